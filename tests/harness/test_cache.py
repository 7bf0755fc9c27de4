"""The cache of decoded images: the same predictions as without it, whatever has happened to its files."""

import errno
import itertools
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import start_script, wait_for
from safetensors.torch import save_file
from timm.data import create_transform
from timm.data.transforms import CenterCropOrPad
from torchvision.transforms import Compose

from dhtm.harness.core.errors import UserError
from dhtm.harness.data import cache, photographs
from dhtm.harness.data.splits import Split
from dhtm.harness.models.backbones import bare_backbone
from dhtm.harness.runs import predict as prediction
from dhtm.harness.runs.evaluate import evaluate

WIDE = {"input_size": (3, 32, 32), "crop_pct": 0.9, "interpolation": "bicubic"}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Every test opens its caches anew, as another process would."""
    monkeypatch.setattr(cache, "_opened", {})
    monkeypatch.setattr(cache, "CHUNK", 3)


@pytest.fixture
def run(composed, photos, tmp_path):
    """Evaluate DeiT-Tiny on a copy of the photographs; returns predictions and metrics."""
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    checkpoint = tmp_path / "tiny.safetensors"
    save_file(bare_backbone("deit_tiny_patch16_224", 3).state_dict(), checkpoint)
    numbers = itertools.count()

    def evaluate_with(*overrides, results=None):
        results = results or tmp_path / f"runs{next(numbers)}"
        metrics = evaluate(
            composed(
                "backbone=deit_tiny", f"backbone.checkpoint={checkpoint}", "backbone.num_classes=3", "data=imagefolder",
                f"data.root={root}", "device=cpu", "num_workers=0", f"results_dir={results}",
                f"cache_dir={tmp_path}/cache", *overrides,
            )
        )  # fmt: skip
        rows = pd.read_parquet(results / metrics["run_id"] / "predictions.parquet")
        return rows.assign(top5=rows.top5.map(tuple)), metrics

    evaluate_with.root, evaluate_with.cache = root, tmp_path / "cache"
    return evaluate_with


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.tuples(st.integers(8, 90), st.integers(8, 90)))
def test_in_parts_a_transform_is_the_same_bit_for_bit(seed, size):
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(2)]
    whole = create_transform(**WIDE)
    first, normalise = cache.parts(whole)
    pixels = torch.stack([first(image) for image in images])
    assert pixels.dtype == torch.uint8
    assert torch.equal(normalise(pixels), torch.stack([whole(image) for image in images]))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), shape=st.sampled_from([(9,), (9, 2), (9, 3, 5)]), dtype=st.sampled_from([np.uint8, np.int64]))
def test_rows_of_a_file_are_those_of_an_array(tmp_path_factory, data, shape, dtype):
    file = tmp_path_factory.mktemp("rows") / "file"
    array = np.zeros(shape, dtype)
    file.write_bytes(array.tobytes())
    rows = cache.Rows(file, dtype, shape, write=True)
    for number in range(3):
        written = data.draw(st.lists(st.integers(0, 8), unique=True))
        array[written] = values = np.full((len(written), *shape[1:]), number + 1, dtype) * dtype(7)
        rows.write(written, values)
        read = data.draw(st.lists(st.integers(0, 8)))
        assert np.array_equal(rows.read(read), array[read])
    assert file.read_bytes() == array.tobytes() and (len(rows), rows.nbytes) == (9, array.nbytes)


def cut_and_grown(file):
    """As another process mends it, before it has filled it."""
    size = file.stat().st_size
    os.truncate(file, 4 * 3 * 224 * 224)
    os.truncate(file, size)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: os.truncate(file, 4 * 3 * 224 * 224), "it is cut short"),  # a map would have killed the process
        (cut_and_grown, "it has changed"),
        (lambda file: flip(file), "it has changed"),
    ],
)
def test_a_cache_that_changes_under_a_run_ends_it_and_it_can_go_on(run, monkeypatch, damage, reason):
    direct, _ = run("cache_dir=null")
    predict = prediction.predict

    def damaging(*arguments):
        parts = predict(*arguments)
        yield next(parts)
        damage(next(run.cache.glob("*/pixels")))
        yield from parts

    results = run.cache.with_name("runs")
    monkeypatch.setattr(prediction, "predict", damaging)
    with pytest.raises(UserError, match=rf"pixels: cannot be read any more \({reason}\); the same command goes on"):
        run("batch_size=3", results=results)
    monkeypatch.setattr(prediction, "predict", predict)
    rows, _ = run("batch_size=3", results=results)
    pd.testing.assert_frame_equal(rows, direct)


def test_augmentation_has_no_parts():
    assert cache.parts(create_transform(**WIDE, is_training=True, auto_augment=None, re_prob=0.5)) is None


@pytest.mark.parametrize("overrides", [[], ["dtype=bfloat16"], ["data.limit=5", "batch_size=2"]])
def test_predictions_are_those_without_a_cache_row_by_row(run, overrides):
    direct, metrics = run(*overrides, "cache_dir=null")
    assert not run.cache.exists()
    for _ in range(2):
        rows, same = run(*overrides)
        pd.testing.assert_frame_equal(rows, direct)
        assert same["run_id"] == metrics["run_id"], "a cache is no part of what a run is"


def test_the_images_are_decoded_once(run, monkeypatch):
    before, _ = run()
    for file in run.root.glob("val/*/*"):
        file.write_bytes(bytes(file.stat().st_size))  # as many zeros
    pd.testing.assert_frame_equal(run()[0], before)
    monkeypatch.setattr(cache, "_opened", {})
    pd.testing.assert_frame_equal(run()[0], before)
    with pytest.raises(UserError, match="cannot be read"):
        run("cache_dir=null")


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "chunks"),
    [
        ("pixels", flip, 1),
        ("labels", flip, 1),
        ("pixels", lambda file: os.truncate(file, file.stat().st_size // 2), 2),
        ("labels", lambda file: file.write_bytes(b""), 2),  # the labels of the first chunk are zero
        ("checksums", lambda file: file.write_bytes(file.read_bytes()[:-4]), 1),
        ("checksums", lambda file: file.write_bytes(os.urandom(100)), 0),
        ("checksums", lambda file: file.unlink(), 0),
    ],
)
def test_what_is_damaged_is_made_again(run, monkeypatch, caplog, name, damage, chunks):
    before, _ = run()
    (folder,) = run.cache.iterdir()
    damage(folder / name)
    monkeypatch.setattr(cache, "_opened", {})
    pd.testing.assert_frame_equal(run()[0], before)
    assert (f"{chunks} of 3 chunks are damaged" in caplog.text) == bool(chunks)
    monkeypatch.setattr(cache, "_opened", {})
    caplog.clear()
    pd.testing.assert_frame_equal(run()[0], before)
    assert "damaged" not in caplog.text


def test_other_images_or_another_crop_are_another_cache(run):
    run()
    run("data.limit=4")
    next(run.root.glob("val/*/*")).unlink()
    photographs._listed.cache_clear()
    run()
    assert len(list(run.cache.iterdir())) == 3


def test_an_image_that_cannot_be_read_is_named_and_the_others_stay(run):
    file = sorted(run.root.glob("val/*/*"))[-1]
    content = file.read_bytes()
    file.write_bytes(content[:200].ljust(len(content)))
    with pytest.raises(UserError, match=f"image 7 cannot be read: .*{file.name}"):
        run()
    (folder,) = run.cache.iterdir()
    assert len((folder / "checksums").read_text().splitlines()) == 2
    file.write_bytes(content)
    pd.testing.assert_frame_equal(run()[0], run("cache_dir=null")[0])


@pytest.mark.parametrize("n_files", [0, 1])
def test_without_room_images_are_decoded_for_every_run(run, monkeypatch, caplog, n_files):
    """Also where there is room for the images, but not for their labels."""
    files = itertools.count()

    def full(*arguments):
        if next(files) == n_files:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    rows, _ = run()
    assert "no room for 1 MB (No space left on device); images are decoded anew" in caplog.text
    pd.testing.assert_frame_equal(rows, run("cache_dir=null")[0])
    assert not list(run.cache.glob("*/pixels"))


@pytest.mark.parametrize("cannot", [None, errno.EOPNOTSUPP])
def test_file_systems_that_cannot_reserve_blocks(run, monkeypatch, caplog, cannot):
    def fails(*arguments):
        raise OSError(cannot, "not supported")

    if cannot is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", fails)
    rows, _ = run()
    assert "no room" not in caplog.text and list(run.cache.glob("*/pixels"))
    pd.testing.assert_frame_equal(rows, run("cache_dir=null")[0])


def test_where_nothing_can_be_written_the_setting_is_named(run):
    with pytest.raises(UserError, match="cache_dir=/proc/nowhere: cannot write there"):
        run("cache_dir=/proc/nowhere")
    with pytest.raises(UserError, match="cache_dir=5: it must be a path"):
        run("cache_dir=5")


def test_a_whole_cache_is_used_where_nothing_can_be_written(run, monkeypatch):
    """Of another user, say. Permissions would not stop a test that runs as root."""

    def read_only(folder, setting):
        if folder.is_relative_to(run.cache):
            raise UserError(f"{setting}: cannot write there (Read-only file system); choose another place")

    before, _ = run()
    (folder,) = run.cache.iterdir()
    for file in run.root.glob("val/*/*"):
        file.write_bytes(bytes(file.stat().st_size))  # as many zeros
    contents = {file: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(cache, "require_writable", read_only)
    monkeypatch.setattr(cache, "_opened", {})
    pd.testing.assert_frame_equal(run()[0], before)
    assert {file: file.read_bytes() for file in folder.iterdir()} == contents
    for damage in (flip, lambda file: os.truncate(file, 5), Path.unlink):
        monkeypatch.setattr(cache, "_opened", {})
        damage(folder / "pixels")
        with pytest.raises(UserError, match=r"cache_dir=.*cannot write there"):
            run()


def test_the_colour_of_borders_is_part_of_what_a_cache_is(run):
    """timm's transform does not print it."""
    split = Split(
        dataset=[(torch.zeros(3, 8, 8, dtype=torch.uint8), 0)],
        classes=("a",),
        fingerprint="f",
        in_memory=False,
        channels=3,
        n_classes=1,
    )
    for fill in (0, 0, 255):
        transform = Compose([CenterCropOrPad(8, fill=fill)])
        assert cache.cached(split, transform, (3, 8, 8), run.cache, 0, "x", True).images.shape == (1, 3, 8, 8)
    assert len(list(run.cache.iterdir())) == 2


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """900 small JPEGs of three classes."""
    root = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    for i in range(900):
        folder = root / "val" / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((300, 260)).save(folder / f"{i}.jpg")
    return root


def preparation(root, folder):
    options = ["backbone=deit_tiny", "backbone.num_classes=3", "data=imagefolder", f"data.root={root}", "num_workers=1"]
    return ["prepare_data", *options, f"cache_dir={folder}"]


def written(folder):
    return sum(file.read_text().count("\n") for file in folder.glob("*/checksums"))


def contents(folder):
    return [(folder / next(folder.iterdir()) / name).read_bytes() for name in ("pixels", "labels")]


def test_killed_half_way_it_goes_on_and_two_at_once_fill_it_once(many, tmp_path, script, monkeypatch):
    monkeypatch.undo()  # chunks as large as a user's
    killed, together = tmp_path / "killed", tmp_path / "together"
    process = start_script(*preparation(many, killed))
    wait_for(lambda: written(killed) >= 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    before = written(killed)
    assert 2 <= before < 15, "killed before its end"
    result = script(*preparation(many, killed))
    assert result.returncode == 0 and "900 images, 0.1 GB" in result.stdout
    assert written(killed) <= 15 + 1 + 1, "what was there was not made again"

    said = [tmp_path / "first", tmp_path / "second"]
    builders = [start_script(*preparation(many, together), stdout=file) for file in said]
    for builder in builders:
        builder.join(300)
    assert [builder.exitcode for builder in builders] == [0, 0]
    assert sum("waiting for another process" in file.read_text() for file in said) == 1
    assert written(together) == 15
    assert contents(killed) == contents(together)
