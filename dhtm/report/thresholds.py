"""Do thresholds change a model less than a fixed number of merges? Paired comparisons at equal mean FLOPs."""

from pathlib import Path

import pandas as pd

from dhtm.harness.runs.directory import predictions
from dhtm.report.registry import entry_of
from dhtm.report.runs import SAME_WEIGHTS, by_target
from dhtm.report.statistics import compare, holm
from dhtm.report.tables import FAITHFUL, Table, caption_of_set, cells, difference, number

_VARIED = ("k", "total", "inflect", "threshold", "max_merges", "backend")
_COLUMNS = [
    ("target %", lambda row: number(row.target, 0)), ("method", lambda row: row.label), "reduction %", "GFLOPs", *FAITHFUL,
    "flips won / lost", *difference("KL − without, nats", "kl_"), "top-1 %",
    *difference("top-1 − without, points", p="p (top-1)"), "run",
]  # fmt: skip
NOTES = [
    "Each pair has the same options and nearly the same mean FLOPs: one makes as many merges in every image, the other as many "
    "as an image has neighbours above thresholds, which were found on images that are not tested on. GFLOPs are the mean over "
    "images, with quartiles and the maximum where images differ.",
    "Differences are with thresholds minus without, of the mean KL and of top-1, with a paired bootstrap 95% interval; p is of "
    "the paired sign-flip permutation test, and * marks those below 0.05 after Holm's correction for all tests of their kind "
    "in this table. KL and agreement are against the unmerged model's outputs; a smaller KL is not a better accuracy.",
]


def thresholds_table(runs: pd.DataFrame, results_dir: Path) -> Table | None:
    """Make the table from runs of DHTM that were solved for a target; None if none has thresholds."""
    off_the_shelf = runs[runs.method.str.startswith("dhtm") & ~runs.trained.astype(bool) & runs.kl.notna()]
    rows = []
    for (target, *_), frame in by_target(off_the_shelf).groupby(["target", *SAME_WEIGHTS], dropna=False):
        frame = frame.sort_values(["plain", "finished"])  # DHTM itself before DHTM+ with its options
        for _, alike in frame.groupby([_options(run) for run in frame.itertuples()], sort=False):
            has_threshold = alike.knob == "threshold"
            if has_threshold.nunique() < 2:
                continue
            (counted,), (adaptive,) = (alike[mask].tail(1).itertuples() for mask in (~has_threshold, has_threshold))
            label = " ".join(filter(None, [entry_of(counted.method).label, counted.options]))
            for name, run in ((label, counted), (f"{label}, thresholds", adaptive)):
                rows.append({"target": target, "label": name, **run._asdict()})
            rows[-1] |= compare(predictions(results_dir / adaptive.run_id), predictions(results_dir / counted.run_id))
    if not rows:
        return None
    data = pd.DataFrame(rows).drop(columns=["knobs", "finished"])  # a time would differ in every repetition
    data["p_holm"], data["kl_p_holm"] = holm(data.p), holm(data.kl_p)
    parts = []
    for _, frame in data.groupby(SAME_WEIGHTS, sort=False, dropna=False):
        parts.append((caption_of_set(frame), cells(frame, *_COLUMNS)))
    return Table(data, parts, NOTES)


def _options(run) -> str:
    """Return the options that the runs of a pair have in common, as text."""
    return str((run.layers, sorted((name, value) for name, value in run.knobs.items() if name not in _VARIED)))
