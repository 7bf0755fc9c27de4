"""Check that the committed results are complete, and that some of their rows are reproduced."""

import os
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

from dhtm.harness import config as door
from dhtm.harness.models.backbones import Backbone, weights_sha256
from dhtm.harness.models.weights import load_model

EMBEDDED = ROOT / "results" / "embedded"
PHOTOGRAPHS = ROOT / "results" / "imagenette"
KS = [0, 10, 20, 30, 40, 48, 56]


@pytest.fixture(scope="module")
def committed():
    return pd.read_csv(EMBEDDED / "tables" / "runs.csv", keep_default_na=False, na_values=[""])


def test_reference_runs_are_complete_and_use_the_shipped_weights(committed):
    over_k = committed[(committed.layers == "4,7,11") & committed.k.isin(KS)].set_index(["method", "k"])
    assert {(method, k) for method in ("dhtm", "random") for k in KS} <= set(over_k.index)
    shipped = weights_sha256(Backbone("deit_micro", "deit_micro", num_classes=10).load())
    assert set(committed.weights_sha256[~committed.trained]) == {shipped}
    assert not committed.untrained.any()
    assert over_k.loc[("random", 56), "ci_high"] < over_k.loc[("dhtm", 56), "ci_low"], "the task distinguishes methods"


def test_rows_of_table_2_are_complete_and_at_equal_flops():
    table = pd.read_csv(EMBEDDED / "tables" / "table2.csv").query("data == 'digits' and target == 30")
    rows = table.set_index("method")
    assert len(rows) >= 13 and rows.top1.notna().all()
    assert rows.drop("unmerged").flops_reduction_pct.between(28.5, 31.5).all()
    assert rows.drop(["unmerged", "DHTM"]).p.between(0, 1).all()


def test_row_of_the_embedded_task_is_reproduced(committed, evaluated):
    metrics = evaluated("method=dhtm", "method.k=56")
    rows = committed[(committed.method == "dhtm") & (committed.layers == "4,7,11")]
    reference = rows.set_index("k").loc[56]
    assert metrics["n_images"] == reference.n_images
    assert metrics["flops_g"] == pytest.approx(reference.flops_g, rel=1e-7)
    assert ",".join(map(str, metrics["tokens_by_layer"])) == reference.tokens_by_layer
    # Processors round differently, which may change the class of images at the decision boundary: up to 4 of 2,000.
    assert metrics["top1"] == pytest.approx(reference.top1, abs=0.2)
    assert metrics["agreement"] == pytest.approx(reference.agreement, abs=0.2)
    assert metrics["kl"] == pytest.approx(reference.kl, rel=0.05)


def test_rows_of_trained_methods_use_the_shipped_weights(committed, composed, tmp_path):
    """Load them with an empty checkpoints_dir, so that weights trained in this checkout are ignored."""
    run = door.evaluation(composed("method=sit", "target.reduction_pct=30"))
    model, weights = load_model(run.backbone, run.method, tmp_path)
    rows = committed[(committed.method == "sit") & (committed.value == run.method.setting)]
    assert weights is not None and set(rows.weights_sha256) == {weights_sha256(model)}


def test_row_of_imagenette_is_reproduced(evaluated):
    """Reproduce the cheapest row, if Imagenette is available: IMAGENETTE=DIR gives its folder."""
    folder = Path(os.environ.get("IMAGENETTE", ROOT / "data" / "imagenette"))
    if not (folder / "val").is_dir():
        pytest.skip(f"{folder}/val is missing: set IMAGENETTE to the folder that holds Imagenette's train/ and val/")
    runs = pd.read_csv(PHOTOGRAPHS / "tables" / "runs.csv", dtype={"targets": str})
    reference = runs[(runs.method == "tome") & (runs.targets == "60")].iloc[0]
    overrides = ["backbone=deit_mini", "data=imagenette", f"data.root={folder}", "method=tome"]
    metrics = evaluated(*overrides, f"method.r={reference.value:.0f}")
    assert metrics["n_images"] == reference.n_images == 3925
    assert metrics["weights_sha256"] == reference.weights_sha256
    assert metrics["top1"] == pytest.approx(reference.top1, abs=0.2)
    assert metrics["kl"] == pytest.approx(reference.kl, rel=0.05)
