"""Tables and figures from run directories, published numbers beside ours."""

import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
import timm
from conftest import ROOT
from PIL import Image

import dhtm
from dhtm.harness.core.errors import UserError
from dhtm.harness.runs.store import predictions
from dhtm.report import table1 as table1_module
from dhtm.report.figure4 import COMPARED, figure4
from dhtm.report.report import report
from dhtm.report.runs import at_target, load_runs, over_k, published
from dhtm.report.style import BACKBONES, METHODS

KS = [0, 10, 20, 30, 40, 48, 56]


def finished_run(folder, number, correct=None, **changes):
    """A finished run's metrics.json with made-up figures; with its predictions where ``correct`` has a bool an image."""
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
        "code_version": "2" * 64, "library_version": "5" * 64, "finished": f"2026-01-01T00:{number % 60:02d}:00+00:00",
    }  # fmt: skip
    path = folder / metrics["run_id"]
    path.mkdir(parents=True)
    if correct is not None:
        correct = np.array(correct, dtype=bool)
        labels = np.arange(len(correct)) % 10
        frame = pd.DataFrame({"index": np.arange(len(correct)), "label": labels, "correct": correct})
        frame["top5"] = [list(range(first, first + 5)) for first in np.where(correct, labels, labels + 1)]
        frame.to_parquet(path / "predictions.parquet", index=False)
        changes = {"n_images": len(correct), "top1": 100 * correct.mean()} | changes
    (path / "metrics.json").write_text(json.dumps(metrics | changes))


def aimed_run(folder, number, method, target=30.0, knobs=None, **changes):
    """A finished run whose knob was solved for a target, with what the harness writes of it; "unmerged" has no knob."""
    trained = changes.get("trained", False)
    knob = {"dhtm": "k", "lotm": "k", "tome": "r", "unmerged": None}.get(method, "keep_rate")
    options = {"tome": {"proportional_attention": True, "inflect": 0.0}, "dpc_knn": {"weighted": trained}}.get(
        method, {}
    )
    new = {
        "method": method,
        "knob": knob,
        "knobs": {knob or "k": {"k": 40, "r": 8, "keep_rate": 0.7, None: 0}[knob]} | options | (knobs or {}),
        "layers": {"dhtm": [4, 7, 11], "lotm": [4, 7, 11], "tome": "all", "unmerged": "all"}.get(method, [4, 7, 10]),
        "trained": trained,
        "untrained": False,
        "targets_reduction_pct": [target] if knob else [],
        "flops_reduction_pct": target + 0.25 if knob else 0.0,
        "weights_sha256": method if trained else "0" * 64,
    }
    finished_run(folder, number, **new | changes)


@pytest.fixture
def closed_form_flops(monkeypatch):
    """FLOPs of DeiT without tracing it 42 times."""
    monkeypatch.setattr(
        table1_module, "gflops", lambda architecture, k, layers: len(architecture) - k * sum(layers) / 1000
    )


@pytest.fixture
def report_config(composed, tmp_path):
    return composed(f"results_dir={tmp_path}/runs", f"output_dir={tmp_path}/out", config_name="report")


def test_flops_of_the_published_backbones_are_counted():
    model = dhtm.patch(timm.create_model("deit_tiny_patch16_224"), dhtm.DHTM(k=48, layers=(4, 7, 10)))
    expected = dhtm.count_flops(model).total / 1e9
    assert table1_module.gflops("deit_tiny_patch16_224", 48, (4, 7, 10)) == expected == pytest.approx(0.81, rel=0.01)


@pytest.mark.usefixtures("closed_form_flops")
def test_without_imagenet_there_are_dashes_and_nothing_is_taken_from_the_paper(report_config, tmp_path):
    for number, k in enumerate(KS):
        finished_run(tmp_path / "runs", number, k=k)
        finished_run(tmp_path / "runs", 100 + number, k=k, method="random", top1=80.0, top1_ci95=[79.0, 81.0])
    report(report_config)
    table = pd.read_csv(tmp_path / "out/tables/table1.csv")
    deit = table[table.data == "imagenet"]
    assert len(deit) == 21
    assert deit.top1.isna().all()
    assert deit.top1_difference.isna().all()
    micro = table[table.backbone == "deit_micro"]
    assert micro.k.tolist() == KS
    assert (micro.top1 == 90).all()
    text = (tmp_path / "out/tables/table1.md").read_text()
    assert "|  40 |               71.66 |              – |          – |               0.88 |" in text
    assert "90.00 [89.00, 91.00]" in text
    assert "these are the figures of k = 48" in text
    assert r"\toprule" in (tmp_path / "out/tables/table1.tex").read_text()
    assert "_" not in (tmp_path / "out/tables/table1.tex").read_text().replace(r"\_", "")
    assert len(pd.read_csv(tmp_path / "out/tables/runs.csv")) == 14
    picture = np.asarray(Image.open(tmp_path / "out/figures/figure4.png").convert("RGB"))
    for method in COMPARED:
        _, colour, _ = METHODS[method]
        rgb = np.array([round(255 * c) for c in matplotlib.colors.to_rgb(colour)])
        assert (abs(picture.astype(int) - rgb).max(-1) < 4).sum() > 50, "each method is drawn in its colour"
    assert (tmp_path / "out/figures/figure4.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.usefixtures("closed_form_flops")
def test_imagenet_runs_stand_beside_the_published_numbers(report_config, tmp_path):
    finished_run(
        tmp_path / "runs",
        1,
        k=40,
        backbone="deit_small",
        data="imagenet",
        top1=79.40,
        top1_ci95=[79.05, 79.75],
        n_images=50000,
    )
    report(report_config)
    table = pd.read_csv(tmp_path / "out/tables/table1.csv").set_index(["backbone", "k"])
    row = table.loc["deit_small", 40]
    assert row.top1_difference == pytest.approx(-0.06)
    assert row.published_top1 == 79.46
    text = (tmp_path / "out/tables/table1.md").read_text()
    assert "DeiT-Small on ImageNet-1K, 50,000 images" in text
    assert "79.40 [79.05, 79.75]" in text
    assert "−0.06" in text


@pytest.mark.usefixtures("closed_form_flops")
def test_a_report_without_runs_has_the_papers_part(report_config, tmp_path):
    with pytest.raises(UserError, match=r"runs: no such directory; evaluate something first"):
        report(report_config)
    (tmp_path / "runs").mkdir()
    report(report_config)
    assert len(pd.read_csv(tmp_path / "out/tables/table1.csv")) == 21
    assert pd.read_csv(tmp_path / "out/tables/table2.csv").top1.isna().all()
    assert (tmp_path / "out/figures/figure1.pdf").exists()


def test_only_runs_under_the_papers_options_are_shown(tmp_path):
    runs = tmp_path / "runs"
    finished_run(runs, 1, k=40, top1=90.0)
    finished_run(runs, 2, k=40, top1=1.0, knobs={"linkage": "size"})
    finished_run(runs, 3, k=40, top1=2.0, layers=[4, 7, 10])
    finished_run(runs, 4, k=40, top1=3.0, n_images=100)
    finished_run(runs, 5, k=40, top1=4.0, dtype="bfloat16")
    (runs / "0000000000000006").mkdir()  # an unfinished run
    assert over_k(load_runs(str(runs)), "deit_micro", "digits", "dhtm").top1.to_dict() == {40: 90.0}


def test_a_series_over_k_is_of_one_model_and_one_code(tmp_path):
    for number, k in enumerate(KS):
        finished_run(tmp_path, number, k=k, top1=90.0)
        finished_run(tmp_path, 20 + number, k=k, top1=91.0, code_version="3" * 64)
    finished_run(tmp_path, 50, k=40, top1=1.0, weights_sha256="4" * 64)
    finished_run(tmp_path, 51, k=25, top1=2.0, n_images=10)
    series = over_k(load_runs(str(tmp_path)), "deit_micro", "digits", "dhtm")
    assert series.top1.to_dict() == dict.fromkeys(KS, 91.0), "the newest of the complete ones"


def test_figure_4_has_a_panel_for_each_comparison(tmp_path):
    for number, k in enumerate(KS):
        finished_run(tmp_path, number, k=k)
        finished_run(tmp_path, 100 + number, k=k, method="random")
        finished_run(tmp_path, 200 + number, k=k, backbone="deit_small", data="imagenet")
    figure = figure4(load_runs(str(tmp_path)))
    titles = [ax.get_title() for ax in figure.axes]
    assert len(titles) == 2
    assert titles[0].startswith(BACKBONES["deit_micro"])
    assert titles[1].startswith("DeiT-Small, ImageNet-1K")
    labels = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert {"DHTM", "DHTM, published", "random merging, published"} == set(labels)


def test_damaged_metrics_and_unwritable_output_are_named(composed, tmp_path):
    (tmp_path / "runs" / "0123").mkdir(parents=True)
    (tmp_path / "runs" / "0123" / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"0123/metrics.json: damaged"):
        report(composed(f"results_dir={tmp_path}/runs", config_name="report"))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"output_dir=/proc/nowhere: cannot write there"):
        report(composed(f"results_dir={tmp_path}/none", "output_dir=/proc/nowhere", config_name="report"))


def test_published_numbers():
    table = published("table1").set_index(["backbone", "k"])
    assert len(table) == 21
    assert table.loc[("deit_tiny", 0), "top1"] == 72.20
    assert table.loc[("deit_base", 40), "flops_g"] == 13.97
    assert table.groupby("backbone").top1.is_monotonic_decreasing.all()
    assert len(published("table2")) == 30
    assert len(published("claims")) == 25
    for file in (ROOT / "results" / "paper").glob("*.csv"):
        assert pd.read_csv(file).place.notna().all()


def test_what_a_target_run_says_of_itself(tmp_path):
    finished_run(tmp_path, 1, k=30)
    aimed_run(tmp_path, 2, "dpc_knn", 12.5, trained=True)
    aimed_run(tmp_path, 3, "sinkhorn", untrained=True, targets_reduction_pct=[30.000000000000004, 31.0])
    aimed_run(tmp_path, 4, "unmerged")
    runs = load_runs(str(tmp_path)).set_index("method")
    assert runs.knob[["dhtm", "dpc_knn", "sinkhorn"]].tolist() == ["k", "keep_rate", "keep_rate"]
    assert pd.isna(runs.knob["unmerged"])
    assert runs.value[["dhtm", "dpc_knn", "sinkhorn"]].tolist() == [30, 0.7, 0.7]
    assert runs.targets.to_dict() == {"dhtm": "", "dpc_knn": "12.5", "sinkhorn": "30,31", "unmerged": ""}
    assert runs.trained.to_dict() == {"dhtm": False, "dpc_knn": True, "sinkhorn": False, "unmerged": False}
    assert runs.untrained.to_dict() == {"dhtm": False, "dpc_knn": False, "sinkhorn": True, "unmerged": False}
    assert runs.k["dhtm"] == 30 and pd.isna(runs.k["sinkhorn"])


@pytest.mark.parametrize(
    ("method", "trained", "knobs", "plain"),
    [
        ("tome", False, {}, True),
        ("tome", True, {"inflect": -1.0}, False),
        ("tome", False, {"proportional_attention": False}, False),
        ("dhtm", False, {"proportional_attention": True}, False),
        ("dpc_knn", True, {}, True),
        ("dpc_knn", False, {"weighted": True}, False),
        ("dpc_knn", True, {"weighted": False}, False),
        ("token_mergence", True, {"scales": [2]}, False),
        ("sinkhorn", True, {"epsilon": 1.0, "iterations": 3}, True),
        ("own", False, {"proportional_attention": True}, True),
    ],
)
def test_the_papers_options_of_each_method(tmp_path, method, trained, knobs, plain):
    aimed_run(tmp_path, 1, method, trained=trained, knobs=knobs)
    assert load_runs(str(tmp_path)).plain.tolist() == [plain]


def test_runs_at_a_target_are_of_the_same_images_and_weights(tmp_path):
    aimed_run(tmp_path, 1, "dhtm")
    aimed_run(tmp_path, 2, "dhtm", layers="all")
    aimed_run(tmp_path, 3, "dhtm", 40.0)
    aimed_run(tmp_path, 4, "tome")
    aimed_run(tmp_path, 5, "tome", trained=True)
    aimed_run(tmp_path, 6, "lotm")
    aimed_run(tmp_path, 7, "lotm")  # once more
    aimed_run(tmp_path, 8, "sit", untrained=True, weights_sha256="9" * 64)
    finished_run(tmp_path, 9, k=0)
    finished_run(tmp_path, 10, k=40)  # for no target
    aimed_run(tmp_path, 11, "k_medoids", n_images=100)
    aimed_run(tmp_path, 12, "k_medoids", dtype="bfloat16")
    aimed_run(tmp_path, 13, "k_medoids", data_fingerprint="5" * 64)
    aimed_run(tmp_path, 14, "k_medoids", weights_sha256="5" * 64)
    aimed_run(tmp_path, 15, "dhtm", weights_sha256="5" * 64)
    aimed_run(tmp_path, 16, "tome", knobs={"proportional_attention": False})
    aimed_run(tmp_path, 17, "dhtm", backbone="deit_tiny")
    chosen = at_target(load_runs(str(tmp_path)), "deit_micro", "digits", 30)
    found = {(run.method, run.layers, run.trained): int(run.run_id, 16) for run in chosen.itertuples()}
    assert found == {
        ("dhtm", "4,7,11", False): 1,
        ("dhtm", "all", False): 2,
        ("tome", "all", False): 4,
        ("tome", "all", True): 5,
        ("lotm", "4,7,11", False): 7,
        ("sit", "4,7,10", False): 8,
        ("unmerged", "all", False): 9,
    }
    every = at_target(load_runs(str(tmp_path)), "deit_micro", "digits")
    assert len(every) == len(chosen) + 1
    assert set(every.target.dropna()) == {30, 40}


def test_more_images_go_before_more_methods_and_newer_runs(tmp_path):
    aimed_run(tmp_path, 1, "dhtm")
    for number, method in enumerate(("dhtm", "tome", "lotm"), start=2):
        aimed_run(tmp_path, number, method, n_images=500)
    aimed_run(tmp_path, 5, "unmerged", n_images=50_000)  # compares with nothing
    assert at_target(load_runs(str(tmp_path)), "deit_micro", "digits", 30).run_id.tolist() == [f"{1:016x}"]


def test_a_solved_k_is_in_the_row_of_k_only_where_it_is_the_papers(tmp_path):
    for number, k in enumerate((10, 20, 30)):
        finished_run(tmp_path, number, k=k)
    aimed_run(tmp_path, 10, "dhtm")  # 40
    aimed_run(tmp_path, 11, "dhtm", 25.0, knobs={"k": 33})
    aimed_run(tmp_path, 12, "dhtm", trained=True)
    assert over_k(load_runs(str(tmp_path)), "deit_micro", "digits", "dhtm").index.tolist() == [10, 20, 30, 40]


def test_predictions_are_in_the_order_of_the_images(tmp_path):
    finished_run(tmp_path, 1, correct=[True, False, True])
    file = tmp_path / f"{1:016x}" / "predictions.parquet"
    pd.read_parquet(file).iloc[::-1].to_parquet(file, index=False)
    frame = predictions(tmp_path / f"{1:016x}")
    assert frame.index.tolist() == [0, 1, 2]
    assert frame.correct.tolist() == [True, False, True]
    file.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"predictions.parquet: missing or damaged"):
        predictions(tmp_path / f"{1:016x}")
    with pytest.raises(UserError, match=r"none/metrics.json: missing or damaged"):
        predictions(tmp_path / "none")
