"""Figures 1 and 4: top-1 and KL over the cost, published points beside ours."""

import textwrap

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dhtm.report.registry import BACKBONES, DATA, GREY, METHODS, SERIES, Series, label_of, title_of
from dhtm.report.runs import Pair, at_target, of_series, over_k, pairs, read_published
from dhtm.report.style import SIZES, draw_intervals, plt

PAPER = ("deit_small", "imagenet")  # the last panel, which has the published points
MIN_TARGETS = 3
ZOOM = 2  # points of top-1 below the unmerged model that the close-up shows
COMPARED = [  # in Figure 4
    Series(METHODS[method].label, method, "4,7,11", False, METHODS[method].label) for method in ("dhtm", "random")
]


def figure1(runs: pd.DataFrame) -> Figure:
    """Draw DHTM against other methods over the FLOPs reduction that was reached: top-1, and KL from the unmerged model.

    There is a column for each backbone and data set with runs solved for three targets, and one with the published points.
    Below the published points is a close-up of the first column's top-1, unless our KL is drawn there. Methods whose own
    parameters were never trained are skipped: they would show nothing and compress the others.
    """
    runs = runs[~runs.untrained.astype(bool)]
    panels = _panels({pair: at_target(runs, *pair) for pair in [*pairs(runs), PAPER]}, "target", MIN_TARGETS)
    figure, axes, below = _axes(panels, "FLOPs reduction (%)", (4.6, 3.6))
    handles, zoom = {}, _zoom(axes, panels) if below[0] and not below[-1] else None
    for ax, ax_kl, frame in zip(axes, below, panels.values(), strict=True):
        for series in [*SERIES.values(), *_unknown_series(frame)]:
            points = of_series(frame, series).drop_duplicates("run_id")
            if series.label and len(points):
                handles[series.label] = Line2D([], [], **SIZES, **series.style)
                _draw(ax, ax_kl, points, "flops_reduction_pct", series)
                if zoom and ax is axes[0]:
                    draw_intervals(zoom, points, "flops_reduction_pct", ["top1"], series)
        for top1 in frame.top1[frame.method == "unmerged"]:
            handles["unmerged"] = ax.axhline(top1, color=GREY, linewidth=0.8, zorder=0)
    handles |= _draw_published_reductions(axes[-1])
    for ax in axes:
        ax.set_xlim(0, None)
    figure.tight_layout()
    n_rows = _draw_legend(figure, handles)
    _write_below(figure, [_extremes(pair, frame) for pair, frame in panels.items()], 0.02 - 0.035 * n_rows)
    return figure


def figure4(runs: pd.DataFrame) -> Figure:
    """Draw DHTM against random merging over FLOPs: top-1, and KL from the unmerged model.

    There is a column for each backbone and data set evaluated with both methods, and one with the published points.
    """
    frames = {
        pair: pd.concat([over_k(runs, *pair, series.method).reset_index() for series in COMPARED])
        for pair in [*pairs(runs), PAPER]
    }
    panels = _panels(frames, "method", len(COMPARED))
    figure, axes, below = _axes(panels, "GFLOPs", (3.6, 3))
    for ax, ax_kl, frame in zip(axes, below, panels.values(), strict=True):
        for series in COMPARED:
            points = of_series(frame, series)
            if len(points):
                _draw(ax, ax_kl, points, "flops_g", series)
        for row in frame[frame.method == "dhtm"].itertuples():  # random merging has the same k at nearly the same FLOPs
            above = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 6}
            ax.annotate(f"k={row.k}", (row.flops_g, row.ci_high), **above)
    table = read_published("table1").query("backbone == 'deit_small'")
    text = read_published("figure4").query("method == 'random'")
    for series, points in zip(COMPARED, (table, text), strict=True):
        _draw_hollow(axes[-1], points.flops_g, points.top1, series)
    for ax in axes:
        ax.legend()
    figure.tight_layout()
    _write_below(figure, [_ratio(pair, frame) for pair, frame in panels.items()], 0.0)
    return figure


def _panels(frames: dict[Pair, pd.DataFrame], column: str, at_least: int) -> dict[Pair, pd.DataFrame]:
    """Return the frames with enough different values in a column; the paper's is the last one, and always shown."""
    shown = {pair: frame for pair, frame in frames.items() if frame[column].nunique() >= at_least and pair != PAPER}
    return shown | {PAPER: frames[PAPER]}


def _axes(
    panels: dict[Pair, pd.DataFrame], xlabel: str, size: tuple[float, float]
) -> tuple[Figure, list[Axes], list[Axes | None]]:
    """Make a column for each panel: top-1 with a title and KL below it; None if no run has a KL."""
    width, height = size
    has_kl = [frame.kl.notna().any() for frame in panels.values()]
    n_rows = 2 if any(has_kl) else 1
    figure = plt.figure(figsize=(width * len(panels), n_rows * height))
    grid = figure.add_gridspec(n_rows, len(panels))
    axes, below = [], []
    for column, ((backbone, data), frame) in enumerate(panels.items()):
        images = ": published only\n" if frame.empty else f"\n{frame.n_images.max():,} images, 95% intervals"
        ax = figure.add_subplot(grid[0, column])
        ax.set(title=f"{BACKBONES.get(backbone, backbone)}, {DATA.get(data, data)}{images}", xlabel=xlabel)
        axes.append(ax)
        below.append(figure.add_subplot(grid[1, column], sharex=ax) if has_kl[column] else None)
        if has_kl[column]:
            below[-1].set(xlabel=xlabel, ylabel="KL from the unmerged model (nats)", yscale="log")
    axes[0].set_ylabel("top-1 accuracy (%)")
    return figure, axes, below


def _zoom(axes: list[Axes], panels: dict[Pair, pd.DataFrame]) -> Axes | None:
    """Add a close-up below the last panel: the top-1 of the first panel near the unmerged model's; None if that is unknown."""
    pair, frame = next(iter(panels.items()))
    top1 = frame.top1[frame.method == "unmerged"].max()
    if pd.isna(top1):
        return None
    ax = axes[-1].figure.add_subplot(axes[-1].get_subplotspec().get_gridspec()[1, -1], sharex=axes[0])
    ax.set(ylim=(top1 - ZOOM, top1 + ZOOM / 2), title=f"{title_of(*pair)}: top-1, close-up")
    ax.set(xlabel="FLOPs reduction (%)", ylabel="top-1 accuracy (%)")
    ax.axhline(top1, color=GREY, linewidth=0.8, zorder=0)
    return ax


def _draw(ax: Axes, ax_kl: Axes | None, points: pd.DataFrame, x: str, series: Series) -> None:
    """Draw top-1 over a column, and KL except where nothing is merged and it is zero, with their intervals."""
    draw_intervals(ax, points, x, ("top1", "ci_low", "ci_high"), series)
    if ax_kl:
        merged = points[(points.flops_reduction_pct > 0) & (points.kl > 0)]
        draw_intervals(ax_kl, merged, x, ("kl", "kl_low", "kl_high"), series)


def _draw_hollow(ax: Axes, x: pd.Series, top1: pd.Series, series: Series) -> None:
    hollow = series.style | {"linestyle": ":", "markerfacecolor": "none", "clip_on": False}
    ax.plot(x, top1, label=f"{series.label}, published", **hollow)


def _draw_published_reductions(ax: Axes) -> dict[str, Line2D]:
    """Draw DHTM's points of Table 1 and the others' of Table 2; return the lines for the legend."""
    table1 = read_published("table1").query("backbone == 'deit_small'").set_index("k")
    table2 = read_published("table2").query("backbone == 'deit_small'").set_index("method")
    handles = {}
    for name, series in SERIES.items():
        points = table1 if name == "DHTM" else table2[table2.index == name]
        if series.label and len(points):
            _draw_hollow(ax, 100 * (1 - points.flops_g / table1.flops_g[0]), points.top1, series)
            handles[series.label] = Line2D([], [], **SIZES, **series.style)
    ax.axhline(table1.top1[0], color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    handles["published"] = Line2D([], [], color=GREY, marker="o", markerfacecolor="none", linestyle=":")
    return handles


def _unknown_series(frame: pd.DataFrame) -> list[Series]:
    """Return the series of methods that the registry does not have."""
    unknown = frame[~frame.method.isin(METHODS)]
    keys = unknown[["method", "layers", "trained"]].drop_duplicates().itertuples(index=False, name=None)
    return [Series(key[0], *key, label=f"{key[0]} (trained)" if key[2] else key[0]) for key in keys]


def _draw_legend(figure: Figure, handles: dict[str, Line2D]) -> int:
    """Draw one legend below all panels, in the order of SERIES; off-the-shelf strategies are bold, as in the paper.

    Returns:
        The number of its rows.
    """
    bold = {series.label: not series.trained for series in SERIES.values() if series.label}
    labels = sorted(handles, key=[*bold, *(label for label in handles if label not in bold)].index)
    n_columns = 5
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.02), "ncols": n_columns}
    legend = figure.legend([handles[label] for label in labels], labels, **place)
    for text in legend.get_texts():
        text.set_fontweight("bold" if bold.get(text.get_text()) else "normal")
    return -(-len(labels) // n_columns)


def _write_below(figure: Figure, sentences: list[str], y: float) -> None:
    """Write sentences below the panels."""
    width = int(16 * figure.get_figwidth())
    text = "\n".join("\n".join(textwrap.wrap(sentence, width)) for sentence in sentences if sentence)
    figure.text(0.5, y, text, ha="center", va="top", fontsize=8)


def _extremes(pair: Pair, frame: pd.DataFrame) -> str:
    """Describe which methods change the outputs least and most at 30% fewer FLOPs."""
    at = frame[(frame.target == 30) & frame.kl.notna()].sort_values("kl")
    if len(at) < 2:
        return ""
    least, most = at.iloc[0], at.iloc[-1]
    first, last = (
        f"(KL {row.kl:.2g} nats{'' if pd.isna(row.top1) else f', top-1 {row.top1:.1f}%'})" for row in (least, most)
    )
    return (
        f"{title_of(*pair)}, 30% fewer FLOPs, off the shelf: {label_of(least)} changes the outputs least {first}, "
        f"{label_of(most)} most {last}."
    )


def _ratio(pair: Pair, frame: pd.DataFrame) -> str:
    """Describe how much more than DHTM random merging changes the outputs."""
    kl = frame.pivot(index="k", columns="method", values="kl").reindex(columns=["random", "dhtm"]).dropna()
    kl = kl[kl.index > 0]
    if kl.empty:
        return ""
    ratio = kl["random"] / kl["dhtm"]
    low, high = (f"{value:.1f}" if value < 10 else f"{value:,.0f}" for value in (ratio.min(), ratio.max()))
    return f"{title_of(*pair)}: random merging has {low} to {high} times the KL of DHTM at the same k."
