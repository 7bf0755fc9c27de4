"""Training resumes bit for bit, is the same over ranks and accumulated batches, and refuses invalid settings."""

import os
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from processes import start_script, wait_for
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_tensor

from dhtm.harness import config
from dhtm.harness.core.errors import UserError
from dhtm.harness.data.scenes import Digits
from dhtm.harness.models.backbones import EMBEDDED_WEIGHTS, Backbone
from dhtm.harness.training import trainer
from dhtm.harness.training.embedded import train_embedded

SHORT = [
    "recipe=embedded", "method=sit", "method.keep_rate=0.5", "data.limit=48", "batch_size=16", "epochs=3", "device=cpu",
    "num_workers=0",
]  # fmt: skip


@pytest.fixture
def described(composed):
    """Return a function that describes a training by overrides."""
    return lambda *overrides: config.training(composed(*overrides, config_name="train"))


@pytest.fixture
def run(described, tmp_path):
    """Return a function that trains in this process, into a folder below ``tmp_path``."""

    def train_with(*overrides, folder="out"):
        return trainer.train(described(*SHORT, f"output={tmp_path}/{folder}", *overrides))

    return train_with


@pytest.fixture(scope="module")
def on_photographs(tmp_path_factory):
    """Save timm's smallest ViT with three outputs; return it, and overrides that train it on photographs from these weights."""
    model, file = Backbone("tiny", "test_vit", 3).bare(), tmp_path_factory.mktemp("tiny") / "w.safetensors"
    save_file(model.state_dict(), file)
    options = ["backbone.architecture=test_vit", f"backbone.checkpoint={file}", "backbone.num_classes=3"]
    options += ["data=imagefolder", "method=tome", "epochs=1", "warmup_epochs=0", "batch_size=2", "device=cpu"]
    return model, options


def state(folder):
    return load_file(folder / "last.safetensors")


def test_killed_training_resumes_bit_for_bit(tmp_path, script):
    """The training uses random crops, erasing, mixup and drop path, whose random generators depend on the epoch."""
    training = [
        "train", *SHORT, "augment=true", "mixup=0.2", "drop_path=0.2", "auto_augment=null", "random_erasing=0.5",
        "color_jitter=0.4", "num_workers=1",
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert script(*training, f"output={whole}").returncode == 0
    process = start_script(*training, f"output={killed}")
    wait_for((killed / "last.pt").exists)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert len(pd.read_csv(killed / "history.csv")) < 3, "must be killed before its end"
    result = script(*training, f"output={killed}")
    assert result.returncode == 0 and "resuming after epoch" in result.stdout
    torch.testing.assert_close(state(whole), state(killed), rtol=0, atol=0)
    columns = ["epoch", "lr", "loss", "top1"]
    assert pd.read_csv(whole / "history.csv")[columns].equals(pd.read_csv(killed / "history.csv")[columns])


def test_finished_training_is_not_repeated_and_refuses_more_epochs(run):
    last = run("epochs=1")
    assert run("epochs=1") == last
    with pytest.raises(
        UserError, match=r"last.pt: started with epochs=1, not epochs=2; set another output=DIR, or force=true"
    ):
        run("epochs=2")


def test_checkpoint_accepts_moved_images_and_refuses_others(described, on_photographs, photos, tmp_path):
    """On a cluster, for example, each job copies the images to its own disk."""
    options = [*on_photographs[1], f"output={tmp_path}/out"]
    last = trainer.train(described(*options, f"data.root={photos}"))
    moved = shutil.copytree(photos, tmp_path / "moved")
    assert trainer.train(described(*options, f"data.root={moved}")) == last
    other = shutil.copytree(photos, tmp_path / "other")
    shutil.copy(image := next((other / "train").glob("*/*")), image.with_name("another.JPEG"))
    with pytest.raises(UserError, match=r"last.pt: started with images=\w+, not images="):
        trainer.train(described(*options, f"data.root={other}"))


def test_training_locks_its_folder(run, monkeypatch, tmp_path):
    def resume(self):
        with pytest.raises(Timeout):
            FileLock(tmp_path / "out/.lock").acquire(timeout=0)
        raise InterruptedError

    monkeypatch.setattr(trainer._Trainer, "resume", resume)
    with pytest.raises(InterruptedError):
        run()
    FileLock(tmp_path / "out/.lock").acquire(timeout=0).lock.release()


def test_ranks_with_different_checkpoints_do_not_resume(run, monkeypatch):
    monkeypatch.setattr(trainer.Ranks, "gather", lambda self, n_epochs: [n_epochs, 1])
    with pytest.raises(
        UserError, match=r"would resume after epochs \[0, 1\]; set output=DIR on a disk that all machines"
    ):
        run()


def test_scenes_of_an_epoch_depend_only_on_its_number():
    """Loading processes keep their own copies of a data set, so opening another epoch must not change it."""

    def images(dataset):
        return torch.stack([dataset[i][0] for i in range(len(dataset))])

    split, of_another_process = (Digits(limit=4).open("train", to_tensor) for _ in range(2))
    dataset = split.dataset_in(1)
    first, second = images(dataset), images(split.dataset_in(2))
    assert not torch.equal(first, second)
    assert torch.equal(images(dataset), first), "must be the same after the next epoch was loaded"
    assert torch.equal(images(of_another_process.dataset_in(2)), second)


def test_training_learns_and_the_evaluation_finds_its_weights(described, evaluated, tmp_path):
    options = ["method=patch_merger", "target.reduction_pct=40", f"checkpoints_dir={tmp_path}", "device=cpu"]
    before = evaluated(*options, "data.limit=160", "allow_untrained=true")
    small = [*options, "epochs=2", "num_workers=0", "data.limit=160", "batch_size=32", "save_dtype=float32"]
    last = trainer.train(described("recipe=embedded", *small))
    after = evaluated(*options, "data.limit=160")
    assert after["trained"] and after["top1"] == pytest.approx(last["top1"]), "must equal training's own validation"
    assert after["top1"] > before["top1"]
    folder = next((tmp_path / "deit_micro").iterdir())
    assert after["params_m"] == pytest.approx(sum(value.numel() for value in state(folder).values()) / 1e6)
    file_names = ["best.safetensors", "history.csv", "last.pt", "last.safetensors"]
    assert sorted(file.name for file in folder.glob("[!.]*")) == file_names


def test_accumulation_and_ranks_train_as_the_whole_batch_does(run, ranks, tmp_path):
    exact = ["save_dtype=float32", "epochs=1"]
    whole = run(*exact, folder="whole")
    parts = run(*exact, "accumulate=4", folder="parts")
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    torch.testing.assert_close(state(tmp_path / "whole"), state(tmp_path / "parts"), rtol=1e-3, atol=1e-4)
    sweep = [*SHORT, *exact, "method.keep_rate=0.5,0.6", f"checkpoints_dir={tmp_path}"]
    for result in ranks(2, "train", "-m", *sweep):
        assert result.returncode == 0, result.stderr
    shared = tmp_path / "deit_micro/sit_keep_rate_0.5"
    torch.testing.assert_close(state(tmp_path / "whole"), state(shared), rtol=1e-3, atol=1e-4)
    (row,) = pd.read_csv(shared / "history.csv").to_dict("records")
    assert row["loss"] == pytest.approx(whole["loss"], rel=1e-4), "must be the mean over ranks"
    assert abs(row["top1"] - whole["top1"]) <= 100 / 48, "must count each image once"
    assert (tmp_path / "deit_micro/sit_keep_rate_0.6/last.pt").exists(), "the same processes must run the next training"


def test_ranks_validate_the_same_weights(ranks, photos, tmp_path):
    """After an update, the running statistics of deit_mini's batch normalisation differ between ranks."""
    (tmp_path / "print_weights.py").write_text(
        "import runpy\n"
        "from dhtm.harness.models.backbones import weights_sha256\n"
        "from dhtm.harness.training import trainer\n"
        "trainer.predict = lambda model, *_: print('weights', weights_sha256(model)) or []\n"
        "runpy.run_path('scripts/train.py', run_name='__main__')\n"
    )
    options = [
        "backbone=deit_mini",
        "backbone.num_classes=3",
        "init=scratch",
        "data=imagefolder",
        f"data.root={photos}",
    ]
    options += ["method=tome", "augment=false", "epochs=1", "warmup_epochs=0", "batch_size=8", f"output={tmp_path}/out"]
    first, second = ranks(2, tmp_path / "print_weights", *options, "num_workers=0", "device=cpu")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout.split()[:2] == second.stdout.split()[:2]


def test_whole_protocol_trains_on_photographs(described, on_photographs, photos, tmp_path):
    """Start from a checkpoint, with ToMe, mixup, cutmix, RandAugment and erasing, in bfloat16."""
    model, options = on_photographs
    more = ["batch_size=4", "amp=bfloat16", "num_workers=1", "clip_grad=1.0", f"output={tmp_path}/out"]
    last = trainer.train(described(*options, f"data.root={photos}", *more))
    assert np.isfinite(last["loss"]) and 0 <= last["top1"] <= 100
    trained = state(tmp_path / "out")
    assert all(value.isfinite().all() for value in trained.values())
    assert not torch.equal(trained["head.weight"], model.head.weight)


def test_splits_must_have_different_images_and_the_same_classes(described, on_photographs, photos, tmp_path):
    options = [*on_photographs[1], f"output={tmp_path}/out"]
    with pytest.raises(UserError, match=r"data.train_split=train and data.split=val are the same images"):
        trainer.train(described(*options, f"data.root={photos}/train"))
    shutil.copytree(photos, tmp_path / "data")
    (tmp_path / "data/train/n02102040").rename(tmp_path / "data/train/n03000684")
    with pytest.raises(UserError, match=r"data.train_split=train and data.split=val have different classes"):
        trainer.train(described(*options, f"data.root={tmp_path}/data"))


def test_augmentation_options_reach_timm(described):
    options = ["augment=true", "auto_augment=null", "color_jitter=0.3", "crop_scale=[0.3,0.9]", "mixup_prob=0.25"]
    training = described(*SHORT, *options)
    images, _ = trainer._open_splits(training, training.backbone.bare())
    steps = str(images.dataset.transform)
    assert "scale=(0.3, 0.9)" in steps and "ColorJitter(brightness=(0.7, 1.3)" in steps
    assert trainer._mixup(training, 10).mix_prob == 0.25


def test_training_from_scratch_starts_with_random_weights(run, tmp_path):
    frozen = ["seed=123456", "epochs=1", "base_lr=0", "warmup_epochs=0", "data.limit=16"]
    run(*frozen, "init=scratch", folder="scratch")
    run(*frozen, folder="pretrained")
    embedded = load_file(EMBEDDED_WEIGHTS)
    assert torch.equal(state(tmp_path / "pretrained")["head.weight"], embedded["head.weight"])
    assert not torch.equal(state(tmp_path / "scratch")["head.weight"], embedded["head.weight"])
    added = {key for key in state(tmp_path / "scratch") if key.startswith("reducer.")}
    assert added and set(state(tmp_path / "scratch")) == embedded.keys() | added, (
        "must save the method's parameters too"
    )


def test_nonfinite_loss_stops_training_and_damaged_checkpoint_is_named(run, tmp_path):
    run("epochs=1", "base_lr=0")
    file = tmp_path / "out/last.pt"
    checkpoint = file.read_bytes()
    message = r"the loss is (nan|inf) in update \d+: stopped, .* try a smaller base_lr=1e\+30"
    with pytest.raises(UserError, match=message):
        run("epochs=1", "base_lr=1e30", "warmup_epochs=0", "force=true")
    assert file.read_bytes() == checkpoint
    file.write_bytes(checkpoint[:3000])
    with pytest.raises(UserError, match=r"out/last.pt: damaged .* remove it, or start again with force=true"):
        run("epochs=1")


def test_training_that_runs_out_of_memory_resumes_with_accumulate(run, monkeypatch, caplog):
    cross_entropy, calls = trainer.cross_entropy, iter(range(100))

    def full(logits, *arguments, **options):
        if len(logits) == 16 and next(calls) == 4:  # in the second epoch
            raise torch.OutOfMemoryError("CUDA out of memory")
        return cross_entropy(logits, *arguments, **options)

    monkeypatch.setattr(trainer, "cross_entropy", full)
    with pytest.raises(UserError, match=r"out of memory \(CUDA out of memory\); try accumulate=2"):
        run("epochs=2")
    assert run("epochs=2", "accumulate=2")["epoch"] == 2
    assert "resuming after epoch 1 of 2" in caplog.text


REFUSED = {
    "batch_size=100": "the training split has only 48 images",
    "batch_size=18 accumulate=5": "batch_size=18: it must be a multiple of accumulate=5 times 1 ranks",
    "batch_size=9 augment=true mixup=0.2": "times 1 ranks, an even one for mixup",
    "amp=int8": "Input should be 'bfloat16' or 'float16'",
    "method.keep_rate=1.5": "it must be above 0 and at most 1",
    "method.checkpoint=x.safetensors": "training starts from weights of the backbone",
    "warmup_epochs=4": "more than epochs=3",
    "optimiser=x": "timm makes no such optimiser",
    "auto_augment=foo augment=true": "timm does not support this augmentation",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_invalid_settings_are_refused(run, overrides):
    with pytest.raises(UserError, match=REFUSED[overrides]) as error:
        run(*overrides.split())
    assert overrides.split("=")[0].removeprefix("method.") in str(error.value)


@pytest.mark.parametrize("launcher", ["submitit_local", "submitit_slurm"])
def test_submitit_config_resolves_for_trainings(composed, launcher):
    OmegaConf.register_new_resolver("n_gpus", lambda: 1, replace=True)
    options = [f"hydra/launcher={launcher}", "checkpoints_dir=/elsewhere", "hydra.job.name=train"]
    hydra = composed(*options, config_name="train", return_hydra_config=True).hydra
    assert OmegaConf.to_container(hydra.launcher, resolve=True)["submitit_folder"].startswith("/elsewhere/")


def test_training_the_embedded_model_writes_loadable_weights(composed, tmp_path):
    file = tmp_path / "new/micro.safetensors"
    stages = (
        "stages=[{steps: 3, batch_size: 8, window: 8, difficulty: [0, 0.5]}, "
        "{steps: 2, batch_size: 4, window: 14, difficulty: [1, 1]}]"
    )
    settings = composed(stages, f"output={file}", config_name="train_micro")
    config.call(train_embedded, settings)
    model = Backbone("deit_micro", "deit_micro", 10, file).load()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    (other := tmp_path / "other").touch()
    assert file.stat().st_mode == other.stat().st_mode, "others may read it as they may read any new file"
    first = file.read_bytes()
    config.call(train_embedded, settings)
    assert file.read_bytes() == first, "the seed must determine the training"
    settings.output = str(tmp_path)
    with pytest.raises(UserError, match=r"output=.*: give a file that ends with \.safetensors"):
        config.call(train_embedded, settings)
