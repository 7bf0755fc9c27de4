"""The benchmark for readers: how fast the methods are at equal FLOPs, and how the time of DHTM's merge grows."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dhtm.harness.models.methods import knob_text
from dhtm.report.registry import GREY, METHODS, Series, entry_of, title_of
from dhtm.report.runs import by_target, of_series
from dhtm.report.style import draw_intervals, plt
from dhtm.report.tables import Table, number, with_interval


def speed_table(frame: pd.DataFrame, caption: str) -> Table:
    """Make a table of the results of :func:`dhtm.harness.benchmark.time_methods`, one part per target."""
    notes = [
        "Medians; speed-ups are over the unmerged backbone in the same round. Ideal is the speed-up by FLOPs alone. Its share "
        "can exceed 100%, because attention's softmax and memory traffic shrink too.",
        "Merge is the reduction's share of the forward pass. Peak is the memory beside weights and images.",
    ]
    targets = frame.target.dropna().unique()
    parts = {caption: frame}
    if len(targets) > 1:
        parts = {
            f"{caption}, {target:g}% fewer FLOPs": frame[frame.target.isna() | (frame.target == target)]
            for target in targets
        }
    return Table(frame, [(shown, _speed_cells(part)) for shown, part in parts.items()], notes)


def _speed_cells(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
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


def scaling_table(frame: pd.DataFrame, caption: str) -> Table:
    """Make a table of the merge alone from :func:`dhtm.harness.benchmark.time_merge`, with its growth in N."""
    names = {"n_tokens": "N", "k": "k", "batch_size": "batch"}
    shown = pd.DataFrame(
        {
            "over": names[row.varied],
            **{shown: str(getattr(row, name)) for name, shown in names.items()},
            "merge, ms [quartiles]": with_interval(row.merge_ms, row.merge_ms_q1, row.merge_ms_q3),
            "ATC's clustering, ms": number(row.atc_ms, 1),
            "scipy's clustering, ms": number(row.scipy_ms, 1),
            "merge, times as fast": number(row.scipy_ms / row.merge_ms, 1),
            "ATC, times as fast": number(row.scipy_ms / row.atc_ms, 1),
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


def speed_figure(frame: pd.DataFrame, runs: pd.DataFrame, title: str) -> Figure:
    """Draw top-1 and KL against the speed-up, for the methods that have runs at the same reduction.

    Args:
        frame: from :func:`dhtm.harness.benchmark.time_methods`.
        runs: of one backbone and data set, such as results/embedded/tables/runs.csv.
        title: of the figure.
    """
    where = title_of(*runs[["backbone", "data"]].iloc[0])
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4))
    columns = {"top1": ["top1", "ci_low", "ci_high"], "kl": ["kl", "kl_low", "kl_high"]}
    names = {"top1": f"top-1 (%)\n{where}", "kl": f"KL from unmerged (nats)\n{where}"}
    measured = _with_runs(frame, runs)
    for ax, quantity in zip(axes, columns, strict=True):
        for method, points in measured.dropna(subset=quantity).groupby("method", sort=False):
            if quantity == "kl" and method == "unmerged":
                continue
            entry = entry_of(method)
            style = {"color": entry.colour, "marker": entry.marker}
            draw_intervals(ax, points, "speedup", columns[quantity], entry.label, style)
        ax.set(xlabel="speed-up over the unmerged model", ylabel=names[quantity])
    axes[1].set_yscale("log")
    for ideal in frame.groupby("target").ideal_speedup.median():
        for ax in axes:
            ax.axvline(ideal, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1, 0.5), title="dotted: by FLOPs alone")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    return figure


def _with_runs(frame: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Add the top-1 and the KL of the runs at the same reduction, with their intervals."""
    found, solved = [], by_target(runs)
    for row in frame.itertuples():
        ours = of_series(
            solved[solved.target == row.target], Series(row.method, row.method, row.layers, row.trained is True)
        )
        ours = runs[runs.method == "unmerged"] if row.method == "unmerged" else ours
        if not ours.empty:
            taken = ["top1", "ci_low", "ci_high", "kl", "kl_low", "kl_high"]
            found.append({"method": row.method, "speedup": row.speedup, **ours.iloc[-1][taken]})
    return pd.DataFrame(found)


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
