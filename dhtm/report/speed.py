"""The benchmark for readers: how fast the methods are at equal FLOPs, and how the time of DHTM's merge grows."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dhtm.harness.models.methods import knob_text
from dhtm.report.registry import GREY, METHODS, Series, entry_of
from dhtm.report.runs import of_series, solved_for
from dhtm.report.style import plt
from dhtm.report.tables import Table, number, with_interval


def speed_table(frame: pd.DataFrame, caption: str) -> Table:
    """Make a table of the methods' figures from :func:`dhtm.harness.benchmark.time_methods`."""
    shown = pd.DataFrame(
        {
            "method": entry_of(row.method).label,
            "knob": knob_text(row.knob, row.value),
            "reduction %": number(row.flops_reduction_pct, 1),
            "images/s": number(row.images_per_s, 1),
            "speed-up [quartiles]": with_interval(row.speedup, row.speedup_q1, row.speedup_q3),
            "ideal": number(row.ideal_speedup, 2),
            "share of ideal %": number(row.ideal_share_pct, 0),
            "merge %": number(row.merge_pct, 1),
            "peak MB": number(row.peak_memory_mb, 0),
            "1 image, ms": number(row.latency_ms, 1),
            "its speed-up [quartiles]": with_interval(
                row.latency_speedup, row.latency_speedup_q1, row.latency_speedup_q3
            ),
        }
        for row in frame.itertuples()
    )
    notes = [
        "Medians; speed-ups are over the unmerged backbone in the same round. Ideal is the speed-up by FLOPs alone. Its share "
        "can exceed 100%, because attention's softmax and memory traffic shrink too.",
        "Merge is the reduction's share of the forward pass. Peak is the memory beside weights and images.",
    ]
    return Table(frame, [(caption, shown)], notes)


def scaling_table(frame: pd.DataFrame, caption: str) -> Table:
    """Make a table of the merge alone from :func:`dhtm.harness.benchmark.time_merge`, with its growth in N."""
    names = {"n_tokens": "N", "k": "k", "batch_size": "batch"}
    shown = pd.DataFrame(
        {
            "over": names[row.varied],
            **{shown: str(getattr(row, name)) for name, shown in names.items()},
            "merge, ms [quartiles]": with_interval(row.merge_ms, row.merge_ms_q1, row.merge_ms_q3),
            "scipy's clustering, ms": number(row.scipy_ms, 1),
            "times as fast": number(row.scipy_ms / row.merge_ms, 1),
        }
        for row in frame.itertuples()
    )
    is_over_n = (frame.varied == "n_tokens").sum() > 1
    notes = [f"Time grows as N^{growth(frame):.2f} (least squares on logarithms)."] if is_over_n else []
    return Table(frame, [(caption, shown)], notes)


def growth(frame: pd.DataFrame) -> float:
    """Return the exponent with which the merge's time grows in N."""
    over_n = frame[frame.varied == "n_tokens"]
    return float(np.polyfit(np.log(over_n.n_tokens), np.log(over_n.merge_ms), 1)[0])


def speed_figure(frame: pd.DataFrame, runs: pd.DataFrame, reduction_pct: float, title: str) -> Figure:
    """Draw the speed-up against top-1 on the embedded task at the same reduction, for methods that have runs there.

    Args:
        frame: from :func:`dhtm.harness.benchmark.time_methods`.
        runs: the committed runs of the embedded task, results/embedded/tables/runs.csv.
        reduction_pct: the benchmark's target.
        title: of the figure.
    """
    figure, ax = plt.subplots(figsize=(5.6, 4))
    solved = solved_for(runs, reduction_pct)
    for row in frame.itertuples():
        ours = of_series(solved, Series(row.method, row.method, row.layers, row.trained is True))
        ours = runs[runs.method == "unmerged"] if row.method == "unmerged" else ours
        if ours.empty:
            continue
        entry, best = entry_of(row.method), ours.sort_values("top1").iloc[-1]
        across = [[row.speedup - row.speedup_q1], [row.speedup_q3 - row.speedup]]
        up = [[best.top1 - best.ci_low], [best.ci_high - best.top1]]
        style = {"color": entry.colour, "marker": entry.marker, "linestyle": "none", "capsize": 2}
        ax.errorbar(row.speedup, best.top1, up, across, label=entry.label, **style)
    ideal = frame.ideal_speedup[frame.method != "unmerged"]
    ax.axvspan(ideal.min(), ideal.max(), color=GREY, alpha=0.25, linewidth=0, label="FLOPs-ideal")
    ax.set(title=title, xlabel="speed-up over the unmerged model", ylabel="top-1 of deit_micro on embedded data (%)")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def scaling_figure(frame: pd.DataFrame, title: str) -> Figure:
    """Draw the merge's time over N, over k and over the batch, on logarithmic axes."""
    names = {"n_tokens": "tokens N", "k": "merges k", "batch_size": "images in the batch"}
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
    for ax, (varied, name) in zip(axes, names.items(), strict=True):
        part = frame[frame.varied == varied].sort_values(varied)
        errors = [part.merge_ms - part.merge_ms_q1, part.merge_ms_q3 - part.merge_ms]
        style = {"color": METHODS["dhtm"].colour, "marker": "o", "capsize": 2}
        ax.errorbar(part[varied], part.merge_ms, errors, label="DHTM's merge", **style)
        if part.scipy_ms.notna().any():
            ax.plot(part[varied], part.scipy_ms, color=GREY, marker="s", label="scipy's average linkage")
        ax.set(xscale="log", yscale="log", xlabel=name)
        ax.set_xticks(part[varied].unique(), part[varied].unique().astype(str), minor=False)
        ax.set_xticks([], minor=True)
    axes[0].set_ylabel("ms")
    axes[0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    return figure
