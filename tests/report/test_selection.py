"""Which runs a table or figure shows, and which options are the paper's."""

import pandas as pd
import pytest
from made_up import KS, write_run, write_solved_run

from dhtm.report.page.charts import chart_data
from dhtm.report.runs import at_target, by_target, load_runs, over_k

MICRO = ("deit_micro", "digits")


def test_runs_have_the_value_of_their_knob_and_targets(tmp_path):
    write_run(tmp_path, 1, k=30)
    write_solved_run(tmp_path, 2, "dpc_knn", 12.5, trained=True)
    write_solved_run(tmp_path, 3, "sinkhorn", untrained=True, targets_reduction_pct=[30.000000000000004, 31.0])
    write_solved_run(tmp_path, 4, "unmerged")
    runs = load_runs(tmp_path).set_index("method")
    merging = runs.loc[["dhtm", "dpc_knn", "sinkhorn"]]
    assert merging.knob.tolist() == ["k", "keep_rate", "keep_rate"] and pd.isna(runs.knob["unmerged"])
    assert merging.value.tolist() == [30, 0.7, 0.7]
    assert runs.targets.to_dict() == {"dhtm": "", "dpc_knn": "12.5", "sinkhorn": "30,31", "unmerged": ""}
    rows = by_target(runs)
    assert list(zip(rows.index, rows.target, strict=True)) == [
        ("dpc_knn", 12.5),
        ("sinkhorn", 30),
        ("sinkhorn", 31),
    ]


@pytest.mark.parametrize(
    ("method", "trained", "knobs", "plain"),
    [
        ("tome", True, {"inflect": -1.0}, False),
        ("dhtm", False, {"k": 7, "backend": "torch"}, True),
        ("dpc_knn", True, {}, True),
        ("dpc_knn", True, {"weighted": False}, False),
        ("token_mergence", True, {"scales": [2, 4]}, True),
        ("token_mergence", True, {"scales": [2]}, False),
        ("own", False, {"proportional_attention": True}, True),
    ],
)
def test_runs_are_plain_only_with_the_papers_options(tmp_path, method, trained, knobs, plain):
    write_solved_run(tmp_path, 1, method, trained=trained, knobs=knobs)
    assert load_runs(tmp_path).plain.tolist() == [plain]


def test_series_over_k_has_the_papers_options_one_model_and_one_code_version(tmp_path):
    for number, k in enumerate(KS):
        write_run(tmp_path, number, k=k, top1=90.0)
        write_run(tmp_path, 20 + number, k=k, top1=91.0, code_version="3" * 64)
    changes = [
        {"k": 25, "n_images": 10}, {"knobs": {"linkage": "size"}}, {"layers": [4, 7, 10]}, {"n_images": 100},
        {"dtype": "bfloat16"}, {"weights_sha256": "4" * 64}, {"among": 7}, {"among": 7, "n_images": 5000},
    ]  # fmt: skip
    for number, changed in enumerate(changes, start=50):
        write_run(tmp_path, number, **{"k": 40, "top1": 1.0} | changed)
    (tmp_path / "0000000000000099").mkdir()  # an unfinished run
    series = over_k(load_runs(tmp_path), *MICRO, "dhtm")
    assert series.top1.to_dict() == dict.fromkeys(KS, 91.0), "the newest of the complete series"


def test_series_has_one_seed_only_if_the_method_is_random(tmp_path):
    for number, (method, k, seed) in enumerate(
        [("dhtm", 10, 3), ("dhtm", 20, 0), ("random", 10, 3), ("random", 20, 0)]
    ):
        knobs = {"seed": seed} if method == "random" else {}
        write_run(tmp_path, number, k=k, method=method, seed=seed, knobs=knobs)
    runs = load_runs(tmp_path)
    assert over_k(runs, *MICRO, "dhtm").index.tolist() == [10, 20]
    assert over_k(runs, *MICRO, "random").index.tolist() == [20]


def test_series_has_a_solved_k_only_if_the_paper_has_it(tmp_path):
    write_run(tmp_path, 1, k=10)
    write_solved_run(tmp_path, 10, "dhtm")  # k = 40
    write_solved_run(tmp_path, 11, "dhtm", 25.0, knobs={"k": 33})
    write_solved_run(tmp_path, 12, "dhtm", trained=True)
    assert over_k(load_runs(tmp_path), *MICRO, "dhtm").index.tolist() == [10, 40]


def test_runs_at_a_target_have_the_same_images_weights_and_library_version(tmp_path):
    write_solved_run(tmp_path, 1, "dhtm")
    write_solved_run(tmp_path, 2, "dhtm", layers="all")
    write_solved_run(tmp_path, 3, "dhtm", 40.0)
    write_solved_run(tmp_path, 4, "tome")
    write_solved_run(tmp_path, 5, "tome", trained=True)
    write_solved_run(tmp_path, 6, "lotm")
    write_solved_run(tmp_path, 7, "lotm")  # repeats run 6
    write_solved_run(tmp_path, 8, "sit", untrained=True, weights_sha256="9" * 64)
    write_run(tmp_path, 9, k=0)
    write_run(tmp_path, 10, k=40)  # without a target
    write_solved_run(tmp_path, 11, "k_medoids", n_images=100)
    write_solved_run(tmp_path, 12, "k_medoids", dtype="bfloat16")
    write_solved_run(tmp_path, 13, "k_medoids", data_fingerprint="5" * 64)
    write_solved_run(tmp_path, 14, "k_medoids", weights_sha256="5" * 64)
    write_solved_run(tmp_path, 22, "k_medoids", among=5)  # predicted among five classes only
    write_solved_run(tmp_path, 23, "dhtm", library_version="6" * 64)
    write_solved_run(tmp_path, 15, "dhtm", weights_sha256="5" * 64)
    write_solved_run(tmp_path, 16, "tome", knobs={"proportional_attention": False})
    write_solved_run(tmp_path, 17, "dhtm", backbone="deit_tiny")
    for number, method in enumerate(("dhtm", "tome", "lotm"), start=18):
        write_solved_run(tmp_path, number, method, n_images=500)  # newer, but fewer images
    write_solved_run(tmp_path, 21, "unmerged", n_images=50_000)  # no other run on these images
    chosen = at_target(load_runs(tmp_path), *MICRO, 30)
    numbers = {(run.method, run.layers, run.trained): int(run.run_id, 16) for run in chosen.itertuples()}
    assert numbers == {
        ("dhtm", "4,7,11", False): 1,
        ("dhtm", "all", False): 2,
        ("tome", "all", False): 4,
        ("tome", "all", True): 5,
        ("lotm", "4,7,11", False): 7,
        ("sit", "4,7,10", False): 8,
        ("unmerged", "all", False): 9,
    }
    all_targets = at_target(load_runs(tmp_path), *MICRO)
    assert len(all_targets) == len(chosen) + 1 and set(all_targets.target.dropna()) == {30, 40}


def test_charts_separate_runs_on_different_images(tmp_path):
    write_run(tmp_path, 1)
    write_run(tmp_path, 2, n_images=500, split="holdout", dtype="bfloat16")
    write_run(tmp_path, 3, among=7)
    data = chart_data(load_runs(tmp_path), pd.Series(dtype=float)).data.tolist()
    assert data[:2] == ["digits test, 2,000 images", "digits holdout, 500 images, bfloat16"]
    assert data[2] == "digits test, 2,000 images, among 7 classes"
