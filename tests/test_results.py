"""The committed reference run: what it shows, and that it can be had again."""

import json

import pandas as pd
import pytest
from conftest import ROOT

from dhtm.harness.backbones import load_backbone, weights_sha256
from dhtm.harness.evaluate import evaluate

EMBEDDED = ROOT / "results" / "embedded"
KS = [0, 10, 20, 30, 40, 48, 56]


@pytest.fixture(scope="module")
def committed():
    return pd.read_csv(EMBEDDED / "tables" / "runs.csv").set_index(["method", "k"])


def test_the_reference_run_is_complete_and_of_the_shipped_weights(committed):
    assert sorted(committed.index) == [(method, k) for method in ("dhtm", "random") for k in KS]
    assert set(committed.weights_sha256) == {weights_sha256(load_backbone("deit_micro", None, 10))}
    assert (committed.n_images >= 1000).all()
    for name in (
        "tables/table1.csv",
        "tables/table1.md",
        "tables/table1.tex",
        "figures/figure4.pdf",
        "figures/figure4.png",
    ):
        assert (EMBEDDED / name).exists()


def test_the_embedded_task_tells_methods_apart(committed):
    assert committed.loc[("dhtm", 0), "top1"] >= 93
    assert committed.loc[("random", 56), "ci_high"] < committed.loc[("dhtm", 56), "ci_low"]


@pytest.mark.parametrize(("method", "k"), [("dhtm", 56), ("random", 40)])
def test_a_part_of_it_again(committed, composed, tmp_path, method, k):
    metrics = evaluate(composed(f"method={method}", f"method.k={k}", "device=cpu", f"results_dir={tmp_path}"))
    reference = committed.loc[(method, k)]
    assert metrics["n_images"] == reference.n_images
    assert metrics["flops_g"] == pytest.approx(reference.flops_g, rel=1e-7)
    # Another processor rounds otherwise, and an image on the edge may fall to the other side: 4 of 2,000.
    assert metrics["top1"] == pytest.approx(reference.top1, abs=0.2)
    assert ",".join(map(str, metrics["tokens_by_layer"])) == reference.tokens_by_layer
    assert json.loads((tmp_path / metrics["run_id"] / "metrics.json").read_text()) == metrics
