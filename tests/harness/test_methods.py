"""Weights trained with a method: they are found and loaded, or refused if they do not match."""

import dataclasses
import re

import pytest
import torch

from dhtm.harness.core.errors import UnavailableError, UserError
from dhtm.harness.models.backbones import EMBEDDED_WEIGHTS, Backbone
from dhtm.harness.models.methods import Method
from dhtm.harness.models.weights import load_model, save_weights

MICRO = Backbone("deit_micro", "deit_micro", 10)
SIT = Method("sit", "baselines.SiT", "keep_rate", "trained", {"keep_rate": 0.5, "layers": [4, 7, 10]})


def history(epoch, epochs):
    return {"epoch": epoch, "epochs": epochs, "init": "pretrained", "data": "digits"}


def with_options(method, checkpoint="trained", **options):
    return dataclasses.replace(method, checkpoint=str(checkpoint), options=method.options | options)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Save a SiT at keep rate 0.5 in deit_micro, as training does; return the folder, the file in it, and the model."""
    torch.manual_seed(7)
    model = SIT.put_into(MICRO.load(), MICRO.name)
    folder = tmp_path_factory.mktemp("checkpoints")
    file = folder / "deit_micro/sit_keep_rate_0.5/last.safetensors"
    file.parent.mkdir(parents=True)
    save_weights(model, MICRO, SIT, torch.float32, history(30, 30), file)
    return folder, file, model


def test_weights_are_found_by_backbone_method_and_knob_or_by_file(weights, tmp_path):
    folder, file, trained = weights
    images = torch.randn(3, 1, 56, 56)
    for method, checkpoints in ((SIT, folder), (with_options(SIT, file), tmp_path)):
        model, loaded_file = load_model(MICRO, method, checkpoints)
        assert loaded_file == file
        with torch.inference_mode():
            assert torch.equal(model(images), trained(images))


MISMATCHES = {
    "keep_rate=0.5, not keep_rate=0.6": (MICRO, with_options(SIT, keep_rate=0.6)),
    "layers=[4, 7, 10], not layers=[4, 7, 11]": (MICRO, with_options(SIT, layers=[4, 7, 11])),
    "method=sit, not method=tome": (MICRO, Method("tome", "baselines.ToMe", "r", options={"r": 8, "layers": "all"})),
    "num_classes=10, not num_classes=3": (dataclasses.replace(MICRO, num_classes=3), SIT),
}


def test_mismatched_weights_are_refused_and_the_mismatch_is_named(weights, tmp_path):
    for mismatch, (backbone, method) in MISMATCHES.items():
        with pytest.raises(UserError, match=re.escape(f"trained with {mismatch}")):
            load_model(backbone, with_options(method, weights[1]), tmp_path)


def test_weights_of_an_unfinished_training_are_loaded_only_by_file(weights, tmp_path):
    file = tmp_path / MICRO.name / SIT.place / "last.safetensors"
    file.parent.mkdir(parents=True)
    save_weights(weights[2], MICRO, SIT, torch.float32, history(2, 6), file)
    with pytest.raises(UserError, match=r"last.safetensors: trained for 2 of 6 epochs so far; .* method.checkpoint=/"):
        load_model(MICRO, SIT, tmp_path)
    assert load_model(MICRO, with_options(SIT, file), tmp_path)[1] == file


def test_damaged_and_unrelated_weights_are_refused(weights, tmp_path):
    damaged = tmp_path / "w.safetensors"
    damaged.write_bytes(weights[1].read_bytes()[:5000])
    for file, message in (
        (damaged, "not weights of scripts/train.py, or damaged"),
        (EMBEDDED_WEIGHTS, "trained with backbone=None, not backbone=deit_micro"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(MICRO, with_options(SIT, file), tmp_path)


def test_learned_method_without_weights_needs_allow_untrained_and_is_marked(evaluated, tmp_path):
    sinkhorn = ["method=sinkhorn", "method.keep_rate=0.31", f"checkpoints_dir={tmp_path}", "data.limit=8"]
    with pytest.raises(UnavailableError, match=r"no weights trained for sinkhorn_keep_rate_0.31 in deit_micro"):
        evaluated(*sinkhorn)
    with pytest.raises(UserError, match=r"method=sinkhorn has parameters of its own and method.checkpoint=null"):
        evaluated(*sinkhorn, "method.checkpoint=null")
    metrics = evaluated(*sinkhorn, "allow_untrained=true")
    assert metrics["untrained"] and not metrics["trained"]
    again = evaluated(*sinkhorn, "allow_untrained=true", "force=true")
    assert again["run_id"] == metrics["run_id"], "the seed must determine untrained parameters"
    plain = evaluated("data.limit=8", "method=lotm")
    assert not plain["untrained"] and not plain["trained"]
