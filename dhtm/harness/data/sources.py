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
        root: the folder of the images or of the files that hold them; or the hub's address.
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
        try:
            return Path(self.root).is_dir() and any(Path(self.root).iterdir())
        except OSError:  # a network disk that is gone
            return False

    @abc.abstractmethod
    def read(self, index: int) -> BinaryIO:
        """Return an image's file.

        Raises:
            OSError: it cannot be read.
        """


class Files(Source):
    """Images that are files below a folder, with a class for each or without classes (None)."""

    def __init__(self, folder: Path, files: Sequence[Path], classes: Sequence[str] | None = None):
        names = [str(file.relative_to(folder)) for file in files]
        super().__init__(str(folder), names, [_size(file) for file in files], classes)

    def read(self, index: int) -> BinaryIO:
        return (Path(self.root) / os.fsdecode(self.names[index])).open("rb")


def in_folder(folder: Path) -> Files:
    """Return the images of a folder, without classes; or if it has none, those of its folders, one per class."""
    if files := _images(folder.iterdir()):
        return Files(folder, files)
    with explain(f"data.root: {folder}: neither images nor folders of images", FileNotFoundError):
        listed = ImageFolder(str(folder))
    return Files(folder, [Path(file) for file, _ in listed.samples], [listed.classes[i] for i in listed.targets])


def below(folder: Path) -> Files:
    """Return all images below a folder, without classes; links to folders are followed, as in :func:`in_folder`.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    if files := _images(Path(inside, name) for inside, _, names in os.walk(folder, followlinks=True) for name in names):
        return Files(folder, files)
    what = "no image in it" if folder.is_dir() else "no such directory"
    raise UserError(f"data.root={folder}: {what}; give a folder of images ({', '.join(IMG_EXTENSIONS)})")


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in IMG_EXTENSIONS and not path.is_dir())


def _size(file: Path) -> int | None:
    """Return a file's size; None for a link to nothing, which is then an unreadable image."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


class Tars(Source):
    """Images in tar files of one folder, which are never unpacked: ImageNet's own, or WebDataset shards.

    The class of an image is the number in the .cls or .json (``"label"``) file beside it, as WebDataset writes it; otherwise
    the name of its folder.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = files
        members = {(number, member.name): member for number, file in enumerate(files) for member in _members(file)}
        images = [key for key in members if Path(key[1]).suffix.lower() in IMG_EXTENSIONS]
        if not images:
            raise UserError(f"data.root: there are no images in {files[0]}")
        self.places = np.array([(key[0], members[key].offset_data, members[key].size) for key in images])
        given = [self._label(number, name, members) for number, name in images]
        if None in given or (len(set(given)) == 1 and isinstance(given[0], str)):  # a single folder is not a class
            given = None
        names = [f"{files[number].name}/{name}" for number, name in images]
        super().__init__(str(files[0].parent), names, [members[key].size for key in images], given)

    def read(self, index: int) -> BinaryIO:
        return io.BytesIO(self._content(*self.places[index]))

    def _content(self, number: int, offset: int, size: int) -> bytes:
        with self.files[number].open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def _label(self, number: int, name: str, members: dict[tuple[int, str], tarfile.TarInfo]) -> int | str | None:
        folder, slash, file = name.rpartition("/")
        sample = f"{folder}{slash}{file.partition('.')[0]}"
        for suffix in (".cls", ".json"):
            if member := members.get((number, sample + suffix)):
                with explain(f"data.root: {self.files[number]}: {member.name} does not hold the number of a class"):
                    content = json.loads(self._content(number, member.offset_data, member.size))
                    return int(content["label"] if suffix == ".json" else content)
        return Path(folder).name or None


def _members(file: Path) -> list[tarfile.TarInfo]:
    with (
        explain(f"data.root: {file}: not a tar file, or damaged, or compressed (decompress it first)"),
        tarfile.open(file, "r:") as tar,
    ):
        members = [member for member in tar if member.isreg()]
        tar.fileobj.seek(tar.offset)  # of the header that is none, which tarfile takes for the end
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"damaged or cut off at byte {tar.offset}")
        return members
