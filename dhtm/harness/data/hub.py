"""Images in parquet or Arrow files as the Hugging Face hub stores them, local or on the hub, read by ``datasets``."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow.compute as pc

from dhtm.harness.core.errors import UserError, explain
from dhtm.harness.data.sources import SPLITS, Source

HUB = "hf://datasets/"
_LABELS = ("label", "labels", "cls", "target")


class HubTable(Source):
    """The rows of a ``datasets.Dataset`` with a column of images and one of their classes; ``files`` identify it."""

    def __init__(self, root: str, table, files: list):
        import datasets

        columns = table.features.items()
        images = [
            name
            for name, kind in columns
            if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)
        ]
        labels = [name for name, kind in columns if isinstance(kind, datasets.ClassLabel) or name in _LABELS]
        if not images or not labels:
            raise UserError(f"data.root={root}: no column of images and one of labels in {', '.join(table.features)}")
        self.column, label = images[0], labels[0]
        self.rows = table.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))
        self.class_names = tuple(getattr(table.features[label], "names", None) or ()) or None
        chunks = self.rows.data.column(self.column).chunks  # memory-mapped, so images are not read
        paths = [path for chunk in chunks for path in pc.struct_field(chunk, "path").to_pylist()]
        names = [f"row {row} ({path})" if path else f"row {row}" for row, path in enumerate(paths)]
        super().__init__(root, names, files, table[label][:])

    def is_there(self) -> bool:
        return self.root.startswith(HUB) or super().is_there()

    def read(self, index: int) -> BinaryIO:
        image = self.rows[index][self.column]
        return Path(image["path"]).open("rb") if image["bytes"] is None else io.BytesIO(image["bytes"])


def open_table(root: str, split: str, files: Sequence[Path] = ()) -> HubTable:
    """Open the parquet or Arrow files of a split, or what ``Dataset.save_to_disk`` wrote, or a data set of the hub.

    Args:
        root: the folder of the files, or ``hf://datasets/<user>/<name>``.
        split: the split to take from the hub.
        files: the parquet or Arrow files of the split.
    """
    with explain("data.root: parquet, Arrow and the hub need `datasets`", remedy=": pip install -e '.[hub]'"):
        import datasets
    with explain(f"data.root={root}: cannot be read"):
        if root.startswith(HUB):
            return HubTable(root, *_from_hub(datasets, root, split))
        if files:
            named = {split: [str(file) for file in files]}
            table = datasets.load_dataset(files[0].suffix.removeprefix("."), data_files=named, split=split)
        else:
            table = datasets.load_from_disk(root)
            files = [Path(file["filename"]) for file in table.cache_files]
        return HubTable(root, table, [[file.name, file.stat().st_size] for file in files])


def _from_hub(datasets, root: str, split: str) -> tuple:
    """Download a split; return its table and the addresses of its files, which contain their revision."""
    name = root.removeprefix(HUB).strip("/")
    builder = datasets.load_dataset_builder(name)
    known = list(builder.config.data_files or builder.info.splits or ())
    found = next((one for one in SPLITS.get(split, (split,)) if one in known), None)
    if found is None:
        raise UserError(f"data.split={split}: {root} has {', '.join(map(str, known))}")
    files = sorted(map(str, builder.config.data_files[found]))
    if all(file.endswith(".parquet") for file in files):  # loading by name would download all splits
        return datasets.load_dataset("parquet", data_files={found: files}, split=found), files
    return datasets.load_dataset(name, split=found), files
