"""The ablation of DHTM and DHTM+: one option at a time, each compared with the paper's DHTM image by image."""

from pathlib import Path

import pandas as pd

from dhtm.harness.runs.directory import predictions
from dhtm.report.registry import SERIES
from dhtm.report.runs import SAME_WEIGHTS, solved_for
from dhtm.report.statistics import compare, holm
from dhtm.report.tables import Table, caption_of, difference_cells, faithfulness_cells, number

TARGETS = (30, 40)  # percent fewer FLOPs
MIN_OPTIONS = 4  # fewer are not an ablation: every sweep has DHTM, DHTM in all layers, and DHTM+
_DEFAULT = "the paper's"
_COMPARED = [
    f"{prefix}{name}" for prefix in ("kl_", "") for name in ("difference", "difference_low", "difference_high", "p")
]
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
    frames = []
    for target in TARGETS:
        solved = solved_for(
            runs[
                runs.method.isin(("dhtm", "dhtm_plus", "dhtm_threshold")) & ~runs.trained.astype(bool) & runs.kl.notna()
            ],
            target,
        )
        solved = solved.assign(target=target, changed=_changes(solved)).sort_values("finished")
        for _, frame in solved.groupby(SAME_WEIGHTS, dropna=False):
            frame = frame.drop_duplicates("changed", keep="last")
            if len(frame) > MIN_OPTIONS and _DEFAULT in set(frame.changed):
                frames.append(_compare(frame.sort_values("kl"), results_dir))
    if not frames:
        return None
    data = pd.concat(frames, ignore_index=True)
    data["kl_p_holm"], data["p_holm"] = holm(data.kl_p), holm(data.p)
    keys = ["backbone", "data", "split", "target"]
    return Table(data, [_part(*part, frame) for part, frame in data.groupby(keys, sort=False)], NOTES)


def _changes(runs: pd.DataFrame) -> list[str]:
    """Return how each run differs from the paper's DHTM."""
    changed = []
    for run in runs.itertuples():
        name = {"dhtm_plus": "DHTM+", "dhtm_threshold": "DHTM+ threshold"}.get(run.method, "")
        layers = "" if run.layers == SERIES[name or "DHTM"].layers else f"layers={run.layers}"
        changed.append(" ".join(filter(None, [name, run.options, layers])) or _DEFAULT)
    return changed


def _compare(frame: pd.DataFrame, results_dir: Path) -> pd.DataFrame:
    """Add the comparisons of each run with the paper's options."""
    default = predictions(results_dir / frame[frame.changed == _DEFAULT].run_id.iloc[0])
    found = [
        {} if run.changed == _DEFAULT else compare(predictions(results_dir / run.run_id), default)
        for run in frame.itertuples()
    ]
    compared = pd.DataFrame(found).reindex(columns=_COMPARED).astype(float)
    return pd.concat([frame.reset_index(drop=True), compared], axis=1)


def _part(backbone: str, data: str, split: str, target: int, frame: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    rows = []
    for row in frame.itertuples():
        cells = {
            "options": row.changed,
            "merges": number(row.value, 0),
            "reduction %": number(row.flops_reduction_pct, 1),
        }
        cells |= faithfulness_cells(row) | difference_cells(row, _DEFAULT)
        rows.append(cells | {"run": row.run_id})
    caption = caption_of(backbone, data, frame.n_images, f"split {split}", f"{target}% fewer FLOPs")
    return caption, pd.DataFrame(rows)
