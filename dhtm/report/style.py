"""How methods and backbones look: the same name and colour in every table and figure."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from dhtm.harness.store import write_atomically

# Okabe and Ito's palette, which colour-blind readers can tell apart; orange and blue as in the paper's Figure 4.
METHODS = {"dhtm": ("DHTM", "#E69F00", "o"), "random": ("random merging", "#0072B2", "s")}
BACKBONES = {
    "deit_tiny": "DeiT-Tiny",
    "deit_small": "DeiT-Small",
    "deit_base": "DeiT-Base",
    "deit_micro": "deit_micro (embedded)",
}
DATA = {"imagenet": "ImageNet-1K", "digits": "digits"}

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
    """Write ``path`` with the endings .pdf and .png, without dates, and close the figure; return the PNG's path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for ending, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        write_atomically(
            path.with_suffix(ending), lambda file, metadata=metadata: figure.savefig(file, metadata=metadata)
        )
    plt.close(figure)
    return path.with_suffix(".png")
