"""The table of DHTM with one option changed at a time."""

import numpy as np
import pytest
from made_up import write_solved_run

from dhtm.report.ablation import ablation
from dhtm.report.runs import load_runs

DEFAULTS = {"k": 40, "mass": None, "total": None, "inflect": 0.0}


def write(folder, number, kl, method="dhtm", layers=(4, 7, 11), **knobs):
    rng = np.random.default_rng(number)
    options = {"knobs": DEFAULTS | knobs, "layers": list(layers) if isinstance(layers, tuple) else layers}
    options |= {"knob": "total", "knobs": {"total": 100}} if method == "dhtm_plus" else {"knob": "k"}
    write_solved_run(folder, number, method, 40.0, correct=rng.random(200) < 0.9, kl=kl * rng.random(200), **options)


def test_each_option_is_compared_with_the_papers(tmp_path):
    write(tmp_path, 0, 1.0)
    write(tmp_path, 1, 0.5, linkage="size")
    write(tmp_path, 2, 1.0, connectivity=4)
    write(tmp_path, 3, 4.0, layers=(2, 4, 6))
    assert ablation(load_runs(tmp_path), tmp_path) is None, "too few for an ablation"
    write(tmp_path, 4, 0.1, method="dhtm_plus", layers="all")
    table = ablation(load_runs(tmp_path), tmp_path)
    rows = table.data.set_index("changed")
    assert rows.index.tolist() == rows.sort_values("kl").index.tolist()
    assert set(rows.index) == {"the paper's", "linkage=size", "connectivity=4", "layers=2,4,6", "DHTM+"}
    assert rows.kl_difference["linkage=size"] == pytest.approx(rows.kl["linkage=size"] - rows.kl["the paper's"])
    assert rows.kl_p[["linkage=size", "layers=2,4,6", "DHTM+"]].max() < 0.001 < rows.kl_p["connectivity=4"]
    assert np.isnan(rows.kl_p["the paper's"]) and (rows.kl_p_holm.dropna() >= rows.kl_p.dropna()).all()
    assert "40% fewer FLOPs" in table.markdown()
