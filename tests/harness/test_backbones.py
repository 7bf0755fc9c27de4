"""Tests of backbones and of loading their weights from checkpoints."""

import os

import pytest
import timm
import torch
from safetensors.torch import save_file

from dhtm.harness.core.errors import UserError
from dhtm.harness.models.backbones import Backbone, weights_sha256

ARCHITECTURE = "test_vit"  # timm's smallest


def test_checkpoints_load(tmp_path):
    model = timm.create_model(ARCHITECTURE, num_classes=3)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    parallel = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": parallel}, tmp_path / "of_data_parallel.pth")
    for file in tmp_path.iterdir():
        loaded = Backbone("own", ARCHITECTURE, 3, file).load()
        assert weights_sha256(loaded) == weights_sha256(model)
        assert not loaded.training


class Evil:
    """An object that creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_invalid_checkpoint_raises_one_line_error(tmp_path):
    save_file(timm.create_model(ARCHITECTURE, num_classes=3).state_dict(), tmp_path / "cut.safetensors")
    os.truncate(tmp_path / "cut.safetensors", 20_000)
    contents = {
        "other_head.pth": timm.create_model(ARCHITECTURE, num_classes=5).state_dict(),
        "nothing.pth": {"epoch": 3},
        "evil.pth": {"model": Evil(tmp_path / "executed")},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    reasons = {"other_head.pth": "size mismatch for head.weight", "nothing.pth": "Missing key"}
    for name in (*contents, "cut.safetensors"):
        message = rf"^backbone.checkpoint={tmp_path / name}: not the weights of test_vit \(.*"
        with pytest.raises(UserError, match=message + reasons.get(name, "") + r".*\); give .*num_classes .*$") as error:
            Backbone("own", ARCHITECTURE, 3, tmp_path / name).load()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists(), "unpickling executed code"
