"""Tests of choosing a setting: the search for the bound, the images that it uses, and its output."""

import itertools
import math
import re
import runpy

import pandas as pd
import pytest
import timm
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import baselines  # noqa: F401
import dhtm  # noqa: F401  used by the printed lines
from dhtm.harness import choose as module
from dhtm.harness import config
from dhtm.harness.choose import boundary, choose, python_line
from dhtm.harness.core.errors import UserError
from dhtm.harness.models.methods import Method
from dhtm.harness.runs.directory import predictions
from dhtm.harness.runs.metrics import faithfulness
from dhtm.report.choices import choice_table
from dhtm.report.runs import load_runs


@settings(deadline=None)
@given(start=st.integers(1, 80), last=st.integers(5, 70), per_setting=st.floats(0.3, 1.4))
def test_boundary_finds_two_neighbouring_settings(start, last, per_setting):
    """The knob takes k = 1, 2, …, last and saves ``per_setting`` percent per step; the condition holds from ``start`` on."""
    tried = []

    def holds(k):
        tried.append(k)
        return k >= start

    def at(percent):
        return round(percent / per_setting) if percent <= last * per_setting else None

    assert boundary(holds, at) == (min(start - 1, last) or None, start if start <= last else None)
    assert len(set(tried)) <= 10 + math.ceil(math.log2(10 / per_setting + 1)) + 3, "too many settings were tried"


@pytest.fixture
def coarse(monkeypatch):
    """Search settings that are 30% of the FLOPs apart, and none between them."""
    monkeypatch.setattr(module, "STEP", 30)
    monkeypatch.setattr(module, "FINEST", 30)


@pytest.fixture
def on_digits(composed, tmp_path):
    """Return a function that makes a Choice for the embedded model and 24 scenes from overrides."""
    folders = [f"{name}_dir={tmp_path}/{name}" for name in ("results", "cache", "output")]
    common = ["backbone=deit_micro", "data=digits", "data.limit=24", "device=cpu", "batch_size=8", "rounds=1", *folders]
    return lambda *overrides: config.choice(composed(*common, *overrides, config_name="choose"))


def test_choice_uses_half_of_the_images_and_the_upper_end_of_the_interval(on_digits, coarse, tmp_path, monkeypatch):
    """A setting is not chosen if the bound is between its mean and the upper end of its interval.

    A method that cannot meet the bound is reported, and does not prevent a choice for the others.
    """
    monkeypatch.setattr(module, "STEP", 20)
    frame, *_ = choose(on_digits("max_kl=100"))
    tried = frame[frame.part == "choose"].sort_values("kl")
    run_ids = load_runs(tmp_path / "results").set_index("k").run_id
    assert (frame.n_images == 12).all()
    for row in frame.itertuples():
        half = predictions(tmp_path / "results" / run_ids[row.value]).iloc[0 if row.part == "choose" else 1 :: 2]
        assert row.kl == pytest.approx(half.kl.mean()) and row.kl_high == faithfulness(half)["kl_ci95"][1]

    expected, too_high = tried.iloc[-2], tried.iloc[-1]
    assert expected.kl_high < too_high.kl < too_high.kl_high, "the test needs settings with different KL"
    choice = on_digits(f"max_kl={(too_high.kl + too_high.kl_high) / 2}", "methods=[random,dhtm]")
    frame, chosen, (miss,) = choose(choice)
    assert list(chosen) == ["dhtm"] and chosen["dhtm"].setting == expected.value
    (reported,) = frame[frame.part == "report"].itertuples()
    assert reported.value == expected.value and reported.speedup > 0 and reported.latency_ms > 0
    assert re.match(r"method=random: no setting meets max_kl=0\.\d+; nearest is kl=0\.\d+ \[.*at k = \d+ \(", miss)
    assert miss in choice_table(frame, [miss], choice).markdown()


def test_latency_bound_is_met_with_the_smallest_k(on_digits, monkeypatch):
    """One image takes 100 − k/2 ms; after the first timing, of the unmerged model, everything takes twice as long."""
    load = itertools.chain([1], itertools.repeat(2))

    def time_methods(benchmark, *images):
        ms = pd.Series([100.0, *(100 - method.options["k"] / 2 for method in benchmark.methods.values())])
        frame = pd.DataFrame({"method": ["unmerged", *benchmark.methods], "latency_speedup": 100 / ms})
        return frame.assign(latency_ms=ms * next(load), speedup=1.0, speedup_q1=1.0, speedup_q3=1.0, images_per_s=1.0)

    monkeypatch.setattr(module, "STEP", 30)
    monkeypatch.setattr(module, "time_methods", time_methods)
    _, chosen, _ = choose(on_digits("max_latency_ms=90.3", "data.limit=2"))
    assert chosen["dhtm"].setting == 20


def test_script_chooses_settings_on_a_folder_of_images(composed, photos, coarse, caplog, tmp_path):
    """Run it on eight photographs, with a bound that every setting meets."""
    folders = [f"{name}_dir={tmp_path}/{name}" for name in ("results", "cache", "output")]
    photographs = ["backbone=deit_mini", f"data.root={photos}/val"]
    small = ["rounds=1", "batch_size=2", "device=cpu", "methods=[dhtm,lotm]", "max_kl=100"]
    main = runpy.run_path(str(ROOT / "scripts/choose.py"))["main"]
    main(composed(*photographs, *folders, *small, config_name="choose"))
    frame = pd.read_csv(tmp_path / "output" / "choice.csv")
    tried, reported = (frame[frame.part == part] for part in ("choose", "report"))
    assert (frame.n_images == 4).all(), "four of the eight images are used to choose, four to report"
    assert reported.method.tolist() == ["dhtm", "lotm"]
    for row in reported.itertuples():
        (choice,) = tried[(tried.method == row.method) & tried.chosen].itertuples()
        assert choice.value == row.value
        line = rf"dhtm\.patch\(model, \S+\(k={row.value:.0f}.*\)\)"
        model = timm.create_model("deit_mini")  # noqa: F841  patched by the line
        exec(re.search(line, caplog.text).group())
    for ending in ("csv", "md", "tex", "pdf", "png"):
        assert (tmp_path / "output" / f"choice.{ending}").stat().st_size > 500


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "0 bounds: give one of max_kl=, min_agreement= and max_latency_ms="),
        (["max_kl=1", "min_agreement=99"], "2 bounds: give one of"),
        (["max_kl=1", "methods=[sit]"], "method=sit: its weights are trained with it"),
        (["max_kl=1", "methods=[unmerged]"], "method=unmerged: it has no knob"),
        (["max_latency_ms=10", "methods=[dhtm_threshold]"], "its time depends on the image"),
    ],
)
def test_invalid_choice_raises(on_digits, overrides, message):
    with pytest.raises(UserError, match=message):
        on_digits(*overrides)


def test_python_line_has_the_options_that_are_not_defaults():
    method = Method("dhtm", "dhtm.DHTM", "k", options={"k": 3, "layers": [2, 5], "linkage": "size"})
    assert python_line(method) == "dhtm.patch(model, dhtm.DHTM(k=3, layers=(2, 5), linkage='size'))"


def test_one_threshold_per_layer_is_chosen(on_digits, coarse):
    frame, chosen, _ = choose(on_digits("methods=[dhtm_threshold]", "max_kl=100", "data.limit=12"))
    assert len(chosen["dhtm_threshold"].setting) == 12
    tried = frame[frame.part == "choose"]
    assert tried.flops_reduction_pct.is_monotonic_increasing and tried.flops_reduction_pct.max() > 25
    assert "dhtm.DHTMPlus(threshold=(" in python_line(chosen["dhtm_threshold"])
