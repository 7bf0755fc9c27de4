"""Splits of data sets, and how their images are loaded in batches."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import joblib
import numpy as np
import torch
from timm.data import create_transform, resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dhtm.harness.core.errors import UserError, explain


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set.

    Attributes:
        dataset: item i is (image, label); the image as the transform returns it.
        classes: the names of the model's outputs, in their order; None where labels are the numbers of outputs.
        fingerprint: SHA-256 of what identifies the images and labels.
        n_classes: the number of outputs that a model needs.
        channels: of each image.
        in_memory: items cost next to nothing, so they are loaded without worker processes.
        among: the outputs that can be predicted; None for all.
        real_labels: all correct labels of each image, empty if unknown; None if images have only one label.
        normalise: turns a batch of the dataset's images into the model's input, on the device; None if not needed.
        groups: int64 [n]; images with the same number belong together; None if all are independent.
        new_each_epoch: returns the dataset of an epoch, for training sets that change; None for all others.
    """

    dataset: Dataset
    classes: tuple[str, ...] | None
    fingerprint: str
    n_classes: int
    channels: int = 3
    in_memory: bool = False
    among: tuple[int, ...] | None = None
    real_labels: list[list[int]] | None = None
    normalise: Callable[[Tensor], Tensor] | None = None
    groups: np.ndarray | None = None
    new_each_epoch: Callable[[int], Dataset] | None = None

    def dataset_in(self, epoch: int) -> Dataset:
        """Return the dataset of an epoch of training."""
        return self.dataset if self.new_each_epoch is None else self.new_each_epoch(epoch)


class UnreadableError(UserError):
    """An image of a data set cannot be read."""

    def __init__(self, index: int, name: str, reason: str):
        super().__init__(f"image {index} cannot be read: {name}: {reason}")
        self.index, self.name, self.reason = index, name, reason

    def __reduce__(self):  # worker processes pickle it
        return type(self), (self.index, self.name, self.reason)


class Batch(NamedTuple):
    """Indices [B], images [B, C, H, W] and labels [B] of the readable images, and errors for the others."""

    ids: Tensor
    images: Tensor | None
    labels: Tensor
    failed: list[UnreadableError]


def open_split(data, split: str, preprocessing: dict, n_classes: int, **augmentation) -> Split:
    """Open a split of a data set for a backbone.

    Args:
        data: has a ``name`` and ``open(split, transform)``, like Digits and Photographs.
        split: name of the split.
        preprocessing: the backbone's, as timm resolves it.
        n_classes: the number of outputs of the backbone.
        augmentation: more options of timm's create_transform.

    Raises:
        UserError: the data set cannot be read, or does not fit the backbone.
    """
    options = " ".join(f"{key}={value}" for key, value in augmentation.items())
    with explain(f"{options}: timm does not support this augmentation"):
        transform = create_transform(**preprocessing, **augmentation)
    opened = data.open(split, transform)
    if opened.n_classes > n_classes or (opened.classes is not None and opened.n_classes < n_classes):
        raise UserError(
            f"data={data.name} has {opened.n_classes} classes, the backbone {n_classes}: choose a backbone for this data "
            "(backbone=...), or weights trained on it (backbone.checkpoint=FILE backbone.num_classes=...); if the data has "
            "only some of the backbone's classes, set data.class_map"
        )
    if opened.channels != preprocessing["input_size"][0]:
        raise UserError(
            f"data={data.name} has images of {opened.channels} channels, the backbone takes "
            f"{preprocessing['input_size'][0]}: choose a backbone for this data (backbone=...)"
        )
    return opened


def choice_images(
    data, split: str, model: VisionTransformer, n_images: int = 256, first: int = 0, step: int = 1
) -> Tensor:
    """Return evenly spaced images of a split, preprocessed for a model and on its device: [n, C, H, W].

    Args:
        first, step: use only the images first, first + step, … of the split.
    """
    opened = open_split(data, split, resolve_data_config(model=model), model.num_classes)
    indices = np.arange(first, len(opened.dataset), step)
    chosen = indices[np.linspace(0, len(indices) - 1, min(n_images, len(indices)), dtype=int)].tolist()
    device = next(model.parameters()).device
    loaded = batches(opened, chosen, len(chosen), device, None, lambda unreadable: None)
    return next(images for _, images, _ in loaded)


def mask(model_num_classes: int, split: Split, device: torch.device) -> Tensor:
    """Return a mask [C] to add to logits: 0 for the outputs in ``split.among``, −inf for others."""
    added = torch.zeros(model_num_classes, device=device)
    if split.among is not None:
        added.fill_(-torch.inf)[list(split.among)] = 0
    return added


def batches(
    split: Split,
    indices: Sequence[int],
    batch_size: int,
    device: torch.device,
    num_workers: int | None,
    on_unreadable: Callable[[UnreadableError], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield indices, normalised images on the device, and labels, batch by batch, skipping unreadable images.

    Args:
        num_workers: as in :func:`load`; not used where images are in memory.
        on_unreadable: called with the error of every image that cannot be read; None to raise the first.
    """
    chosen = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    n_workers = 0 if split.in_memory else num_workers
    for ids, images, labels, failed in load(split.dataset, chosen, n_workers, pin_memory=device.type == "cuda"):
        for unreadable in failed:
            if on_unreadable is None:
                raise unreadable
            on_unreadable(unreadable)
        if images is not None:
            images = images.to(device, non_blocking=True)
            yield ids, split.normalise(images) if split.normalise else images, labels


def default_workers(n_sharing: int = 1) -> int:
    """Return one worker process per core that a batch system allots, up to 16, shared among ``n_sharing`` processes."""
    return min(16, max(1, joblib.cpu_count() // n_sharing))


def load(
    dataset: Dataset, batches: Sequence[Sequence[int]], num_workers: int | None, pin_memory: bool = False
) -> Iterator[Batch]:
    """Yield the items of a data set in the given batches.

    Args:
        num_workers: processes that load them; None for :func:`default_workers`, shared among the processes of torchrun.

    Raises:
        UserError: the data set as a whole can no longer be read.
    """
    if num_workers is None:
        num_workers = default_workers(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    loader = DataLoader(_Batches(dataset, batches), batch_size=None, num_workers=num_workers, pin_memory=pin_memory)
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Batches(Dataset):
    """The batches of a data set: item i is the i-th :class:`Batch`, or an error that concerns more than one image."""

    def __init__(self, dataset: Dataset, batches: Sequence[Sequence[int]]):
        self.dataset, self.batches = dataset, batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number) -> Batch | UserError:
        readable, failed = [], []
        for index in self.batches[number]:
            try:
                readable.append((index, *self.dataset[index]))
            except UnreadableError as error:
                failed.append(error)
            except UserError as error:  # returned, because an error from a worker process would arrive with a traceback
                return error
        ids, labels = (torch.tensor([item[part] for item in readable], dtype=torch.int64) for part in (0, 2))
        # NumPy's stack, because the threads of PyTorch's wait for each other when other processes use the cores.
        images = torch.from_numpy(np.stack([image for _, image, _ in readable])) if readable else None
        return Batch(ids, images, labels, failed)
