"""The finished runs and the published numbers, as frames to make tables and figures from."""

from pathlib import Path

import pandas as pd

import dhtm
from dhtm.harness.runs.store import finished_runs

PAPER = Path(dhtm.__file__).parent.parent / "results" / "paper"
_COLUMNS = [
    "run_id", "backbone", "method", "k", "layers", "knob", "value", "trained", "untrained", "targets", "data", "split",
    "n_images", "top1", "ci_low", "ci_high", "top5", "flops_g", "flops_baseline_g", "flops_reduction_pct", "merge_flops_g",
    "params_m", "tokens_by_layer", "dtype", "device", "seed", "weights_sha256", "data_fingerprint", "code_version",
    "library_version", "finished", "plain",
]  # fmt: skip
# A run belongs in the paper's tables where every option but the knob and the layers is the paper's, which is the default.
_DEFAULTS = {
    "dhtm": {
        "connectivity": 8,
        "similarity": "cosine",
        "linkage": "mean",
        "features": "tokens",
        "proportional_attention": False,
    },
    "random": {"connectivity": 8},
    "tome": {"inflect": 0, "proportional_attention": True},
    "dpc_knn": {"neighbours": 5},
    "k_medoids": {"rounds": 3},
    "patch_merger": {"scale": False},
    "sinkhorn": {"epsilon": 1, "iterations": 3},
    "token_mergence": {"scales": [2, 4]},
}
# Runs that differ in one of these do not belong in one row of k.
_SAME = ["dtype", "n_images", "split", "seed", "weights_sha256", "data_fingerprint", "code_version"]
# Runs that differ in one of these cannot be compared: not image by image, or not method by method.
_COMPARABLE = ["dtype", "n_images", "split", "data_fingerprint", "library_version"]


def load_runs(results_dir: str) -> pd.DataFrame:
    """All finished runs, one row each.

    ``value`` is that of the knob; ``targets`` are the FLOPs reductions in percent that the knob was solved for, joined by
    commas, "" where it was given; ``plain``: are the options the paper's?
    """
    runs = finished_runs(results_dir)
    if runs.empty:
        return pd.DataFrame(columns=_COLUMNS)
    runs["targets"] = [",".join(f"{target:g}" for target in targets) for targets in runs.targets_reduction_pct]
    runs["k"] = pd.Series([knobs.get("k") for knobs in runs.knobs], dtype=float)
    runs["value"] = pd.Series([knobs.get(knob) for knobs, knob in zip(runs.knobs, runs.knob, strict=True)], dtype=float)
    runs["ci_low"], runs["ci_high"] = zip(*runs.top1_ci95, strict=True)
    runs["plain"] = [_plain(run.method, run.knobs, run.trained or run.untrained) for run in runs.itertuples()]
    runs["layers"] = [layers if isinstance(layers, str) else ",".join(map(str, layers)) for layers in runs.layers]
    runs["tokens_by_layer"] = [",".join(map(str, tokens)) for tokens in runs.tokens_by_layer]
    runs = runs.reindex(columns=_COLUMNS)  # library_version is younger than the rest
    return runs.sort_values(["data", "backbone", "method", "value", "run_id"], ignore_index=True)


def _plain(method: str, knobs: dict, learns: bool) -> bool:
    defaults = _DEFAULTS.get(method, {})
    if method == "dpc_knn":
        defaults = defaults | {"weighted": learns}
    return all(knobs.get(key, value) == value for key, value in defaults.items())


def over_k(runs: pd.DataFrame, backbone: str, data: str, method: str) -> pd.DataFrame:
    """A method's runs off the shelf over k under the paper's options in layers 4, 7, 11, of the same weights, images, code.

    Where there are several such series, images that are not for training go before others, then float32 before other
    dtypes, then the one of most images, of most k, the newest. A k that was solved for a target is there only if it is one
    of the paper's.
    """
    chosen = runs[
        (runs.backbone == backbone)
        & (runs.data == data)
        & (runs.method == method)
        & (runs.layers == "4,7,11")
        & runs.plain.astype(bool)
        & ~runs.trained.astype(bool)
        & ((runs.targets == "") | runs.k.isin(published("table1").k))
    ].astype({"k": int})
    series = [frame for _, frame in chosen.groupby(_SAME, dropna=False)]
    if not series:
        return chosen.set_index("k")

    def rank(frame):
        first = frame.iloc[0]
        return (
            first.split != "train",
            first["dtype"] == "float32",
            first.n_images,
            frame.k.nunique(),
            frame.finished.max(),
        )

    best = max(series, key=rank)
    return best.drop_duplicates("k").set_index("k").sort_index()


def at_target(runs: pd.DataFrame, backbone: str, data: str, target: float | None = None) -> pd.DataFrame:
    """The runs solved for a FLOPs reduction in percent (None: for any), and the unmerged one, of the same images and library.

    At most one, the newest, for each method, layers, trained or not, and ``target``, a column that is NaN for the unmerged
    run, whose method is "unmerged" here also where it is DHTM with k = 0. All options are the paper's, and all methods
    that neither are trained nor have parameters of their own run on the same weights. Where there are several such sets,
    images that are not for training go before others, then float32 before other dtypes, then the one of most images, of
    most runs, the newest.
    """
    chosen = runs[(runs.backbone == backbone) & (runs.data == data) & runs.plain.astype(bool)]
    is_unmerged = (chosen.method == "unmerged") | ((chosen.method == "dhtm") & (chosen.k == 0))
    unmerged = chosen[is_unmerged].assign(method="unmerged", layers="all", target=float("nan"))
    aimed = chosen[~is_unmerged].assign(target=chosen.targets.str.split(",")).explode("target")
    aimed = aimed.assign(target=pd.to_numeric(aimed.target)).dropna(subset="target")
    together = pd.concat([aimed if target is None else aimed[aimed.target == target], unmerged], ignore_index=True)
    sets = [_of_one_model(frame) for _, frame in together.groupby(_COMPARABLE, dropna=False)]
    if not sets:
        return together

    def rank(frame):
        first = frame.iloc[0]
        aimed = frame.target.notna().any()  # unmerged runs alone compare nothing
        return (
            aimed, first.split != "train", first["dtype"] == "float32", first.n_images, len(frame), frame.finished.max(),
        )  # fmt: skip

    return max(sets, key=rank)


def _of_one_model(frame: pd.DataFrame) -> pd.DataFrame:
    """Without runs of other weights than most, but for those that have weights of their own, and without repeated ones."""
    series = ["method", "layers", "trained", "target"]
    newest = frame.sort_values("finished").drop_duplicates([*series, "weights_sha256"], keep="last")
    alone = newest.trained.astype(bool) | newest.untrained.astype(bool)
    models = newest[~alone].groupby("weights_sha256")
    if models.ngroups:
        weights, _ = max(models, key=lambda model: (len(model[1]), model[1].finished.max()))
        newest = newest[alone | (newest.weights_sha256 == weights)]
    return newest.drop_duplicates(series, keep="last")


def published(name: str) -> pd.DataFrame:
    """A table of results/paper."""
    return pd.read_csv(PAPER / f"{name}.csv")
