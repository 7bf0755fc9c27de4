"""The benchmark writes what it says; how fast anything is, no test judges."""

import json

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image

from dhtm.harness.benchmark import _peak_memory_mb, benchmark, check, scaling
from dhtm.harness.core.errors import UserError
from dhtm.report.speed import growth, speed_figure

FAST = ["backbone=deit_micro", "rounds=2", "batch_size=2", "device=cpu"]
SMALL = ["scaling.grids=[4,6]", "scaling.ks=[5,2]", "scaling.batch_sizes=[2,1]", "scaling.channels=16"]


@pytest.fixture(scope="module")
def frame(composed):
    dropped = [f"~methods.{name}" for name in ("sinkhorn", "token_mergence", "random", "dpc_knn")]
    return benchmark(composed(*FAST, *dropped, config_name="benchmark")).set_index("method")


def test_a_row_for_every_method_at_the_same_cost(frame):
    assert frame.index.tolist() == ["unmerged", "tome", "lotm", "k_medoids", "patch_merger", "sit", "dhtm"]
    merged = frame.drop("unmerged")
    assert merged.flops_reduction_pct.between(28, 32).all()
    np.testing.assert_allclose(merged.ideal_speedup, 1 / (1 - merged.flops_reduction_pct / 100))
    assert (frame.speedup["unmerged"], frame.latency_speedup["unmerged"]) == (1, 1)
    np.testing.assert_allclose(frame.images_per_s, 2 / (frame.ms / 1000))
    assert merged.merge_pct.between(0.1, 90).all() and np.isnan(frame.merge_pct["unmerged"])
    assert merged.trained[["patch_merger", "sit"]].all() and not merged.trained[["tome", "dhtm"]].any()


def test_peak_memory_is_that_of_the_largest_tensors():
    """Of an MLP in evaluation: its input, the hidden units before and after the activation; then those and the output."""
    model = torch.nn.Sequential(torch.nn.Linear(10, 1000), torch.nn.ReLU(), torch.nn.Linear(1000, 10)).eval()
    images = torch.randn(500, 10)
    assert _peak_memory_mb(model, images) == pytest.approx(2 * 500 * 1000 * 4 / 1e6, rel=0.05)


def test_more_tokens_take_more_memory(frame):
    model = timm.create_model("deit_micro").eval()
    assert _peak_memory_mb(model, torch.randn(4, 1, 56, 56)) > _peak_memory_mb(model, torch.randn(2, 1, 56, 56)) > 0


def test_scaling_varies_one_thing_at_a_time(composed):
    grown = scaling(composed(*FAST, *SMALL, config_name="benchmark"))
    assert grown[["varied", "n_tokens", "k", "batch_size"]].to_numpy().tolist() == [
        ["n_tokens", 16, 5, 2], ["n_tokens", 36, 5, 2], ["k", 16, 5, 2], ["k", 16, 2, 2],
        ["batch_size", 16, 5, 2], ["batch_size", 16, 5, 1],
    ]  # fmt: skip
    assert (grown.merge_ms > 0).all() and (grown.scipy_ms > 0).all()


def test_growth_is_the_exponent():
    n = np.array([196, 256, 576, 1024])
    grown = pd.DataFrame({"varied": "n_tokens", "n_tokens": n, "merge_ms": 0.3 * n**1.25})
    assert growth(grown) == pytest.approx(1.25)


def test_the_figure_has_each_method_at_its_speed_and_top1(frame):
    rows = [
        ("dhtm", False, "4,7,11", "30", 90.0),
        ("dhtm", False, "4,7,11", "20", 10.0),
        ("unmerged", False, "all", None, 95.0),
    ]
    rows.append(("sit", True, "4,7,10", "20,30", 80.0))
    runs = pd.DataFrame(rows, columns=["method", "trained", "layers", "targets", "top1"])
    runs["ci_low"], runs["ci_high"] = runs.top1 - 1, runs.top1 + 1
    (ax,) = speed_figure(frame.reset_index(), runs, 30, "").axes
    points = {container.get_label(): container[0].get_xydata()[0].tolist() for container in ax.containers}
    assert points == {
        "unmerged": [1, 95],
        "DHTM": [frame.speedup["dhtm"], 90],
        "SiT": [frame.speedup["sit"], 80],
    }


def test_the_script_writes_tables_figures_and_the_machine(script, tmp_path):
    dropped = [f"~methods.{name}" for name in ("sinkhorn", "token_mergence", "random", "dpc_knn", "lotm", "sit")]
    result = script("benchmark", *FAST, *SMALL, *dropped, f"output_dir={tmp_path}/new")
    assert result.returncode == 0, result.stderr
    for name in ("speed", "merge"):
        assert (tmp_path / f"new/{name}.md").read_text(encoding="utf-8") in result.stdout
        assert len(pd.read_csv(tmp_path / f"new/{name}.csv")) >= 5
        assert Image.open(tmp_path / f"new/{name}.png").width > 500
    machine = json.loads((tmp_path / "new/environment.json").read_text())
    assert torch.__version__.startswith(machine["versions"]["torch"]) and machine["date"] >= "2026"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=0", "rounds=0: it must be an integer from 1"),
        ("dtype=int8", "dtype=int8: choose"),
        ("scaling.grids=[]", r"scaling.grids=\[\]: it must be a list of integers from 2"),
        ("scaling.ks=[196]", r"scaling.ks=\[196\]: each must be below the tokens of the smallest"),
        ("scaling.channels=0", "channels=0: it must be an integer from 1"),
        ("device=nowhere", "device=nowhere: not to be had"),
    ],
)
def test_bad_options(composed, override, message):
    with pytest.raises(UserError, match=message):
        check(composed("backbone=deit_micro", override, config_name="benchmark"))
