"""Figures 1 and 4: top-1 over the cost, published points beside ours."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dhtm.report.registry import BACKBONES, DATA, GREY, METHODS, SERIES, Series
from dhtm.report.runs import Pair, at_target, of_series, over_k, pairs, published
from dhtm.report.style import plt

PAPER = ("deit_small", "imagenet")  # the last panel, which has the published points
MIN_TARGETS = 3
COMPARED = [Series(METHODS[method].label, method, "4,7,11", False) for method in ("dhtm", "random")]  # in Figure 4


def figure1(runs: pd.DataFrame) -> Figure:
    """Draw DHTM against other methods, top-1 over the reduction of FLOPs that was reached.

    There is a panel for each backbone and data set with runs solved for three targets, and one with the published points.
    Methods whose own parameters were never trained are not drawn: they would show nothing and compress the others.
    """
    panels = _panels(runs, lambda pair: at_target(runs, *pair), lambda frame: frame.target.nunique() >= MIN_TARGETS)
    figure, axes = _axes(panels, "FLOPs reduction (%)", (4.6, 4))
    handles = {}
    for ax, frame in zip(axes, panels.values(), strict=True):
        for series in [*SERIES.values(), *_unknown_series(frame)]:
            points = of_series(frame, series).drop_duplicates("run_id")
            if series.label and len(points):
                handles[series.label] = _draw(ax, points, "flops_reduction_pct", series.label, series.style)
        for top1 in frame.top1[frame.method == "unmerged"]:
            handles["unmerged"] = ax.axhline(top1, color=GREY, linewidth=0.8, zorder=0)
    handles |= _draw_published_reductions(axes[-1])
    for ax in axes:
        ax.set_xlim(0, None)
    figure.tight_layout()
    _draw_legend(figure, handles)
    return figure


def figure4(runs: pd.DataFrame) -> Figure:
    """Draw DHTM against random merging, top-1 over FLOPs.

    There is a panel for each backbone and data set evaluated with both methods, and one with the published points.
    """

    def select(pair: Pair) -> pd.DataFrame:
        return pd.concat([over_k(runs, *pair, series.method).reset_index() for series in COMPARED])

    panels = _panels(runs, select, lambda frame: frame.method.nunique() == len(COMPARED))
    figure, axes = _axes(panels, "GFLOPs", (3.6, 3.2))
    for ax, frame in zip(axes, panels.values(), strict=True):
        for series in COMPARED:
            points = of_series(frame, series)
            if len(points):
                _draw(ax, points, "flops_g", series.name, series.style)
        for row in frame[frame.method == "dhtm"].itertuples():  # random merging has the same k at nearly the same FLOPs
            above = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 6}
            ax.annotate(f"k={row.k}", (row.flops_g, row.ci_high), **above)
    table = published("table1").query("backbone == 'deit_small'")
    text = published("figure4").query("method == 'random'")
    for series, points in zip(COMPARED, (table, text), strict=True):
        _draw_hollow(axes[-1], points.flops_g, points.top1, series.name, series.style)
    for ax in axes:
        ax.legend()
    figure.tight_layout()
    return figure


def _panels(
    runs: pd.DataFrame, select: Callable[[Pair], pd.DataFrame], is_shown: Callable[[pd.DataFrame], bool]
) -> dict[Pair, pd.DataFrame]:
    """Return the selected runs of each panel; the paper's panel, the last one, is always shown."""
    frames = {pair: select(pair) for pair in pairs(runs) if pair != PAPER}
    return {pair: frame for pair, frame in frames.items() if is_shown(frame)} | {PAPER: select(PAPER)}


def _axes(panels: dict[Pair, pd.DataFrame], xlabel: str, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """Make a row of panels, each with its title."""
    width, height = size
    figure, axes = plt.subplots(1, len(panels), figsize=(width * len(panels), height), squeeze=False)
    for ax, ((backbone, data), frame) in zip(axes[0], panels.items(), strict=True):
        first, second = (
            (": published only", "") if frame.empty else ("", f"{frame.n_images.max():,} images, 95% intervals")
        )
        ax.set(title=f"{BACKBONES.get(backbone, backbone)}, {DATA.get(data, data)}{first}\n{second}", xlabel=xlabel)
    axes[0, 0].set_ylabel("top-1 accuracy (%)")
    return figure, axes[0]


def _draw(ax: Axes, points: pd.DataFrame, x: str, label: str, style: dict[str, Any]) -> Line2D:
    """Draw top-1 with its intervals over a column; return the line for a legend."""
    points = points.sort_values(x)
    errors = [points.top1 - points.ci_low, points.ci_high - points.top1]
    style = style | {"linewidth": 1.2, "markersize": 6}
    outline = {"markeredgecolor": "white", "markeredgewidth": 0.5}  # overlapping markers can be told apart
    bars = {"ecolor": (style["color"], 0.6), "elinewidth": 0.8, "capsize": 2}
    ax.errorbar(points[x], points.top1, errors, label=label, **bars, **style, **outline)
    return Line2D([], [], **style)


def _draw_hollow(ax: Axes, x: pd.Series, top1: pd.Series, label: str, style: dict[str, Any]) -> None:
    hollow = style | {"linestyle": ":", "markerfacecolor": "none", "clip_on": False}
    ax.plot(x, top1, label=f"{label}, published", **hollow)


def _draw_published_reductions(ax: Axes) -> dict[str, Line2D]:
    """Draw DHTM's points of Table 1 and the others' of Table 2; return the lines for the legend."""
    table1 = published("table1").query("backbone == 'deit_small'").set_index("k")
    table2 = published("table2").query("backbone == 'deit_small'").set_index("method")
    handles = {}
    for name, series in SERIES.items():
        points = table1 if name == "DHTM" else table2[table2.index == name]
        if series.label and len(points):
            _draw_hollow(ax, 100 * (1 - points.flops_g / table1.flops_g[0]), points.top1, series.label, series.style)
            handles[series.label] = Line2D([], [], linewidth=1.2, markersize=6, **series.style)
    ax.axhline(table1.top1[0], color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    handles["published"] = Line2D([], [], color=GREY, marker="o", markerfacecolor="none", linestyle=":")
    return handles


def _unknown_series(frame: pd.DataFrame) -> list[Series]:
    """Return the series of methods that the registry does not have."""
    unknown = frame[~frame.method.isin(METHODS) & ~frame.untrained.astype(bool)]
    keys = unknown[["method", "layers", "trained"]].drop_duplicates().itertuples(index=False, name=None)
    return [Series(key[0], *key, label=f"{key[0]} (trained)" if key[2] else key[0]) for key in keys]


def _draw_legend(figure: Figure, handles: dict[str, Line2D]) -> None:
    """Draw one legend below all panels, in the order of SERIES; off-the-shelf strategies are bold, as in the paper."""
    bold = {series.label: not series.trained for series in SERIES.values() if series.label}
    labels = sorted(handles, key=[*bold, *(label for label in handles if label not in bold)].index)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.02), "ncols": min(4 * len(figure.axes), 5)}
    legend = figure.legend([handles[label] for label in labels], labels, **place)
    for text in legend.get_texts():
        text.set_fontweight("bold" if bold.get(text.get_text()) else "normal")
