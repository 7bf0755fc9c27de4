"""The methods, backbones and data sets that the report knows: names, colours, the paper's series and its options."""

import dataclasses
import json
from typing import Any

from dhtm.harness.models.methods import Method

GREY = "#7F7F7F"


@dataclasses.dataclass(frozen=True)
class MethodEntry:
    """How a method looks in every table and figure, and the class whose defaults are the paper's options."""

    label: str
    colour: str
    marker: str
    target: str | None = None

    @property
    def style(self) -> dict[str, str]:
        """Its line's Matplotlib properties."""
        return {"color": self.colour, "marker": self.marker}


# Okabe and Ito's palette, which colour-blind readers can tell apart, and two dark colours of Tol's. Orange and blue are as
# in the paper's Figure 4. A method keeps its colour when it is trained or merges in other layers.
METHODS = {
    "unmerged": MethodEntry("unmerged", GREY, "."),
    "dhtm": MethodEntry("DHTM", "#E69F00", "o", "dhtm.DHTM"),
    "dhtm_plus": MethodEntry("DHTM+", "#E31A1C", "8", "dhtm.DHTMPlus"),
    "dhtm_threshold": MethodEntry("DHTM+ threshold", "#6A3D9A", "H", "dhtm.DHTMPlus"),
    "random": MethodEntry("random merging", "#0072B2", "s", "baselines.RandomMerge"),
    "tome": MethodEntry("ToMe", "#009E73", "^", "baselines.ToMe"),
    "lotm": MethodEntry("LoTM", "#56B4E9", "P", "baselines.LoTM"),
    "dpc_knn": MethodEntry("DPC-KNN", "#CC79A7", "X", "baselines.DPCKNN"),
    "k_medoids": MethodEntry("K-Medoids", "#000000", "h", "baselines.KMedoids"),
    "sit": MethodEntry("SiT", "#D55E00", ">", "baselines.SiT"),
    "patch_merger": MethodEntry("PatchMerger", "#882255", "<", "baselines.PatchMerger"),
    "sinkhorn": MethodEntry("Sinkhorn", "#332288", "*", "baselines.Sinkhorn"),
    "token_mergence": MethodEntry("Token mergence", "#F0E442", "d", "baselines.TokenMergence"),
    "atc": MethodEntry("ATC", "#117733", "p", "baselines.ATC"),
    "pitome": MethodEntry("PiToMe", "#AA4499", "v", "baselines.PiToMe"),
}
_NEW = ("#999933", "#661100", "#44AA99", "#DDCC77")  # Tol's colours, for methods that are not named here
# Names for readers; others are shown by their names in the harness.
BACKBONES = {
    "deit_tiny": "DeiT-Tiny",
    "deit_small": "DeiT-Small",
    "deit_base": "DeiT-Base",
    "deit_micro": "deit_micro (embedded)",
}
DATA = {"imagenet": "ImageNet-1K", "imagenette": "Imagenette"}


@dataclasses.dataclass(frozen=True)
class Series:
    """A method in some layers, trained with it or off the shelf: a row of Table 2 and, with a label, a line of Figure 1.

    Attributes:
        name: the name in Table 2.
        method, layers, trained: which runs belong to it.
        label: the name in the legend of Figure 1.
        marker, line: in Figure 1; by default the method's marker, and a dashed line where the method was trained.
    """

    name: str
    method: str
    layers: str
    trained: bool
    label: str | None = None
    marker: str | None = None
    line: str | None = None

    @property
    def style(self) -> dict[str, Any]:
        """The line's Matplotlib properties."""
        entry = entry_of(self.method)
        line = self.line or ("--" if self.trained else "-")
        return {"color": entry.colour, "marker": self.marker or entry.marker, "linestyle": line}


# In the order in which Figure 1 draws them, so that DHTM lies on top.
SERIES = {
    series.name: series
    for series in (
        Series("unmerged", "unmerged", "all", False),
        Series("Sinkhorn", "sinkhorn", "4,7,10", True),
        Series("PatchMerger", "patch_merger", "4,7,10", True),
        Series("SiT", "sit", "4,7,10", True, "SiT"),
        Series("K-Medoids", "k_medoids", "4,7,10", True, "K-Medoids"),
        Series("DPC-KNN", "dpc_knn", "4,7,10", True, "DPC-KNN"),
        Series("Token mergence", "token_mergence", "4,7,10", True),
        Series("PiToMe w/train", "pitome", "all", True),
        Series("ATC w/train", "atc", "4,7,10", True),
        Series("DPC-KNN OTS", "dpc_knn", "4,7,10", False, r"DPC-KNN$_{\mathbf{OTS}}$"),
        Series("K-Medoids OTS", "k_medoids", "4,7,10", False, r"K-Medoids$_{\mathbf{OTS}}$"),
        Series("PiToMe", "pitome", "all", False, "PiToMe"),
        Series("ATC", "atc", "4,7,10", False, "ATC"),
        Series("LoTM", "lotm", "4,7,11", False, "LoTM"),
        Series("ToMe w/train", "tome", "all", True, r"ToMe$_{\mathrm{w/train}}$", marker="v"),
        Series("ToMe OTS", "tome", "all", False, r"ToMe$_{\mathbf{OTS}}$"),
        Series("DHTM all", "dhtm", "all", False, r"DHTM$^{\mathbf{all}}$", marker="D", line="-."),
        Series("DHTM", "dhtm", "4,7,11", False, r"DHTM$^{\mathbf{4,7,11}}$"),
        Series("DHTM+", "dhtm_plus", "all", False, "DHTM+"),
        Series("DHTM+ threshold", "dhtm_threshold", "all", False, r"DHTM+$_{\mathrm{threshold}}$"),
    )
}


_LAYERS = {series.method: series.layers for series in SERIES.values()}  # of DHTM the paper's, its last series


def label_of(run: Any) -> str:
    """Name a run's method, and its layers unless they are those of the method's row in Table 2."""
    label = entry_of(run.method).label
    return label if run.layers == _LAYERS.get(run.method) else f"{label}, layers {run.layers}"


def title_of(backbone: str, data: str) -> str:
    """Name a backbone on a data set for readers."""
    return f"{BACKBONES.get(backbone, backbone)} on {DATA.get(data, data)}"


def entry_of(method: str) -> MethodEntry:
    """Return a method's entry; an unknown method gets its own name, and a colour that depends on the name alone."""
    return METHODS.get(method) or MethodEntry(method, _NEW[sum(method.encode()) % len(_NEW)], ".")


def changed_options(method: str, options: dict[str, Any], knob: str | None, learned: bool) -> dict[str, Any]:
    """Return a run's options that differ from the paper's, which are the class's defaults; none for an unknown method.

    The knob and the layers may have any value. ``learned`` is whether the method's own parameters were, or should have
    been, trained.
    """
    target = entry_of(method).target
    if target is None:
        return {}
    papers = json.loads(json.dumps(Method(method, target).options))  # with lists, as in the run's metrics
    if method == "dpc_knn":
        papers["weighted"] = learned  # the published models average with learned weights
    ignored = {knob, "layers", "seed", "backend"}  # every backend gives the same merges
    return {
        name: options[name]
        for name in papers
        if name not in ignored and options.get(name, papers[name]) != papers[name]
    }
