"""The finished runs and the published numbers, as frames to make tables and figures from."""

from pathlib import Path

import pandas as pd

from dhtm.harness.store import finished_runs

PAPER = Path(__file__).parents[2] / "results" / "paper"
_COLUMNS = [
    "run_id", "backbone", "method", "k", "layers", "data", "split", "n_images", "top1", "ci_low", "ci_high", "top5",
    "flops_g", "flops_baseline_g", "flops_reduction_pct", "merge_flops_g", "params_m", "tokens_by_layer", "dtype", "device",
    "seed", "weights_sha256", "data_fingerprint", "code_version", "finished", "plain",
]  # fmt: skip
# A run belongs in the paper's tables where every option but k and the layers is the paper's, which is the default.
_DEFAULTS = {
    "connectivity": 8,
    "similarity": "cosine",
    "linkage": "mean",
    "features": "tokens",
    "proportional_attention": False,
}
# Runs that differ in one of these do not belong in one row of k.
_SAME = ["dtype", "n_images", "seed", "weights_sha256", "data_fingerprint", "code_version"]


def load_runs(results_dir: str) -> pd.DataFrame:
    """All finished runs, one row each, with k, the interval's ends, and ``plain``: are the options the paper's?"""
    runs = finished_runs(results_dir)
    if runs.empty:
        return pd.DataFrame(columns=_COLUMNS)
    runs["k"] = [knobs.get("k") for knobs in runs.knobs]
    runs["ci_low"], runs["ci_high"] = zip(*runs.top1_ci95, strict=True)
    runs["plain"] = [all(knobs.get(key, value) == value for key, value in _DEFAULTS.items()) for knobs in runs.knobs]
    runs["layers"] = [layers if isinstance(layers, str) else ",".join(map(str, layers)) for layers in runs.layers]
    runs["tokens_by_layer"] = [",".join(map(str, tokens)) for tokens in runs.tokens_by_layer]
    return runs[_COLUMNS].sort_values(["data", "backbone", "method", "k", "run_id"], ignore_index=True)


def over_k(runs: pd.DataFrame, backbone: str, data: str, method: str) -> pd.DataFrame:
    """A method's runs over k under the paper's options in layers 4, 7 and 11, all of the same weights, images and code.

    Where there are several such series, float32 goes before other dtypes, then the one of most images, then the one of
    most k, then the newest.
    """
    chosen = runs[
        (runs.backbone == backbone)
        & (runs.data == data)
        & (runs.method == method)
        & (runs.layers == "4,7,11")
        & runs.plain.astype(bool)
    ]
    series = [frame for _, frame in chosen.groupby(_SAME, dropna=False)]
    if not series:
        return chosen.set_index("k")

    def rank(frame):
        first = frame.iloc[0]
        return first["dtype"] == "float32", first.n_images, frame.k.nunique(), frame.finished.max()

    best = max(series, key=rank)
    return best.drop_duplicates("k").set_index("k").sort_index()


def published(name: str) -> pd.DataFrame:
    """A table of results/paper."""
    return pd.read_csv(PAPER / f"{name}.csv")
