"""The results of scripts/choose.py: the settings within a bound as a table, and the trade-off as a figure."""

import pandas as pd
from matplotlib.figure import Figure

from dhtm.harness.choose import BOUNDS, Choice
from dhtm.report.registry import BACKBONES, DATA, GREY, entry_of
from dhtm.report.style import draw_intervals, plt
from dhtm.report.tables import CELLS, FAITHFUL, Table, caption_of, cells, number

_LABELS = {
    "kl": "KL from the unmerged model (nats)",
    "agreement": "agreement with the unmerged model (%)",
    "latency_ms": "ms for one image",
}
_IN_WORDS = {
    "max_kl": "KL at most {:g} nats",
    "min_agreement": "agreement at least {:g}%",
    "max_latency_ms": "at most {:g} ms for one image",
}
_RING = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "color": "black", "linestyle": "none", "zorder": 4}


def choice_table(frame: pd.DataFrame, missed: list[str], choice: Choice) -> Table:
    """Make the table of the chosen settings from what :func:`dhtm.harness.choose.choose` returns."""
    tried, reported = (frame[frame.part == part] for part in ("choose", "report"))
    columns = [
        "method", ("setting", CELLS["knob"]), ("GFLOPs", lambda row: number(row.flops_g, 3)), "reduction %", *FAITHFUL,
        "speed-up [quartiles]", "images/s", "1 image, ms",
    ]  # fmt: skip
    key, limit = choice.bound
    is_chosen = (
        "merges least of those whose median meets the bound"
        if key == "max_latency_ms"
        else "saves the most FLOPs of those that meet the bound with the far end of the 95% interval"
    )
    notes = [
        f"For each method, this is the setting that {is_chosen}. It was chosen on {tried.n_images.max():,} images. The numbers "
        "above are of other images, not used for the choice, and may exceed the bound by chance.",
        "KL and agreement compare the outputs with the unmerged model's, without labels. They say how much merging changes, "
        "not whether for the better. The speed-up is over the unmerged model in the same round, medians.",
        *missed,
    ]
    backbone, data = choice.evaluation.backbone.name, choice.evaluation.data.name
    bound = _IN_WORDS[key].format(limit)
    caption = caption_of(backbone, data, reported.n_images, "not used for the choice", bound)
    return Table(frame, [(caption, cells(reported, *columns))], notes)


def choice_figure(frame: pd.DataFrame, choice: Choice) -> Figure:
    """Draw KL, and the bounded quantity if it is another, over the FLOPs reduction. Chosen settings are ringed."""
    key, limit = choice.bound
    columns = list(dict.fromkeys(["kl", BOUNDS[key]]))
    figure, axes = plt.subplots(1, len(columns), figsize=(4.8 * len(columns), 3.8), squeeze=False)
    tried = frame[frame.part == "choose"].sort_values("flops_reduction_pct")
    for ax, column in zip(axes[0], columns, strict=True):
        # The axis of KL is logarithmic, without those that are only rounding.
        shown, scale = (tried[tried.kl > 5e-7], "log") if column == "kl" else (tried, "linear")
        interval = [] if column == "latency_ms" else [f"{column}_low", f"{column}_high"]
        for method in choice.methods:
            points = shown[shown.method == method]
            draw_intervals(ax, points, "flops_reduction_pct", [column, *interval], entry_of(method))
        if column == BOUNDS[key]:
            ax.axhline(limit, color=GREY, linestyle="--", linewidth=1, label="bound")
        chosen = shown[shown.chosen]
        ax.plot(chosen.flops_reduction_pct, chosen[column], **_RING, label="chosen")
        ax.set(xlabel="FLOPs reduction (%)", ylabel=_LABELS[column], yscale=scale, xlim=(0, None))
    axes[0][-1].legend()
    backbone, data = choice.evaluation.backbone.name, choice.evaluation.data.name
    intervals = f"{tried.n_images.max():,} images used for the choice, 95% intervals"
    title = f"{BACKBONES.get(backbone, backbone)}, {DATA.get(data, data)}, {_IN_WORDS[key].format(limit)}\n{intervals}"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    return figure
