"""The results of scripts/choose.py: the settings within a bound as a table, and the trade-off as a figure."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dhtm.harness.choose import BOUNDS, Choice
from dhtm.harness.models.methods import knob_text
from dhtm.report.registry import BACKBONES, DATA, GREY, entry_of
from dhtm.report.style import draw_intervals, plt
from dhtm.report.tables import Table, caption_of, faithfulness_cells, number, with_interval

_LABELS = {
    "kl": "KL from the unmerged model (nats)",
    "agreement": "agreement with the unmerged model (%)",
    "latency_ms": "ms for one image",
}
_RING = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "color": "black", "linestyle": "none", "zorder": 4}


def choice_table(frame: pd.DataFrame, missed: list[str], choice: Choice) -> Table:
    """Make the table of the chosen settings from what :func:`dhtm.harness.choose.choose` returns."""
    tried, reported = (frame[frame.part == part] for part in ("choose", "report"))
    rows = []
    for row in reported.itertuples():
        cells = {"method": entry_of(row.method).label, "setting": knob_text(row.knob, row.value)}
        cells |= {"GFLOPs": number(row.flops_g, 3), "reduction %": number(row.flops_reduction_pct, 1)}
        cells |= faithfulness_cells(row)
        cells["speed-up [quartiles]"] = with_interval(row.speedup, row.speedup_q1, row.speedup_q3)
        cells |= {"images/s": number(row.images_per_s, 1), "1 image, ms": number(row.latency_ms, 1)}
        rows.append(cells)
    backbone, data = choice.evaluation.backbone.name, choice.evaluation.data.name
    is_latency = choice.max_latency_ms is not None
    notes = [
        (
            "For each method, this is the setting that merges least of those whose median meets the bound. "
            if is_latency
            else "For each method, this is the setting that saves the most FLOPs of those that meet the bound with the far "
            "end of the 95% interval. "
        )
        + f"It was chosen on {tried.n_images.max():,} images. The numbers above are of other images, not used for the choice, "
        "and may exceed the bound by chance.",
        "KL and agreement compare the outputs with the unmerged model's, without labels. They say how much merging changes, "
        "not whether for the better. The speed-up is over the unmerged model in the same round, medians.",
        *missed,
    ]
    caption = caption_of(backbone, data, reported.n_images, "not used for the choice", _describe(choice))
    return Table(frame, [(caption, pd.DataFrame(rows))], notes)


def choice_figure(frame: pd.DataFrame, choice: Choice) -> Figure:
    """Draw KL, and the bounded quantity if it is another, over the FLOPs reduction. Chosen settings are ringed."""
    key, limit = choice.bound
    columns = list(dict.fromkeys(["kl", BOUNDS[key]]))
    figure, axes = plt.subplots(1, len(columns), figsize=(4.8 * len(columns), 3.8), squeeze=False)
    tried = frame[frame.part == "choose"].sort_values("flops_reduction_pct")
    for ax, column in zip(axes[0], columns, strict=True):
        for method in choice.methods:
            _draw(ax, method, tried[tried.method == method], column)
        if column == BOUNDS[key]:
            ax.axhline(limit, color=GREY, linestyle="--", linewidth=1, label="bound")
        ax.plot([], [], **_RING, label="chosen")
        scale = "log" if column == "kl" else "linear"
        ax.set(xlabel="FLOPs reduction (%)", ylabel=_LABELS[column], yscale=scale, xlim=(0, None))
    axes[0][-1].legend()
    backbone, data = choice.evaluation.backbone.name, choice.evaluation.data.name
    intervals = f"{tried.n_images.max():,} images used for the choice, 95% intervals"
    title = f"{BACKBONES.get(backbone, backbone)}, {DATA.get(data, data)}, {_describe(choice)}\n{intervals}"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    return figure


def _draw(ax: Axes, method: str, points: pd.DataFrame, column: str) -> None:
    """Draw one method, without KLs that are only rounding, because their axis is logarithmic."""
    entry = entry_of(method)
    points = points[points.kl > 5e-7] if column == "kl" else points
    interval = [] if column == "latency_ms" else [f"{column}_low", f"{column}_high"]
    style = {"color": entry.colour, "marker": entry.marker}
    draw_intervals(ax, points, "flops_reduction_pct", [column, *interval], entry.label, style)
    chosen = points[points.chosen]
    ax.plot(chosen.flops_reduction_pct, chosen[column], **_RING)


def _describe(choice: Choice) -> str:
    """Describe the bound in words."""
    key, limit = choice.bound
    if key == "max_kl":
        return f"KL at most {limit:g} nats"
    return f"agreement at least {limit:g}%" if key == "min_agreement" else f"at most {limit:g} ms for one image"
