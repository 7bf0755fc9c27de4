"""The ablation of DHTM and DHTM+: one option at a time, each compared with the paper's DHTM image by image."""

from pathlib import Path

import pandas as pd

from dhtm.harness.runs.directory import predictions
from dhtm.report.registry import SERIES
from dhtm.report.runs import SAME_WEIGHTS, by_target
from dhtm.report.statistics import compare, holm
from dhtm.report.tables import FAITHFUL, Table, caption_of_set, cells, difference, number

MIN_OPTIONS = 4  # fewer are not an ablation: every sweep has DHTM, DHTM in all layers, and DHTM+
_DEFAULT = "the paper's"
_COMPARED = [
    f"{prefix}{name}" for prefix in ("kl_", "") for name in ("difference", "difference_low", "difference_high", "p")
]
_COLUMNS = [
    ("options", lambda row: row.changed), ("merges", lambda row: number(row.value, 0)), "reduction %", *FAITHFUL,
    *difference("KL − the paper's, nats", "kl_"), "top-1 %", *difference("top-1 − the paper's, points", p="p (top-1)"), "run",
]  # fmt: skip
NOTES = [
    "Each row differs from the paper's DHTM, or from DHTM+, in the options that it names. All have the same FLOPs by their "
    "number of merges, which is k in each layer or, for DHTM+, the total. KL and agreement are against the unmerged model's "
    "outputs, see the notes of Table 2; a smaller KL is not a better accuracy.",
    "Differences are this row minus the paper's options, of the mean KL and of top-1, with a paired bootstrap 95% interval. p "
    "is of the paired sign-flip permutation test; * marks those below 0.05 after Holm's correction for all tests of their "
    "kind in this table.",
]


def ablation(runs: pd.DataFrame, results_dir: Path) -> Table | None:
    """Make the table from off-the-shelf runs that were solved for a target; None if no options were varied."""
    variants = runs.method.isin(("dhtm", "dhtm_plus", "dhtm_threshold")) & ~runs.trained.astype(bool) & runs.kl.notna()
    solved = by_target(runs[variants]).sort_values("finished")
    solved["changed"] = [_changes(run) for run in solved.itertuples()]
    frames = []
    for _, frame in solved.groupby(["target", *SAME_WEIGHTS], dropna=False):
        frame = frame.drop_duplicates("changed", keep="last").sort_values("kl")
        default = frame.run_id[frame.changed == _DEFAULT]
        if len(frame) <= MIN_OPTIONS or default.empty:
            continue
        papers = predictions(results_dir / default.iloc[0])
        found = [
            {} if run.changed == _DEFAULT else compare(predictions(results_dir / run.run_id), papers)
            for run in frame.itertuples()
        ]
        compared = pd.DataFrame(found, frame.index).reindex(columns=_COMPARED).astype(float)
        frames.append(pd.concat([frame, compared], axis=1))
    if not frames:
        return None
    data = pd.concat(frames, ignore_index=True)
    data["kl_p_holm"], data["p_holm"] = holm(data.kl_p), holm(data.p)
    parts = []
    for (target, *_), frame in data.groupby(["target", *SAME_WEIGHTS], sort=False, dropna=False):
        parts.append((caption_of_set(frame, f"{target:g}% fewer FLOPs"), cells(frame, *_COLUMNS)))
    return Table(data, parts, NOTES)


def _changes(run) -> str:
    """Return how a run differs from the paper's DHTM."""
    name = {"dhtm_plus": "DHTM+", "dhtm_threshold": "DHTM+ threshold"}.get(run.method, "")
    layers = "" if run.layers == SERIES[name or "DHTM"].layers else f"layers={run.layers}"
    return " ".join(filter(None, [name, run.options, layers])) or _DEFAULT
