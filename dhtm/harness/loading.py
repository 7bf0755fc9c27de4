"""From a config of the group ``data`` to batches of images on a device."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader

from dhtm.harness.cache import Pixels, cached, parts
from dhtm.harness.data import Indexed, Split, collate, n_loaders
from dhtm.harness.errors import UserError, one_line


def load_data(data: DictConfig, split: str, preprocessing: dict, n_classes: int, **augmentation) -> Split:
    """A split of what a config of the group ``data`` names, checked against the outputs of the backbone.

    Args:
        data: of the config group.
        split: which, instead of the config's.
        preprocessing: the backbone's, as timm resolves it.
        n_classes: outputs of the backbone.
        augmentation: more options of timm's create_transform.
    """
    try:
        transform = create_transform(**preprocessing, **augmentation)
    except Exception as error:  # timm checks options by assertions, conversions and look-ups
        options = " ".join(f"{key}={value}" for key, value in augmentation.items())
        raise UserError(f"{options}: timm takes no such augmentation ({one_line(error)})") from error
    split = _instantiated(data, split, transform)
    if len(split.classes) != n_classes:
        raise UserError(
            f"data={data.name} has {len(split.classes)} classes, the backbone {n_classes}: choose a backbone for this data "
            "(backbone=...), or weights trained on it (backbone.checkpoint=FILE backbone.num_classes=...)"
        )
    if split.channels != preprocessing["input_size"][0]:
        raise UserError(
            f"data={data.name} has images of {split.channels} channels, the backbone takes {preprocessing['input_size'][0]}: "
            "choose a backbone for this data (backbone=...)"
        )
    return split


def from_cache(split: Split, config: DictConfig, preprocessing: dict) -> Split:
    """The same split by way of the cache, which is filled first where it lacks images; for images on disk.

    Args:
        split: of :func:`load_data`.
        config: with the data that it is of, cache_dir and num_workers.
        preprocessing: the backbone's.

    Raises:
        UserError: an image cannot be read, or nothing can be written to the cache, and it lacks images.
    """
    in_parts = None if split.in_memory or config.cache_dir is None else parts(create_transform(**preprocessing))
    if in_parts is None:
        return split
    transform, normalise = in_parts
    cropped = _instantiated(config.data, config.data.split, transform)
    pixels = cached(
        cropped, transform, preprocessing["input_size"], config.cache_dir, config.num_workers, config.data.name
    )
    return split if pixels is None else dataclasses.replace(split, dataset=pixels, normalise=normalise)


def batches(
    split: Split, indices: Sequence[int], batch_size: int, device: torch.device, num_workers: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Indices, normalised images on the device, and labels of one batch after the other."""
    if isinstance(split.dataset, Pixels):
        for ids, pixels, labels in split.dataset.batches(indices, batch_size, device):
            yield ids, split.normalise(pixels), labels
        return
    loader = DataLoader(
        Indexed(split.dataset),
        batch_size,
        sampler=indices,
        num_workers=0 if split.in_memory and num_workers is None else n_loaders(num_workers),
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        ids, images, labels = batch
        yield ids, images.to(device, non_blocking=True), labels


def _instantiated(data: DictConfig, split: str, transform: Callable) -> Split:
    arguments = {key: value for key, value in data.items() if key not in ("name", "train_split")}
    try:
        return instantiate({**arguments, "split": split}, transform=transform)
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise cause if isinstance(cause, UserError) else UserError(f"data={data.name}: {one_line(cause)}") from error
