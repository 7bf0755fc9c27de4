"""Figure 4: DHTM against random merging, top-1 over FLOPs."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dhtm.report.runs import over_k, published
from dhtm.report.style import BACKBONES, DATA, METHODS, plt

COMPARED = ("dhtm", "random")


def figure4(runs: pd.DataFrame) -> Figure:
    """One panel for each backbone and data set evaluated with both methods, and one with the paper's printed points.

    DeiT-Small on ImageNet, the paper's own, shares the panel of the printed points.
    """
    compared = runs[runs.method.isin(COMPARED)].groupby(["backbone", "data"]).method.nunique()
    panels = [
        pair for pair, methods in compared.items() if methods == len(COMPARED) and pair != ("deit_small", "imagenet")
    ]
    panels.append(("deit_small", "imagenet"))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.2), squeeze=False)
    for ax, (backbone, data) in zip(axes[0], panels, strict=True):
        n_images = _draw_ours(ax, runs, backbone, data)
        what = f"{BACKBONES.get(backbone, backbone)}, {DATA.get(data, data)}"
        if (backbone, data) == ("deit_small", "imagenet"):
            _draw_published(ax)
            what = f"{what}{'' if n_images else ': published only'}"
        ax.set(title=what + (f"\n{n_images:,} images, 95% intervals" if n_images else "\n"), xlabel="GFLOPs")
        ax.legend()
    axes[0, 0].set_ylabel("top-1 accuracy (%)")
    figure.tight_layout()
    return figure


def _draw_ours(ax: Axes, runs: pd.DataFrame, backbone: str, data: str) -> int:
    n_images = 0
    for method in COMPARED:
        name, colour, marker = METHODS[method]
        frame = over_k(runs, backbone, data, method)
        if frame.empty:
            continue
        flops, top1 = frame.flops_g.to_numpy(), frame.top1.to_numpy()
        errors = [top1 - frame.ci_low.to_numpy(), frame.ci_high.to_numpy() - top1]
        ax.errorbar(flops, top1, errors, color=colour, marker=marker, markersize=4, capsize=2, label=name)
        n_images = int(frame.n_images.max())
        if method != "dhtm":  # the other's k are the same, and nearly the same FLOPs
            continue
        for k, row in frame.iterrows():
            above = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 6}
            ax.annotate(f"k={k}", (row.flops_g, row.ci_high), **above)
    return n_images


def _draw_published(ax: Axes) -> None:
    table = published("table1").query("backbone == 'deit_small'")
    text = published("figure4").query("method == 'random'")
    points = {"dhtm": (table.flops_g, table.top1), "random": (text.flops_g, text.top1)}
    for method, (flops, top1) in points.items():
        name, colour, marker = METHODS[method]
        ax.plot(flops, top1, marker, color=colour, markerfacecolor="none", linestyle=":", label=f"{name}, published")
