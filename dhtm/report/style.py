"""The look of all figures, and how they are saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dhtm.harness.core.files import write_atomically

plt.rcParams.update(
    {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 9,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "pdf.fonttype": 42,
        "savefig.bbox": "tight",
        "savefig.dpi": 200,
    }
)


SIZES = {"linewidth": 1.2, "markersize": 6}


def draw_intervals(
    ax: Axes, points: pd.DataFrame, x: str, columns: Sequence[str], label: str, style: dict[str, Any]
) -> None:
    """Draw a line of points over a column.

    Args:
        columns: the value and, if it has an interval, the interval's ends.
        style: Matplotlib's properties of the line, its color among them.
    """
    points = points.sort_values(x)
    value, *ends = (points[column] for column in columns)
    errors = [value - ends[0], ends[1] - value] if ends else None
    outline = {"markeredgecolor": "white", "markeredgewidth": 0.5}  # to distinguish overlapping markers
    bars = {"ecolor": (style["color"], 0.6), "elinewidth": 0.8, "capsize": 2}
    ax.errorbar(points[x], value, errors, label=label, **bars, **SIZES, **style, **outline)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write ``path`` with the endings .pdf and .png, without dates, and close the figure; return the path of the PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for ending, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        write_atomically(
            path.with_suffix(ending), lambda file, metadata=metadata: figure.savefig(file, metadata=metadata)
        )
    plt.close(figure)
    return path.with_suffix(".png")
