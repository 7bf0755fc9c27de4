"""The table of thresholds against as many merges in every image."""

import numpy as np
import pytest
from made_up import write_solved_run

from dhtm.report.runs import load_runs
from dhtm.report.thresholds import thresholds_table

COUNTED = {"total": 72, "inflect": -1.0, "threshold": None, "max_merges": None, "linkage": "size"}


def write(folder, number, kl, method="dhtm_plus", target=30.0, **options):
    rng = np.random.default_rng(number)
    knobs = COUNTED | ({"total": None, "threshold": [0.9] * 12} if method == "dhtm_threshold" else {}) | options
    more = (
        {"knob": "threshold", "flops_g_quartiles": [0.1, 0.11, 0.12, 0.13, 0.16]} if method == "dhtm_threshold" else {}
    )
    write_solved_run(
        folder, number, method, target, knobs, **({"knob": "total"} | more), layers="all",
        correct=rng.random(200) < 0.9, kl=kl * rng.random(200),
    )  # fmt: skip


def test_pairs_differ_in_nothing_but_the_threshold(tmp_path):
    write(tmp_path, 0, 1.0)
    assert thresholds_table(load_runs(tmp_path), tmp_path) is None
    write(tmp_path, 1, 0.2, "dhtm_threshold")
    write(tmp_path, 2, 0.1, "dhtm_threshold", linkage="mean")  # has no counterpart
    write(tmp_path, 3, 0.1, "dhtm_threshold", target=40.0)  # nor has this
    table = thresholds_table(load_runs(tmp_path), tmp_path)
    counted, adaptive = table.data.itertuples()
    assert (counted.run_id, adaptive.run_id) == (f"{0:016x}", f"{1:016x}")
    assert adaptive.kl_difference == pytest.approx(adaptive.kl - counted.kl) and adaptive.kl_p < 0.001
    assert np.isnan(counted.kl_difference)
    text = table.markdown()
    assert "[0.1100, 0.1300], at most 0.1600" in text and "DHTM+, thresholds" in text
