"""The finished runs and the published numbers as frames, and the selection of runs that can be compared."""

import math
from pathlib import Path

import pandas as pd

from dhtm.harness.core.files import PROJECT
from dhtm.harness.runs.directory import finished_runs
from dhtm.report.registry import Series, changed_options

FAITHFULNESS = ["kl", "kl_low", "kl_high", "agreement", "agreement_low", "agreement_high", "flips_won", "flips_lost"]
_COLUMNS = [
    "run_id", "backbone", "method", "k", "layers", "options", "knob", "value", "trained", "untrained", "targets", "data",
    "split", "n_images", "top1", "ci_low", "ci_high", "top5", *FAITHFULNESS, "flops_g", "flops_g_q1", "flops_g_q3",
    "flops_g_max", "flops_baseline_g", "flops_reduction_pct", "merge_flops_g", "params_m", "tokens_by_layer", "dtype",
    "device", "seed", "weights_sha256", "data_fingerprint", "code_version", "library_version", "finished", "plain",
    "knobs", "among", "miou", "miou_low", "miou_high",
]  # fmt: skip
# The columns of lists in metrics.json, and the columns for their elements.
_LISTS = {
    "top1_ci95": ["ci_low", "ci_high"],
    "kl_ci95": ["kl_low", "kl_high"],
    "agreement_ci95": ["agreement_low", "agreement_high"],
    "miou_ci95": ["miou_low", "miou_high"],
    "flops_g_quartiles": ["flops_g_min", "flops_g_q1", "flops_g_median", "flops_g_q3", "flops_g_max"],
}
# Runs of one method over k must agree in these, and random merging in the seed among its options.
_SAME_MODEL = ["dtype", "n_images", "split", "among", "weights_sha256", "data_fingerprint", "code_version"]
# Runs of several methods must agree in these to be compared image by image.
_SAME_IMAGES = ["dtype", "n_images", "split", "among", "data_fingerprint", "library_version"]
# Off-the-shelf runs of several options must agree in these to be compared image by image.
SAME_WEIGHTS = ["backbone", "data", "weights_sha256", *_SAME_IMAGES]

Pair = tuple[str, str]  # a backbone and a data set


def load_runs(results_dir: Path) -> pd.DataFrame:
    """Return all finished runs, one row per run.

    ``value`` is the value of the knob, NaN if it has one for each layer. ``targets`` are the FLOPs reductions in percent
    that the knob was solved for, joined by commas, and "" if the knob was given. ``flops_g`` is the mean over images; its
    quartiles and maximum are NaN if all images cost the same. ``options`` are those that differ from the paper's, and
    ``plain`` is whether there are none; ``knobs`` are all options but the layers, as a dict.
    """
    runs = finished_runs(results_dir)
    if runs.empty:
        return pd.DataFrame(columns=_COLUMNS)
    runs = runs.reindex(columns=list(dict.fromkeys([*runs, *FAITHFULNESS, "miou", *_LISTS])))
    runs["targets"] = [",".join(f"{target:g}" for target in targets) for targets in runs.targets_reduction_pct]
    runs["k"] = pd.Series([knobs.get("k") for knobs in runs.knobs], dtype=float)
    values = [knobs.get(knob) for knobs, knob in zip(runs.knobs, runs.knob, strict=True)]
    runs["value"] = pd.Series([None if isinstance(value, list) else value for value in values], dtype=float)
    for column, names in _LISTS.items():
        # Not a list: the images have no labels, the run has no reference, or it is of an earlier version.
        runs[names] = [found if isinstance(found, list) else [math.nan] * len(names) for found in runs[column]]
    runs = runs.astype(dict.fromkeys(["top1", "top5", *FAITHFULNESS], float))
    changed = [
        changed_options(run.method, run.knobs, run.knob, run.trained or run.untrained) for run in runs.itertuples()
    ]
    runs["options"] = [" ".join(f"{name}={value}" for name, value in options.items()) for options in changed]
    runs["plain"] = runs.options == ""
    runs["layers"] = [layers if isinstance(layers, str) else ",".join(map(str, layers)) for layers in runs.layers]
    runs["tokens_by_layer"] = [",".join(map(str, tokens)) for tokens in runs.tokens_by_layer]
    return runs.sort_values(["data", "backbone", "method", "value", "run_id"], ignore_index=True).reindex(
        columns=_COLUMNS
    )


def read_published(name: str) -> pd.DataFrame:
    """Return a table of results/paper."""
    return pd.read_csv(PROJECT / "results" / "paper" / f"{name}.csv")


def pairs(runs: pd.DataFrame) -> list[Pair]:
    """Return the pairs of backbone and data set that the runs have."""
    return list(runs[["backbone", "data"]].drop_duplicates().itertuples(index=False, name=None))


def over_k(runs: pd.DataFrame, backbone: str, data: str, method: str) -> pd.DataFrame:
    """Select a method's off-the-shelf runs in layers 4, 7 and 11, one per k, with the same weights, images and code.

    All options are the paper's. A k that was solved for a target is included only if the paper has this k too. If there are
    several such series, :func:`best_set` chooses one.
    """
    plain = _plain_runs(runs, backbone, data)
    chosen = plain[
        (plain.method == method)
        & (plain.layers == "4,7,11")
        & ~plain.trained.astype(bool)
        & ((plain.targets == "") | plain.k.isin(read_published("table1").k))
    ].astype({"k": int})
    seeds = chosen.knobs.map(lambda knobs: knobs.get("seed"))
    series = [_newest(frame, ["k"]) for _, frame in chosen.groupby([*_SAME_MODEL, seeds], dropna=False)]
    return best_set(series, chosen).set_index("k").sort_index()


def at_target(runs: pd.DataFrame, backbone: str, data: str, target: float | None = None) -> pd.DataFrame:
    """Select runs solved for a FLOPs reduction in percent, or for any (None), and the unmerged run on the same images.

    All options are the paper's, and all methods without weights of their own run on the same weights. There is at most one
    run for each method, layers, training and ``target``, a column that is NaN for the unmerged run. DHTM with k = 0 is an
    unmerged run too, and its method becomes "unmerged". If there are several such sets, :func:`best_set` chooses one; unmerged
    runs alone are the last choice.
    """
    plain = _plain_runs(runs, backbone, data)
    is_unmerged = (plain.method == "unmerged") | ((plain.method == "dhtm") & (plain.k == 0))
    unmerged = plain[is_unmerged].assign(method="unmerged", layers="all", target=float("nan"))
    solved = by_target(plain[~is_unmerged])
    together = pd.concat([solved if target is None else solved[solved.target == target], unmerged], ignore_index=True)
    sets = [_on_same_weights(frame) for _, frame in together.groupby(_SAME_IMAGES, dropna=False)]
    return best_set([frame for frame in sets if frame.target.notna().any()] or sets, together)


def of_series(runs: pd.DataFrame, series: Series, untrained: bool = False) -> pd.DataFrame:
    """Select a series' runs; with ``untrained`` also those whose own parameters should have been trained and were not."""
    lacks_training = runs.untrained.astype(bool)
    matches = ((runs.trained.astype(bool) | lacks_training) == series.trained) & (untrained | ~lacks_training)
    return runs[(runs.method == series.method) & (runs.layers == series.layers) & matches]


def by_target(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each run and each FLOPs reduction in percent it was solved for, in the column ``target``."""
    rows = runs.assign(target=runs.targets.astype("string").str.split(",")).explode("target")
    return rows.assign(target=pd.to_numeric(rows.target).astype(float)).dropna(subset="target")


def _plain_runs(runs: pd.DataFrame, backbone: str, data: str) -> pd.DataFrame:
    return runs[(runs.backbone == backbone) & (runs.data == data) & runs.plain.astype(bool)]


def _newest(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    return frame.sort_values("finished").drop_duplicates(by, keep="last")


def _on_same_weights(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the newest of repeated runs on the most common weights; runs on a method's own weights always stay."""
    series = ["method", "layers", "trained", "untrained", "target"]
    newest = _newest(frame, [*series, "weights_sha256"])
    own = newest.trained.astype(bool) | newest.untrained.astype(bool)
    models = newest[~own].groupby("weights_sha256")
    if models.ngroups:
        weights, _ = max(models, key=lambda model: (len(model[1]), model[1].finished.max()))
        newest = newest[own | (newest.weights_sha256 == weights)]
    return newest.drop_duplicates(series, keep="last")


def best_set(sets: list[pd.DataFrame], otherwise: pd.DataFrame) -> pd.DataFrame:
    """Return the set to show, or ``otherwise`` if there is none.

    It prefers images that are not for training, then top-1 among all classes, float32, more images, more runs, newer runs.
    """

    def rank(frame: pd.DataFrame) -> tuple:
        first = frame.iloc[0]
        usual = first.split != "train", pd.isna(first.among), first["dtype"] == "float32"
        return *usual, first.n_images, len(frame), frame.finished.max()

    return max(sets, key=rank, default=otherwise)
