"""The look of all figures, and how they are saved."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dhtm.harness.core.files import write_atomically
from dhtm.report.registry import MethodEntry, Series

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


def draw_intervals(ax: Axes, points: pd.DataFrame, x: str, columns: Sequence[str], drawn: MethodEntry | Series) -> None:
    """Draw a line of points over a column: of values and, if the columns have them, the ends of their intervals."""
    points = points.sort_values(x)
    value, *ends = (points[column] for column in columns)
    errors = np.stack([value - ends[0], ends[1] - value]) if ends else None
    outline = {"markeredgecolor": "white", "markeredgewidth": 0.5}  # to distinguish overlapping markers
    bars = {"ecolor": (drawn.style["color"], 0.6), "elinewidth": 0.8, "capsize": 2}
    ax.errorbar(points[x], value, errors, label=drawn.label, **bars, **SIZES, **drawn.style, **outline)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write ``path`` with the endings .pdf and .png, without dates, and close the figure; return the path of the PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for ending, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        write_atomically(path.with_suffix(ending), partial(figure.savefig, metadata=metadata))
    plt.close(figure)
    return path.with_suffix(".png")
