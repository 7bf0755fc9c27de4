"""Tests of faithfulness: KL and agreement, against a plain loop over timm's model."""

import json

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from scipy.special import log_softmax

import dhtm
from dhtm.harness.core.errors import UserError
from dhtm.harness.data.scenes import Digits
from dhtm.harness.runs.directory import predictions
from dhtm.harness.runs.metrics import compare_with, faithfulness, keep


@torch.inference_mode()
def outputs_of(n_images, dtype=torch.float32, **options):
    """Return the embedded model's log-probabilities in float64, image by image; with options, those of DHTM."""
    model = timm.create_model("deit_micro", pretrained=True).eval().to(dtype)
    if options:
        dhtm.patch(model, dhtm.DHTM(**options))
    split = Digits("digits").open("test", lambda image: (torch.from_numpy(np.array(image))[None] / 255 - 0.5) / 0.5)
    logits = [model(split.dataset[i][0][None].to(dtype)).double().numpy() for i in range(n_images)]
    return log_softmax(np.concatenate(logits), axis=1)


def test_kl_and_agreement_match_a_plain_loop(evaluated, tmp_path):
    metrics = evaluated("method.k=56", "data.limit=40", "batch_size=7")
    unmerged, merged = outputs_of(40), outputs_of(40, k=56, layers=(4, 7, 11))
    kl = (np.exp(unmerged) * (unmerged - merged)).sum(axis=1)
    rows = predictions(tmp_path / "runs" / metrics["run_id"])
    assert rows.kl.to_numpy() == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert (rows.unmerged_class == unmerged.argmax(axis=1)).all()
    assert metrics["kl"] == pytest.approx(rows.kl.mean())
    assert metrics["kl_ci95"][0] < metrics["kl"] < metrics["kl_ci95"][1]
    assert metrics["agreement"] == 100 * (unmerged.argmax(axis=1) == merged.argmax(axis=1)).mean()


def test_kl_is_zero_without_merges(evaluated, tmp_path):
    for dtype in ("float32", "bfloat16"):
        metrics = evaluated("method.k=0", "data.limit=20", f"dtype={dtype}")
        assert metrics["kl"] == pytest.approx(0, abs=1e-6) and metrics["agreement"] == 100
        assert metrics["flips_won"] == metrics["flips_lost"] == 0
    runs = [json.loads(file.read_text()) for file in (tmp_path / "runs").glob("*/metrics.json")]
    unmerged = {run["dtype"]: run for run in runs if run["method"] == "unmerged"}
    assert unmerged["float32"]["kl"] == 0
    full, half = outputs_of(20), outputs_of(20, torch.bfloat16)
    kl = (np.exp(full) * (full - half)).sum(axis=1).mean()
    assert unmerged["bfloat16"]["kl"] == pytest.approx(kl, rel=0.02), "bfloat16 is compared with float32"


def test_unmerged_model_has_zero_kl_with_any_backend(evaluated):
    assert evaluated("method=unmerged", "options={backend: torch}", "data.limit=4")["kl"] == 0


def test_damaged_outputs_raise_with_the_remedy(evaluated, tmp_path):
    evaluated("method=unmerged", "data.limit=20")
    (file,) = (tmp_path / "runs").glob("*/outputs.parquet")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"{file}: missing or damaged .*method=unmerged force=true"):
        evaluated("method.k=10", "data.limit=20")
    evaluated("method=unmerged", "data.limit=20", "force=true")
    assert evaluated("method.k=10", "data.limit=20")["kl"] > 0


def test_weights_trained_with_a_method_have_no_kl(evaluated, tmp_path):
    metrics = evaluated("method=tome_trained", "target.reduction_pct=30", "data.limit=20")
    assert metrics["trained"] and not metrics["untrained"]
    assert metrics["kl"] is metrics["kl_ci95"] is metrics["agreement"] is None
    assert "kl" not in predictions(tmp_path / "runs" / metrics["run_id"])


def test_images_without_labels_have_kl_and_agreement(evaluated, photos):
    """The splits "choose" and "report" have every second image each."""
    shared = ["data=images", f"data.root={photos}/val", "backbone=deit_mini", "method.k=50"]
    metrics = evaluated(*shared)
    assert (metrics["n_images"], metrics["top1"], metrics["top5"], metrics["flips_lost"]) == (8, None, None, None)
    assert metrics["kl"] > 0 and 0 <= metrics["agreement"] <= 100
    parts = [evaluated(*shared, f"data.split={split}") for split in ("choose", "report")]
    assert [part["n_images"] for part in parts] == [4, 4]
    assert np.mean([part["kl"] for part in parts]) == pytest.approx(metrics["kl"], rel=1e-4)


def test_small_kl_over_many_classes_is_not_lost_in_rounding():
    """At 10% fewer FLOPs the KL is about 10⁻⁶ nats, which half precision would double."""
    generator, ids = torch.Generator().manual_seed(0), np.arange(64)
    unmerged, noise = (torch.randn(64, 1000, generator=generator) for _ in range(2))
    merged, best = unmerged + 0.0014 * noise, unmerged.argmax(dim=1).numpy()
    kept = keep(ids, unmerged.log_softmax(dim=1), best)["log_probabilities"]
    compare = compare_with(pd.DataFrame({"index": ids, "class_1": best, "log_probabilities": kept}))
    p, q = (log_softmax(logits.double().numpy(), axis=1) for logits in (unmerged, merged))
    expected = (np.exp(p) * (p - q)).sum(axis=1).mean()
    assert expected < 2e-6
    assert compare(ids, merged.log_softmax(dim=1), best)["kl"].mean() == pytest.approx(expected, rel=0.05)


def test_image_that_the_unmerged_run_skipped_raises():
    best = np.zeros(2, dtype=int)
    kept = keep(np.arange(2), torch.randn(2, 3).log_softmax(dim=1), best)["log_probabilities"]
    compare = compare_with(pd.DataFrame({"index": [0, 2], "class_1": best, "log_probabilities": kept}))
    with pytest.raises(UserError, match=r"image 1: the unmerged run skipped it .* method=unmerged force=true"):
        compare(np.array([0, 1]), torch.randn(2, 3).log_softmax(dim=1), best)


def test_flips_are_counted_by_the_model_that_is_right():
    classes = pd.DataFrame({"label": [0, 0, 0, 0, 0], "unmerged_class": [0, 0, 1, 1, 1], "class_1": [0, 1, 0, 2, 1]})
    metrics = faithfulness(classes.assign(kl=[0.0, 0.5, 0.5, np.nan, 0.2], correct=classes.class_1 == classes.label))
    assert (metrics["flips_won"], metrics["flips_lost"], metrics["agreement"]) == (1, 1, 40)
    assert metrics["kl"] == pytest.approx(0.3), "an image whose logits are not finite has no KL"
