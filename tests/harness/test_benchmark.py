"""Tests of the benchmark's tables and figures. None depends on how fast anything is."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import only
from PIL import Image
from processes import ROOT

from dhtm.harness import config
from dhtm.harness.benchmark import _peak_memory_mb, time_methods
from dhtm.harness.core.errors import UnavailableError, UserError
from dhtm.harness.models.backbones import Backbone
from dhtm.report.speed import growth, speed_figure

RUNS = ROOT / "results/embedded/tables/runs.csv"


@pytest.fixture(scope="module")
def result(script, tmp_path_factory):
    """Run scripts/benchmark.py; return its output and its output folder. DHTM cannot reach the second target, 60%."""
    folder = tmp_path_factory.mktemp("benchmark")
    completed = script(
        "benchmark", "backbone=deit_micro", "rounds=1", "batch_size=2", "device=cpu", "target.reduction_pct=[30,60]",
        *only("tome", "sit", "dhtm"), "scaling.grids=[4,6]", "scaling.ks=[5,2]",
        "scaling.batch_sizes=[2,1]", "scaling.channels=16", f"runs={RUNS}", f"output_dir={folder}",
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    return completed.stdout, folder


@pytest.fixture(scope="module")
def frame(result):
    """Return the rows of the unmerged model and of the first target, indexed by method."""
    rows = pd.read_csv(result[1] / "speed.csv").set_index("method")
    return rows[rows.target != 60]


def test_every_method_has_one_row_at_equal_flops(frame):
    assert frame.index.tolist() == ["unmerged", "tome", "sit", "dhtm"]
    merged = frame.drop("unmerged")
    assert merged.flops_reduction_pct.between(28, 32).all()
    np.testing.assert_allclose(merged.ideal_speedup, 1 / (1 - merged.flops_reduction_pct / 100), rtol=1e-6)
    assert (frame.speedup["unmerged"], frame.latency_speedup["unmerged"]) == (1, 1)
    np.testing.assert_allclose(frame.images_per_s, 2 / (frame.ms / 1000), rtol=1e-6)
    assert merged.merge_pct.between(0.1, 90).all() and np.isnan(frame.merge_pct["unmerged"])
    assert merged.trained.to_dict() == {"tome": False, "sit": True, "dhtm": False}


def test_peak_memory_is_that_of_the_tensors_held_at_once():
    """An MLP's peak is the hidden units before and after the activation. A ViT's peak grows with the batch."""
    model = torch.nn.Sequential(torch.nn.Linear(10, 1000), torch.nn.ReLU(), torch.nn.Linear(1000, 10)).eval()
    assert _peak_memory_mb(model, torch.randn(500, 10)) == pytest.approx(2 * 500 * 1000 * 4 / 1e6, rel=0.05)
    model = Backbone("deit_micro", "deit_micro", 10).bare()
    assert _peak_memory_mb(model, torch.randn(4, 1, 56, 56)) > _peak_memory_mb(model, torch.randn(2, 1, 56, 56)) > 0


def test_growth_is_the_exponent_of_a_power_law():
    n = np.array([196, 256, 576, 1024])
    times = pd.DataFrame({"varied": "n_tokens", "n_tokens": n, "merge_ms": 0.3 * n**1.25})
    assert growth(times) == pytest.approx(1.25)


def test_figure_shows_top1_and_kl_of_each_method_at_its_speedup(frame):
    committed = pd.read_csv(RUNS)
    dhtm, unmerged, sit = (committed[committed.method == name].iloc[:1] for name in ("dhtm", "unmerged", "sit"))
    dhtm = dhtm.assign(layers="4,7,11")
    rows = [dhtm.assign(targets="30", top1=90.0), dhtm.assign(targets="20", top1=10.0), unmerged.assign(top1=95.0)]
    rows.append(dhtm.assign(targets="30", top1=20.0, options="linkage=size"))
    runs = pd.concat([*rows, sit.assign(layers="4,7,10", targets="20,30", trained=True, top1=80.0)])
    runs["ci_low"], runs["ci_high"] = runs.top1 - 1, runs.top1 + 1
    top1, kl = speed_figure(frame.reset_index(), runs, "").axes
    assert points_in(top1) == {
        "unmerged": [[1, 95]],
        "DHTM": [[frame.speedup["dhtm"], 90]],
        "SiT": [[frame.speedup["sit"], 80]],
    }
    assert points_in(kl) == {"DHTM": [[frame.speedup["dhtm"], dhtm.kl.item()]]}, "trained models have no KL"


def points_in(ax):
    return {container.get_label(): container[0].get_xydata().tolist() for container in ax.containers}


def test_script_times_all_targets_and_writes_results(result):
    """A method that cannot reach a target is skipped for it. The merge is timed with N, k or the batch size varied."""
    output, folder = result
    speed, merge = (pd.read_csv(folder / f"{name}.csv") for name in ("speed", "merge"))
    at_60 = speed[speed.target == 60]
    assert at_60.method.tolist() == ["tome", "sit"] and at_60.flops_reduction_pct.tolist() == pytest.approx(
        [60] * 2, abs=2
    )
    assert merge[["varied", "n_tokens", "k", "batch_size"]].to_numpy().tolist() == [
        ["n_tokens", 16, 5, 2], ["n_tokens", 36, 5, 2], ["k", 16, 5, 2], ["k", 16, 2, 2],
        ["batch_size", 16, 5, 2], ["batch_size", 16, 5, 1],
    ]  # fmt: skip
    assert (merge[["merge_ms", "atc_ms", "scipy_ms"]] > 0).all(axis=None)
    for name in ("speed", "merge"):
        assert (folder / f"{name}.md").read_text(encoding="utf-8") in output
        assert Image.open(folder / f"{name}.png").width > 500
    environment = json.loads((folder / "environment.json").read_text())
    assert torch.__version__.startswith(environment["versions"]["torch"]) and environment["date"] >= "2026"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runs=/nowhere.csv", "runs=/nowhere.csv: Path does not point to a file"),
        ("rounds=0", "rounds=0: Input should be greater than 0"),
    ],
)
def test_invalid_option_raises(composed, override, message):
    with pytest.raises(UserError, match=message):
        config.benchmark(composed(override, config_name="benchmark"))


def test_target_that_no_method_reaches_raises(composed):
    small = ["backbone=deit_micro", "rounds=1", "batch_size=2", "device=cpu"]
    given = composed(*small, *only("dhtm"), "target.reduction_pct=90", config_name="benchmark")
    with pytest.raises(UnavailableError, match="none reaches a target"):
        time_methods(config.benchmark(given))
