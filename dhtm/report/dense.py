"""Dense prediction over FLOPs: the mIoU of the segmented scenes, for every method."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dhtm.harness.runs.dense import miou_interval
from dhtm.harness.runs.directory import predictions
from dhtm.report.registry import GREY, entry_of, title_of
from dhtm.report.style import draw_intervals, plt
from dhtm.report.tables import Table, number, with_interval

NOTES = [
    "A linear probe, fitted on the unmerged model's features of 600 training scenes, names each patch ground, digit or "
    "distractor; merged tokens are given back to all their patches first. mIoU is the mean over the three classes of "
    "intersection over union, over all patches of the test scenes, with a bootstrap 95% interval over scans. The features are "
    "frozen and nothing was trained for merging.",
    "The last column is the mIoU of DHTM, or of DHTM+ where DHTM cannot save so much, minus that of the row, with a paired "
    "bootstrap 95% interval.",
]


def dense_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Select the off-the-shelf runs that have an mIoU, one row for each FLOPs reduction they were solved for."""
    found = (
        runs[runs.miou.notna() & ~runs.trained.astype(bool)]
        .assign(target=runs.targets.str.split(","))
        .explode("target")
    )
    found = found.assign(target=pd.to_numeric(found.target)).sort_values("finished")
    return found.drop_duplicates(["backbone", "data", "method", "options", "layers", "target"], keep="last")


def dense_table(runs: pd.DataFrame, results_dir: Path) -> Table | None:
    """Make the table; None if no run has an mIoU."""
    frame = dense_runs(runs)
    if frame.empty:
        return None
    parts, rows = [], []
    for (backbone, data), pair in frame.groupby(["backbone", "data"], sort=False):
        unmerged = pair[pair.method == "unmerged"]
        for target, solved in pair.dropna(subset="target").groupby("target"):
            solved = pd.concat([unmerged, solved.sort_values("miou", ascending=False)])
            reference = next(
                (run for name in ("dhtm", "dhtm_plus") for run in solved[solved.method == name].itertuples()), None
            )
            compared = [_compare(run, reference, results_dir) for run in solved.itertuples()]
            together = pd.concat([solved.reset_index(drop=True).assign(target=target), pd.DataFrame(compared)], axis=1)
            rows.append(together)
            n_images = solved.n_images.max()
            caption = (
                f"{title_of(backbone, data)}, {n_images:,} images, {target:g}% fewer FLOPs, mIoU of a linear probe"
            )
            parts.append((caption, _cells(together, entry_of(reference.method).label if reference else "DHTM")))
    return Table(pd.concat(rows, ignore_index=True).drop(columns="knobs"), parts, NOTES) if rows else None


def _compare(run, reference, results_dir: Path) -> dict[str, float]:
    if reference is None or run.run_id == reference.run_id:
        return dict.fromkeys(("difference", "difference_low", "difference_high"), np.nan)
    first, second = (predictions(results_dir / one.run_id) for one in (reference, run))
    groups = first.group if "group" in first else first.index
    counts = (np.stack(frame.confusion).astype(np.int64) for frame in (first, second))
    by_class, low, high = miou_interval(next(counts), groups.to_numpy(), next(counts))
    return {"difference": by_class.mean(), "difference_low": low, "difference_high": high}


def _cells(frame: pd.DataFrame, reference: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "method": f"{entry_of(run.method).label} {run.options}".strip(),
            "reduction %": number(run.flops_reduction_pct, 1),
            "mIoU % [95% interval]": with_interval(run.miou, run.miou_low, run.miou_high),
            f"{reference} − this, points": with_interval(
                run.difference, run.difference_low, run.difference_high, signed=True
            ),
            "top-1 %": number(run.top1, 2),
            "run": run.run_id,
        }
        for run in frame.itertuples()
    )


def dense_figure(runs: pd.DataFrame) -> Figure | None:
    """Draw mIoU over the reduction of FLOPs; None if no run has an mIoU."""
    frame = dense_runs(runs)
    panels = list(frame.dropna(subset="target").groupby(["backbone", "data"], sort=False))
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 4), squeeze=False)
    for ax, ((backbone, data), solved) in zip(axes[0], panels, strict=True):
        for method, points in solved[solved.options == ""].groupby("method", sort=False):
            entry = entry_of(method)
            style = {"color": entry.colour, "marker": entry.marker}
            draw_intervals(ax, points, "flops_reduction_pct", ["miou", "miou_low", "miou_high"], entry.label, style)
        for miou in frame.miou[(frame.method == "unmerged") & (frame.backbone == backbone) & (frame.data == data)]:
            ax.axhline(miou, color=GREY, linewidth=0.8, zorder=0, label="unmerged")
        ax.set(xlabel="FLOPs reduction (%)", ylabel="mIoU of a linear probe (%)", xlim=(0, None))
        ax.set_title(f"{title_of(backbone, data)}, {solved.n_images.max():,} images, 95% intervals", fontsize=9)
        ax.legend()
    figure.tight_layout()
    return figure
