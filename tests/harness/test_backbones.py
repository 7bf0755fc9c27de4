"""Backbones and their weights, from every place that they may come from."""

import pickle
import tempfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from dhtm.harness.core.errors import UserError
from dhtm.harness.models.backbones import MICRO_WEIGHTS, load_backbone, weights_sha256


def tiny():
    torch.manual_seed(7)
    return timm.create_model("deit_tiny_patch16_224", num_classes=3).eval()


def save_as(kind, model, path):
    state = model.state_dict()
    {
        "safetensors": lambda: save_file(state, path),
        "pth": lambda: torch.save(state, path),
        "pth, under model": lambda: torch.save({"model": state, "epoch": 3}, path),
        "pth, under state_dict, from DataParallel": lambda: torch.save(
            {"state_dict": {f"module.{key}": value for key, value in state.items()}}, path
        ),
    }[kind]()


@pytest.mark.parametrize("kind", ["safetensors", "pth", "pth, under model", "pth, under state_dict, from DataParallel"])
def test_checkpoints_load(kind, tmp_path):
    model = tiny()
    path = tmp_path / f"weights.{kind.split(',')[0]}"
    save_as(kind, model, path)
    loaded = load_backbone("deit_tiny_patch16_224", str(path), 3)
    assert weights_sha256(loaded) == weights_sha256(model)
    assert not loaded.training


def test_pretrained_weights_come_through_timm(monkeypatch, tmp_path):
    """What the hub would deliver, from a local file: timm's own pretrained path, whose source is a file here."""
    model = timm.create_model("deit_tiny_patch16_224")
    save_file(model.state_dict(), tmp_path / "hub.safetensors")
    create = timm.create_model

    def from_file(*args, pretrained, **options):
        assert pretrained
        return create(
            *args, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "hub.safetensors")}, **options
        )

    monkeypatch.setattr(timm, "create_model", from_file)
    load_backbone.cache_clear()
    assert weights_sha256(load_backbone("deit_tiny_patch16_224", None, 1000)) == weights_sha256(model)
    load_backbone.cache_clear()


def test_the_embedded_weights():
    model = load_backbone("deit_micro", None, 10)
    assert type(model) is timm.models.vision_transformer.VisionTransformer
    assert len(model.blocks) == 12
    assert model.patch_embed.grid_size == (14, 14)
    assert 0.5e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 1.5e6
    assert MICRO_WEIGHTS.stat().st_size <= 3e6


def test_the_hash_is_of_the_weights_and_not_of_the_file():
    model = tiny()
    before = weights_sha256(model)
    assert weights_sha256(tiny()) == before
    with torch.no_grad():
        model.head.bias[0] += 1e-6
    assert weights_sha256(model) != before


EXECUTED = Path(tempfile.gettempdir()) / "dhtm-test-executed-a-pickle"


class Evil:
    def __reduce__(self):
        return (open, (str(EXECUTED), "w"))


def bad_files(folder):
    wide = timm.create_model("deit_tiny_patch16_224", num_classes=5).state_dict()
    small = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2).state_dict()
    pickled = pickle.dumps({"model": Evil()})
    torch.save(wide, folder / "other_head.pth")
    torch.save(small, folder / "other_depth.pth")
    torch.save({"model": Evil()}, folder / "evil.pth")
    (folder / "evil.pkl").write_bytes(pickled)
    torch.save(tiny().state_dict(), folder / "whole.pth")
    (folder / "cut.pth").write_bytes((folder / "whole.pth").read_bytes()[:100_000])
    save_file(tiny().state_dict(), folder / "whole.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:100_000])
    (folder / "text.safetensors").write_text("not weights")
    (folder / "empty.pth").write_bytes(b"")
    torch.save(tiny().state_dict(), folder / "legacy.pth", _use_new_zipfile_serialization=False)
    (folder / "legacy_cut.pth").write_bytes((folder / "legacy.pth").read_bytes()[:20_000])
    (folder / "picture.pth").write_bytes(b"\x89PNG\r\n" + bytes(range(256)))
    torch.save([1, 2], folder / "list.pth")
    torch.save({"epoch": 3}, folder / "nothing.pth")
    (folder / "folder.pth").mkdir()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.pth", "no such file"),
        ("folder.pth", "no such file"),
        ("other_head.pth", r"head\.(weight|bias) is \[5.*\], not \[3.*\]; set backbone.num_classes"),
        ("other_depth.pth", "it lacks 120 parameters that it needs, blocks.10.attn.proj.bias for one"),
        ("evil.pth", "holds more than weights, which is not loaded"),
        ("evil.pkl", "holds more than weights, which is not loaded"),
        ("cut.pth", "cannot be read as weights, it may be damaged"),
        ("cut.safetensors", "cannot be read as weights, it may be damaged"),
        ("text.safetensors", "cannot be read as weights, it may be damaged"),
        ("legacy_cut.pth", "cannot be read as weights, it may be damaged"),
        ("picture.pth", "damaged"),
        ("empty.pth", "cannot be read as weights, it may be damaged"),
        ("list.pth", "cannot be read as weights, it may be damaged"),
        ("nothing.pth", "holds no parameters"),
    ],
)
def test_bad_checkpoints_are_refused_in_one_line(name, message, tmp_path):
    bad_files(tmp_path)
    path = tmp_path / name
    with pytest.raises(UserError, match=message) as error:
        load_backbone("deit_tiny_patch16_224", str(path), 3)
    assert str(error.value).startswith(f"backbone.checkpoint={path}: ")
    assert "\n" not in str(error.value)
    assert not EXECUTED.exists(), "a pickle was executed"


def test_unknown_architecture_and_no_network():
    with pytest.raises(UserError, match=r"backbone.architecture=deit_huge: not a model of timm"):
        load_backbone("deit_huge", None, 1000)
    with pytest.raises(UserError, match=r"pretrained weights cannot be had .*backbone.checkpoint=FILE"):
        load_backbone("deit_tiny_patch16_224", None, 1000)
