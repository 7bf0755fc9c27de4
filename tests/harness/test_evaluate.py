"""Tests of runs: their results and files, skipping finished runs, interruptions, and one-line errors."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from PIL import Image
from processes import ROOT, start_script, wait_for
from safetensors.torch import save_file

import dhtm
from dhtm.harness import config
from dhtm.harness.core.devices import exact
from dhtm.harness.core.errors import UnavailableError, UserError
from dhtm.harness.data.scenes import Digits
from dhtm.harness.models import cost
from dhtm.harness.models.backbones import Backbone
from dhtm.harness.models.methods import Method
from dhtm.harness.runs.evaluate import Evaluation, evaluate
from dhtm.harness.runs.predict import CLASSES

REQUIRED_METRICS = """run_id experiment backbone method knobs layers data split n_images n_failed top1 top1_ci95 top5 flops_g
    flops_baseline_g flops_reduction_pct merge_flops_g params_m tokens_by_layer images_per_s batch_size dtype device seed
    wall_s weights_sha256 versions git_commit"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a checkpoint of a DeiT-Tiny with random weights for three classes."""
    torch.manual_seed(5)
    model = timm.create_model("deit_tiny_patch16_224", num_classes=3)
    torch.nn.init.normal_(model.head.weight)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return path


def read(metrics, tmp_path):
    folder = tmp_path / "runs" / metrics["run_id"]
    assert sorted(file.name for file in folder.iterdir() if file.name != "changes.diff") == [
        "config.yaml", "environment.json", "metrics.json", "predictions.parquet",
    ]  # fmt: skip
    return folder, pd.read_parquet(folder / "predictions.parquet")


def test_dense_prediction_counts_every_patch_by_class(evaluated, tmp_path):
    metrics = evaluated("method.k=40", "data.limit=60", "dense=true")
    _, predictions = read(metrics, tmp_path)
    confusion = np.stack(predictions.confusion)
    classes = Digits().patch_classes("test", range(60), (14, 14))
    for label in range(3):
        assert (confusion[:, 3 * label : 3 * label + 3].sum(axis=1) == (classes == label).sum(axis=1)).all()
    low, high = metrics["miou_ci95"]
    assert 70 < low < metrics["miou"] < high < 95 and metrics["iou"].keys() == {"ground", "digit", "distractor"}
    unmerged = evaluated("method=unmerged", "data.limit=60", "dense=true")
    assert metrics["miou"] < unmerged["miou"] and unmerged["finished"] <= metrics["finished"], "unmerged runs first"
    with pytest.raises(UserError, match="only data=digits"):
        evaluated("dense=true", "data=images", f"data.root={tmp_path}", "backbone=deit_mini")


def test_threshold_gives_each_image_its_own_number_of_tokens(evaluated, tmp_path, monkeypatch):
    """The threshold is found on training scenes; on test scenes the mean cost is near the target."""
    run = ("method=dhtm_threshold", "target.reduction_pct=30", "data.limit=32")
    metrics = evaluated(*run)
    _, predictions = read(metrics, tmp_path)
    tokens = np.stack(predictions.tokens)
    assert tokens.shape == (32, 12) and (np.diff(tokens) <= 0).all() and len(np.unique(tokens[:, -1])) > 10
    np.testing.assert_allclose(metrics["tokens_by_layer"], tokens.mean(axis=0), atol=0.006)
    assert metrics["targets_reduction_pct"] == [30] and metrics["flops_reduction_pct"] == pytest.approx(30, abs=7)
    low, *_, high = metrics["flops_g_quartiles"]
    assert low < metrics["flops_g"] < high < metrics["flops_baseline_g"]
    found_on = metrics["thresholds_from"]
    assert (found_on["split"], found_on["n_images"], len(found_on["sha256"])) == ("train", 32, 64)
    assert len(metrics["knobs"]["threshold"]) == 12 and metrics["merge_flops_g"] > 0
    monkeypatch.setattr(cost, "find_thresholds", lambda *_: pytest.fail("the thresholds are stored already"))
    assert evaluated(*run)["finished"] == metrics["finished"]


def test_thresholds_need_other_images_than_those_evaluated(evaluated, photos, tmp_path):
    save_file(Backbone("mini", "deit_mini", 3).bare().state_dict(), tmp_path / "mini.safetensors")
    overrides = [
        "backbone=deit_mini", f"backbone.checkpoint={tmp_path}/mini.safetensors", "backbone.num_classes=3",
        "data=imagefolder", "method=dhtm_threshold", "target.reduction_pct=30",
    ]  # fmt: skip
    for root, message in (
        (photos / "val", "give a data.root that holds a folder for each split"),
        (tmp_path, r"it has no folder train"),
    ):
        (tmp_path / "val").mkdir(exist_ok=True)
        with pytest.raises(
            UnavailableError, match=f"its thresholds are found on images other than data.split=val.*{message}"
        ):
            evaluated(*overrides, f"data.root={root}")


def test_run_directory_has_all_files_and_metrics(evaluated, tmp_path):
    metrics = evaluated("method.k=48", "data.limit=100")
    folder, predictions = read(metrics, tmp_path)
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert set(REQUIRED_METRICS.split()) <= set(metrics)
    assert list(predictions.columns) == ["index", "label", *CLASSES, "correct", "kl", "unmerged_class", "group"]
    assert predictions["index"].tolist() == list(range(100))
    assert metrics["n_images"] == 100
    assert metrics["top1"] == 100 * predictions.correct.mean()
    assert metrics["tokens_by_layer"] == [196] * 3 + [148] * 3 + [100] * 4 + [52] * 2
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "k: 48" in (folder / "config.yaml").read_text()


def test_photographs_are_preprocessed_as_for_deit(evaluated, photos, checkpoint, tmp_path):
    """Compare with a plain loop that spells out DeiT's published preprocessing."""
    overrides = ["data=imagefolder", f"data.root={photos}", "backbone=deit_tiny", "method.k=20"]
    metrics = evaluated(*overrides, f"backbone.checkpoint={checkpoint}", "backbone.num_classes=3", "batch_size=3")
    _, predictions = read(metrics, tmp_path)

    model = timm.create_model("deit_tiny_patch16_224", num_classes=3, checkpoint_path=str(checkpoint)).eval()
    dhtm.patch(model, dhtm.DHTM(k=20, layers=(4, 7, 11)))
    expected = []
    files = sorted((photos / "val").glob("*/*.JPEG"))
    for file in files:
        image = Image.open(file).convert("RGB")
        width, height = image.size
        scale = 248 / min(width, height)  # 224 / 0.9, as DeiT's evaluation crops
        image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
        left, top = round((image.width - 224) / 2), round((image.height - 224) / 2)
        pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
        pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.inference_mode():
            logits = model(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None])
        expected.append(logits[0].argsort(descending=True).tolist())
    assert predictions[CLASSES[:3]].to_numpy().tolist() == expected
    assert (predictions[CLASSES[3:]] == -1).all(axis=None), "the model has three outputs"
    assert predictions.label.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert metrics["top5"] == 100
    # Wilson's interval (1927) in closed form.
    p, n, z = predictions.correct.mean(), 8, 1.959963984540054
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [100 * (centre - half) / (1 + z**2 / n), 100 * (centre + half) / (1 + z**2 / n)]
    assert metrics["top1_ci95"] == pytest.approx(expected)
    assert metrics["flops_g"] == dhtm.count_flops(model).total / 1e9


def test_finished_run_is_skipped_unless_forced(evaluated, tmp_path):
    first = evaluated("data.limit=8", "batch_size=8")
    file = tmp_path / "runs" / first["run_id"] / "metrics.json"
    written = file.stat().st_mtime_ns
    # The batch size is not part of the run id.
    (file.parent / ".ipynb_checkpoints").mkdir()  # as Jupyter creates it
    assert evaluated("data.limit=8", "batch_size=2") == first
    assert file.stat().st_mtime_ns == written
    forced = evaluated("data.limit=8", "force=true")
    assert file.stat().st_mtime_ns > written
    assert forced["run_id"] == first["run_id"]


def test_run_id_depends_only_on_what_determines_the_result(composed, tmp_path):
    changes = [
        "method.k=41", "method.layers=[4,7,10]", "data.limit=5", "dtype=bfloat16", "data.seed=1", "method=random",
        "method=random seed=1", "dense=true",
    ]  # fmt: skip
    ids = []

    def stop(folder, n_images):
        ids.append(folder.name)
        raise KeyboardInterrupt

    for change in ["", "batch_size=2 num_workers=1 method.backend=torch experiment=table1", *changes]:
        run = config.evaluation(composed("data.limit=4", f"results_dir={tmp_path}", *change.split()))
        with pytest.raises(KeyboardInterrupt):
            evaluate(run, on_start=stop)
    assert ids[0] == ids[1] and len(set(ids)) == 1 + len(changes)


def test_run_killed_between_any_two_files_is_unfinished(evaluated, tmp_path, monkeypatch):
    metrics = evaluated("data.limit=4")
    folder = tmp_path / "runs" / metrics["run_id"]
    for n_written in range(5):  # one shard of predictions and four files are renamed
        shutil.rmtree(folder / "shards", ignore_errors=True)
        remaining = [n_written]

        def replace(path, target, remaining=remaining):
            if not remaining[0]:
                raise KeyboardInterrupt
            remaining[0] -= 1
            os.replace(path, target)  # noqa: PTH105

        with monkeypatch.context() as patch:
            patch.setattr(type(folder), "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                evaluated("data.limit=4", "force=true")
        assert not (folder / "metrics.json").exists()
        assert not list(folder.glob(".*"))
    assert evaluated("data.limit=4")["top1"] == metrics["top1"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.k=many"], r"method=dhtm: k='many'"),
        (["method.layers=[4,13]"], r"layers=\[4, 13\]: the model has layers 1 to 12"),
        (["options=size"], r"options=size: give options of the method"),
        (["method._target_=dhtm.Nothing"], r"method=dhtm: no class dhtm.Nothing"),
        (["data._target_=dhtm.Nothing"], r"data._target_=dhtm.Nothing: cannot be imported"),
        (["data=images", f"data.root={ROOT}/configs"], r"configs: no image in it; give a folder of images"),
        (["data=imagenet"], r"data.root is not set: give the folder"),
        (["data=imagenet", "data.root=/no/such/place"], r"data.root=/no/such/place: no such directory"),
        (["method=random", "seed=abc"], r"seed=abc: Input should be a valid integer"),
        (["data.seed=-1"], r"data.seed=-1: "),
        (["backbone.num_classes=7"], r"backbone.num_classes=7: the pretrained weights of deit_micro have 10 outputs"),
        (["data.split=valid"], r"data.split=valid: Input should be 'test' or 'train'"),
        (["device=tpu"], r"device=tpu: not available"),
        (["results_dir='~no-such-user/runs'"], r"~no-such-user/runs \(.*; write the path in full"),
        (["results_dir=/proc/nowhere"], r"results_dir=/proc/nowhere: cannot write there"),
        (
            ["backbone.num_classes=7", "backbone.checkpoint=/no/such/file"],
            r"backbone.checkpoint=/no/such/file: Path does not point to a file",
        ),
        (["backbone.architecture=deit_huge"], r"backbone.architecture=deit_huge: timm has no such model"),
        (["backbone=deit_small"], r"pretrained weights are not available .*backbone.checkpoint=FILE"),
    ],
)
def test_invalid_setting_raises_one_line_error(evaluated, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        evaluated("data.limit=2", *overrides)
    assert "\n" not in str(error.value)


def test_unsuitable_data_raises(evaluated, photos, tmp_path):
    with pytest.raises(UserError, match="data=imagefolder has 3 classes, the backbone 10: choose a backbone"):
        evaluated("data=imagefolder", f"data.root={photos}")
    torch.save(timm.create_model("deit_micro", num_classes=3).state_dict(), tmp_path / "grey.pth")
    grey = [f"backbone.checkpoint={tmp_path}/grey.pth", "backbone.num_classes=3"]
    with pytest.raises(UserError, match="data=imagefolder has images of 3 channels, the backbone takes 1"):
        evaluated("data=imagefolder", f"data.root={photos}", *grey)
    (tmp_path / "val" / "n01440764").mkdir(parents=True)
    with pytest.raises(UserError, match="no valid file for the classes n01440764"):
        evaluated("data=imagefolder", f"data.root={tmp_path}")


def test_run_from_python_equals_the_run_from_hydra(evaluated, tmp_path):
    run = Evaluation(
        backbone=Backbone("deit_micro", "deit_micro", num_classes=10),
        method=Method("dhtm", "dhtm.DHTM", knob="k", options={"k": 40, "layers": (4, 7, 11)}),
        data=Digits(limit=4),
        results_dir=tmp_path / "python",
    )
    metrics = evaluated("method.k=40", "data.limit=4")
    assert {key: evaluate(run)[key] for key in ("run_id", "top1")} == {key: metrics[key] for key in ("run_id", "top1")}
    by_python, by_hydra = (
        yaml.safe_load((tmp_path / folder / metrics["run_id"] / "config.yaml").read_text())
        for folder in ("python", "runs")
    )
    assert by_python["method"] == by_hydra["method"] and by_python["method"]["layers"] == [4, 7, 11]
    assert by_python["data"]["limit"] == 4


@pytest.mark.parametrize("warn_only", [False, True])
def test_exact_restores_the_settings(warn_only, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def settings():
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        return torch.are_deterministic_algorithms_enabled(), warns, tf32

    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        before = settings()
        with exact(torch.device("cuda")):  # sets flags only, so it needs no GPU
            assert settings() == (True, True, (False, False))
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_closed_pipe_ends_a_script_without_an_error():
    command = f"{sys.executable} scripts/evaluate.py --help | head -0"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not result.stderr


def test_damaged_metrics_raise_unless_forced(evaluated, tmp_path):
    folder = tmp_path / "runs" / evaluated("data.limit=2")["run_id"]
    (folder / "metrics.json").write_text('{"top1": 9')
    with pytest.raises(UserError, match=r"metrics.json: damaged .*force=true"):
        evaluated("data.limit=2")
    assert evaluated("data.limit=2", "force=true")["n_images"] == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.k=100"], r"error: backbone=deit_micro, method=dhtm: k=100 merges in layer 7.*\n"),
        (["backbone=deit_huge"], r"error: .*Could not find 'backbone/deit_huge'.*\n"),
        (["batchsize=3"], r"error: .*batchsize.* \(Key 'batchsize' is not in struct.*\)\n"),
    ],
)
def test_invalid_command_line_prints_one_line_and_exits_with_1(script, overrides, message, tmp_path):
    result = script("evaluate", *overrides, f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache")
    assert result.returncode == 1
    assert re.fullmatch(message, result.stderr)


def test_ctrl_c_ends_a_run_without_a_traceback(tmp_path):
    run = ["data.limit=300", "batch_size=1", "store_every_s=0", f"results_dir={tmp_path}/runs"]
    process = start_script("evaluate", *run, stderr=tmp_path / "errors")
    wait_for(lambda: list(tmp_path.glob("runs/*/shards/*")))
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("runs/*/metrics.json"))
