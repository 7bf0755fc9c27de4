"""Images as a backbone sees them, decoded, resized and cropped once for all runs of a sweep.

A folder of ``cache_dir`` holds one split under one transform: ``pixels`` (uint8 [n, C, H, W]), ``labels`` (int64 [n]),
``checksums`` (a line for every chunk that is written) and ``lock``. Only chunks whose checksum is right are believed, and
later only images that are still as they were then; so what a crash, or anything else, leaves behind is made again, and no
more than that.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import Compose, Normalize, PILToTensor, ToTensor
from tqdm import tqdm

from dhtm.harness.core.errors import UserError, path_given
from dhtm.harness.data.splits import Batch, Split, UnreadableError, load
from dhtm.harness.runs.store import locked, require_writable

log = logging.getLogger(__name__)

CHUNK = 64  # images
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PACKAGES = ("Pillow", "timm", "torchvision")  # other versions may decode or resize another way
_opened: dict[Path, "Pixels"] = {}  # by this process, which need not verify them again


class Rows:
    """An array [n, ...] in a file, read and written by its rows.

    By calls, which can fail, because a map of a file that is cut short, or whose disk vanishes, kills the process.

    Args:
        file: at least as large as the array.
        write: shall rows be written too?

    Raises:
        OSError: here and in the methods, what is wrong with the file.
    """

    def __init__(self, file: Path, dtype: type, shape: tuple[int, ...], write: bool):
        self.name, self.dtype, self.shape = file, np.dtype(dtype), shape
        self._file = file.open("r+b" if write else "rb", buffering=0)
        self._row_bytes = self.dtype.itemsize * math.prod(shape[1:])

    def __len__(self):
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return len(self) * self._row_bytes

    def read(self, rows: Sequence[int]) -> np.ndarray:
        """The rows with these numbers, in their order."""
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for part, offset in self._parts(values, rows):
            while part:
                n_bytes = os.preadv(self._file.fileno(), [part], offset)
                if not n_bytes:
                    raise OSError(errno.EIO, "it is cut short")
                part, offset = part[n_bytes:], offset + n_bytes
        return values

    def write(self, rows: Sequence[int], values: np.ndarray) -> None:
        """Set the rows with these numbers."""
        for part, offset in self._parts(np.ascontiguousarray(values, self.dtype), rows):
            while part:
                n_bytes = os.pwrite(self._file.fileno(), part, offset)
                part, offset = part[n_bytes:], offset + n_bytes

    def _parts(self, values: np.ndarray, rows: Sequence[int]) -> Iterator[tuple[memoryview, int]]:
        """Of the values, the bytes of rows that follow each other in the file, and where there."""
        numbers = np.asarray(rows, dtype=np.int64)
        ends = np.flatnonzero(np.diff(numbers, append=-1) != 1) + 1
        for first, last in itertools.pairwise([0, *ends]):
            yield memoryview(values[first:last].reshape(-1)).cast("B"), int(numbers[first]) * self._row_bytes


class Pixels:
    """A split's images, which stay on the disk, and labels.

    Args:
        images: uint8 [n, C, H, W].
        labels: int64 [n].
        checksums: of each image, uint32 [n].
        failed: those that could not be read, by their index; they are blank.
    """

    def __init__(self, images: Rows, labels: np.ndarray, checksums: np.ndarray, failed: dict[int, UnreadableError]):
        self.images, self.labels, self.checksums, self.failed = images, labels, checksums, failed
        self._resident: Tensor | None = None

    def __len__(self):
        return len(self.images)

    def on(self, device: torch.device) -> Tensor | None:
        """All images on a GPU, where they stay; None where that has no room for them twice, or is none."""
        if device.type != "cuda":
            return None
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if self._resident is None or self._resident.device != device:
            self._resident = None
            if torch.cuda.mem_get_info(device)[0] < 2 * self.images.nbytes:
                return None
            resident = torch.empty(self.images.shape, dtype=torch.uint8, device=device)
            for rows in _chunks(len(self)):
                resident[rows.start : rows.stop] = self._read(rows)
            self._resident = resident
        return self._resident

    def batches(self, batches: Sequence[Sequence[int]], device: torch.device) -> Iterator[Batch]:
        """The images, uint8 and on the device if they stay there, in the batches that are asked for."""
        resident = self.on(device)
        for indices in batches:
            rows = np.array([index for index in indices if index not in self.failed], dtype=np.int64)
            ids = torch.from_numpy(rows)
            images = self._read(rows) if resident is None else resident[ids.to(device)]
            failed = [self.failed[index] for index in indices if index in self.failed]
            yield Batch(ids, images, torch.from_numpy(self.labels[rows]), failed)

    def _read(self, rows: Sequence[int]) -> Tensor:
        try:
            images = self.images.read(rows)
            if not np.array_equal(_checksums(images), self.checksums[rows]):
                raise OSError(errno.EIO, "it has changed")
        except OSError as error:
            _opened.clear()  # the next run of this process looks again
            raise UserError(
                f"{self.images.name}: cannot be read any more ({error.strerror}); the same command goes on, and makes again "
                "what is damaged, or set cache_dir=null"
            ) from None
        return torch.from_numpy(images)


class Normaliser:
    """What a transform does to cropped images, for a whole batch wherever it is, bit for bit as image by image."""

    def __init__(self, normalize: Normalize):
        self.mean, self.std = (torch.as_tensor(of, dtype=torch.float32) for of in (normalize.mean, normalize.std))

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to float32 of the same shape."""
        # By a tensor: a GPU divides by a number by multiplying with its inverse, which rounds another way.
        largest = torch.full((1,), 255.0, device=pixels.device)
        mean, std = (of.to(pixels.device).view(-1, 1, 1) for of in (self.mean, self.std))
        return pixels.to(torch.float32).div_(largest).sub_(mean).div_(std)


def parts(transform: Compose) -> tuple[Compose, Normaliser] | None:
    """An evaluation's transform in two: from PIL images to uint8 [C, H, W], and the rest. None if it has another form."""
    *first, to_tensor, normalize = transform.transforms
    if not isinstance(to_tensor, ToTensor) or not isinstance(normalize, Normalize):
        return None
    return Compose([*first, PILToTensor()]), Normaliser(normalize)


def cached(
    split: Split,
    transform: Compose,
    size: tuple[int, int, int],
    cache_dir: str,
    num_workers: int | None,
    name: str,
    fail_fast: bool,
) -> Pixels | None:
    """The images of a split from the cache, after putting there what it lacks; None where the disk has no room.

    Args:
        split: gives uint8 tensors [C, H, W].
        transform: the one by which it does.
        size: C, H, W.
        cache_dir: folder of caches.
        num_workers: processes that decode images; None for one a core.
        name: what to call it on a progress bar.
        fail_fast: raise the first error of an image that cannot be read.

    Raises:
        UserError: the folder cannot be written to, and lacks images, or cannot be read.
    """
    versions = {package: metadata.version(package) for package in _PACKAGES}
    # timm's transforms do not print the colour that they fill borders with.
    steps = [(str(step), getattr(step, "fill", None)) for step in transform.transforms]
    key = json.dumps([split.fingerprint, len(split.dataset), steps, size, versions], default=str)
    folder = path_given(cache_dir, "cache_dir") / hashlib.sha256(key.encode()).hexdigest()[:16]
    if folder not in _opened:
        shape = (len(split.dataset), *size)
        with contextlib.ExitStack() as held:
            try:
                require_writable(folder, f"cache_dir={cache_dir}")
                held.enter_context(locked(folder / "lock", f"waiting for another process, which fills {folder}"))
                found = _complete(split, shape, folder, num_workers, name, fail_fast)
            except UserError as error:
                # Others may have made it for all to read.
                found = None if isinstance(error, UnreadableError) else _filled_by_others(shape, folder)
                if found is None:
                    raise
        if found is None or found.failed:  # which may be mended before the next run
            return found
        _opened[folder] = found
    return _opened[folder]


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What the system says against reading or writing a cache, in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cache_dir: {folder}: cannot be read or written ({error.strerror}); choose another place, or cache_dir=null"
        ) from error


def _filled_by_others(shape: tuple[int, ...], folder: Path) -> Pixels | None:
    """A cache as it is, where nothing can be added to it; None unless all is there."""
    try:
        images, labels = _open(folder, shape, write=False)
        missing, checksums = _missing(folder, images, labels)
        return None if missing else Pixels(images, labels.read(range(shape[0])), checksums, {})
    except OSError:  # not there, or too short
        return None


def _open(folder: Path, shape: tuple[int, ...], write: bool) -> tuple[Rows, Rows]:
    return Rows(folder / "pixels", np.uint8, shape, write), Rows(folder / "labels", np.int64, shape[:1], write)


def _complete(
    split: Split, shape: tuple[int, ...], folder: Path, num_workers: int | None, name: str, fail_fast: bool
) -> Pixels | None:
    with _told(folder):
        if not _room(folder, shape):
            return None
        images, labels = _open(folder, shape, write=True)
        missing, checksums = _missing(folder, images, labels)
    failed = {}
    if missing:
        batches = load(split.dataset, missing, num_workers)
        with (
            _opened_checksums(folder) as file,
            tqdm(total=sum(map(len, missing)), desc=f"{name}: cache", unit=" images", disable=None) as bar,
        ):
            for rows, batch in zip(missing, batches, strict=True):
                if batch.failed and fail_fast:
                    raise batch.failed[0]
                if len(batch.ids):
                    read, pixels = batch.ids.numpy(), batch.images.numpy()
                    with _told(folder):
                        images.write(read, pixels)
                        labels.write(read, batch.labels.numpy())
                    checksums[read] = _checksums(pixels)
                if batch.failed:  # tried again by the next process
                    failed |= {unreadable.index: unreadable for unreadable in batch.failed}
                else:
                    with _told(folder):
                        file.write(f"{rows.start} {_checksum(checksums[rows], batch.labels.numpy())}\n")
                        file.flush()
                bar.update(len(rows))
    with _told(folder):
        images, labels = _open(folder, shape, write=False)
        return Pixels(images, labels.read(range(shape[0])), checksums, failed)


@contextlib.contextmanager
def _opened_checksums(folder: Path) -> Iterator[IO]:
    with _told(folder):
        file = (folder / "checksums").open("a")
    try:
        if file.tell():
            file.write("\n")  # the last line may have been cut off
        yield file
    finally:
        with contextlib.suppress(OSError):  # of what could not be flushed
            file.close()


def _missing(folder: Path, images: Rows, labels: Rows) -> tuple[list[range], np.ndarray]:
    """The chunks that are not there, or not as they were written; and the checksum of every image, uint32 [n]."""
    written, checksums = {}, np.zeros(len(images), np.uint32)
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "checksums").read_text(errors="replace").splitlines():
            first, _, checksum = line.partition(" ")
            written[first] = checksum
    chunks, missing = _chunks(len(images)), []
    for rows in chunks:
        checksums[rows] = _checksums(images.read(rows))
        if written.get(str(rows.start)) != str(_checksum(checksums[rows], labels.read(rows))):
            missing.append(rows)
    damaged = [rows for rows in missing if str(rows.start) in written]
    if damaged:
        log.warning("%s: %d of %d chunks are damaged and must be made again", folder, len(damaged), len(chunks))
    return missing, checksums


def _chunks(n_images: int) -> list[range]:
    return [range(first, min(first + CHUNK, n_images)) for first in range(0, n_images, CHUNK)]


def _checksums(images: np.ndarray) -> np.ndarray:
    """Of each image, uint32 [n]."""
    return np.array([zlib.crc32(image) for image in images], np.uint32)


def _checksum(checksums: np.ndarray, labels: np.ndarray) -> int:
    """Of a chunk, from those of its images."""
    return zlib.crc32(np.ascontiguousarray(labels, np.int64), zlib.crc32(np.ascontiguousarray(checksums)))


def _room(folder: Path, shape: tuple[int, ...]) -> bool:
    """Reserve the disk's blocks for a cache; where there are none, leave nothing, and say so."""
    files = {folder / "pixels": math.prod(shape), folder / "labels": 8 * shape[0]}
    try:
        for file, size in files.items():
            _reserve(file, size)
        return True
    except OSError as error:
        if error.errno not in _FULL:
            raise
        for file in files:
            file.unlink(missing_ok=True)
        log.warning(
            "cache_dir: %s: no room for %.0f MB (%s); images are decoded anew for every run",
            folder, sum(files.values()) / 1e6, error.strerror,
        )  # fmt: skip
        return False


def _reserve(file: Path, size: int) -> None:
    """Give a file its size and the disk's blocks behind it, so that a disk without room for it is known at once."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        before = os.fstat(descriptor)
        if before.st_size == size and 512 * before.st_blocks >= size:
            return
        os.ftruncate(descriptor, size)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except (OSError, AttributeError) as error:  # some file systems and systems cannot
            lacking = size - 512 * before.st_blocks
            if getattr(error, "errno", None) in _FULL or shutil.disk_usage(file.parent).free < lacking:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
    finally:
        os.close(descriptor)
