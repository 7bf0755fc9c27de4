"""Sets of photographs on disk or on the Hugging Face hub, ImageNet foremost, as a model's preprocessing leaves them."""

import functools
import hashlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dhtm.harness.core.errors import UserError, one_line, path_given
from dhtm.harness.data import labels as labelling
from dhtm.harness.data.hub import HUB, rows_of_files, rows_of_hub, rows_of_saved
from dhtm.harness.data.sources import SPLITS, Folder, Source, Tars
from dhtm.harness.data.splits import Split, UnreadableError, limited


def photographs(
    root: str | None,
    split: str,
    limit: int | None,
    transform: Callable,
    labels: str | None = None,
    class_map: str | None = None,
    among: str = "all",
    real_labels: bool = False,
    streaming: bool = False,
) -> Split:
    """A split of a set of photographs.

    Args:
        root: a folder of class folders, of images, of tar files, of parquet or Arrow files, or one that has such a folder
            for the split; or a tar file, or several by a pattern; or ``hf://datasets/<user>/<name>``.
        split: "val", say; ignored where root has no splits.
        limit: the first so many images only, in the order of the root.
        transform: from an RGB PIL image.
        labels: a file of labels, see :func:`dhtm.harness.data.labels.labelled`; None where the root says all.
        class_map: how classes are numbered, see :func:`dhtm.harness.data.labels.numbered`.
        among: "all" outputs of the model are asked, or those of the "present" classes alone, as is the custom for ImageNet-A
            and -R.
        real_labels: compare with the reassessed labels of ImageNet's validation images too.
        streaming: read parquet and the hub's files from their beginning to their end, nothing is downloaded or copied.
    """
    if root is None:
        raise UserError("data.root is not set: give the folder that holds val/n01440764/…, data.root=DIR")
    if among not in ("all", "present"):
        raise UserError(f"data.among={among}: choose one of all, present")
    source, numbers, classes = _listed(root, split, labels, class_map, streaming)
    if real_labels and classes != labelling.synsets() and class_map != "numbers":
        raise UserError("data.real_labels: they number classes as ImageNet-1K does; set data.class_map=synsets too")
    return Split(
        Photographs(source, numbers, limited(limit, len(source)), transform),
        classes,
        3,
        hashlib.sha256(source.fingerprint.encode() + numbers.tobytes()).hexdigest(),
        in_memory=False,
        n_classes=int(numbers.max()) + 1 if classes is None else len(classes),
        among=tuple(np.unique(numbers).tolist()) if among == "present" else None,
        real_labels=labelling.real(source) if real_labels else None,
    )


class Photographs(Dataset):
    """Images of a source, RGB as timm has them, and their labels."""

    def __init__(self, source: Source, labels: np.ndarray, n_images: int, transform: Callable):
        self.source, self.labels, self.n_images, self.transform = source, labels, n_images, transform
        self.streamed = source.streamed

    def __len__(self):
        return self.n_images

    def __getitem__(self, index):
        return self._item(index, functools.partial(self.source.read, index))

    def stream(self) -> Iterator[tuple[int, Callable]]:
        """Every image's index and a function that decodes it, from the first on."""
        files = self.source.stream()
        for index in range(self.n_images):
            try:
                opened = next(files)
            except StopIteration:
                return
            except Exception as error:  # of files, the network, the hub
                raise UserError(
                    f"data.root={self.source.root}: the stream broke off at image {index} ({type(error).__name__}: "
                    f"{one_line(error)}); the same command goes on from there"
                ) from error
            yield index, functools.partial(self._item, index, opened)

    def _item(self, index: int, opened: Callable[[], BinaryIO]) -> tuple[torch.Tensor, int]:
        try:
            with opened() as file:
                return self.transform(decode(file)), int(self.labels[index])
        except Exception as error:  # damaged files make decoders raise whatever there is
            if not self.source.is_there():
                raise UserError(
                    f"data.root={self.source.root}: has gone, or is empty, while images were read; the same command goes on "
                    "when it is back"
                ) from error
            raise UnreadableError(index, self.source.name(index), one_line(error)) from error


def decode(file: BinaryIO) -> Image.Image:
    """An image as timm reads it: whatever PIL can, by what it holds and not by its name, in RGB; EXIF turns nothing.

    Raises:
        Exception: it is damaged, or has more than PIL's limit of 89 million pixels, as decompression bombs do, or is more than
            1,000 times as long as wide.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about EXIF, palettes and the like; about bombs too, which are errors here
        image = Image.open(file)
        # The second is small until its short side is made as long as a model's images.
        if image.width * image.height > Image.MAX_IMAGE_PIXELS or max(image.size) > 1000 * min(image.size):
            raise Image.DecompressionBombError(f"{image.width} × {image.height} pixels: taken for a decompression bomb")
        return image.convert("RGB")


@functools.cache  # the same for a whole sweep
def _listed(root, split, labels, class_map, streaming) -> tuple[Source, np.ndarray, tuple[str, ...] | None]:
    source = _source(root, split, streaming)
    given = source.given
    if given is None and labels is None:
        labels = labelling.beside(Path(source.root))
        if labels is None:
            raise UserError(
                f"data.root={root}: its images are not in class folders; say which classes they have by data.labels=FILE, the "
                "ILSVRC2012 devkit or a CSV of file names and classes"
            )
    class_names = source.class_names
    if labels is not None:
        given, class_names = labelling.labelled(source, labels), None
    if np.issubdtype(given.dtype, np.integer) and given.min() < 0:
        raise UserError(f"data.root={root}: {source.name(int(given.argmin()))} has no class; choose another split")
    numbers, classes = labelling.numbered(given, class_names, class_map, root)
    if classes is not None and numbers.max() >= len(classes):
        name = source.name(int(numbers.argmax()))
        raise UserError(f"data.root={root}: {name} is of class {numbers.max()}, the last is {len(classes) - 1}")
    return source, numbers, classes


def _source(root: str, split: str, streaming: bool) -> Source:
    if root.startswith(HUB):
        return rows_of_hub(root, split, streaming)
    path = path_given(root, "data.root")
    if path.is_dir():
        return _in_folder(_of_split(path, split, root), split, streaming)
    files = [path] if path.is_file() else _matching(str(path))
    if not files:
        raise UserError(f"data.root={root}: no such directory; give the folder that holds {split}/n01440764/…")
    suffix = files[0].suffix
    if suffix == ".tar":
        return Tars(str(path if path.is_file() else files[0].parent), files)
    if suffix in (".parquet", ".arrow"):
        return rows_of_files(path if path.is_file() else files[0].parent, files, split, streaming)
    raise UserError(f"data.root={root}: neither a folder nor a .tar, .parquet or .arrow file")


def _of_split(folder: Path, split: str, root: str) -> Path:
    """The folder of a split, or the whole where it has none."""
    for name in SPLITS.get(split, (split,)):
        if (folder / name).is_dir():
            return folder / name
    others = [name for names in SPLITS.values() for name in names if (folder / name).is_dir()]
    if others:
        raise UserError(f"data.root={root}: it has no folder {split}; choose another split, or another root")
    return folder


def _in_folder(folder: Path, split: str, streaming: bool) -> Source:
    if (folder / "state.json").is_file():
        return rows_of_saved(folder)
    for inside in (folder, folder / "data"):
        for suffix in (".parquet", ".arrow", ".tar"):
            files = _of_split_by_name(sorted(inside.glob(f"*{suffix}")), split)
            if files:
                root = str(inside)
                return Tars(root, files) if suffix == ".tar" else rows_of_files(inside, files, split, streaming)
    return Folder(folder)


def _of_split_by_name(files: list[Path], split: str) -> list[Path]:
    """Those of one split, where their names tell of splits at all: validation-00000-of-00014, ILSVRC2012_img_val."""

    def tells(file: Path, names) -> bool:
        return not set(names).isdisjoint(re.split(r"[^a-z]+", file.stem.lower()))

    known = [name for names in SPLITS.values() for name in names]
    if not any(tells(file, known) for file in files):
        return files
    return [file for file in files if tells(file, SPLITS.get(split, (split,)))]


def _matching(pattern: str) -> list[Path]:
    """Files by a pattern of the shell, with {000..063} for numbers as WebDataset's users write it."""
    path = Path(pattern)
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if braces is None:
        return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    first, last = braces.groups()
    numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    files = [Path(pattern[: braces.start()] + number + pattern[braces.end() :]) for number in numbers]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(f"data.root={pattern}: {missing[0]} is not there")
    return files
