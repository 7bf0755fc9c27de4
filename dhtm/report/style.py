"""The look of all figures, and how they are saved."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
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


def save_figure(figure: Figure, path: Path) -> Path:
    """Write ``path`` with the endings .pdf and .png, without dates, and close the figure; return the path of the PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for ending, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        write_atomically(
            path.with_suffix(ending), lambda file, metadata=metadata: figure.savefig(file, metadata=metadata)
        )
    plt.close(figure)
    return path.with_suffix(".png")
