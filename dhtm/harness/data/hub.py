"""Images in parquet or Arrow files as the Hugging Face hub stores them, local or on the hub, read by ``datasets``."""

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow.compute as pc

from dhtm.harness.core.errors import UserError, one_line
from dhtm.harness.data.sources import SPLITS, Source

HUB = "hf://datasets/"
_LABELS = ("label", "labels", "cls", "target")


class Rows(Source):
    """The rows of a table: of its columns one has images, one their classes.

    Args:
        root: where it is.
        table: of ``datasets``, one to be streamed or not.
        labels: of the rows, in order.
        class_names: in the order of the labels' numbers, where the table has them.
        files: what identifies the files that the table was made of.
    """

    def __init__(self, root: str, table, labels: Sequence[int], class_names: tuple[str, ...] | None, files: list):
        import datasets

        column = _image_column(table.features, root)
        self.rows = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column, self.class_names = column, class_names
        self.streamed = isinstance(table, datasets.IterableDataset)
        super().__init__(root, self._names(len(labels)), files, labels)

    def _names(self, n_rows: int) -> list[str]:
        names = [f"row {row}" for row in range(n_rows)]
        if self.streamed:
            return names
        chunks = self.rows.data.column(self.column).chunks  # mapped from the disk: their images are not read
        paths = [path for chunk in chunks for path in pc.struct_field(chunk, "path").to_pylist()]
        return [f"{name} ({path})" if path else name for name, path in zip(names, paths, strict=True)]

    def is_there(self) -> bool:
        return self.root.startswith(HUB) or super().is_there()

    def read(self, index: int) -> BinaryIO:
        return _file(self.rows[index][self.column])

    def stream(self) -> Iterator[Callable[[], BinaryIO]]:
        """Functions that open the images' files, in order; for a table that is streamed."""
        for row in self.rows:
            yield functools.partial(_file, row[self.column])


def rows_of_files(folder: Path, files: Sequence[Path], split: str, streaming: bool) -> Rows:
    """Parquet files, or Arrow files, of one split, in the order of their names."""
    kind = "parquet" if files[0].suffix == ".parquet" else "arrow"
    identity = [[file.name, file.stat().st_size] for file in files]
    return _loaded(
        kind, {"data_files": {split: [str(file) for file in files]}}, str(folder), split, streaming, identity
    )


def rows_of_saved(folder: Path) -> Rows:
    """What ``Dataset.save_to_disk`` wrote."""
    datasets = _datasets()
    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever its readers meet
        raise UserError(f"data.root: {folder}: cannot be read ({one_line(error)})") from error
    files = [[Path(file["filename"]).name, Path(file["filename"]).stat().st_size] for file in table.cache_files]
    column = _label_column(table.features, str(folder))
    return Rows(str(folder), table, table[column][:], _class_names(table.features[column]), files)


def rows_of_hub(root: str, split: str, streaming: bool) -> Rows:
    """A data set of the hub, ``hf://datasets/<user>/<name>``; downloaded, or streamed."""
    name = root.removeprefix(HUB).strip("/")
    return _loaded(name, {}, root, split, streaming, None)


def _loaded(name: str, options: dict, root: str, split: str, streaming: bool, identity: list | None) -> Rows:
    datasets = _datasets()
    try:
        builder = datasets.load_dataset_builder(name, **options)
        split = _name_of_split(builder, split, root)
        if identity is None:  # the hub's addresses of files have their revision in them
            identity = sorted(map(str, builder.config.data_files[split]))
            # By the data set's name all its splits would be downloaded.
            if all(file.endswith(".parquet") for file in identity):
                name, options = "parquet", {"data_files": {split: identity}}
                builder = datasets.load_dataset_builder(name, **options)
        if streaming:
            table = builder.as_streaming_dataset(split)
        else:
            builder.download_and_prepare()
            table = builder.as_dataset(split)
        features = table.features
        column = _label_column(features, root)
        if streaming:  # the labels alone first, for which parquet's images need not be read
            only = {"columns": [column]} if hasattr(builder.config, "columns") else {}
            alone = datasets.load_dataset_builder(name, **options, **only).as_streaming_dataset(split)
            labels = [row[column] for row in alone.select_columns([column])]
        else:
            labels = table[column][:]
    except UserError:
        raise
    except Exception as error:  # of files, the network, the hub
        raise UserError(f"data.root={root}: cannot be read ({type(error).__name__}: {one_line(error)})") from error
    return Rows(root, table, labels, _class_names(features[column]), identity)


def _name_of_split(builder, split: str, root: str) -> str:
    known = list(builder.config.data_files or builder.info.splits or ())
    for name in SPLITS.get(split, (split,)):
        if name in known:
            return name
    raise UserError(f"data.split={split}: {root} has {', '.join(map(str, known))}")


def _datasets():
    try:
        import datasets
    except ImportError:
        raise UserError("data.root: parquet, Arrow and the hub need `datasets`: pip install -e '.[hub]'") from None
    return datasets


def _image_column(features, root: str) -> str:
    import datasets

    for name, feature in features.items():
        if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature):
            return name
    raise UserError(f"data.root={root}: of its columns {', '.join(features)} none has images")


def _label_column(features, root: str) -> str:
    import datasets

    for name, feature in features.items():
        if isinstance(feature, datasets.ClassLabel) or name in _LABELS:
            return name
    raise UserError(
        f"data.root={root}: of its columns {', '.join(features)} none has labels; one of them must be named label"
    )


def _class_names(feature) -> tuple[str, ...] | None:
    names = getattr(feature, "names", None)
    return tuple(names) if names else None


def _file(image: dict) -> BinaryIO:
    if image["bytes"] is not None:
        return io.BytesIO(image["bytes"])
    if image["path"] is None:
        raise OSError("the row is empty")
    return Path(image["path"]).open("rb")
