"""Damaged images, overrides, checkpoints and result directories: one line each, no traceback, and no wrong number.

`make test` tries a few of each, `make stress` more than a thousand; both draw them anew from fixed seeds.
"""

import io
import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import ROOT
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

import dhtm
from dhtm.harness.core.errors import UserError
from dhtm.harness.models.backbones import Backbone
from dhtm.harness.runs.directory import predictions
from dhtm.report.runs import load_runs

FORMATS = ["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP"]


def sizes(few, many):
    return [pytest.param(few, id="few"), pytest.param(many, id="many", marks=pytest.mark.stress)]


def damaged(content, rng):
    """The content of a file after one of the things that happen to files."""
    content = bytearray(content)
    what = rng.choice(["cut off", "bits flipped", "zeros", "empty", "noise", "spliced"])
    if what == "cut off":
        return bytes(content[: rng.randrange(len(content))])
    if what == "bits flipped":
        for _ in range(rng.choice([1, 3, 30])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif what == "zeros":
        start = rng.randrange(len(content))
        content[start : start + 512] = bytes(len(content[start : start + 512]))
    elif what == "noise":
        return rng.randbytes(rng.randrange(1, 2000))
    elif what == "spliced":
        start = rng.randrange(len(content))
        return bytes(content[:start] + content[rng.randrange(len(content)) :])
    return b"" if what == "empty" else bytes(content)


def photograph(rng, kind):
    file = io.BytesIO()
    pixels = np.frombuffer(rng.randbytes(8 * 9 * 3), np.uint8).reshape(8, 9, 3)
    Image.fromarray(pixels).resize((90, 80)).save(file, kind)
    return file.getvalue()


def wrong_type(rng):
    return rng.choice([b"<html>404</html>", b"%PDF-1.4\n%", b"PK\x03\x04", b"\x7fELF", b"null", "Übergröße".encode()])


@pytest.mark.parametrize("n_images", sizes(30, 600))
def test_images(evaluated, tmp_path, n_images):
    """Every file that Pillow can read has the prediction that it has by itself, and every other is listed."""
    rng = random.Random(0)
    folder = tmp_path / "photos" / "n01440764"
    folder.mkdir(parents=True)
    for i in range(n_images):
        content = photograph(rng, rng.choice(FORMATS))
        content = content if i % 5 == 0 else wrong_type(rng) if i % 7 == 0 else damaged(content, rng)
        (folder / f"{i:04d}.jpg").write_bytes(content)
    model = timm.create_model("deit_tiny_patch16_224", num_classes=1000).eval()
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    metrics = evaluated(
        "backbone=deit_tiny", f"backbone.checkpoint={tmp_path}/tiny.safetensors", "data=imagefolder",
        f"data.root={tmp_path}/photos", "data.class_map=synsets", "data.on_error=skip", "method.k=20", "num_workers=2",
        "batch_size=16",
    )  # fmt: skip
    run = tmp_path / "runs" / metrics["run_id"]
    found = predictions(run).filter(like="class_")

    dhtm.patch(model, dhtm.DHTM(k=20, layers=(4, 7, 11)))
    transform = create_transform(**resolve_data_config(model=model))
    unreadable = []
    for i, file in enumerate(sorted(folder.iterdir())):
        try:
            image = Image.open(file).convert("RGB")
        except Exception:  # whatever Pillow raises
            unreadable.append(i)
            continue
        with torch.inference_mode():
            logits = model(transform(image)[None])[0]
        best = logits.topk(5)
        apart = -best.values.diff().max()  # closer ones may change places between batches
        assert apart < 1e-4 or found.loc[i].tolist() == best.indices.tolist(), file
    assert 0 < len(unreadable) < n_images
    assert pd.read_csv(run / "failed.csv")["index"].tolist() == unreadable
    assert (metrics["n_failed"], metrics["n_images"]) == (len(unreadable), n_images - len(unreadable))


def keys(config, prefix=""):
    for key, value in config.items_ex(resolve=False):
        if isinstance(value, DictConfig):
            yield from keys(value, f"{prefix}{key}.")
        yield f"{prefix}{key}"


VALUES = [
    "abc", "-1", "0", "1.5", "1e99", "nan", "inf", "null", "true", "''", "[]", "[1,2]", "[[1]]", "{a:1}", "'a b'", "../..",
    "/dev/null", "99999999999999999999", "${nothing}", "${oc.env:NO_SUCH_VARIABLE}", "'${', '", "ü", "1,2", "[", "'",
]  # fmt: skip

NAMES = ["abc", "''", "../..", "/dev/null", "ü", "${nothing}", "'a b'", "["]


# Command lines of a script, one after the other in one process; a line of JSON for each: exit code and output.
LOOP = """
import contextlib, io, json, runpy, sys
for line in sys.stdin:
    sys.argv, out, code = json.loads(line), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        except BaseException as error:
            out.write(f"Traceback: {error!r}")
    print(json.dumps([code, out.getvalue()]), flush=True)
"""


def carried_out(commands, folder):
    lines = [json.dumps([str(ROOT / "scripts/evaluate.py"), *command]) for command in commands]
    result = subprocess.run(
        [sys.executable, "-c", LOOP], input="\n".join(lines), cwd=folder, capture_output=True, text=True, timeout=900,
        check=True,
    )  # fmt: skip
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    "n_commands", [pytest.param(12, id="few"), pytest.param(300, id="many", marks=pytest.mark.stress)]
)
def test_overrides(composed, tmp_path, n_commands):
    """Any value of any key: what it asks for, or one line."""
    config = composed("target.reduction_pct=20", "data.limit=2")
    fixed = ["data.limit=2", "num_workers=0", "device=cpu"]
    rng = random.Random(1)
    paths = [key for key in keys(config) if key.split(".")[0] not in ("results_dir", "cache_dir", "checkpoints_dir")]
    changes = []
    for _ in range(n_commands):
        key = rng.choice(paths)
        # What is no name of a choice Hydra itself refuses, with a traceback of its own.
        changes.append(
            f"{key}={rng.choice(NAMES if key == 'experiment' or OmegaConf.is_dict(config.get(key)) else VALUES)}"
        )
    commands = [[*fixed, f"results_dir={tmp_path}/runs", change] for change in changes]
    for change, (code, said) in zip(changes, carried_out(commands, tmp_path), strict=True):
        assert "Traceback" not in said, (change, said)
        assert code in (0, 1), (change, said)
        if code:
            assert said.strip(), change
        key, _, value = change.partition("=")
        if code == 1 and "error: " in said:
            line = said[said.index("error: ") :].strip()
            assert "\n" not in line, (change, line)
            named = (key.split(".")[0], key.split(".")[-1], value)
            assert any(name in line for name in named if name), ("names what is wrong", change, line)
    for file in (tmp_path / "runs").glob("*/metrics.json"):
        metrics = json.loads(file.read_text())
        config = OmegaConf.load(file.parent / "config.yaml")
        assert metrics["n_images"] == min(config.data.limit or 2000, 2000) and metrics["method"] == config.method.name


@pytest.mark.parametrize("n_files", sizes(5, 100))
def test_checkpoints(evaluated, tmp_path, n_files):
    """A damaged file is refused, or its run is another than that of the whole one."""
    rng = random.Random(2)
    whole = evaluated("data.limit=2")
    state = Backbone("deit_micro", "deit_micro", 10).bare().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    contents = {".pth": (tmp_path / "weights.pth").read_bytes(), ".safetensors": dhtm_weights()}
    refused = 0
    for i in range(n_files):
        suffix = rng.choice(sorted(contents))
        file = tmp_path / f"{i}{suffix}"
        file.write_bytes(damaged(contents[suffix], rng))
        try:
            metrics = evaluated("data.limit=2", f"backbone.checkpoint={file}")
        except UserError as error:
            refused += 1
            said = str(error)
            assert str(file) in said and "\n" not in said
        else:
            assert metrics["run_id"] != whole["run_id"] and metrics["weights_sha256"] != whole["weights_sha256"]
    assert refused


def dhtm_weights():
    return (ROOT / "dhtm/assets/deit_micro.safetensors").read_bytes()


@pytest.mark.parametrize("n_files", sizes(5, 100))
def test_result_directories(evaluated, tmp_path, n_files):
    """Predictions that have changed, and metrics that are cut short, are not believed by a report or another run."""
    rng = random.Random(3)
    metrics = evaluated("data.limit=20", f"results_dir={tmp_path}/whole")
    whole = tmp_path / "whole" / metrics["run_id"]
    expected = predictions(whole)
    for i in range(n_files):
        root = tmp_path / str(i)
        folder = shutil.copytree(whole, root / whole.name)
        file = folder / rng.choice(["metrics.json", "predictions.parquet"])
        before = file.read_bytes()
        short = before[: rng.randrange(len(before) - 2)]  # the last two bytes are the bracket and the end of the line
        file.write_bytes(short if file.suffix == ".json" else damaged(before, rng))
        if file.read_bytes() == before:
            continue
        try:
            runs = load_runs(root)
            found = predictions(root / whole.name)
        except UserError as error:
            said = str(error)
            assert file.name in said and "\n" not in said
        else:
            raise AssertionError(f"{file}: believed, {runs} {found}")
        if i % 5 == 0:
            again = evaluated("data.limit=20", f"results_dir={root}", "force=true")
            assert again["top1"] == metrics["top1"]
            pd.testing.assert_frame_equal(predictions(root / whole.name), expected)
