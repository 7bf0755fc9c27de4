"""From a config of the group ``data`` to batches of images on a device."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from timm.data import create_transform
from torch import Tensor

from dhtm.harness.core.errors import UserError, one_line
from dhtm.harness.data.cache import Pixels, cached, parts
from dhtm.harness.data.splits import Split, UnreadableError, load


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
    if split.n_classes > n_classes or (split.classes is not None and split.n_classes < n_classes):
        raise UserError(
            f"data={data.name} has {split.n_classes} classes, the backbone {n_classes}: choose a backbone for this data "
            "(backbone=...), or weights trained on it (backbone.checkpoint=FILE backbone.num_classes=...); for some classes "
            "of many, say which they are by data.class_map"
        )
    if split.channels != preprocessing["input_size"][0]:
        raise UserError(
            f"data={data.name} has images of {split.channels} channels, the backbone takes {preprocessing['input_size'][0]}: "
            "choose a backbone for this data (backbone=...)"
        )
    return split


def on_error(data: DictConfig) -> str:
    """What is done about images that cannot be read, as a config of the group ``data`` has it: collect, skip or fail_fast."""
    chosen = data.get("on_error", "collect")
    if chosen not in ("collect", "skip", "fail_fast"):
        raise UserError(f"data.on_error={chosen}: choose one of collect, skip, fail_fast")
    return chosen


def described(preprocessing: dict) -> str:
    """What is done to images, in one line."""
    return ", ".join(str(step) for step in create_transform(**preprocessing).transforms)


def from_cache(split: Split, config: DictConfig, preprocessing: dict) -> Split:
    """The same split by way of the cache, which is filled first where it lacks images; for images on disk.

    Args:
        split: of :func:`load_data`.
        config: with the data that it is of, cache_dir and num_workers.
        preprocessing: the backbone's.

    Raises:
        UserError: nothing can be written to the cache, and it lacks images; or with data.on_error=fail_fast an image cannot
            be read.
    """
    in_parts = None if split.in_memory or config.cache_dir is None else parts(create_transform(**preprocessing))
    if in_parts is None:
        return split
    transform, normalise = in_parts
    cropped = _instantiated(config.data, config.data.split, transform)
    pixels = cached(
        cropped, transform, preprocessing["input_size"], config.cache_dir, config.num_workers, config.data.name,
        fail_fast=on_error(config.data) == "fail_fast",
    )  # fmt: skip
    return split if pixels is None else dataclasses.replace(split, dataset=pixels, normalise=normalise)


def batches(
    split: Split,
    indices: Sequence[int],
    batch_size: int,
    device: torch.device,
    num_workers: int | None,
    on_unreadable: Callable[[UnreadableError], None],
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Indices, normalised images on the device, and labels of one batch after the other, without what cannot be read.

    Args:
        on_unreadable: is told of every image that cannot be.
    """
    chosen = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    if isinstance(split.dataset, Pixels):
        loaded = split.dataset.batches(chosen, device)
    else:
        n_workers = 0 if split.in_memory and num_workers is None else num_workers
        loaded = load(split.dataset, chosen, n_workers, pin_memory=device.type == "cuda")
    for ids, images, labels, failed in loaded:
        for unreadable in failed:
            on_unreadable(unreadable)
        if len(ids):
            images = images.to(device, non_blocking=True)
            yield ids, split.normalise(images) if split.normalise else images, labels


def _instantiated(data: DictConfig, split: str, transform: Callable) -> Split:
    arguments = {key: value for key, value in data.items() if key not in ("name", "train_split", "on_error")}
    try:
        return instantiate({**arguments, "split": split}, transform=transform)
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise cause if isinstance(cause, UserError) else UserError(f"data={data.name}: {one_line(cause)}") from error
