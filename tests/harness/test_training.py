"""The trainer goes on bit for bit where it was killed, trains alike over ranks and parts, and refuses what cannot end well."""

import os
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from processes import start_script, wait_for
from safetensors.torch import load_file, save_file

import baselines
import dhtm
from dhtm.harness.core.errors import UserError
from dhtm.harness.models.backbones import bare_backbone
from dhtm.harness.runs.evaluate import evaluate
from dhtm.harness.training.trainer import train

SHORT = [
    "recipe=embedded", "method=sit", "method.keep_rate=0.5", "data.limit=48", "batch_size=16", "epochs=3", "device=cpu",
    "num_workers=0",
]  # fmt: skip


@pytest.fixture
def run(composed, tmp_path):
    """Train in this process, into a folder of the test's own."""

    def train_with(*overrides, folder="out"):
        return train(composed(*SHORT, f"output={tmp_path}/{folder}", *overrides, config_name="train"))

    return train_with


def state(folder):
    return load_file(folder / "last.safetensors")


def equal(one, other, **tolerance):
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], **tolerance)


def test_a_training_killed_in_its_second_epoch_goes_on_bit_for_bit(tmp_path, script):
    """With random crops, erasing, mixup and drop path, which all draw from generators that must be restored."""
    training = [
        "train", *SHORT, "augment=true", "mixup=0.2", "drop_path=0.2", "auto_augment=null", "random_erasing=0.5",
        "num_workers=1",
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert script(*training, f"output={whole}").returncode == 0
    process = start_script(*training, f"output={killed}")
    wait_for((killed / "last.pt").exists)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert len(pd.read_csv(killed / "history.csv")) < 3, "killed before its end"
    result = script(*training, f"output={killed}")
    assert result.returncode == 0 and "going on after epoch" in result.stdout
    equal(state(whole), state(killed), rtol=0, atol=0)
    columns = ["epoch", "lr", "loss", "top1"]
    assert pd.read_csv(whole / "history.csv")[columns].equals(pd.read_csv(killed / "history.csv")[columns])


def test_a_finished_training_is_not_repeated_and_more_epochs_are_another_one(run, tmp_path):
    last = run("epochs=1")
    assert run("epochs=1") == last
    with pytest.raises(
        UserError, match=r"last.pt: begun with epochs=1, not epochs=2; set another output=DIR, or force=true"
    ):
        run("epochs=2")
    assert run("epochs=2", "force=true")["epoch"] == 2


def test_training_learns_and_the_evaluation_finds_its_weights(composed, tmp_path):
    options = ["method=patch_merger", "target.reduction_pct=40", f"checkpoints_dir={tmp_path}", "device=cpu"]
    before = evaluate(composed(*options, "data.limit=200", "allow_untrained=true", f"results_dir={tmp_path}/runs"))
    small = [*SHORT[:1], *options, "epochs=2", "num_workers=0", "data.limit=320", "batch_size=32", "save_dtype=float32"]
    last = train(composed(*small, config_name="train"))
    after = evaluate(composed(*options, "data.limit=320", f"results_dir={tmp_path}/runs"))
    assert after["trained"] and after["top1"] == pytest.approx(last["top1"]), "validation is the runner's evaluation"
    assert after["top1"] > before["top1"]
    folder = next((tmp_path / "deit_micro").iterdir())
    assert sorted(file.name for file in folder.iterdir()) == [
        "best.safetensors", "history.csv", "last.pt", "last.safetensors",
    ]  # fmt: skip


def test_parts_of_a_batch_and_ranks_train_as_the_whole_batch(run, ranks, tmp_path):
    exact = ["save_dtype=float32", "epochs=1"]
    whole = run(*exact, folder="whole")
    parts = run(*exact, "accumulate=4", folder="parts")
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    equal(state(tmp_path / "whole"), state(tmp_path / "parts"), rtol=1e-3, atol=1e-4)
    sweep = [*SHORT, *exact, "method.keep_rate=0.5,0.6", f"checkpoints_dir={tmp_path}"]
    for result in ranks(2, "train", "-m", *sweep):
        assert result.returncode == 0, result.stderr
    shared = tmp_path / "deit_micro/sit_keep_rate_0.5"
    equal(state(tmp_path / "whole"), state(shared), rtol=1e-3, atol=1e-4)
    (row,) = pd.read_csv(shared / "history.csv").to_dict("records")
    assert row["loss"] == pytest.approx(whole["loss"], rel=1e-4), "the mean over ranks"
    assert abs(row["top1"] - whole["top1"]) <= 100 / 48, "each image counted once"
    assert (tmp_path / "deit_micro/sit_keep_rate_0.6/last.pt").exists(), "the next training of the same processes"


@pytest.mark.stress
def test_machines_that_do_not_share_a_disk_do_not_go_on_apart(run, tmp_path):
    run("epochs=1", folder="0")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        command = [sys.executable, str(ROOT / "scripts/train.py"), *SHORT, "epochs=1", f"output={tmp_path}/{rank}"]
        where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
        ranks.append(subprocess.Popen(command, env=os.environ | where, stderr=subprocess.PIPE, text=True))
    for process in ranks:
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 1
        assert "the processes would go on after epochs [1, 0]; set output=DIR on a disk that all machines share" in said


def test_photographs_with_the_whole_protocol(composed, photos, tmp_path):
    """From a checkpoint, with mixup, cutmix, RandAugment and erasing, in bfloat16, with ToMe on."""
    save_file(bare_backbone("deit_tiny_patch16_224", 3).state_dict(), tmp_path / "tiny.safetensors")
    last = train(
        composed(
            "backbone=deit_tiny", f"backbone.checkpoint={tmp_path}/tiny.safetensors", "backbone.num_classes=3",
            "data=imagefolder", f"data.root={photos}", "method=tome", "epochs=1", "warmup_epochs=0", "batch_size=4",
            "amp=bfloat16", "num_workers=1", "clip_grad=1.0", "device=cpu", f"output={tmp_path}/out", config_name="train",
        )
    )  # fmt: skip
    assert np.isfinite(last["loss"]) and 0 <= last["top1"] <= 100
    trained = state(tmp_path / "out")
    assert all(value.isfinite().all() for value in trained.values())
    assert not torch.equal(trained["head.weight"], bare_backbone("deit_tiny_patch16_224", 3).head.weight)


def test_training_and_validation_are_not_the_same_images(composed, photos, tmp_path):
    save_file(bare_backbone("deit_tiny_patch16_224", 3).state_dict(), tmp_path / "tiny.safetensors")
    options = [
        f"backbone.checkpoint={tmp_path}/tiny.safetensors",
        "backbone.num_classes=3",
        f"data.root={photos}/train",
    ]
    with pytest.raises(UserError, match=r"data.train_split=train and data.split=val are the same images"):
        train(
            composed(
                "backbone=deit_tiny", "data=imagefolder", "method=tome", f"output={tmp_path}/out", "batch_size=2",
                "device=cpu", *options, config_name="train",
            )
        )  # fmt: skip


def test_from_scratch_begins_with_random_weights(run, tmp_path):
    still = ["epochs=1", "base_lr=0", "warmup_epochs=0"]
    run(*still, "init=scratch", folder="scratch")
    run(*still, folder="pretrained")
    embedded = load_file(ROOT / "dhtm/assets/deit_micro.safetensors")
    assert torch.equal(state(tmp_path / "pretrained")["head.weight"], embedded["head.weight"])
    assert not torch.equal(state(tmp_path / "scratch")["head.weight"], embedded["head.weight"])


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_epoch(run, tmp_path):
    run("epochs=1", "base_lr=0")
    checkpoint = (tmp_path / "out/last.pt").read_bytes()
    with pytest.raises(
        UserError, match=r"the loss is (nan|inf) in update \d+: stopped, .* try a smaller base_lr=1e\+30"
    ):
        run("epochs=1", "base_lr=1e30", "warmup_epochs=0", "force=true")
    assert (tmp_path / "out/last.pt").read_bytes() == checkpoint


def test_a_damaged_checkpoint_is_named(run, tmp_path):
    run("epochs=1")
    file = tmp_path / "out/last.pt"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"out/last.pt: damaged .* remove it, or begin again with force=true"):
        run("epochs=1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=100", "batch_size=100: the training split has only 48 images"),
        ("accumulate=5", "batch_size=16: it must be a multiple of accumulate=5 times 1 ranks"),
        ("accumulate=0", "accumulate=0: it must be an integer from 1"),
        ("epochs=0", "epochs=0: it must be an integer from 1"),
        ("amp=int8", "amp=int8: choose one of bfloat16, float16, or null"),
        ("init=imagenet", "init=imagenet: choose one of pretrained, scratch"),
        ("output=/proc/nowhere", "output=/proc/nowhere: cannot write there"),
        ("save_dtype=int8", "save_dtype=int8: choose one of"),
        ("method.keep_rate=1.5", "keep_rate=1.5: it must be above 0 and at most 1"),
        ("mixup=null", "mixup=None: it must be a number from 0"),
        ("cutmix=x", "cutmix=x: it must be a number from 0"),
        ("base_lr=abc", "base_lr=abc: it must be a number from 0"),
        ("random_erasing=null", "random_erasing=None: it must be a number from 0 and below 1"),
        ("label_smoothing=1", "label_smoothing=1: it must be a number from 0 and below 1"),
        ("drop_path=true", "drop_path=True: it must be a number from 0 and below 1"),
        ("clip_grad=-1", "clip_grad=-1: it must be a number from 0, or null"),
        ("seed=null", "seed=None: it must be an integer from 0"),
        ("num_workers=-1", "num_workers=-1: it must be an integer from 0, or null"),
        ("warmup_epochs=4", "warmup_epochs=4: more than epochs=3"),
        ("optimiser=x", "optimiser=x: timm makes no such optimiser"),
    ],
)
def test_what_cannot_end_well_is_not_begun(run, override, message):
    with pytest.raises(UserError, match=message):
        run(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["augment=true", "auto_augment=foo"], "auto_augment=foo .*: timm takes no such augmentation"),
        (["init=scratch", "backbone.architecture=vgg99"], "backbone.architecture=vgg99: not a model of timm"),
    ],
)
def test_what_cannot_be_built_is_named(run, overrides, message):
    with pytest.raises(UserError, match=message):
        run(*overrides)


def test_running_out_of_memory_keeps_the_last_epoch_and_the_remedy_goes_on(run, monkeypatch):
    whole, calls = dhtm.harness.training.trainer.cross_entropy, iter(range(100))

    def full(logits, *arguments, **options):
        if len(logits) == 16 and next(calls) == 4:  # in the second epoch
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(logits, *arguments, **options)

    monkeypatch.setattr(dhtm.harness.training.trainer, "cross_entropy", full)
    with pytest.raises(UserError, match=r"device=cpu: out of memory with 16 images at once; .* accumulate=2, say"):
        run()
    assert run("accumulate=2")["epoch"] == 3
    assert next(calls) == 5, "the first epoch was not trained again"


def test_classes_that_differ_between_the_splits_are_refused(composed, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "data")
    (tmp_path / "data/train/n02102040").rename(tmp_path / "data/train/n03000684")
    options = [
        "backbone=deit_tiny",
        "backbone.num_classes=3",
        "init=scratch",
        "method=tome",
        "batch_size=2",
        "device=cpu",
    ]
    message = (
        r"data.train_split=train and data.split=val have different classes, n02979186 and n02102040 under one number"
    )
    with pytest.raises(UserError, match=message):
        train(
            composed(
                "data=imagefolder",
                f"data.root={tmp_path}/data",
                f"output={tmp_path}/out",
                *options,
                config_name="train",
            )
        )


def test_the_trained_model_keeps_its_method_in_the_state_dict(run, tmp_path):
    run("epochs=1")
    model = dhtm.patch(bare_backbone("deit_micro", 10), baselines.SiT(0.5))
    try:
        assert set(state(tmp_path / "out")) == set(model.state_dict())
    finally:
        dhtm.unpatch(model)
