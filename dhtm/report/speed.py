"""The benchmark for readers: how fast the methods are at equal FLOPs, and how DHTM's merge grows."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dhtm.report.style import METHODS, UNMERGED, colour_of, plt
from dhtm.report.tables import Table, number


def speed_table(frame: pd.DataFrame, caption: str) -> Table:
    """The methods' figures, see :func:`dhtm.harness.benchmark.benchmark`, quartiles in brackets."""
    shown = pd.DataFrame(
        {
            "method": [_label(row.method) for row in frame.itertuples()],
            "knob": ["" if pd.isna(row.knob) else f"{row.knob} = {row.value:g}" for row in frame.itertuples()],
            "reduction %": [number(value, 1) for value in frame.flops_reduction_pct],
            "images/s": [number(value, 1) for value in frame.images_per_s],
            "speed-up [quartiles]": _with_quartiles(frame, ""),
            "ideal": [number(value, 2) for value in frame.ideal_speedup],
            "share of ideal %": [number(value, 0) for value in frame.ideal_share_pct],
            "merge %": [number(value, 1) for value in frame.merge_pct],
            "peak MB": [number(value, 0) for value in frame.peak_memory_mb],
            "1 image, ms": [number(value, 1) for value in frame.latency_ms],
            "its speed-up [quartiles]": _with_quartiles(frame, "latency_"),
        }
    )
    notes = [
        "Medians; speed-ups are over the unmerged backbone in the same round. Ideal: by FLOPs alone; its share may pass 100%, "
        "for attention's softmax and traffic to memory shrink too.",
        "Merge: the reduction's share of the forward. Peak: memory beside weights and images.",
    ]
    return Table(frame, [(caption, shown)], notes)


def scaling_table(frame: pd.DataFrame, caption: str) -> Table:
    """The merge by itself, see :func:`dhtm.harness.benchmark.scaling`, and how it grows with N."""
    names = {"n_tokens": "N", "k": "k", "batch_size": "batch"}
    shown = frame.rename(columns=names)[list(names.values())].astype(str)
    shown.insert(0, "over", frame.varied.map(names))
    shown["merge, ms [quartiles]"] = [
        f"{row.merge_ms:.2f} [{row.merge_ms_q1:.2f}, {row.merge_ms_q3:.2f}]" for row in frame.itertuples()
    ]
    shown["scipy's clustering, ms"] = [number(value, 1) for value in frame.scipy_ms]
    shown["times as fast"] = [number(value, 1) for value in frame.scipy_ms / frame.merge_ms]
    notes = (
        [f"Time grows as N^{growth(frame):.2f} (least squares on logarithms)."]
        if (frame.varied == "n_tokens").sum() > 1
        else []
    )
    return Table(frame, [(caption, shown)], notes)


def growth(frame: pd.DataFrame) -> float:
    """The exponent with which the merge's time grows in N."""
    over_n = frame[frame.varied == "n_tokens"]
    return float(np.polyfit(np.log(over_n.n_tokens), np.log(over_n.merge_ms), 1)[0])


def speed_figure(frame: pd.DataFrame, runs: pd.DataFrame, reduction_pct: float, title: str) -> Figure:
    """Speed-up over top-1 on the embedded task at the same reduction, where runs have it; a line at the ideal.

    Args:
        frame: as of :func:`dhtm.harness.benchmark.benchmark`.
        runs: the committed runs of the embedded task, results/embedded/tables/runs.csv.
        reduction_pct: the benchmark's target.
        title: of the figure.
    """
    figure, ax = plt.subplots(figsize=(5.6, 4))
    for row in frame.itertuples():
        ours = runs[(runs.method == row.method) & (runs.trained == (row.trained is True)) & (runs.layers == row.layers)]
        aimed = [reduction_pct in map(float, str(of).split(",")) for of in ours.targets.fillna("nan")]
        ours = runs[runs.method == "unmerged"] if row.method == "unmerged" else ours[aimed]
        if ours.empty:
            continue
        colour, marker = (
            (UNMERGED, ".")
            if row.method == "unmerged"
            else (colour_of(row.method), METHODS.get(row.method, ".")[-1][-1])
        )
        across = [[row.speedup - row.speedup_q1], [row.speedup_q3 - row.speedup]]
        best = ours.sort_values("top1").iloc[-1]
        up = [[best.top1 - best.ci_low], [best.ci_high - best.top1]]
        ax.errorbar(
            row.speedup, best.top1, up, across, color=colour, marker=marker, linestyle="none", capsize=2,
            label=_label(row.method),
        )  # fmt: skip
    ideal = frame.ideal_speedup[frame.method != "unmerged"]
    ax.axvspan(ideal.min(), ideal.max(), color=UNMERGED, alpha=0.25, linewidth=0, label="FLOPs-ideal")
    ax.set(
        title=title, xlabel="speed-up over the unmerged model", ylabel="top-1 of deit_micro on the embedded task (%)"
    )
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def scaling_figure(frame: pd.DataFrame, title: str) -> Figure:
    """The merge's time over N, over k and over the batch, on logarithmic axes."""
    names = {"n_tokens": "tokens N", "k": "merges k", "batch_size": "images in the batch"}
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
    for ax, (varied, name) in zip(axes, names.items(), strict=True):
        part = frame[frame.varied == varied].sort_values(varied)
        errors = [part.merge_ms - part.merge_ms_q1, part.merge_ms_q3 - part.merge_ms]
        ax.errorbar(
            part[varied], part.merge_ms, errors, color=colour_of("dhtm"), marker="o", capsize=2, label="DHTM's merge"
        )
        if part.scipy_ms.notna().any():
            ax.plot(part[varied], part.scipy_ms, color=UNMERGED, marker="s", label="scipy's average linkage")
        ax.set(xscale="log", yscale="log", xlabel=name)
        ax.set_xticks(part[varied].unique(), part[varied].unique().astype(str), minor=False)
        ax.set_xticks([], minor=True)
    axes[0].set_ylabel("ms")
    axes[0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def _label(method: str) -> str:
    return METHODS[method][0] if method in METHODS else method


def _with_quartiles(frame: pd.DataFrame, of: str) -> list[str]:
    columns = [frame[f"{of}speedup{end}"] for end in ("", "_q1", "_q3")]
    return [f"{median:.2f} [{low:.2f}, {high:.2f}]" for median, low, high in zip(*columns, strict=True)]
