"""Map the classes of a data set to the numbers of a model's outputs."""

import csv
import functools
import io
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
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
            folders of ImageNet-V2; a file: .txt with one name per line in the order of the outputs, or .json of names and
            numbers; None: the sorted names are numbered.
        root: where the images are, for messages.

    Returns:
        The numbers, int64 [n], and the names; None if the outputs have no names.

    Raises:
        UserError: a class is not in the map, or the numbers are not in ImageNet-1K's order.
    """
    if np.issubdtype(given.dtype, np.integer):
        if class_map in (None, "numbers"):
            return given, class_names
        if class_map == "synsets" and (class_names is None or not set(class_names) <= set(synsets())):
            if class_names is not None:
                _require_order(class_names, root)
            return given, synsets()
        given = given.astype(str) if class_names is None else np.array(class_names)[given]
    names, inverse = np.unique(given, return_inverse=True)
    numbers, outputs = _numbers(names.tolist(), class_map)
    missing = [name for name in names.tolist() if name not in numbers]
    if missing:
        raise UserError(
            f"data.root: {root}: the class {missing[0]} ({len(missing)} such) is not one of class_map={class_map}"
        )
    return np.array([numbers[name] for name in names.tolist()], dtype=np.int64)[inverse], outputs


def _numbers(names: Sequence[str], class_map: str | None) -> tuple[dict[str, int], tuple[str, ...] | None]:
    if class_map == "numbers":
        return {name: int(name) for name in names if name.isdecimal()}, None
    if class_map is None:
        outputs = tuple(names)
    elif class_map == "synsets":
        outputs = synsets()
    else:
        path = Path(class_map)
        remedy = (
            "; give synsets, numbers, null, a .txt file with one class per line, or a .json file of classes and numbers"
        )
        with explain(f"data.class_map={class_map}: cannot be read", remedy=remedy):
            if path.suffix == ".json":
                return {str(name): int(number) for name, number in json.loads(path.read_text()).items()}, None
            outputs = tuple(line.strip() for line in path.read_text().split("\n") if line.strip())
    return {name: number for number, name in enumerate(outputs)}, outputs


def _require_order(names: tuple[str, ...], root: str) -> None:
    """Raise unless a table's classes are in ImageNet-1K's order, judged by the table's words for them."""
    info = ImageNetInfo("imagenet-1k")
    words = [info.index_to_description(number) for number in range(len(synsets()))]
    differ = [_first_word(name) != _first_word(word) for name, word in zip(names, words, strict=False)]
    # A few classes have different words in different sources. In another order, nearly all words differ.
    if len(names) != len(words) or sum(differ) > len(words) // 10:
        raise UserError(f"data.root: {root}: its {len(names)} classes are not ImageNet-1K's in their order")


def _first_word(name: str) -> str:
    return name.split(",")[0].strip().lower().replace("_", " ")


def find_labels(root: Path) -> str | None:
    """Find a file with labels of ImageNet's validation images in a folder or its parent; None if there is none."""
    for folder in (root, root.parent):
        for name in _KEPT_BESIDE:
            if (folder / name).exists():
                return str(folder / name)
    return None


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
    with explain(f"data.labels={labels}: cannot be read as labels"):
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
    classes = {}
    for line in path.read_text().splitlines():
        file, *rest = next(csv.reader([line])) if "," in line else line.split()
        if not rest or not rest[0].split():
            raise ValueError(
                "a line lacks a file name or a class"
                + ("; the ids of ILSVRC2012 need the devkit's meta.mat" if line.isdecimal() else "")
            )
        found = rest[0].split()[0]
        if classes.setdefault(_stem(file), found) != found:
            raise ValueError(f"{_stem(file)} has two classes")
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


def reassessed_labels(source: Source) -> list[list[int]]:
    """Return the labels of Beyer et al. (2020, "Are we done with ImageNet?") for each image, from timm's copy.

    Raises:
        UserError: images are not named like ImageNet's validation images.
    """
    by_name = RealLabelsImagenet([None] * 50_000).real_labels
    found = [_NUMBER.search(name.decode(errors="replace")) for name in source.names.tolist()]
    if None in found:
        name = source.name(found.index(None))
        raise UserError(f"data.real_labels: {name}: files must be named ILSVRC2012_val_00000293 and so on")
    return [by_name[f"{match[0]}.JPEG"] for match in found]
