"""From what a data set says of its images' classes to the numbers of a model's outputs."""

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

from dhtm.harness.core.errors import UserError, one_line, path_given
from dhtm.harness.data.sources import Source

_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_KEPT_BESIDE = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12", "LOC_val_solution.csv")


@functools.cache
def synsets() -> tuple[str, ...]:
    """The 1,000 classes of ImageNet-1K in the order of the pretrained models' outputs, by timm."""
    return tuple(ImageNetInfo("imagenet-1k").label_names())


def numbered(
    given: np.ndarray, class_names: tuple[str, ...] | None, class_map: str | None, root: str
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """The output that stands for each image's class, and the outputs' names in their order.

    Args:
        given: the class of each image, its name (str [n]) or number (int64 [n]).
        class_names: in the order of those numbers, where they are known.
        class_map: "synsets", names are those of ImageNet-1K; "numbers", they are the outputs' numbers, as ImageNet-V2's
            folders have it; a file, .txt with a name a line in the order of the outputs, or .json of names and numbers;
            None, the names are numbered in their order.
        root: where the images are, for messages.

    Returns:
        int64 [n], and None where the outputs have no names.

    Raises:
        UserError: a class is none of those, or the order is not that of ImageNet-1K.
    """
    if np.issubdtype(given.dtype, np.integer):
        if class_map in (None, "numbers"):
            return given, class_names
        if class_map == "synsets" and not _are_synsets(class_names):
            _check_order(class_names, root)
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
    if class_map is None:
        return {name: number for number, name in enumerate(names)}, tuple(names)
    if class_map == "synsets":
        return {name: number for number, name in enumerate(synsets())}, synsets()
    if class_map == "numbers":
        return {name: int(name) for name in names if name.isdecimal()}, None
    path = path_given(class_map, "data.class_map")
    try:
        if path.suffix == ".json":
            return {str(name): int(number) for name, number in json.loads(path.read_text()).items()}, None
        lines = path.read_text().split("\n")
        listed = tuple(line.strip() for line in lines if line.strip())
        return {name: number for number, name in enumerate(listed)}, listed
    except FileNotFoundError:
        raise UserError(
            f"data.class_map={class_map}: no such file; give one, or synsets, or numbers, or null"
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"data.class_map={class_map}: cannot be read ({one_line(error)}); give a .txt with a class a line, or a .json of "
            "classes and numbers"
        ) from error


def _are_synsets(class_names: tuple[str, ...] | None) -> bool:
    return class_names is not None and set(class_names) <= set(synsets())


def _check_order(names: tuple[str, ...] | None, root: str) -> None:
    """Whether a table's numbers of classes are those of ImageNet-1K, by the words that it has for them."""
    if names is None:  # nothing to go by
        return
    info = ImageNetInfo("imagenet-1k")
    words = [info.index_to_description(number) for number in range(len(synsets()))]
    wrong = [
        number
        for number, name in enumerate(names)
        if number >= len(words) or _first_word(name) != _first_word(words[number])
    ]
    # The words for a few classes differ between sources; in another order nearly all do.
    if len(names) != len(words) or len(wrong) > len(words) // 10:
        number = wrong[0] if wrong else len(names)
        name = names[number] if number < len(names) else "none"
        raise UserError(
            f"data.root: {root}: its {len(names)} classes are not ImageNet-1K's in their order: number {number} is "
            f"{name}, not {' '.join((synsets()[number], words[number])) if number < len(words) else 'any'}"
        )


def _first_word(name: str) -> str:
    return name.split(",")[0].strip().lower().replace("_", " ")


def beside(root: Path) -> str | None:
    """The file of labels that ImageNet's validation images come with, in a folder or the one above it; None without one."""
    for folder in (root, root.parent):
        for name in _KEPT_BESIDE:
            if (folder / name).exists():
                return str(folder / name)
    return None


def labelled(source: Source, labels: str) -> np.ndarray:
    """The class of each image, by its file's name, of a file of labels.

    Args:
        source: of images.
        labels: the ILSVRC2012 devkit (its folder, or as it ships, ILSVRC2012_devkit_t12.tar.gz); or a table of file names
            and classes, separated by commas or blanks, such as the LOC_val_solution.csv of Kaggle.

    Returns:
        Names (str [n]) or numbers (int64 [n]).

    Raises:
        UserError: the file cannot be read, or lacks an image.
    """
    path = path_given(labels, "data.labels")
    try:
        devkit = path.is_dir() or path.name.endswith((".tar.gz", ".tgz"))
        classes = _of_devkit(path) if devkit else _of_table(path)
    except FileNotFoundError as error:
        raise UserError(f"data.labels={labels}: no such file ({error.filename or one_line(error)})") from None
    except (OSError, ValueError, KeyError, IndexError, tarfile.TarError) as error:
        raise UserError(f"data.labels={labels}: cannot be read as labels ({one_line(error)})") from error
    try:
        found = [classes[_stem(name.decode(errors="replace"))] for name in source.names.tolist()]
    except KeyError as error:
        raise UserError(f"data.labels={labels}: it says nothing of the image {error.args[0]}") from None
    return np.array([int(name) for name in found]) if all(name.isdecimal() for name in found) else np.array(found)


def _stem(file: str) -> str:
    path = Path(file)
    return path.stem if path.suffix.lower() in IMG_EXTENSIONS else path.name


def _of_table(path: Path) -> dict[str, str]:
    """By the name of its file, the first word on each image."""
    classes = {}
    for line in path.read_text().splitlines():
        file, *rest = next(csv.reader([line])) if "," in line else line.split()
        if not rest or not rest[0].split():
            raise ValueError(
                "a line has no file name and class"
                + (", the ids of ILSVRC2012 mean nothing without the devkit's meta.mat" if line.isdecimal() else "")
            )
        found = rest[0].split()[0]
        if classes.setdefault(_stem(file), found) != found:
            raise ValueError(f"{_stem(file)} has two classes")
    return classes


def _of_devkit(path: Path) -> dict[str, str]:
    """The devkit numbers synsets in an order of its own, which its meta.mat gives."""
    meta, truth = _devkit_files(path)
    from scipy.io import loadmat  # here, because few need it and it takes a moment

    listed = loadmat(meta, squeeze_me=True, struct_as_record=False)["synsets"]
    synset = {int(entry.ILSVRC2012_ID): str(entry.WNID) for entry in listed}
    return {f"ILSVRC2012_val_{i:08d}": synset[int(number)] for i, number in enumerate(truth.split(), start=1)}


def _devkit_files(path: Path) -> tuple[io.BytesIO, bytes]:
    """data/meta.mat and data/ILSVRC2012_validation_ground_truth.txt; of an archive read, not unpacked."""
    if path.is_dir():
        return io.BytesIO((path / "data" / "meta.mat").read_bytes()), (path / "data" / _TRUTH).read_bytes()
    with tarfile.open(path, "r:gz") as archive:
        found = {Path(member.name).name: member for member in archive if member.isreg()}
        meta, truth = (archive.extractfile(found[name]).read() for name in ("meta.mat", _TRUTH))
    return io.BytesIO(meta), truth


def real(source: Source) -> list[list[int]]:
    """The reassessed labels (Beyer et al. 2020, "Are we done with ImageNet?"), of which timm has a copy, for each image.

    Raises:
        UserError: images are not named as ImageNet's validation images are.
    """
    by_name = RealLabelsImagenet([None] * 50_000).real_labels
    found = [_NUMBER.search(name.decode(errors="replace")) for name in source.names.tolist()]
    if None in found:
        name = source.name(found.index(None))
        raise UserError(
            f"data.real_labels: {name}: they are for files that are named ILSVRC2012_val_00000293 and so on"
        )
    return [by_name[f"{match[0]}.JPEG"] for match in found]
