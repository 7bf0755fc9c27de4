"""Figure 1: DHTM against other methods, top-1 over the reduction of FLOPs."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dhtm.report.runs import at_target, published
from dhtm.report.style import BACKBONES, DATA, METHODS, UNMERGED, colour_of, plt

# As Table 2 names them: method, layers, trained with it?, label, line, marker. Trained ones are dashed; drawn from the
# first to the last, so that DHTM lies on top.
SERIES = {
    "SiT": ("sit", "4,7,10", True, "SiT", "--", METHODS["sit"][2]),
    "K-Medoids": ("k_medoids", "4,7,10", True, "K-Medoids", "--", METHODS["k_medoids"][2]),
    "DPC-KNN": ("dpc_knn", "4,7,10", True, "DPC-KNN", "--", METHODS["dpc_knn"][2]),
    "LoTM": ("lotm", "4,7,11", False, "LoTM", "-", METHODS["lotm"][2]),
    "ToMe w/train": ("tome", "all", True, r"ToMe$_{\mathrm{w/train}}$", "--", "v"),
    "ToMe OTS": ("tome", "all", False, r"ToMe$_{\mathbf{OTS}}$", "-", METHODS["tome"][2]),
    "DHTM all": ("dhtm", "all", False, r"DHTM$^{\mathbf{all}}$", "-.", "D"),
    "DHTM": ("dhtm", "4,7,11", False, r"DHTM$^{\mathbf{4,7,11}}$", "-", METHODS["dhtm"][2]),
}
MIN_TARGETS = 3


def figure1(runs: pd.DataFrame) -> Figure:
    """One panel for each backbone and data set with runs solved for three targets, and one with the paper's printed points.

    DeiT-Small on ImageNet, the paper's own, shares the panel of the printed points. The reduction is what was reached.
    Methods whose own parameters were never trained are left out: they would say nothing, and squeeze the others together.
    """
    paper = ("deit_small", "imagenet")
    pairs = runs[["backbone", "data"]].drop_duplicates().itertuples(index=False, name=None)
    compared = {pair: at_target(runs, *pair) for pair in pairs if pair != paper}
    panels = {pair: frame for pair, frame in compared.items() if frame.target.nunique() >= MIN_TARGETS}
    panels[paper] = at_target(runs, *paper)
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4), squeeze=False)
    handles = {}
    for ax, ((backbone, data), frame) in zip(axes[0], panels.items(), strict=True):
        handles |= _draw_ours(ax, frame)
        what = f"{BACKBONES.get(backbone, backbone)}, {DATA.get(data, data)}"
        if (backbone, data) == paper:
            handles |= _draw_published(ax)
            what += ": published only" if frame.empty else ""
        how_many = "" if frame.empty else f"{frame.n_images.iloc[0]:,} images, 95% intervals"
        ax.set(title=f"{what}\n{how_many}", xlabel="FLOPs reduction (%)", xlim=(0, None))
    axes[0, 0].set_ylabel("top-1 accuracy (%)")
    figure.tight_layout()
    _legend(figure, handles)
    return figure


def _draw_ours(ax: Axes, frame: pd.DataFrame) -> dict[str, Line2D]:
    """Draw runs chosen by at_target; return what the legend shows of them, by label."""
    handles = {}
    for method, layers, trained, label, line, marker in [*SERIES.values(), *_others(frame)]:
        of_method = (frame.method == method) & (frame.layers == layers) & (frame.trained == trained)
        points = frame[of_method].drop_duplicates("run_id").sort_values("flops_reduction_pct")
        if points.empty:
            continue
        colour = colour_of(method)
        style = {"color": colour, "marker": marker, "linestyle": line, "linewidth": 1.2, "markersize": 6}
        handles[label] = Line2D([], [], **style)
        reduction, top1 = points.flops_reduction_pct.to_numpy(), points.top1.to_numpy()
        errors = [top1 - points.ci_low.to_numpy(), points.ci_high.to_numpy() - top1]
        outline = {"markeredgecolor": "white", "markeredgewidth": 0.5}  # overlapping markers stay apart
        bars = {"ecolor": (colour, 0.6), "elinewidth": 0.8, "capsize": 2}
        ax.errorbar(reduction, top1, errors, label=label, **bars, **style, **outline)
    for top1 in frame.top1[frame.method == "unmerged"]:
        handles["unmerged"] = ax.axhline(top1, color=UNMERGED, linewidth=0.8, zorder=0)
    return handles


def _others(frame: pd.DataFrame) -> list[tuple]:
    """Series of methods that this project does not know, as SERIES describes them."""
    unknown = frame[~frame.method.isin([*METHODS, "unmerged"]) & ~frame.untrained.astype(bool)]
    series = unknown[["method", "layers", "trained"]].drop_duplicates().itertuples(index=False, name=None)
    return [(*one, one[0] + (" (trained)" if one[2] else ""), "--" if one[2] else "-", ".") for one in series]


def _draw_published(ax: Axes) -> dict[str, Line2D]:
    """Draw DHTM's points of Table 1 and the others' of Table 2, hollow; return what the legend shows of them, by label."""
    table1 = published("table1").query("backbone == 'deit_small'").set_index("k")
    table2 = published("table2").query("backbone == 'deit_small'").set_index("method")
    handles = {}
    for name, (method, _, _, label, line, marker) in SERIES.items():
        points = table1 if name == "DHTM" else table2[table2.index == name]
        if points.empty:
            continue
        style = {"color": METHODS[method][1], "marker": marker}
        reduction = 100 * (1 - points.flops_g / table1.flops_g[0])
        hollow = {"linestyle": ":", "markerfacecolor": "none", "clip_on": False}
        ax.plot(reduction, points.top1, label=f"{label}, published", **style, **hollow)
        handles[label] = Line2D([], [], linestyle=line, linewidth=1.2, markersize=6, **style)
    ax.axhline(table1.top1[0], color=UNMERGED, linewidth=0.8, linestyle=":", zorder=0)
    handles["published"] = Line2D([], [], color=UNMERGED, marker="o", markerfacecolor="none", linestyle=":")
    return handles


def _legend(figure: Figure, handles: dict[str, Line2D]) -> None:
    """One legend below all panels, in the order of SERIES; strategies off the shelf are bold, as in the paper."""
    bold = {label: not trained for _, _, trained, label, _, _ in SERIES.values()}
    labels = sorted(handles, key=[*bold, *(label for label in handles if label not in bold)].index)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.02), "ncols": min(4 * len(figure.axes), 5)}
    legend = figure.legend([handles[label] for label in labels], labels, **place)
    for text in legend.get_texts():
        text.set_fontweight("bold" if bold.get(text.get_text()) else "normal")
