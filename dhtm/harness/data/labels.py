"""Map the classes of a data set to the numbers of a model's outputs."""

import functools
import io
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from timm.data import ImageNetInfo, RealLabelsImagenet
from torchvision.datasets.folder import IMG_EXTENSIONS

from dhtm.harness.core.errors import UserError, explain
from dhtm.harness.data.sources import Source

_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_KEPT_BESIDE = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12", "LOC_val_solution.csv")


@functools.cache
def synsets() -> tuple[str, ...]:
    """Return the 1,000 classes of ImageNet-1K in the order of the pretrained models' outputs, as timm lists them."""
    return tuple(ImageNetInfo("imagenet-1k").label_names())


def number_classes(
    given: np.ndarray, class_names: tuple[str, ...] | None, class_map: str | None, root: str
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Return the number of the output for each image's class, and the outputs' names in order.

    Args:
        given: the class of each image, as a name (str [n]) or a number (int64 [n]).
        class_names: the names of those numbers, in order, if known.
        class_map: "synsets": the names are those of ImageNet-1K; "numbers": the names are the outputs' numbers, as in the
            folders of ImageNet-V2; a file with one name per line in the order of the outputs; None: the sorted names are
            numbered.
        root: where the images are, for messages.

    Returns:
        The numbers, int64 [n], and the names; None if the outputs have no names.

    Raises:
        UserError: a class is not in the map.
    """
    if np.issubdtype(given.dtype, np.integer):
        if class_map in (None, "numbers"):
            return given, class_names
        if class_map == "synsets" and (class_names is None or _describe_imagenet(class_names)):
            return given, synsets()
        given = given.astype(str) if class_names is None else np.array(class_names)[given]
    if class_map == "numbers":
        with explain(f"data.root: {root}: class_map=numbers, but its classes are not numbers", ValueError):
            return given.astype(np.int64), None
    if class_map is None:
        outputs = tuple(np.unique(given).tolist())
    elif class_map == "synsets":
        outputs = synsets()
    else:
        remedy = "; give synsets, numbers, null, or a text file with one class per line"
        with explain(f"data.class_map={class_map}: cannot be read", remedy=remedy):
            outputs = tuple(line.strip() for line in Path(class_map).read_text().split("\n") if line.strip())
        if twice := [name for name in outputs if outputs.count(name) > 1]:
            raise UserError(
                f"data.class_map={class_map}: {twice[0]} is in it {outputs.count(twice[0])} times; give it once"
            )
    numbers = pd.Index(outputs).get_indexer(given)
    missing = set(given[numbers < 0].tolist())
    if missing:
        raise UserError(
            f"data.root: {root}: the class {min(missing)} ({len(missing)} such) is not one of class_map={class_map}"
        )
    return numbers.astype(np.int64), outputs


def _describe_imagenet(names: Sequence[str]) -> bool:
    """Return whether a table's names of classes are words for ImageNet-1K's classes, in their order."""
    info = ImageNetInfo("imagenet-1k")
    words = [info.index_to_description(number) for number in range(len(synsets()))]
    n_same = sum(_first_word(name) == _first_word(word) for name, word in zip(names, words, strict=False))
    # A few classes have different words in different sources. In another order, nearly all words differ.
    return len(names) == len(words) and n_same >= 0.9 * len(words)


def _first_word(name: str) -> str:
    return name.split(",")[0].strip().lower().replace("_", " ")


def find_labels(root: Path) -> str | None:
    """Find a file with labels of ImageNet's validation images in a folder or its parent; None if there is none."""
    files = [folder / name for folder in (root, root.parent) for name in _KEPT_BESIDE]
    return next((str(file) for file in files if file.exists()), None)


def read_labels(source: Source, labels: str) -> np.ndarray:
    """Look up the class of each image, by its file's name, in a file of labels.

    Args:
        source: of the images.
        labels: the ILSVRC2012 devkit (its folder, or as it ships, ILSVRC2012_devkit_t12.tar.gz); or a table of file names
            and classes, separated by commas or blanks, such as Kaggle's LOC_val_solution.csv.

    Returns:
        Names (str [n]) or numbers (int64 [n]).

    Raises:
        UserError: the file cannot be read, or lacks an image.
    """
    path = Path(labels)
    remedy = "; give the ILSVRC2012 devkit, or a text file with a file name and a class on each line"
    with explain(f"data.labels={labels}: cannot be read as labels", remedy=remedy):
        devkit = path.is_dir() or path.name.endswith((".tar.gz", ".tgz"))
        classes = _devkit_labels(path) if devkit else _table_labels(path)
    with explain(f"data.labels={labels}: it has no label for the image", KeyError):
        found = [classes[_stem(name.decode(errors="replace"))] for name in source.names.tolist()]
    return np.array([int(name) for name in found]) if all(name.isdecimal() for name in found) else np.array(found)


def _stem(file: str) -> str:
    path = Path(file)
    return path.stem if path.suffix.lower() in IMG_EXTENSIONS else path.name


def _table_labels(path: Path) -> dict[str, str]:
    """Return the class of each file, which is the first word after the file's name."""
    lines = [line.split("," if "," in line else None, 1) for line in path.read_text().splitlines()]
    classes = {_stem(file): rest.split()[0] for file, rest in lines}
    if len(classes) < len(lines):
        raise ValueError("a file has two lines")
    return classes


def _devkit_labels(path: Path) -> dict[str, str]:
    """Return synsets by file name. The devkit numbers synsets in an order of its own, which its meta.mat lists."""
    if path.is_dir():
        meta, truth = ((path / "data" / name).read_bytes() for name in ("meta.mat", _TRUTH))
    else:
        with tarfile.open(path, "r:gz") as archive:  # read, not unpacked
            found = {Path(member.name).name: member for member in archive if member.isreg()}
            meta, truth = (archive.extractfile(found[name]).read() for name in ("meta.mat", _TRUTH))
    from scipy.io import loadmat  # imported here because it takes a moment and few need it

    listed = loadmat(io.BytesIO(meta), squeeze_me=True, struct_as_record=False)["synsets"]
    synset = {int(entry.ILSVRC2012_ID): str(entry.WNID) for entry in listed}
    return {f"ILSVRC2012_val_{i:08d}": synset[int(number)] for i, number in enumerate(truth.split(), start=1)}


def reassessed_labels(names: Sequence[str]) -> list[list[int]]:
    """Return the labels of Beyer et al. (2020, "Are we done with ImageNet?") for images of these names, from timm's copy.

    Raises:
        UserError: images are not named like ImageNet's validation images.
    """
    by_name = RealLabelsImagenet([None] * 50_000).real_labels
    found = [_NUMBER.search(name) for name in names]
    if None in found:
        name = names[found.index(None)]
        raise UserError(f"data.real_labels: {name}: files must be named ILSVRC2012_val_00000293 and so on")
    return [by_name[f"{match[0]}.JPEG"] for match in found]
