"""Equal cost: the knob found is the best of all there are, by counted FLOPs."""

import pytest
from omegaconf import OmegaConf

import dhtm
from dhtm.harness.core.errors import UnavailableError, UserError
from dhtm.harness.models.backbones import bare_backbone
from dhtm.harness.models.cost import solve
from dhtm.harness.models.methods import build_reducer
from dhtm.harness.runs.evaluate import evaluate


def target(reduction_pct=None, flops_g=None):
    return OmegaConf.create({"reduction_pct": reduction_pct, "flops_g": flops_g})


def flops(method):
    model = dhtm.patch(bare_backbone("deit_micro", 10), build_reducer(method))
    try:
        return dhtm.count_flops(model).total
    finally:
        dhtm.unpatch(model)


@pytest.mark.parametrize(("method", "reduction"), [("lotm", 20), ("tome", 30), ("sit", 30), ("dpc_knn", 55)])
def test_no_neighbouring_knob_comes_nearer(composed, method, reduction):
    config = composed(f"method={method}")
    solved, said = solve(config.backbone, config.method, target(reduction))
    assert said == pytest.approx(reduction)
    plain = dhtm.count_flops(bare_backbone("deit_micro", 10)).total
    found, step = solved[solved.knob], {"keep_rate": 0.005}.get(solved.knob, 1)
    misses = []
    for value in (found - step, found, found + step):
        near = solved.copy()
        near[solved.knob] = round(value, 3) if step < 1 else value
        misses.append(abs(flops(near) / plain - (1 - reduction / 100)))
    assert min(misses) == misses[1]
    assert misses[1] < 0.02
    assert config.method[solved.knob] != found, "the config given stays as it is"


def test_a_target_in_gflops(composed):
    config = composed("method=lotm")
    plain = dhtm.count_flops(bare_backbone("deit_micro", 10)).total
    solved, said = solve(config.backbone, config.method, target(flops_g=0.8 * plain / 1e9))
    assert said == pytest.approx(20)
    assert solved.k == solve(config.backbone, config.method, target(20))[0].k


def test_no_target_and_no_knob_leave_the_method_alone(composed):
    config = composed()
    assert solve(config.backbone, config.method, target()) == (config.method, None)
    unmerged = composed("method=unmerged").method
    assert solve(config.backbone, unmerged, target(30)) == (unmerged, None)


def test_out_of_reach_states_the_range(composed):
    config = composed("method=lotm")
    with pytest.raises(
        UnavailableError,
        match=r"target.reduction_pct=60: method=lotm in layers \[4, 7, 11\] of deit_micro reaches from 0.0% \(k=0\) to "
        r"43.5% \(k=60\)",
    ):
        solve(config.backbone, config.method, target(60))
    tome = composed("method=tome", "method.layers=[6]")
    with pytest.raises(
        UnavailableError, match=r"method=tome in layers \[6\] of deit_micro reaches from 0.0% \(r=0\) to 30.7% \(r=98\)"
    ):
        solve(tome.backbone, tome.method, target(40))  # half of the tokens, once, is all that it can do


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (target(30, 0.1), "give target.reduction_pct or target.flops_g, not both"),
        (target(-5), "target.reduction_pct=-5: give percents from 0 to 100"),
        (target(100), "target.reduction_pct=100: give percents"),
        (target("much"), "target.reduction_pct=much: give percents"),
        (target(None, -1), "target.flops_g=-1: give GFLOPs from 0"),
    ],
)
def test_what_is_no_target_is_refused(composed, wanted, message):
    config = composed()
    with pytest.raises(UserError, match=message):
        solve(config.backbone, config.method, wanted)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.layers=[4,7,13]"], r"layers=\[4, 7, 13\]: the model has layers 1 to 12"),
        (["method=k_medoids", "method.layers=all"], "reads the attention of the layer before, so it starts from 2"),
        (["backbone.architecture=resnet18"], "cannot patch a ResNet"),
    ],
)
def test_a_method_that_cannot_be_put_in_says_so(composed, overrides, message):
    config = composed(*overrides)
    with pytest.raises(UserError, match=message):
        solve(config.backbone, config.method, target(30))


def test_a_keep_rate_given_as_an_integer_is_still_a_rate(composed):
    config = composed("method=dpc_knn", "method.keep_rate=1")
    assert solve(config.backbone, config.method, target(30))[0].keep_rate == 0.79


def test_a_run_carries_target_and_reached_also_when_another_target_finds_it_done(composed, tmp_path):
    def run(*overrides):
        return evaluate(composed(f"results_dir={tmp_path}", "device=cpu", "data.limit=8", "method=lotm", *overrides))

    first = run("target.reduction_pct=20")
    assert first["targets_reduction_pct"] == pytest.approx([20])
    assert first["flops_reduction_pct"] == pytest.approx(20, abs=1)
    assert first["knob"] == "k" and first["knobs"]["k"] == 25
    second = run("target.reduction_pct=20.1")
    assert second["run_id"] == first["run_id"] and second["targets_reduction_pct"] == pytest.approx([20, 20.1])
    by_knob = run("method.k=25")
    assert by_knob == second
    assert run("method.k=3")["targets_reduction_pct"] == []
