"""What scripts/choose.py found: the settings within a bound as a table, and the trade-off as a figure."""

import pandas as pd
from matplotlib.figure import Figure

from dhtm.harness.choose import Choice
from dhtm.report.registry import GREY, entry_of
from dhtm.report.style import plt
from dhtm.report.tables import Table, faithfulness_cells, number, with_interval


def choice_table(frame: pd.DataFrame, choice: Choice) -> Table:
    """Make the table of the chosen settings from the frame of :func:`dhtm.harness.choose.choose`."""
    reported = frame[frame.split == choice.report_on]
    rows = []
    for row in reported.itertuples():
        cells = {"method": entry_of(row.method).label, "setting": f"{row.knob}={row.value:g}"}
        cells |= {"GFLOPs": number(row.flops_g, 3), "reduction %": number(row.flops_reduction_pct, 1)}
        cells |= faithfulness_cells(row)
        cells["speed-up [quartiles]"] = with_interval(row.speedup, row.speedup_q1, row.speedup_q3)
        cells |= {"images/s": number(row.images_per_s, 1), "ms for one image": number(row.latency_ms, 1)}
        rows.append(cells)
    backbone, data = choice.evaluation.backbone.name, choice.evaluation.data.name
    n_chose = frame.n_images[frame.split == choice.choose_on].max()
    caption = f"{backbone} on {data}, {bound(choice)}, {reported.n_images.max():,} images that did not choose"
    notes = [
        "Each setting saves the most FLOPs of those that meet the bound, with the far end of the 95% interval, on "
        f"{n_chose:,} other images (split {choice.choose_on}); for a bound on latency it is the one that merges least. The "
        f"figures above are of split {choice.report_on}, which had no part in the choice and may exceed the bound by chance.",
        "KL and agreement compare the outputs with the unmerged model's, without labels. They say how much merging changes, "
        "not whether for the better. The speed-up is over the unmerged model in the same round.",
    ]
    return Table(frame, [(caption, pd.DataFrame(rows))], notes)


def choice_figure(frame: pd.DataFrame, choice: Choice) -> Figure:
    """Draw KL, or agreement or latency where that is bounded, over the reduction of FLOPs; the chosen settings are ringed."""
    names = {"max_kl": "kl", "min_agreement": "agreement", "max_latency_ms": "latency_ms"}
    labels = {"kl": "KL from the unmerged model (nats)", "agreement": "agreement (%)", "latency_ms": "ms for one image"}
    (key,) = [key for key in names if getattr(choice, key) is not None]
    y = names[key]
    figure, ax = plt.subplots(figsize=(5.2, 3.8))
    tried = frame[frame.split == choice.choose_on].sort_values("flops_reduction_pct")
    for method, points in tried.groupby("method", sort=False):
        entry = entry_of(method)
        style = {"color": entry.colour, "marker": entry.marker, "capsize": 2}
        errors = None
        if y != "latency_ms":
            errors = [points[y] - points[f"{y}_low"], points[f"{y}_high"] - points[y]]
        ax.errorbar(points.flops_reduction_pct, points[y], errors, label=entry.label, **style)
        ring = {"markersize": 13, "markerfacecolor": "none", "color": entry.colour, "linestyle": "none", "marker": "o"}
        ax.plot(points.flops_reduction_pct[points.chosen], points[y][points.chosen], **ring)
    ax.axhline(getattr(choice, key), color=GREY, linestyle="--", linewidth=1, label="bound")
    ax.set(xlabel="FLOPs reduction (%)", ylabel=labels[y], yscale="log" if y == "kl" else "linear", xlim=(0, None))
    ax.set_title(f"{choice.evaluation.backbone.name} on {choice.evaluation.data.name}, {tried.n_images.max():,} images")
    ax.legend()
    return figure


def bound(choice: Choice) -> str:
    """Describe the bound in words."""
    if choice.max_kl is not None:
        return f"KL at most {choice.max_kl:g} nats"
    if choice.min_agreement is not None:
        return f"agreement at least {choice.min_agreement:g}%"
    return f"at most {choice.max_latency_ms:g} ms for one image"
