"""Images as a backbone sees them: decoded, resized and cropped once for all runs of a sweep.

A folder of ``cache_dir`` holds one split under one transform, in files 00000.npy, 00001.npy, … of uint8 [n, C, H, W], each with
the next 256 images. A file is written under a temporary name and renamed, so a file that exists is complete.
"""

import dataclasses
import functools
import hashlib
import json
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Compose, PILToTensor
from torchvision.transforms.functional import normalize
from tqdm import tqdm

from dhtm.harness.core.errors import explain
from dhtm.harness.core.files import lock, write_atomically
from dhtm.harness.data.splits import Split, UnreadableError, default_workers, load

CHUNK = 256  # images in a file
_PACKAGES = ("Pillow", "timm", "torchvision")  # other versions may decode or resize differently


def decode_once(data, split: Split, preprocessing: dict, cache_dir: Path, num_workers: int | None) -> Split:
    """Fill the cache with the images that it lacks, and return a split that reads from it.

    Args:
        data: the split's data set.
        split: ``data.split``, opened with the whole preprocessing.
        preprocessing: the backbone's, as timm resolves it.
        cache_dir: the folder of all caches.
        num_workers: processes that decode images; None for one per core.

    Returns:
        The split with ``normalise`` set and a :class:`CachedImages`; the split itself if its images are in memory or
        change every epoch.

    Raises:
        UserError: the cache lacks images and cannot be written.
    """
    if split.in_memory or split.new_each_epoch is not None:
        return split
    *crop, _, last = create_transform(**preprocessing).transforms
    cropped = data.open(data.split, Compose([*crop, PILToTensor()])).dataset
    versions = {package: metadata.version(package) for package in _PACKAGES}
    key = json.dumps([split.fingerprint, len(cropped), CHUNK, preprocessing, versions])
    images = CachedImages(cache_dir / hashlib.sha256(key.encode()).hexdigest()[:16], cropped)
    if images.missing_chunks():
        remedy = "; remove it and set cache_dir=null, or choose another place"
        with explain(f"cache_dir={cache_dir}: {images.folder} cannot be written", OSError, remedy=remedy):
            images.folder.mkdir(parents=True, exist_ok=True)
            with lock(images.folder / "lock", f"waiting for another process to fill {images.folder}"):
                # The other processes of torchrun only wait, so all cores are free.
                images.fill(default_workers() if num_workers is None else num_workers, data.name)
    normalise = functools.partial(_normalise, mean=last.mean, std=last.std)
    return dataclasses.replace(split, dataset=images, normalise=normalise, in_memory=not images.missing_chunks())


class CachedImages(Dataset):
    """Cropped images, uint8 [C, H, W], and labels; images without a cache file are decoded.

    Args:
        folder: of the files.
        cropped: the data set that decodes and crops.

    Attributes:
        failed: the images that :meth:`fill` could not read; files with such images are not written.
    """

    def __init__(self, folder: Path, cropped: Dataset):
        self.folder, self.cropped = folder, cropped
        self.failed: list[UnreadableError] = []
        self._last: tuple[int | None, np.ndarray | None] = (None, None)  # the number and images of the file read last

    def __len__(self):
        return len(self.cropped)

    def __getitem__(self, index) -> tuple[Tensor, int]:
        number, row = divmod(index, CHUNK)
        if number != self._last[0]:
            self._last = number, self._map(number)
        images = self._last[1]
        if images is None:
            return self.cropped[index]
        return torch.from_numpy(images[row]), int(self.cropped.labels[index])

    def missing_chunks(self) -> list[int]:
        """Return the numbers of the files that do not exist."""
        return [number for number in range(-(-len(self) // CHUNK)) if not self._file(number).exists()]

    def fill(self, num_workers: int | None, name: str) -> None:
        """Decode the images without a cache file, and write the files.

        Raises:
            OSError: the disk is full, for example.
        """
        for file in self.folder.glob(".*.npy"):  # unfinished files of a process that was killed
            file.unlink()
        missing = self.missing_chunks()
        chunks = [range(number * CHUNK, min((number + 1) * CHUNK, len(self))) for number in missing]
        with tqdm(total=sum(map(len, chunks)), desc=f"{name}: cache", unit=" images", disable=None) as bar:
            for number, batch in zip(missing, load(self.cropped, chunks, num_workers), strict=True):
                if not batch.failed:
                    write_atomically(self._file(number), functools.partial(np.save, arr=batch.images.numpy()))
                self.failed += batch.failed
                bar.update(len(batch.ids) + len(batch.failed))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.npy"

    def _map(self, number: int) -> np.ndarray | None:
        file = self._file(number)
        if not file.exists():
            return None
        with explain(f"{file}: damaged", remedy="; remove it and run the same command again, or set cache_dir=null"):
            return np.load(file, mmap_mode="c")  # "c" because PyTorch warns about arrays that cannot be written


def _normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn uint8 [B, C, H, W] into the model's float32 input, bit for bit as the transform does image by image."""
    # Divide by a tensor: for a number, a GPU would multiply with its inverse, which rounds differently.
    largest = torch.full((1,), 255.0, device=pixels.device)
    return normalize(pixels.to(torch.float32).div_(largest), mean, std, inplace=True)
