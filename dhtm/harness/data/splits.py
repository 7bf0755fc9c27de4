"""The data sets that a backbone can be evaluated on, as map-style PyTorch data sets with a fingerprint."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from dhtm.harness.core.errors import UserError
from dhtm.harness.data import scenes

TRAIN_SCENES = 6_400  # in an epoch of training on the digits
_DIGITS = tuple("0123456789")


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set.

    Attributes:
        dataset: item i is (image, label); the image as the transform leaves it.
        classes: the names of the model's outputs, in their order; None where labels are the numbers of outputs.
        channels: of each image.
        fingerprint: SHA-256 of what identifies the images and labels.
        in_memory: items cost next to nothing, so that loading them needs no worker processes.
        n_classes: outputs that a model needs.
        among: the only outputs that are asked; None for all.
        real_labels: of each image all labels that are right, none where nobody knows; None where there is but the one.
        normalise: what is still to be done to a batch of images, where the data set leaves it to the device.
    """

    dataset: Dataset
    classes: tuple[str, ...] | None
    channels: int
    fingerprint: str
    in_memory: bool
    n_classes: int
    among: tuple[int, ...] | None = None
    real_labels: list[list[int]] | None = None
    normalise: Callable | None = None


def digits(split: str, seed: int, limit: int | None, transform: Callable) -> Split:
    """The embedded scenes of handwritten digits; see :mod:`dhtm.harness.data.scenes`.

    Args:
        split: "test", or "train", of which every epoch has new scenes.
        seed: fixes every pixel.
        limit: the first so many scenes only; of each epoch, in training.
        transform: from a grey PIL image.
    """
    if split == "train":
        dataset = _NewScenes(limited(limit, TRAIN_SCENES), seed, transform)
        return Split(dataset, _DIGITS, 1, f"digits {seed}", in_memory=False, n_classes=10)
    if split != "test":
        raise UserError(f"data.split={split}: the digits have data.split=test, and train")
    images, labels, fingerprint = _test_scenes(seed, limited(limit, scenes.N_TEST_SCENES))
    return Split(_Images(images, labels, transform), _DIGITS, 1, fingerprint, in_memory=True, n_classes=10)


@functools.cache
def _test_scenes(seed: int, n_images: int):
    images, labels, _ = scenes.scenes("test", range(n_images), seed)
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


def limited(limit: int | None, n_images: int) -> int:
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise UserError(f"data.limit={limit}: it must be a number of images from 1, or null for all")
    return n_images if limit is None else min(limit, n_images)


class UnreadableError(UserError):
    """An image of a data set that cannot be read."""

    def __init__(self, index: int, name: str, reason: str):
        super().__init__(f"image {index} cannot be read: {name}: {reason}")
        self.index, self.name, self.reason = index, name, reason

    def __reduce__(self):  # as it goes from one process to another
        return type(self), (self.index, self.name, self.reason)


class Batch(NamedTuple):
    """Indices [B], images [B, C, H, W] and labels [B] of those that can be read, and the others."""

    ids: Tensor
    images: Tensor | None
    labels: Tensor
    failed: list[UnreadableError]


def n_cores() -> int:
    """Cores for this process: of those that a batch system leaves it, its share among torchrun's processes."""
    n_here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, n_here // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def load(
    dataset: Dataset, batches: Sequence[Sequence[int]], num_workers: int | None, pin_memory: bool = False
) -> Iterator[Batch]:
    """The items of a data set in the batches that are asked for, rising where it is ``streamed``.

    Args:
        num_workers: processes that load them; None for one a core, up to 16. A stream is read by one, which decodes in as
            many threads.

    Raises:
        UserError: there is nothing to be read any more.
    """
    n_workers = min(16, n_cores()) if num_workers is None else num_workers
    if getattr(dataset, "streamed", False):
        stream = _Stream(dataset, batches, n_workers)
        loader = DataLoader(stream, batch_size=None, num_workers=min(1, n_workers), pin_memory=pin_memory)
    else:
        loader = DataLoader(
            Indexed(dataset), batch_sampler=batches, collate_fn=collate, num_workers=n_workers, pin_memory=pin_memory
        )
    try:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except RuntimeError as error:
        # An error of the data set's own has "in DataLoader worker process".
        if "DataLoader worker (pid" not in str(error):
            raise
        raise UserError(
            "a process that loads images was killed, for want of memory perhaps; the same command goes on, with "
            f"num_workers={n_workers // 2}, say"
        ) from error


class Indexed(Dataset):
    """A data set whose items say where they are in it: (index, image, label), or the error that reading it met."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return _item(index, lambda: self.dataset[index])


class _Stream(IterableDataset):
    """Batches of a data set that is read from its beginning to its end."""

    def __init__(self, dataset: Dataset, batches: Sequence[Sequence[int]], n_threads: int):
        self.dataset, self.batches, self.n_threads = dataset, batches, n_threads

    def __iter__(self):
        stream = self.dataset.stream()
        with ThreadPoolExecutor(max(1, self.n_threads)) as pool:
            for batch in self.batches:
                wanted, found = set(batch), []
                try:
                    while len(found) < len(batch):
                        index, get = next(stream)
                        if index in wanted:
                            found.append((index, get))
                except UserError as error:
                    yield error
                    return
                except StopIteration:
                    yield UserError(f"the data ended before image {batch[len(found)]}; were they changed?")
                    return
                yield collate(list(pool.map(_item, *zip(*found, strict=True))))


def _item(index: int, get: Callable) -> tuple[Tensor, Tensor, Tensor] | UserError:
    try:
        image, label = get()
    except UserError as error:  # raised in a worker process it would come with a traceback
        return error
    return torch.tensor(index), image, torch.tensor(label)


def collate(items: list) -> Batch | UserError:
    """A batch of :class:`Indexed`'s items; or the error among them that is more than an image's."""
    failed = [item for item in items if isinstance(item, UserError)]
    for error in failed:
        if not isinstance(error, UnreadableError):
            return error
    readable = [item for item in items if not isinstance(item, UserError)]
    if not readable:
        return Batch(torch.empty(0, dtype=torch.int64), None, torch.empty(0, dtype=torch.int64), failed)
    return Batch(*default_collate(readable), failed)
