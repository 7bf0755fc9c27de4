"""The data sets that a backbone can be evaluated on, as map-style PyTorch data sets with a fingerprint."""

import copy
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, default_collate
from torchvision.datasets import ImageFolder

from dhtm.harness import digits as scenes
from dhtm.harness.errors import UserError, one_line

TRAIN_SCENES = 6_400  # in an epoch of training on the digits
_DIGITS = tuple("0123456789")


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set.

    Attributes:
        dataset: item i is (image, label); the image as the transform leaves it.
        classes: the names of the classes, in the order of their labels.
        channels: of each image.
        fingerprint: SHA-256 of what identifies the images and labels.
        in_memory: items cost next to nothing, so that loading them needs no worker processes.
        normalise: what is still to be done to a batch of images, where the data set leaves it to the device.
    """

    dataset: Dataset
    classes: tuple[str, ...]
    channels: int
    fingerprint: str
    in_memory: bool
    normalise: Callable | None = None


def digits(split: str, seed: int, limit: int | None, transform: Callable) -> Split:
    """The embedded scenes of handwritten digits; see :mod:`dhtm.harness.digits`.

    Args:
        split: "test", or "train", of which every epoch has new scenes.
        seed: fixes every pixel.
        limit: the first so many scenes only; of each epoch, in training.
        transform: from a grey PIL image.
    """
    if split == "train":
        dataset = _NewScenes(_limited(limit, TRAIN_SCENES), seed, transform)
        return Split(dataset, _DIGITS, 1, f"digits {seed}", in_memory=False)
    if split != "test":
        raise UserError(f"data.split={split}: the digits have data.split=test, and train")
    images, labels, fingerprint = _test_scenes(seed)
    n_images = _limited(limit, len(images))
    return Split(_Images(images[:n_images], labels[:n_images], transform), _DIGITS, 1, fingerprint, in_memory=True)


@functools.cache
def _test_scenes(seed: int):
    images, labels, _ = scenes.scenes("test", range(scenes.N_TEST_SCENES), seed)
    return images, labels, hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()


class _Images(Dataset):
    """Images held as one uint8 array [n, H, W]."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


class _NewScenes(Dataset):
    """Training scenes, drawn when they are asked for; ``epoch`` says which."""

    epoch = 0

    def __init__(self, n_scenes: int, seed: int, transform: Callable):
        self.n_scenes, self.seed, self.transform = n_scenes, seed, transform

    def __len__(self):
        return self.n_scenes

    def __getitem__(self, index):
        images, labels, _ = scenes.scenes("train", [self.epoch * self.n_scenes + index], self.seed)
        return self.transform(Image.fromarray(images[0])), int(labels[0])


def imagefolder(root: str | None, split: str, limit: int | None, transform: Callable) -> Split:
    """ImageNet as it ships: one folder of images a class, named by synset, in root/split or in root itself.

    Classes are numbered by the order of their folders' names, which for the 1,000 synsets of ImageNet-1K is the
    order of the pretrained models' outputs.

    Args:
        root: the folder that holds ``val/n01440764/…``.
        split: its sub-folder; ignored where root holds the class folders themselves.
        limit: the first so many images only, in the order of folders and files.
        transform: from an RGB PIL image.
    """
    if root is None:
        raise UserError("data.root is not set: give the folder that holds val/n01440764/…, data.root=DIR")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise UserError(f"data.root={root}: no such directory; give the folder that holds {split}/n01440764/…")
    if (folder / split).is_dir():
        folder = folder / split
    elif any((folder / other).is_dir() for other in ("train", "val", "test")):
        raise UserError(f"data.root={root}: it has no folder {split}; choose another split, or another root")
    listed, fingerprint = _listed(folder)
    dataset = copy.copy(listed)
    dataset.transform = transform
    part = Subset(dataset, range(_limited(limit, len(dataset))))
    return Split(part, tuple(dataset.classes), 3, fingerprint, in_memory=False)


@functools.cache
def _listed(folder: Path) -> tuple[ImageFolder, str]:
    """A folder of class folders, and the SHA-256 of its images' names, sizes and labels; the same for a whole sweep."""
    try:
        dataset = ImageFolder(str(folder))
    except FileNotFoundError:  # no class folders, or empty ones
        empty = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and not any(path.iterdir())]
        what = f"the class folder {empty[0]} is empty" if empty else "it has no folders of images, one a class"
        raise UserError(f"data.root: {folder}: {what}") from None
    files = [f"{Path(path).relative_to(folder)} {Path(path).stat().st_size} {label}" for path, label in dataset.samples]
    return dataset, hashlib.sha256("\n".join(files).encode()).hexdigest()


def n_loaders(num_workers: int | None) -> int:
    """Processes that load images: as many as asked for, or one a core."""
    return min(16, os.cpu_count() or 1) if num_workers is None else num_workers


def _limited(limit: int | None, n_images: int) -> int:
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise UserError(f"data.limit={limit}: it must be a number of images from 1, or null for all")
    return n_images if limit is None else min(limit, n_images)


class Indexed(Dataset):
    """A data set whose items say where they are in it: (index, image, label), or the error that reading it met."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            image, label = self.dataset[index]
        except OSError as error:  # what PIL raises on a damaged file
            return UserError(f"image {index} cannot be read: {_file(self.dataset, index)}: {one_line(error)}")
        return torch.tensor(index), image, torch.tensor(label)


def collate(items: list) -> list[torch.Tensor] | UserError:
    """A batch of :class:`Indexed`, or the first error in it; raised in a worker it would come with a traceback."""
    for item in items:
        if isinstance(item, UserError):
            return item
    return default_collate(items)


def _file(dataset: Subset, index: int) -> str:
    return dataset.dataset.samples[dataset.indices[index]][0]
