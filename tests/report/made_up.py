"""Write run directories with made-up numbers, in the form that the harness writes."""

import hashlib
import json

import numpy as np
import pandas as pd

from dhtm.harness.runs.dense import segmentation
from dhtm.harness.runs.metrics import faithfulness
from dhtm.report import table1

KS = [0, 10, 20, 30, 40, 48, 56]


def stub_gflops(monkeypatch):
    """Give Table 1 made-up GFLOPs, because counting those of DeiT takes seconds."""

    def gflops(backbone, ks):
        return {layers: [len(backbone) - k * sum(layers) / 1000 for k in ks] for layers in table1.SCHEDULES}

    monkeypatch.setattr(table1, "gflops", gflops)


def write_run(folder, number, correct=None, groups=None, kl=None, confusion=None, **changes):
    """Write the metrics.json of a finished run and, if ``correct`` is given (one bool per image), its predictions.

    ``kl`` is one number per image, or their mean if there are no predictions. ``changes`` replace entries of metrics.json.
    """
    k, knobs = changes.pop("k", 40), changes.pop("knobs", {})
    if changes.get("method", "dhtm") in ("dhtm", "random"):
        options = {"connectivity": 8, "similarity": "cosine", "linkage": "mean", "features": "tokens"}
        knobs = {"k": k, **options, "proportional_attention": False, "backend": "auto"} | knobs
    metrics = {
        "run_id": f"{number:016x}", "experiment": None, "backbone": "deit_micro", "method": "dhtm", "knobs": knobs,
        "knob": "k", "trained": False, "untrained": False, "targets_reduction_pct": [],
        "layers": [4, 7, 11], "data": "digits", "split": "test", "n_images": 2000, "n_failed": 0, "top1": 90.0,
        "top1_ci95": [89.0, 91.0], "top5": 99.0, "flops_g": 0.17 - k / 1000, "flops_baseline_g": 0.17,
        "flops_reduction_pct": 100 * k / 170, "merge_flops_g": 0.0, "params_m": 0.6, "tokens_by_layer": [196, 156],
        "dtype": "float32", "device": "cpu", "seed": 0, "weights_sha256": "0" * 64, "data_fingerprint": "1" * 64,
        "code_version": "2" * 64, "library_version": "5" * 64, "versions": {},
        "finished": f"2026-01-01T00:{number % 60:02d}:00+00:00",
    }  # fmt: skip
    if correct is None and kl is not None:
        changes = {"kl": kl, "kl_ci95": [0.9 * kl, 1.1 * kl]} | changes
    path = folder / metrics["run_id"]
    path.mkdir(parents=True)
    if correct is not None:
        file = path / "predictions.parquet"
        frame = predictions_frame(correct, groups).reset_index(names="index")
        if kl is not None:
            frame = frame.assign(kl=kl, unmerged_class=frame.label)
            changes = faithfulness(frame) | changes
        if confusion is not None:
            frame["confusion"] = list(confusion)
            changes = segmentation(frame) | changes
        frame.to_parquet(file, index=False)
        metrics["predictions_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        changes = {"n_images": len(correct), "top1": 100 * np.mean(correct)} | changes
    (path / "metrics.json").write_text(json.dumps(metrics | changes))


def predictions_frame(correct, groups=None):
    """Return predictions of images 0, 1, 2, … in the form in which the harness reads them."""
    correct = np.array(correct, dtype=bool)
    labels = np.arange(len(correct)) % 10
    best = {f"class_{place}": np.where(correct, labels, labels + 1) + place - 1 for place in range(1, 6)}
    frame = pd.DataFrame({"label": labels, **best, "correct": correct})
    return frame if groups is None else frame.assign(group=groups)


def write_solved_run(folder, number, method, target=30.0, knobs=None, **changes):
    """Write a finished run whose knob was solved for ``target`` percent fewer FLOPs; "unmerged" has no knob."""
    trained = changes.get("trained", False)
    knob = {"dhtm": "k", "lotm": "k", "tome": "r", "unmerged": None}.get(method, "keep_rate")
    options = {"tome": {"proportional_attention": True, "inflect": 0.0}, "dpc_knn": {"weighted": trained}}
    metrics = {
        "method": method,
        "knob": knob,
        "knobs": {knob or "k": {"k": 40, "r": 8, "keep_rate": 0.7, None: 0}[knob]}
        | options.get(method, {})
        | (knobs or {}),
        "layers": {"dhtm": [4, 7, 11], "lotm": [4, 7, 11], "tome": "all", "unmerged": "all"}.get(method, [4, 7, 10]),
        "trained": trained,
        "targets_reduction_pct": [target] if knob else [],
        "flops_reduction_pct": target + 0.25 if knob else 0.0,
        "weights_sha256": method if trained else "0" * 64,
    }
    write_run(folder, number, **metrics | changes)
