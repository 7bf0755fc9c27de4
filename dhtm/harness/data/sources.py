"""Where photographs come from: folders, tar files, and the tables of the Hugging Face hub, each as a list of images."""

import abc
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from dhtm.harness.core.errors import UserError, one_line

SPLITS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}  # and their other names


class Source(abc.ABC):
    """Images in an order that never changes.

    Attributes:
        root: what a user knows it by.
        names: of the images, bytes [n]; an array, because of a list every loading process would copy all of it.
        given: what is known of the class of each: its name (str [n]) or number (int64 [n]); None if nothing is.
        class_names: in the order of those numbers, where they are known.
        fingerprint: SHA-256 of names and sizes, of the images or of the files that hold them.
        streamed: images can be had one after the other only, by a method ``stream``.
    """

    class_names: tuple[str, ...] | None = None
    streamed = False

    def __init__(self, root: str, names: Sequence[str], sizes: Sequence, given: Sequence | None):
        self.root = root
        self.names = np.array([os.fsencode(name) for name in names])
        self.given = None if given is None else np.array(given)
        self.fingerprint = hashlib.sha256(json.dumps([list(names), list(sizes)]).encode()).hexdigest()

    def __len__(self):
        return len(self.names)

    def name(self, index: int) -> str:
        """Of an image, as a user would look for it."""
        return f"{self.root}/{self.names[index].decode(errors='replace')}"

    def is_there(self) -> bool:
        """Whether there is still anything to read from: a disk may go away, and leave an empty folder where it was."""
        root = Path(self.root)
        try:
            return any(root.iterdir()) if root.is_dir() else root.exists()
        except OSError:
            return False

    @abc.abstractmethod
    def read(self, index: int) -> BinaryIO:
        """An image's file.

        Raises:
            OSError: it cannot be read.
        """


class Folder(Source):
    """A folder of images; or of folders, one a class."""

    def __init__(self, folder: Path):
        files, classes = _flat(folder), None
        if files:
            _check_no_classes(folder, files[0])
        else:
            files, classes = _by_class(folder)
        names = [str(file.relative_to(folder)) for file in files]
        super().__init__(str(folder), names, [file.stat().st_size for file in files], classes)

    def read(self, index: int) -> BinaryIO:
        return (Path(self.root) / os.fsdecode(self.names[index])).open("rb")


def _flat(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMG_EXTENSIONS and file.is_file())


def _check_no_classes(folder: Path, stray: Path) -> None:
    for inside in sorted(path for path in folder.iterdir() if path.is_dir()):
        if _flat(inside):
            raise UserError(
                f"data.root: {folder}: {stray.name} lies beside folders of images like {inside.name}; take it away"
            )


def _by_class(folder: Path) -> tuple[list[Path], list[str]]:
    try:
        listed = ImageFolder(str(folder))
    except FileNotFoundError:  # no class folders, or empty ones
        empty = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and not any(path.iterdir())]
        what = f"the class folder {empty[0]} is empty" if empty else "it has no folders of images, one a class"
        raise UserError(f"data.root: {folder}: {what}") from None
    return [Path(file) for file, _ in listed.samples], [listed.classes[label] for _, label in listed.samples]


class Tars(Source):
    """Images in tar files, which are read where they are and never unpacked: as ImageNet ships, or WebDataset shards.

    The class of an image is the number in the .cls or .json (``"label"``) file beside it, as WebDataset has it; else the
    name of its folder.
    """

    def __init__(self, root: str, files: Sequence[Path]):
        self.files = files
        members = [(number, member) for number, file in enumerate(files) for member in _members(file)]
        images = [(number, member) for number, member in members if _suffix(member.name) in IMG_EXTENSIONS]
        if not images:
            raise UserError(f"data.root: {root}: there are no images in {files[0]}")
        beside = {
            (number, *_sample(member.name)): member
            for number, member in members
            if _suffix(member.name) in (".cls", ".json")
        }
        self.places = np.array([(number, member.offset_data, member.size) for number, member in images])
        names = [f"{files[number].name}/{member.name}" for number, member in images]
        given = [self._label(number, member, beside) for number, member in images]
        one_folder = len(set(given)) == 1 and isinstance(given[0], str)  # which says nothing
        known = None if None in given or one_folder else given
        super().__init__(root, names, [member.size for _, member in images], known)

    def name(self, index: int) -> str:
        return f"{self.files[self.places[index, 0]].parent}/{self.names[index].decode(errors='replace')}"

    def read(self, index: int) -> BinaryIO:
        return self._content(*self.places[index])

    def _content(self, number: int, offset: int, size: int) -> BinaryIO:
        with self.files[number].open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    def _label(self, number: int, image: tarfile.TarInfo, beside: dict) -> int | str | None:
        key, _ = _sample(image.name)
        for suffix in (".cls", ".json"):
            member = beside.get((number, key, suffix))
            if member is None:
                continue
            try:
                content = json.loads(self._content(number, member.offset_data, member.size).read())
            except ValueError:
                content = None
            label = content.get("label") if isinstance(content, dict) else content
            if isinstance(label, int):
                return label
            if suffix == ".cls":
                raise UserError(f"data.root: {self.files[number]}: {member.name} does not hold the number of a class")
        return Path(image.name).parent.name or None


def _members(file: Path) -> list[tarfile.TarInfo]:
    try:
        with tarfile.open(file, "r:") as tar:
            members = [member for member in tar if member.isreg()]
            _check_end(tar)
            return members
    except (tarfile.TarError, EOFError) as error:
        what = "it is compressed, decompress it first" if _compressed(file) else "not a tar file, or a damaged one"
        raise UserError(f"data.root: {file}: {what} ({one_line(error)})") from error


def _check_end(tar: tarfile.TarFile) -> None:
    """A header that is damaged looks like the end to ``tarfile``; after the true one there are zeros, a block at least."""
    tar.fileobj.seek(tar.offset)
    n_zeros = 0
    while block := tar.fileobj.read(1 << 20):
        if any(block):
            raise tarfile.ReadError(f"damaged at byte {tar.offset}")
        n_zeros += len(block)
    if n_zeros < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it is cut off")


def _compressed(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _sample(name: str) -> tuple[str, str]:
    """WebDataset's name of a sample, which ends at the first dot of its files' names; and what comes after."""
    folder, _, file = name.rpartition("/")
    key, dot, rest = file.partition(".")
    return f"{folder}/{key}", (dot + rest).lower()
