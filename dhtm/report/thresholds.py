"""Do thresholds change a model less than a fixed number of merges? Paired comparisons at equal mean FLOPs."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from dhtm.harness.runs.directory import predictions
from dhtm.report.registry import entry_of, title_of
from dhtm.report.runs import SAME_WEIGHTS, solved_for
from dhtm.report.statistics import compare, holm
from dhtm.report.tables import Table, difference_cells, faithfulness_cells, flops_cell, number

_VARIED = ("k", "total", "inflect", "threshold", "max_merges", "backend")
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
    rows = []
    off_the_shelf = runs[runs.method.str.startswith("dhtm") & ~runs.trained.astype(bool) & runs.kl.notna()]
    for target in sorted({float(one) for joined in off_the_shelf.targets for one in joined.split(",") if one}):
        for _, frame in solved_for(off_the_shelf, target).groupby(SAME_WEIGHTS, dropna=False):
            for counted, adaptive in _pairs(frame):
                found = compare(predictions(results_dir / adaptive.run_id), predictions(results_dir / counted.run_id))
                label = " ".join(filter(None, [entry_of(counted.method).label, counted.options]))
                for name, run in ((label, counted), (f"{label}, thresholds", adaptive)):
                    rows.append({"target": target, "label": name, **run._asdict()})
                rows[-1] |= found
    if not rows:
        return None
    data = pd.DataFrame(rows).drop(columns=["knobs", "finished"])  # a time would differ in every repetition
    data["p_holm"], data["kl_p_holm"] = holm(data.p), holm(data.kl_p)
    keys = ["backbone", "data", "split", "n_images"]
    return Table(data, [_part(*part, frame) for part, frame in data.groupby(keys, sort=False)], NOTES)


def _pairs(frame: pd.DataFrame) -> Iterator[tuple]:
    """Yield pairs of runs that differ only in how merges are limited, the one without thresholds first."""
    newest = frame.sort_values(["plain", "finished"])  # DHTM itself before DHTM+ with its options
    for _, alike in newest.groupby([_options(run) for run in newest.itertuples()], sort=False):
        counted, adaptive = alike[alike.knob != "threshold"], alike[alike.knob == "threshold"]
        if len(counted) and len(adaptive):
            yield next(counted.tail(1).itertuples()), next(adaptive.tail(1).itertuples())


def _options(run) -> str:
    """Return the options that the runs of a pair have in common, as text."""
    return str((run.layers, sorted((name, value) for name, value in run.knobs.items() if name not in _VARIED)))


def _part(backbone: str, data: str, split: str, n_images: int, frame: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    rows = []
    for row in frame.itertuples():
        cells = {
            "target %": number(row.target, 0),
            "method": row.label,
            "reduction %": number(row.flops_reduction_pct, 1),
        }
        cells |= {"GFLOPs": flops_cell(row), **faithfulness_cells(row)}
        cells["flips won / lost"] = f"{number(row.flips_won, 0)} / {number(row.flips_lost, 0)}"
        cells |= difference_cells(row, "without")
        rows.append(cells | {"run": row.run_id})
    return f"{title_of(backbone, data)}, {n_images:,} images, split {split}", pd.DataFrame(rows)
