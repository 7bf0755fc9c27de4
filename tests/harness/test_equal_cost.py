"""Tests of solving a method's knob for a target in counted FLOPs."""

import dataclasses

import pytest
import torch

import dhtm
from dhtm.harness import config
from dhtm.harness.core.errors import UnavailableError, UserError
from dhtm.harness.data.scenes import scenes
from dhtm.harness.models.backbones import Backbone
from dhtm.harness.models.cost import Target, solve, solve_thresholds

MICRO = Backbone("deit_micro", "deit_micro", 10)
BASELINE_FLOPS = dhtm.count_flops(MICRO.bare()).total


@pytest.fixture
def method(composed):
    """Return a function that makes a method from its name and overrides."""
    return lambda name, *overrides: config.evaluation(composed(f"method={name}", *overrides)).method


@pytest.mark.parametrize(
    ("name", "overrides", "step"),
    [("tome", [], 1), ("dpc_knn", ["method.layers=[2]", "method.keep_rate=1"], 0.005)],  # the integer 1 is a rate too
)
def test_solved_knob_is_nearest_to_the_target(method, name, overrides, step):
    """Compare it with the two neighbouring settings, in timm's smallest ViT."""
    backbone = Backbone("test_vit", "test_vit", 10)

    def flops(candidate):
        return dhtm.count_flops(candidate.put_into(backbone.bare(), "test_vit") if candidate else backbone.bare()).total

    given, baseline = method(name, *overrides), flops(None)
    solved, target_pct = solve(backbone, given, Target(reduction_pct=30))
    assert target_pct == pytest.approx(30)
    misses = []
    for value in (solved.setting - step, solved.setting, solved.setting + step):
        neighbour = dataclasses.replace(solved, options=solved.options | {solved.knob: round(value, 3)})
        misses.append(abs(flops(neighbour) / baseline - 0.7))
    assert min(misses) == misses[1] < 0.02
    assert given == method(name, *overrides) != solved, "the given method is unchanged"


def test_thresholds_meet_a_target_on_average_over_images(method):
    images = torch.from_numpy(scenes("train", range(16))[0])[:, None].float() / 127.5 - 1
    found, target_pct = solve_thresholds(
        MICRO, MICRO.load(), method("dhtm_threshold"), Target(reduction_pct=40), images
    )
    assert target_pct == 40
    model = found.put_into(MICRO.load(), "deit_micro")
    with torch.no_grad():
        model(images)
    tokens = torch.stack([dhtm.regions(model, layer).n_tokens_of_images for layer in range(1, 13)], dim=1)
    total, _ = dhtm.count_flops_of_images(model, tokens)
    assert 100 * (1 - total.double().mean() / BASELINE_FLOPS) == pytest.approx(40, abs=1)
    with pytest.raises(UserError, match="depend on the images"):
        solve(MICRO, found, Target(reduction_pct=40))


def test_target_in_gflops_gives_the_same_knob_as_in_percent(method):
    solved, target_pct = solve(MICRO, method("lotm"), Target(flops_g=0.8 * BASELINE_FLOPS / 1e9))
    assert target_pct == pytest.approx(20)
    assert solved == solve(MICRO, method("lotm"), Target(reduction_pct=20))[0]


def test_method_without_target_or_knob_is_unchanged(method):
    for name, target in (("dhtm", Target()), ("unmerged", Target(reduction_pct=30))):
        assert solve(MICRO, method(name), target) == (method(name), None)


def test_target_out_of_reach_raises_with_the_range(method):
    message = r"target.reduction_pct=60: method=lotm in layers \[4, 7, 11\] of .* from 0.0% \(k=0\) to 43.5% \(k=60\)"
    with pytest.raises(UnavailableError, match=message):
        solve(MICRO, method("lotm"), Target(reduction_pct=60))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["target.reduction_pct=30", "target.flops_g=0.1"], "give target.reduction_pct or target.flops_g, not both"),
        (["target.reduction_pct=-5"], "target.reduction_pct=-5: Input should be greater than or equal to 0"),
        (["target=30"], "target=30: it has keys of its own, set target.KEY=VALUE"),
        (["target.reduction_pct=30", "method.layers=[4,7,13]"], r"layers=\[4, 7, 13\]: the model has layers 1 to 12"),
        (["target.reduction_pct=30", "backbone.architecture=resnet18"], "cannot patch a ResNet"),
    ],
)
def test_invalid_target_or_model_raises(composed, overrides, message):
    with pytest.raises(UserError, match=message):
        config.evaluation(composed(*overrides)).method.reducer()


def test_run_records_every_target_that_it_was_solved_for(evaluated):
    lotm = ["data.limit=8", "method=lotm"]
    first = evaluated(*lotm, "target.reduction_pct=20")
    assert first["targets_reduction_pct"] == pytest.approx([20])
    assert first["flops_reduction_pct"] == pytest.approx(20, abs=1)
    assert first["knob"] == "k" and first["knobs"]["k"] == 25
    second = evaluated(*lotm, "target.reduction_pct=20.1")
    assert second["run_id"] == first["run_id"] and second["targets_reduction_pct"] == pytest.approx([20, 20.1])
    assert evaluated(*lotm, "method.k=25") == second
    assert evaluated(*lotm, "method.k=25", "force=true")["targets_reduction_pct"] == second["targets_reduction_pct"]
    assert evaluated(*lotm, "method.k=3")["targets_reduction_pct"] == []
