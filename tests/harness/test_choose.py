"""Choosing a setting: where a bound is met, on which images, and what a user gets."""

import re

import pandas as pd
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import baselines  # noqa: F401
import dhtm  # noqa: F401  the printed line uses it
from dhtm.harness.choose import boundary, python_line
from dhtm.harness.models.methods import Method


@settings(deadline=None)
@given(st.floats(0, 100), st.integers(1, 9))
def test_the_boundary_is_where_the_condition_begins_to_hold(start, n_points):
    asked = []

    def holds(x):
        asked.append(x)
        return x >= start

    points = [10.0 * (i + 1) for i in range(n_points)]
    below, above = boundary(holds, points)
    assert below is None or not holds(below)
    assert above is None or holds(above)
    if points[0] <= start <= points[-1]:
        assert below <= start <= above or above - start <= 0.5
        assert above - below <= 0.5
    if start > points[-1]:
        assert (below, above) == (points[-1], None)
    assert len(asked) <= n_points + 5 + 2


@pytest.fixture
def chosen(script, photos, tmp_path):
    """Run scripts/choose.py on eight photographs with a model of random weights."""
    torch.manual_seed(0)
    model = timm.create_model("deit_mini", num_classes=10)
    torch.nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), tmp_path / "mini.safetensors")
    places = [f"{name}_dir={tmp_path}/{name}" for name in ("results", "cache", "output")]

    def run(*overrides):
        backbone = ["backbone=deit_mini", f"backbone.checkpoint={tmp_path}/mini.safetensors"]
        return script("choose", *backbone, f"data.root={photos}/val", *places, "rounds=1", "device=cpu", *overrides)

    return run


def test_several_methods_side_by_side(chosen, tmp_path):
    result = chosen("method=dhtm,lotm", "max_kl=0.01")
    assert result.returncode == 0, result.stderr
    frame = pd.read_csv(tmp_path / "output" / "choice.csv")
    tried, reported = (frame[frame.split == split] for split in ("choose", "report"))
    assert (frame.n_images == 4).all(), "half of the eight choose, the other half reports"
    assert set(reported.method) == {"dhtm", "lotm"}
    for row in reported.itertuples():
        of_method = tried[tried.method == row.method]
        (choice,) = of_method[of_method.chosen].itertuples()
        assert choice.value == row.value and choice.kl_high <= 0.01
        assert of_method.flops_reduction_pct[of_method.kl_high <= 0.01].max() == choice.flops_reduction_pct
        line = rf"dhtm\.patch\(model, \S+\(k={row.value:.0f}.*\)\)"
        model = timm.create_model("deit_mini")  # noqa: F841  the line patches it
        exec(re.search(line, result.stdout).group())
    assert (tmp_path / "output" / "choice.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "0 bounds: give one of max_kl=, min_agreement= and max_latency_ms="),
        (["max_kl=1", "min_agreement=99"], "2 bounds: give one of"),
        (["max_kl=-1"], "max_kl=-1: "),
        (["min_agreement=99"], "no setting of any method meets the bound"),
        (["max_kl=1", "method=sit"], "method=sit: no weights trained for sit_keep_rate_"),
        (["max_kl=1", "data.root=/nowhere"], "data.root=/nowhere: no such directory"),
    ],
)
def test_mistakes_get_one_line(chosen, overrides, message):
    result = chosen(*overrides)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr


@pytest.mark.parametrize(
    ("method", "line"),
    [
        (Method("dhtm", "dhtm.DHTM", "k", options={"k": 37}), "dhtm.patch(model, dhtm.DHTM(k=37))"),
        (
            Method("dhtm", "dhtm.DHTM", "k", options={"k": 3, "layers": [2, 5], "linkage": "size"}),
            "dhtm.patch(model, dhtm.DHTM(k=3, layers=(2, 5), linkage='size'))",
        ),
        (Method("tome", "baselines.ToMe", "r", options={"r": 8}), "dhtm.patch(model, baselines.ToMe(r=8))"),
    ],
)
def test_the_line_of_python_has_the_options_that_are_not_defaults(method, line):
    assert python_line(method) == line
    model = timm.create_model("deit_mini")  # noqa: F841  the line patches it
    exec(line)
