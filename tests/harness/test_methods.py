"""Trained weights: found, loaded, and refused where they belong to something else."""

import os
import shutil

import pytest
import torch
from safetensors import safe_open

from dhtm.harness.core.errors import UnavailableError, UserError
from dhtm.harness.models.backbones import load_backbone
from dhtm.harness.models.methods import SHIPPED, load_model, patched, place, save_weights
from dhtm.harness.runs.evaluate import evaluate

SIT = ["method=sit", "method.keep_rate=0.5"]


@pytest.fixture(scope="module")
def weights(composed, tmp_path_factory):
    """A SiT at keep rate 0.5 in deit_micro, saved as training does."""
    config = composed(*SIT, config_name="train")
    torch.manual_seed(7)
    model = patched(load_backbone("deit_micro", None, 10), config.backbone, config.method)
    folder = tmp_path_factory.mktemp("checkpoints")
    file = folder / place(config.backbone, config.method) / "last.safetensors"
    file.parent.mkdir(parents=True)
    save_weights(model, config, torch.float32, config.epochs, file)
    return folder, file, model


def test_weights_are_found_by_backbone_method_and_knob(composed, weights):
    folder, file, trained = weights
    assert file.parent.relative_to(folder).as_posix() == "deit_micro/sit_keep_rate_0.5"
    config = composed(*SIT, f"checkpoints_dir={folder}")
    model, found = load_model(config, config.method)
    assert found == file
    images = torch.randn(3, 1, 56, 56)
    with torch.inference_mode():
        assert torch.equal(model(images), trained(images))


def test_weights_by_file(composed, weights):
    _, file, trained = weights
    config = composed(*SIT, f"method.weights={file}")
    model, _ = load_model(config, config.method)
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.keep_rate=0.6"], "trained with keep_rate=0.5, not keep_rate=0.6"),
        (["method=patch_merger", "method.keep_rate=0.5"], "trained with method=sit, not method=patch_merger"),
        (["method.layers=[4,7,11]"], r"trained with layers=\[4, 7, 10\], not layers=\[4, 7, 11\]"),
        (["backbone=deit_tiny"], "trained with backbone=deit_micro, not backbone=deit_tiny_patch16_224"),
        (["backbone.num_classes=3"], "trained with num_classes=10, not num_classes=3"),
    ],
)
def test_weights_of_something_else_are_refused_with_the_mismatch(composed, weights, overrides, message):
    config = composed(*SIT, *overrides, f"method.weights={weights[1]}")
    with pytest.raises(UserError, match=message):
        load_model(config, config.method)


def test_weights_of_an_unfinished_training_are_taken_only_by_name(composed, weights, tmp_path):
    config = composed(*SIT, "epochs=6", config_name="train")
    file = tmp_path / place(config.backbone, config.method) / "last.safetensors"
    file.parent.mkdir(parents=True)
    save_weights(weights[2], config, torch.float32, 2, file)
    found = composed(*SIT, f"checkpoints_dir={tmp_path}")
    with pytest.raises(UserError, match=r"last.safetensors: trained for 2 of 6 epochs so far; .* method.weights=/"):
        load_model(found, found.method)
    named = composed(*SIT, f"method.weights={file}")
    assert load_model(named, named.method)[1] == file


def test_weights_say_how_they_were_trained_and_may_be_read_by_others(composed, weights):
    with safe_open(weights[1], "pt") as content:
        about = content.metadata()
    assert [about[key] for key in ("epoch", "epochs", "init", "data")] == ["30", "30", "pretrained", "digits"]
    umask = os.umask(0)
    os.umask(umask)
    assert weights[1].stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda whole, file: None, "no such file"),
        (lambda whole, file: file.write_bytes(whole[:5000]), "not weights of scripts/train.py, or damaged"),
        (lambda whole, file: file.write_text("not weights"), "not weights of scripts/train.py, or damaged"),
    ],
)
def test_files_that_are_no_weights(composed, weights, tmp_path, make, message):
    file = tmp_path / "w.safetensors"
    make(weights[1].read_bytes(), file)
    config = composed(*SIT, f"method.weights={file}")
    with pytest.raises(UserError, match=message):
        load_model(config, config.method)


def test_a_plain_checkpoint_is_not_taken_for_trained_weights(composed, tmp_path):
    shutil.copy(SHIPPED.parents[2] / "dhtm/assets/deit_micro.safetensors", tmp_path / "w.safetensors")
    config = composed("method=tome", f"method.weights={tmp_path}/w.safetensors")
    with pytest.raises(UserError, match="trained with backbone=None, not backbone=deit_micro"):
        load_model(config, config.method)


def test_a_learned_method_without_weights_needs_permission_and_is_marked(composed, tmp_path):
    options = ["method=sinkhorn", "method.keep_rate=0.31", f"checkpoints_dir={tmp_path}"]
    config = composed(*options)
    with pytest.raises(UnavailableError, match=r"no weights trained for sinkhorn_keep_rate_0.31 in deit_micro"):
        load_model(config, config.method)
    config = composed(*options, "method.weights=null")
    with pytest.raises(
        UserError, match=r"method=sinkhorn has parameters of its own and method.weights=null gives none"
    ):
        load_model(config, config.method)
    runs = [f"results_dir={tmp_path}/runs", "data.limit=8", "device=cpu"]
    metrics = evaluate(composed(*options, *runs, "allow_untrained=true"))
    assert metrics["untrained"] and not metrics["trained"]
    again = evaluate(composed(*options, *runs, "allow_untrained=true", "force=true"))
    assert again["run_id"] == metrics["run_id"], "untrained parameters are those of the seed"
    plain = evaluate(composed(*runs, "method=lotm"))
    assert not plain["untrained"] and not plain["trained"]


def test_runs_say_that_they_are_trained(composed, weights, tmp_path):
    options = [*SIT, f"checkpoints_dir={weights[0]}", f"results_dir={tmp_path}"]
    metrics = evaluate(composed(*options, "data.limit=8", "device=cpu"))
    assert metrics["trained"] and not metrics["untrained"]
    assert metrics["params_m"] == pytest.approx(sum(p.numel() for p in weights[2].parameters()) / 1e6)
