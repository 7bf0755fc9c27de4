"""Sources of photographs: folders and tar files, each as a list of images.

Damage that the libraries would skip silently is an error here: ``tarfile``, and so WebDataset, takes a damaged header for the
end of the file.
"""

import abc
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from dhtm.harness.core.errors import UserError, explain

SPLITS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}  # and the names of each


class Source(abc.ABC):
    """Images in a fixed order.

    Attributes:
        root: the file or folder, as messages name it.
        names: of the images, bytes [n]; an array, because every loading process would copy a list.
        given: the class of each image, as a name (str [n]) or a number (int64 [n]); None if the source has no classes.
        class_names: the names of those numbers, in order, if known.
        fingerprint: SHA-256 of names and sizes, of the images or of the files that hold them.
    """

    class_names: tuple[str, ...] | None = None

    def __init__(self, root: str, names: Sequence[str], sizes: Sequence, given: Sequence | None):
        self.root = root
        self.names = np.array([os.fsencode(name) for name in names])
        self.given = None if given is None else np.array(given)
        self.fingerprint = hashlib.sha256(json.dumps([list(names), list(sizes)]).encode()).hexdigest()

    def __len__(self):
        return len(self.names)

    def name(self, index: int) -> str:
        """Return the full name of an image, by which a user can find it."""
        return f"{self.root}/{self.names[index].decode(errors='replace')}"

    def is_there(self) -> bool:
        """Return whether the root still exists; a disk that is unmounted may leave an empty folder in its place."""
        root = Path(self.root)
        try:
            return any(root.iterdir()) if root.is_dir() else root.exists()
        except OSError:
            return False

    @abc.abstractmethod
    def read(self, index: int) -> BinaryIO:
        """Return an image's file.

        Raises:
            OSError: it cannot be read.
        """


class Part(Source):
    """A subset of another source's images, given by their numbers, int64 [n]."""

    def __init__(self, source: Source, chosen: np.ndarray):
        self.source, self.chosen = source, chosen
        self.root, self.names, self.class_names = source.root, source.names[chosen], source.class_names
        self.given = None if source.given is None else source.given[chosen]
        self.fingerprint = hashlib.sha256(source.fingerprint.encode() + chosen.tobytes()).hexdigest()

    def name(self, index: int) -> str:
        return self.source.name(self.chosen[index])

    def read(self, index: int) -> BinaryIO:
        return self.source.read(self.chosen[index])


class Files(Source):
    """Images that are files below a folder, with a class for each or without classes (None)."""

    def __init__(self, folder: Path, files: Sequence[Path], classes: Sequence[str] | None):
        names = [str(file.relative_to(folder)) for file in files]
        super().__init__(str(folder), names, [file.stat().st_size for file in files], classes)

    def read(self, index: int) -> BinaryIO:
        return (Path(self.root) / os.fsdecode(self.names[index])).open("rb")


class Folder(Files):
    """A folder of images, or of one folder per class."""

    def __init__(self, folder: Path):
        files, classes = _images(folder.iterdir()), None
        if not files:
            with explain(f"data.root: {folder}: neither images nor folders of images", FileNotFoundError):
                listed = ImageFolder(str(folder))
            files = [Path(file) for file, _ in listed.samples]
            classes = [listed.classes[label] for _, label in listed.samples]
        super().__init__(folder, files, classes)


class Tree(Files):
    """All images below a folder, without classes.

    Raises:
        UserError: there is no such folder, or no image in it.
    """

    def __init__(self, folder: Path):
        files = _images(folder.rglob("*"))
        if not files:
            what = "no image in it" if folder.is_dir() else "no such directory"
            raise UserError(f"data.root={folder}: {what}; give a folder of images ({', '.join(IMG_EXTENSIONS)})")
        super().__init__(folder, files, None)


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(file for file in paths if file.suffix.lower() in IMG_EXTENSIONS and file.is_file())


class Tars(Source):
    """Images in tar files, which are never unpacked: ImageNet's own, or WebDataset shards.

    The class of an image is the number in the .cls or .json (``"label"``) file beside it, as WebDataset writes it; otherwise
    the name of its folder.
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
        one_folder = len(set(given)) == 1 and isinstance(given[0], str)  # not a class
        super().__init__(
            root, names, [member.size for _, member in images], None if None in given or one_folder else given
        )

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
    with (
        explain(f"data.root: {file}: not a tar file, or damaged, or compressed (decompress it first)"),
        tarfile.open(file, "r:") as tar,
    ):
        members = [member for member in tar if member.isreg()]
        _require_end(tar)
        return members


def _require_end(tar: tarfile.TarFile) -> None:
    """Raise unless a block of zeros or more follows the last member: ``tarfile`` takes a damaged header for the end."""
    tar.fileobj.seek(tar.offset)
    n_zeros = 0
    while block := tar.fileobj.read(1 << 20):
        if any(block):
            raise tarfile.ReadError(f"damaged at byte {tar.offset}")
        n_zeros += len(block)
    if n_zeros < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it is cut off")


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _sample(name: str) -> tuple[str, str]:
    """Split a file's name at its first dot into WebDataset's name of the sample and the rest."""
    folder, _, file = name.rpartition("/")
    key, dot, rest = file.partition(".")
    return f"{folder}/{key}", (dot + rest).lower()
