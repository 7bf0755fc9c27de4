"""Dense prediction over FLOPs: the mIoU of the segmented scenes, for every method."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dhtm.harness.runs.dense import miou_interval
from dhtm.harness.runs.directory import predictions
from dhtm.report.registry import GREY, SERIES, entry_of, title_of
from dhtm.report.runs import SAME_WEIGHTS, Pair, best_set, by_target, of_series
from dhtm.report.style import draw_intervals, plt
from dhtm.report.tables import Table, caption_of, cells, difference, with_interval

_COMPARED = ["difference", "difference_low", "difference_high"]
NOTES = [
    "A linear probe, fitted on the unmerged model's features of 600 training scenes, names each patch ground, digit or "
    "distractor; merged tokens are given back to all their patches first. mIoU is the mean over the three classes of "
    "intersection over union, over all patches of the test scenes, with a bootstrap 95% interval over scans. The features are "
    "frozen and nothing was trained for merging.",
    "The last column is the mIoU of DHTM, or of DHTM+ where DHTM cannot save so much, minus that of the row, with a paired "
    "bootstrap 95% interval.",
]


def dense_runs(runs: pd.DataFrame) -> list[tuple[Pair, pd.DataFrame, pd.DataFrame]]:
    """Return each backbone and data set with its off-the-shelf runs that have an mIoU, by target, and its unmerged run.

    All of a pair are on the same images and weights.
    """
    measured, found = runs[runs.miou.notna() & ~runs.trained.astype(bool)], []
    for pair, frame in measured.groupby(["backbone", "data"]):
        frame = best_set([same for _, same in frame.groupby(SAME_WEIGHTS, dropna=False)], frame).sort_values("finished")
        is_unmerged = frame.method == "unmerged"
        solved = by_target(frame[~is_unmerged]).drop_duplicates(["method", "options", "layers", "target"], keep="last")
        if len(solved):
            found.append((pair, solved, frame[is_unmerged].tail(1)))
    return found


def dense_table(runs: pd.DataFrame, results_dir: Path) -> Table | None:
    """Make the table; None if no run has an mIoU."""
    parts, frames = [], []
    for (backbone, data), solved, unmerged in dense_runs(runs):
        for target, frame in solved.groupby("target"):
            frame = pd.concat([unmerged, frame.sort_values("miou", ascending=False)], ignore_index=True)
            papers = frame[frame.options == ""]
            references = pd.concat([of_series(papers, SERIES[name]) for name in ("DHTM", "DHTM+")])
            reference = next(references.itertuples(), None)
            compared = [_compare(run, reference, results_dir) for run in frame.itertuples()]
            frames.append(frame.assign(target=target).join(pd.DataFrame(compared, columns=_COMPARED)))
            label = entry_of(reference.method).label if reference else "DHTM"
            shown = cells(
                frames[-1], ("method", lambda row: f"{entry_of(row.method).label} {row.options}".strip()), "reduction %",
                ("mIoU % [95% interval]", lambda row: with_interval(row.miou, row.miou_low, row.miou_high)),
                difference(f"{label} − this, points")[0], "top-1 %", "run",
            )  # fmt: skip
            caption = caption_of(backbone, data, frame.n_images, f"{target:g}% fewer FLOPs", "mIoU of a linear probe")
            parts.append((caption, shown))
    return Table(pd.concat(frames, ignore_index=True).drop(columns="knobs"), parts, NOTES) if frames else None


def _compare(run, reference, results_dir: Path) -> tuple[float, float, float]:
    if reference is None or run.run_id == reference.run_id:
        return (np.nan,) * 3
    first, second = (predictions(results_dir / one.run_id) for one in (reference, run))
    groups = first.group if "group" in first else first.index
    counts = (np.stack(frame.confusion).astype(np.int64) for frame in (first, second))
    by_class, low, high = miou_interval(next(counts), groups.to_numpy(), next(counts))
    return by_class.mean(), low, high


def dense_figure(runs: pd.DataFrame) -> Figure | None:
    """Draw mIoU over the reduction of FLOPs; None if no run has an mIoU."""
    panels = dense_runs(runs)
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 4), squeeze=False)
    for ax, ((backbone, data), frame, unmerged) in zip(axes[0], panels, strict=True):
        for method, points in frame[frame.options == ""].groupby("method", sort=False):
            draw_intervals(ax, points, "flops_reduction_pct", ["miou", "miou_low", "miou_high"], entry_of(method))
        for miou in unmerged.miou:
            ax.axhline(miou, color=GREY, linewidth=0.8, zorder=0, label="unmerged")
        ax.set(xlabel="FLOPs reduction (%)", ylabel="mIoU of a linear probe (%)", xlim=(0, None))
        ax.set_title(f"{title_of(backbone, data)}, {frame.n_images.max():,} images, 95% intervals", fontsize=9)
        ax.legend()
    figure.tight_layout()
    return figure
