"""Backbones and the files that their weights may come from."""

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
    """Creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_files_that_are_not_its_weights_are_refused_in_one_line(tmp_path):
    for name, content in {"nothing.pth": {"epoch": 3}, "evil.pth": {"model": Evil(tmp_path / "executed")}}.items():
        torch.save(content, tmp_path / name)
        message = rf"^backbone.checkpoint={tmp_path / name}: not the weights of test_vit \(.*\); give .*num_classes .*$"
        with pytest.raises(UserError, match=message) as error:
            Backbone("own", ARCHITECTURE, 3, tmp_path / name).load()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists(), "a pickle was executed"
