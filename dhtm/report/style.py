"""How methods and backbones look: the same name and colour in every table and figure."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from dhtm.harness.runs.store import write_atomically

# Okabe and Ito's palette, which colour-blind readers can tell apart, and two dark ones of Tol's; orange and blue as in the
# paper's Figure 4. A method's variants, trained or in other layers, share its colour.
METHODS = {
    "dhtm": ("DHTM", "#E69F00", "o"),
    "random": ("random merging", "#0072B2", "s"),
    "tome": ("ToMe", "#009E73", "^"),
    "lotm": ("LoTM", "#56B4E9", "P"),
    "dpc_knn": ("DPC-KNN", "#CC79A7", "X"),
    "k_medoids": ("K-Medoids", "#000000", "h"),
    "sit": ("SiT", "#D55E00", ">"),
    "patch_merger": ("PatchMerger", "#882255", "<"),
    "sinkhorn": ("Sinkhorn", "#332288", "*"),
    "token_mergence": ("Token mergence", "#F0E442", "d"),
}
UNMERGED = "#7F7F7F"
_NEW = ("#117733", "#AA4499", "#999933", "#661100")  # Tol's, for methods that are not named here
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


def colour_of(method: str) -> str:
    """A method's colour, also of one that is new: the same in every figure, by its name."""
    return METHODS[method][1] if method in METHODS else _NEW[sum(method.encode()) % len(_NEW)]


def save_figure(figure: Figure, path: Path) -> Path:
    """Write ``path`` with the endings .pdf and .png, without dates, and close the figure; return the PNG's path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for ending, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        write_atomically(
            path.with_suffix(ending), lambda file, metadata=metadata: figure.savefig(file, metadata=metadata)
        )
    plt.close(figure)
    return path.with_suffix(".png")
