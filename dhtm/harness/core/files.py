"""Files: the project's location, atomic writes and locks."""

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import dhtm
from dhtm.harness.core.errors import explain

log = logging.getLogger(__name__)

PROJECT = Path(dhtm.__file__).parent.parent  # the checkout, which holds configs/ and results/


def require_writable(folder: Path, setting: str) -> None:
    """Make a folder if it does not exist; raise a UserError that names the setting if nothing can be written there."""
    with explain(f"{setting}: cannot write there", OSError, remedy="; choose another place"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it: a crash leaves the old file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def lock(path: Path, message: str) -> contextlib.AbstractContextManager:
    """Take an exclusive lock for a ``with`` block. If another process holds it, log the message and wait."""
    held = FileLock(path)
    try:
        return held.acquire(timeout=0)
    except Timeout:
        log.info(message)
        return held.acquire()
