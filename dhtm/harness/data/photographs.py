"""Sets of photographs such as ImageNet, on disk or on the Hugging Face hub, preprocessed for a model."""

import functools
import hashlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, BinaryIO, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from PIL import Image
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch.utils.data import Dataset

from dhtm.harness.core.errors import UserError, one_line
from dhtm.harness.data.hub import HUB, open_table
from dhtm.harness.data.labels import find_labels, number_classes, read_labels, reassessed_labels, synsets
from dhtm.harness.data.sources import SPLITS, Source, Tars, below, in_folder
from dhtm.harness.data.splits import Split, UnreadableError


@dataclass(frozen=True)
class Photographs:
    """A set of photographs; ``configs/data/imagefolder.yaml``, imagenet.yaml and imagenette.yaml explain the settings."""

    name: str
    root: str | None
    split: str = "val"
    train_split: str = "train"
    labels: str | None = None
    class_map: str | None = None
    among: Literal["all", "present"] = "all"
    real_labels: bool = False
    on_error: Literal["collect", "skip"] = "collect"
    limit: PositiveInt | None = None
    holdout: Annotated[int, Field(ge=2)] | None = None

    @property
    def choice_split(self) -> str:
        """The split to make choices on: images held out of training, or else the training images."""
        return "holdout" if self.holdout is not None else self.train_split

    def open(self, split: str, transform: Callable) -> Split:
        """Open a split, for example "val"; the transform takes an RGB PIL image."""
        if self.root is None:
            raise UserError("data.root is not set: give the folder that holds val/n01440764/…, data.root=DIR")
        of_training = self.holdout is not None and split in (self.train_split, "holdout")
        source, numbers, classes = _list(
            self.root, self.train_split if of_training else split, self.labels, self.class_map
        )
        chosen, fingerprint = np.arange(len(source)), source.fingerprint
        if of_training:
            kept_out = pd.Series(numbers).groupby(numbers).cumcount().to_numpy() % self.holdout == 0
            chosen = np.flatnonzero(kept_out if split == "holdout" else ~kept_out)
            numbers, fingerprint = numbers[chosen], _hash(fingerprint, chosen)
        if self.real_labels and classes != synsets() and self.class_map != "numbers":
            raise UserError("data.real_labels: it numbers classes as ImageNet-1K does; set data.class_map=synsets too")
        images = ImageFiles(source, chosen[: self.limit], numbers[: self.limit], transform)
        return Split(
            images,
            classes,
            fingerprint=_hash(fingerprint, numbers),
            n_classes=int(numbers.max()) + 1 if classes is None else len(classes),
            among=tuple(np.unique(numbers).tolist()) if self.among == "present" else None,
            real_labels=reassessed_labels(images.names()) if self.real_labels else None,
        )


@dataclass(frozen=True)
class Images:
    """Any photographs, without labels; ``configs/data/images.yaml`` explains the settings."""

    choice_split: ClassVar[str] = "choose"  # the split to make choices on

    name: str
    root: str | None
    split: Literal["all", "choose", "report"] = "all"
    on_error: Literal["collect", "skip"] = "collect"
    limit: PositiveInt | None = None

    def open(self, split: str, transform: Callable) -> Split:
        """Open a split; its labels are all −1."""
        if self.root is None:
            raise UserError("data.root is not set: give a folder of images, data.root=DIR")
        source = below(Path(self.root))
        first, step = {"all": (0, 1), "choose": (0, 2), "report": (1, 2)}[split]
        chosen = np.arange(first, len(source), step)[: self.limit]
        if not len(chosen):
            raise UserError(f"data.root={self.root}: {len(source)} images are too few for data.split={split}")
        return Split(
            ImageFiles(source, chosen, np.full(len(chosen), -1), transform),
            classes=None,
            fingerprint=_hash(source.fingerprint, chosen),
            n_classes=0,
        )


def _hash(fingerprint: str, numbers: np.ndarray) -> str:
    return hashlib.sha256(fingerprint.encode() + numbers.tobytes()).hexdigest()


class ImageFiles(Dataset):
    """Images of a source, given by their places in it, int64 [n], decoded as timm does, and their labels, int64 [n]."""

    def __init__(self, source: Source, chosen: np.ndarray, labels: np.ndarray, transform: Callable):
        self.source, self.chosen, self.labels, self.transform = source, chosen, labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index) -> tuple[torch.Tensor, int]:
        place = int(self.chosen[index])
        try:
            with self.source.read(place) as file:
                return self.transform(decode(file)), int(self.labels[index])
        except Exception as error:  # decoders raise exceptions of any kind for damaged files
            if not self.source.is_there():
                raise UserError(
                    f"data.root={self.source.root}: it disappeared, or is empty now; run the same command again to resume "
                    "when it is back"
                ) from error
            raise UnreadableError(index, self.source.name(place), one_line(error)) from error

    def names(self) -> list[str]:
        """Return the full names of the images, by which a user can find them."""
        return [self.source.name(place) for place in self.chosen]


def decode(file: BinaryIO) -> Image.Image:
    """Decode an image as timm does, to RGB: any format of PIL, regardless of the file's name and of EXIF rotation.

    Raises:
        Exception: the image is damaged, or has more pixels than PIL's limit of 89 million (a decompression bomb).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about EXIF, palettes and so on
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(file).convert("RGB")


@functools.cache  # a sweep lists its images once
def _list(root, split, labels, class_map) -> tuple[Source, np.ndarray, tuple[str, ...] | None]:
    source = _source(root, split)
    given = source.given
    if given is None and labels is None:
        labels = find_labels(Path(source.root))
        if labels is None:
            raise UserError(
                f"data.root={root}: its images, {source.name(0)} for example, are not in class folders; give their classes by "
                "data.labels=FILE, the ILSVRC2012 devkit or a CSV of file names and classes"
            )
    class_names = source.class_names
    if labels is not None:
        given, class_names = read_labels(source, labels), None
    if np.issubdtype(given.dtype, np.integer) and given.min() < 0:
        raise UserError(f"data.root={root}: {source.name(int(given.argmin()))} has no class; choose another split")
    numbers, classes = number_classes(given, class_names, class_map, root)
    if classes is not None and numbers.max() >= len(classes):
        name = source.name(int(numbers.argmax()))
        raise UserError(f"data.root={root}: {name} has class {numbers.max()}, the last is {len(classes) - 1}")
    return source, numbers, classes


def _source(root: str, split: str) -> Source:
    if root.startswith(HUB):
        return open_table(root, split)
    path = Path(root)
    if path.is_dir():
        folder = _folder_of_split(path, split)
        if (folder / "state.json").is_file():
            return open_table(str(folder), split)
        files = _archives(folder, split)
        if not files:
            return in_folder(folder)
    else:
        files = _shards(root)
    if files[0].suffix == ".tar":
        return Tars(files)
    if files[0].suffix in (".parquet", ".arrow"):
        return open_table(str(files[0].parent), split, files)
    what = "neither a folder nor a .tar, .parquet or .arrow file" if path.exists() else "no such directory"
    raise UserError(f"data.root={root}: {what}; give the folder that holds {split}/n01440764/…")


def _folder_of_split(folder: Path, split: str) -> Path:
    """Return the folder of a split, or the whole folder if it has no folder for any split."""
    for name in SPLITS.get(split, (split,)):
        if (folder / name).is_dir():
            return folder / name
    if any((folder / name).is_dir() for names in SPLITS.values() for name in names):
        raise UserError(f"data.root={folder}: it has no folder {split}; choose another split, or another root")
    return folder


def _archives(folder: Path, split: str) -> list[Path]:
    """Return the files of a folder, or of data/ in it, that hold the images of a split; none if there are no such files.

    They name the split, as validation-00000-of-00014 and ILSVRC2012_img_val do, or else none.
    """
    wanted, known = SPLITS.get(split, (split,)), {name for names in SPLITS.values() for name in names}
    for inside in (folder, folder / "data"):
        for suffix in (".parquet", ".arrow", ".tar"):
            words = {file: set(re.split(r"[^a-z]+", file.stem.lower())) for file in sorted(inside.glob(f"*{suffix}"))}
            named = [file for file in words if words[file].intersection(wanted)]
            if files := named or [file for file in words if not words[file] & known]:
                return files
    return []


def _shards(root: str) -> list[Path]:
    """Return the files of a range of numbers {000..063}, as in WebDataset; or the one file."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", root)
    if braces is None:
        return [Path(root)]
    first, last = braces.groups()
    numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [Path(root[: braces.start()] + number + root[braces.end() :]) for number in numbers]
