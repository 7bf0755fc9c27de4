"""Tests of the cache of decoded images: images are the same as without it, also after damage, full disks and kills."""

import errno
import multiprocessing
import os
import runpy
import shutil
import signal

import numpy as np
import pytest
import torch
from processes import ROOT, wait_for
from timm.data import create_transform

from dhtm.harness.core.errors import UserError
from dhtm.harness.data import cache, photographs
from dhtm.harness.data.cache import decode_once
from dhtm.harness.data.photographs import Photographs
from dhtm.harness.data.splits import batches, open_split

PREPROCESSING = {
    "input_size": (3, 32, 32), "crop_pct": 0.9, "interpolation": "bicubic", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4),
}  # fmt: skip


class Cached:
    """A copy of the photographs and a folder for caches."""

    def __init__(self, root, folder):
        self.data, self.folder, self.files = Photographs("photos", str(root)), folder, sorted(root.glob("val/*/*"))

    def open(self, preprocessing=PREPROCESSING, num_workers=0):
        split = open_split(self.data, "val", preprocessing, 3)
        return split, decode_once(self.data, split, preprocessing, self.folder, num_workers)

    def chunks(self):
        return sorted(file.name for file in self.folder.glob("*/*.npy"))

    def require_same(self):
        """Check that the images are the same as without a cache."""
        direct, split = self.open()
        assert read(split)[0] == read(direct)[0]


@pytest.fixture
def images(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CHUNK", 3)
    photographs._list.cache_clear()
    shutil.copytree(photos, tmp_path / "photos")
    return Cached(tmp_path / "photos", tmp_path / "cache")


def read(split, indices=range(8), batch_size=3, num_workers=0):
    """Return what a run reads from a split: {index: (bytes of the image, label)}, and the errors by index."""
    failed, found = {}, {}
    on_unreadable = lambda error: failed.update({error.index: error})  # noqa: E731
    for ids, batch, labels in batches(split, indices, batch_size, torch.device("cpu"), num_workers, on_unreadable):
        found |= {
            int(i): (image.numpy().tobytes(), int(label)) for i, image, label in zip(ids, batch, labels, strict=True)
        }
    return found, failed


def test_cached_images_are_bit_identical(images):
    direct, split = images.open(num_workers=2)
    expected, _ = read(direct)
    image = create_transform(**PREPROCESSING)(photographs.decode(images.files[4].open("rb")))
    assert expected[4][0] == image.numpy().tobytes()
    assert read(split, num_workers=2)[0] == expected
    assert read(split, [7, 0, 5, 2], 2)[0] == {index: expected[index] for index in (7, 0, 5, 2)}
    assert images.chunks() == ["00000.npy", "00001.npy", "00002.npy"]
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (torch.tensor(PREPROCESSING[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert torch.equal(split.normalise(pixels), (pixels.to(torch.float32) / 255 - mean) / std)


def test_images_are_decoded_once_and_read_only_when_needed(images, monkeypatch):
    direct, split = images.open()
    expected, _ = read(split)
    for file in images.files:
        file.write_bytes(bytes(file.stat().st_size))  # zeros of the same size
    assert len(read(direct)[1]) == 8
    with monkeypatch.context() as patch:
        patch.setattr(np, "load", None)
        _, reopened = images.open()
    assert read(reopened)[0] == expected


def test_other_images_or_preprocessing_use_another_cache(images):
    images.open()
    images.open(PREPROCESSING | {"crop_pct": 1.0})
    images.data = Photographs("photos", images.data.root, limit=4)
    images.open()
    assert len(list(images.folder.iterdir())) == 3


def test_prepare_data_fails_on_unreadable_images_unless_skipped(images, composed):
    images.files[-1].write_bytes(b"no image")
    main = runpy.run_path(str(ROOT / "scripts/prepare_data.py"))["main"]
    overrides = [
        f"data.root={images.data.root}", f"cache_dir={images.folder}", "num_workers=0", "data=imagefolder",
        "backbone.architecture=test_vit", "backbone.num_classes=3", "method=unmerged",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"images that cannot be read: 1; fix them, or set data.on_error=skip"):
        main(composed(*overrides))
    main(composed(*overrides, "data.on_error=skip"))
    assert images.chunks() == ["00000.npy", "00001.npy"]


def test_full_disk_raises_and_the_cache_is_completed_later(images, monkeypatch):
    save, files = np.save, []

    def save_once(file, arr):
        files.append(file)
        save(file, arr)
        if len(files) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", save_once)
        with pytest.raises(
            UserError, match=r"cache_dir=.*/cache: .* cannot be written \(.*No space left.*\); remove it"
        ):
            images.open()
    assert images.chunks() == ["00000.npy"] and not list(images.folder.glob("*/.*"))
    (unfinished := next(images.folder.iterdir()) / ".00001.npy.7.npy").touch()  # left by a killed process
    images.require_same()
    assert len(images.chunks()) == 3 and not unfinished.exists()


def test_damaged_file_raises_and_missing_files_are_decoded_again(images):
    direct, _ = images.open()
    file = next(images.folder.glob("*/00001.npy"))
    file.write_bytes(file.read_bytes()[:5000])
    _, split = images.open()
    with pytest.raises(UserError, match=r"00001\.npy: damaged \(.*\); remove it and run the same command again"):
        read(split)
    shutil.rmtree(file.parent)  # the run that reads from it then decodes the images
    assert read(split)[0] == read(direct)[0]
    images.require_same()
    assert len(images.chunks()) == 3


def test_processes_fill_the_cache_together_when_one_is_killed(images, monkeypatch, tmp_path):
    """Each image is decoded once, apart from those of files that the killed process left unfinished."""
    decode, log = photographs.decode, tmp_path / "decoded"

    def decode_and_count(file):
        with log.open("a") as appended:
            appended.write("x")
        return decode(file)

    monkeypatch.setattr(photographs, "decode", decode_and_count)
    monkeypatch.setattr(cache, "CHUNK", 4)
    for i in range(80):
        shutil.copy(images.files[0], images.files[0].with_name(f"{i}.JPEG"))
    new_process = multiprocessing.get_context("fork").Process
    killed, *others = [new_process(target=images.open) for _ in range(3)]
    killed.start()
    wait_for(lambda: len(images.chunks()) > 3)
    for process in others:
        process.start()
    os.kill(killed.pid, signal.SIGKILL)
    for process in others:
        process.join(100)
    assert [process.exitcode for process in others] == [0, 0]
    assert 88 <= len(log.read_text()) <= 88 + 2 * 4 and len(images.chunks()) == 22
    monkeypatch.setattr(photographs, "decode", decode)
    direct, split = images.open()
    assert read(split, range(88))[0] == read(direct, range(88))[0]
