"""Backbones and their weights, from every place that they may come from."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from dhtm.harness.core.errors import UserError
from dhtm.harness.models.backbones import Backbone, weights_sha256

TINY = "deit_tiny_patch16_224"


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(7)
    return timm.create_model(TINY, num_classes=3).eval()


@pytest.mark.parametrize("name", ["w.safetensors", "of_data_parallel.pth"])
def test_checkpoints_load(tiny, name, tmp_path):
    state = tiny.state_dict()
    if name == "w.safetensors":
        save_file(state, tmp_path / name)
    else:
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / name)
    loaded = Backbone("tiny", TINY, 3, tmp_path / name).load()
    assert weights_sha256(loaded) == weights_sha256(tiny)
    assert not loaded.training


def test_pretrained_weights_come_through_timm(monkeypatch, tmp_path):
    """What the hub would deliver, from a local file: timm's own pretrained path, whose source is a file here."""
    model, create = timm.create_model(TINY), timm.create_model
    save_file(model.state_dict(), tmp_path / "hub.safetensors")

    def from_file(*args, pretrained, **options):
        assert pretrained
        overlay = {"file": str(tmp_path / "hub.safetensors")}
        return create(*args, pretrained=True, pretrained_cfg_overlay=overlay, **options)

    monkeypatch.setattr(timm, "create_model", from_file)
    assert weights_sha256(Backbone("from_a_hub", TINY).load()) == weights_sha256(model)


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


BAD = {
    "other_head.pth": r"size mismatch for head.weight: .*\(\[5, 192\]\).*; backbone.num_classes sets",
    "nothing.pth": "Missing key.* in state_dict",
    "evil.pth": "not the weights of deit_tiny_patch16_224 .*; give model.state_dict",
    "cut.safetensors": "not the weights of deit_tiny_patch16_224 ",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints_are_refused_in_one_line(tiny, name, tmp_path):
    file = tmp_path / name
    save_file(tiny.state_dict(), tmp_path / "whole.safetensors")
    if name == "cut.safetensors":
        file.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:20_000])
    else:
        contents = {
            "other_head.pth": timm.create_model(TINY, num_classes=5).state_dict(),
            "nothing.pth": {"epoch": 3},
            "evil.pth": {"model": Evil(tmp_path / "executed")},
        }
        torch.save(contents[name], file)
    with pytest.raises(UserError, match=BAD[name]) as error:
        Backbone("tiny", TINY, 3, file).load()
    assert str(error.value).startswith(f"backbone.checkpoint={file}: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists(), "a pickle was executed"


def test_unknown_architecture_and_no_network():
    with pytest.raises(UserError, match=r"backbone.architecture=deit_huge: timm has no such model"):
        Backbone("deit_huge", "deit_huge")
    with pytest.raises(UserError, match=r"pretrained weights are not available .*backbone.checkpoint=FILE"):
        Backbone("deit_tiny", TINY).load()
