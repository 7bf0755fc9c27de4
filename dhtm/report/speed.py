"""The benchmark for readers: how fast the methods are at equal FLOPs, and how the time of DHTM's merge grows."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dhtm.report.registry import GREY, METHODS, Series, entry_of, title_of
from dhtm.report.runs import by_target, of_series
from dhtm.report.style import draw_intervals, plt
from dhtm.report.tables import Table, cells, number, with_interval

_SPEED = [
    "method", "knob", "reduction %", "images/s", "speed-up [quartiles]", ("ideal", lambda row: number(row.ideal_speedup, 2)),
    ("share of ideal %", lambda row: number(row.ideal_share_pct, 0)), ("merge %", lambda row: number(row.merge_pct, 1)),
    ("peak MB", lambda row: number(row.peak_memory_mb, 0)), "1 image, ms",
    (
        "its speed-up [quartiles]",
        lambda row: with_interval(row.latency_speedup, row.latency_speedup_q1, row.latency_speedup_q3),
    ),
]  # fmt: skip
_SCALING = [
    ("over", lambda row: {"n_tokens": "N", "k": "k", "batch_size": "batch"}[row.varied]),
    ("N", lambda row: str(row.n_tokens)), ("k", lambda row: str(row.k)), ("batch", lambda row: str(row.batch_size)),
    ("merge, ms [quartiles]", lambda row: with_interval(row.merge_ms, row.merge_ms_q1, row.merge_ms_q3)),
    ("ATC's clustering, ms", lambda row: number(row.atc_ms, 1)),
    ("scipy's clustering, ms", lambda row: number(row.scipy_ms, 1)),
    ("merge, times as fast", lambda row: number(row.scipy_ms / row.merge_ms, 1)),
    ("ATC, times as fast", lambda row: number(row.scipy_ms / row.atc_ms, 1)),
]  # fmt: skip


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
    return Table(frame, [(shown, cells(part, *_SPEED)) for shown, part in parts.items()], notes)


def scaling_table(frame: pd.DataFrame, caption: str) -> Table:
    """Make a table of the merge alone from :func:`dhtm.harness.benchmark.time_merge`, with its growth in N."""
    is_over_n = (frame.varied == "n_tokens").sum() > 1
    notes = [f"Time grows as N^{growth(frame):.2f} (least squares on logarithms)."] if is_over_n else []
    return Table(frame, [(caption, cells(frame, *_SCALING))], notes)


def growth(frame: pd.DataFrame) -> float:
    """Return the exponent with which the merge's time grows in N."""
    over_n = frame[frame.varied == "n_tokens"]
    return float(np.polyfit(np.log(over_n.n_tokens), np.log(over_n.merge_ms), 1)[0])


def speed_figure(frame: pd.DataFrame, runs: pd.DataFrame, title: str) -> Figure:
    """Draw top-1 and KL against the speed-up, for the methods that have runs at the same reduction.

    The runs are of one backbone and data set, such as results/embedded/tables/runs.csv.
    """
    where = title_of(*runs[["backbone", "data"]].iloc[0])
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4))
    columns = {"top-1 (%)": ["top1", "ci_low", "ci_high"], "KL from unmerged (nats)": ["kl", "kl_low", "kl_high"]}
    measured = _with_runs(frame, runs)
    for ax, (name, quantity) in zip(axes, columns.items(), strict=True):
        for method, points in measured.dropna(subset=quantity[0]).groupby("method", sort=False):
            if quantity[0] == "top1" or method != "unmerged":
                draw_intervals(ax, points, "speedup", quantity, entry_of(method))
        ax.set(xlabel="speed-up over the unmerged model", ylabel=f"{name}\n{where}")
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
    found, solved = [], by_target(runs[runs.options.isna()])  # options that differ from the paper's
    for row in frame.itertuples():
        series = Series(row.method, row.method, row.layers, row.trained is True)
        ours = of_series(solved[solved.target == row.target], series)
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
        errors = np.stack([part.merge_ms - part.merge_ms_q1, part.merge_ms_q3 - part.merge_ms])
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
