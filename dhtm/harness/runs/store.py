"""Run directories: one finished evaluation each, under the hash of what determines its result."""

import ast
import contextlib
import fcntl
import functools
import hashlib
import inspect
import io
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

import dhtm
from dhtm.harness.core.errors import UserError, path_given
from dhtm.harness.core.redaction import redacted_config
from dhtm.harness.data.splits import UnreadableError
from dhtm.reducer import Reducer

log = logging.getLogger(__name__)

FAILED = "failed.csv"  # in a run's directory: the images that could not be read
PACKAGES = ("torch", "timm", "torchvision", "fvcore", "numpy", "hydra-core")
# The environment variables that a result or its speed may depend on; of no others is anything written down.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TRITON_INTERPRET",
)  # fmt: skip
_LIBRARY = Path(dhtm.__file__).parent


def run_id(**determinants: Any) -> str:
    """The name of a run: 16 hexadecimal digits of the SHA-256 of everything that determines its result."""
    return hashlib.sha256(json.dumps(determinants, sort_keys=True).encode()).hexdigest()[:16]


def code_version(reducer: Reducer) -> str:
    """SHA-256 of the code that decides what a method computes: its own module and the library's, comments aside."""
    return library_version(Path(inspect.getfile(type(reducer))))


@functools.cache  # parsing takes a quarter of a second, for every run of a sweep
def library_version(*more: Path) -> str:
    """SHA-256 of the code that all methods share, and of files beside it, comments aside."""
    files = {*_LIBRARY.glob("*.py"), *_LIBRARY.glob("kernels/*.py"), *more}
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.parts[-2:]):  # the same order wherever the project lies
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            if documented and ast.get_docstring(node, clean=False) is not None:
                node.body[0] = ast.Pass()
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def require_writable(folder: Path, setting: str) -> None:
    """Make a folder if there is none; where nothing can be written, a UserError that names the setting behind it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{setting}: cannot write there ({error.strerror}); choose another place") from error


class RunDirectory:
    """``results_dir/<run id>``: config.yaml, environment.json, predictions.parquet, and metrics.json last of all.

    While the run is carried out, ``shards`` holds the predictions so far, and ``.lock`` keeps other processes from it.

    Raises:
        UserError: nothing can be written there.
    """

    def __init__(self, results_dir: str, run_id: str):
        self.path = path_given(results_dir, "results_dir") / run_id
        require_writable(self.path, f"results_dir={results_dir}")

    def metrics(self) -> dict | None:
        """The metrics of a finished run, None of any other."""
        file = self.path / "metrics.json"
        return _read_metrics(file) if file.exists() else None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Carry the run out in one process at a time: the others wait, and find it done."""
        lock = self.path / ".lock"
        with locked(lock, f"waiting for another process, which carries out {self.path}"):
            yield
            shutil.rmtree(self.path / "shards", ignore_errors=True)
            for file in self.path.glob(".*"):  # the lock, and what processes that were killed had begun to write
                with contextlib.suppress(OSError):  # others that wait for the lock may keep NFS from it
                    file.unlink()

    def append(self, predictions: pd.DataFrame) -> None:
        """Store predictions of a run that goes on; killed at any moment, they are there or not."""
        content = predictions.to_parquet(index=False)
        file = self.path / "shards" / f"{predictions['index'].iloc[0]:08d}-{zlib.crc32(content):08x}.parquet"
        with self._told():
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, lambda path: path.write_bytes(content))

    def predictions_so_far(self) -> pd.DataFrame:
        """What :meth:`append` stored, one row an image; a shard that is not as it was written is as good as none."""
        shards = [pd.DataFrame(columns=["index"], dtype="int64")]
        for file in sorted((self.path / "shards").glob("[0-9]*.parquet")):
            content = file.read_bytes()
            if file.stem[-8:] == f"{zlib.crc32(content):08x}":
                shards.append(pd.read_parquet(io.BytesIO(content)))
            else:
                log.warning("%s: damaged, its images are predicted again", file)
        return pd.concat(shards[1:] or shards, ignore_index=True).drop_duplicates("index", ignore_index=True)

    def forget(self) -> None:
        """Begin again; unless what is there was begun so, and stopped."""
        begun = self.path / "shards" / "forced"
        if not begun.exists():
            (self.path / "metrics.json").unlink(missing_ok=True)
            shutil.rmtree(self.path / "shards", ignore_errors=True)
            begun.parent.mkdir()
            begun.touch()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What the system says against writing, in one line."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); what was stored before is kept, the same command goes on "
                "from there when this is mended"
            ) from error

    def list_failed(self, failed: list[UnreadableError]) -> None:
        """Leave a list of the images that cannot be read; none where all can."""
        file = self.path / FAILED
        if failed:
            rows = pd.DataFrame(
                [(one.index, one.name, one.reason) for one in failed], columns=["index", "file", "reason"]
            )
            with self._told():
                write_atomically(file, lambda path: rows.to_csv(path, index=False))
        else:
            file.unlink(missing_ok=True)

    def add_target(self, metrics: dict, target: float | None) -> dict:
        """Note that a finished run is also the nearest to another target; FLOPs reductions in percent."""
        targets = metrics["targets_reduction_pct"]
        if target is not None and target not in targets:
            metrics = _sealed({**metrics, "targets_reduction_pct": sorted([*targets, target])})
            write_json(self.path / "metrics.json", metrics)
        return metrics

    def save(self, config: DictConfig, predictions: pd.DataFrame, metrics: dict) -> dict:
        """Make the run a finished one; killed at any moment, it is either that or not there.

        Returns:
            The metrics as they are stored, with SHA-256 sums by which damage is noticed.
        """
        contents = {
            "config.yaml": OmegaConf.to_yaml(redacted_config(config)).encode(),
            "environment.json": _json(environment()),
            "predictions.parquet": predictions.to_parquet(index=False),
        }
        if changes := uncommitted():
            contents["changes.diff"] = changes
        metrics = _sealed({**metrics, "files": {name: _sha256(content) for name, content in contents.items()}})
        with self._told():
            for name, content in {**contents, "metrics.json": _json(metrics)}.items():
                write_atomically(self.path / name, lambda path, content=content: path.write_bytes(content))
        return metrics


def file_of_run(folder: Path, name: str) -> bytes:
    """A file that a finished run left in its directory.

    Raises:
        UserError: the run is not finished, or the file is not as it was written.
    """
    remedy = "compute the run again with force=true"
    try:
        written = _read_metrics(folder / "metrics.json").get("files", {}).get(name)
        content = (folder / name).read_bytes()
    except OSError as error:
        raise UserError(f"{error.filename}: missing or damaged ({error.strerror}); {remedy}") from error
    if written not in (None, _sha256(content)):
        raise UserError(f"{folder / name}: missing or damaged (it has changed since the run); {remedy}")
    return content


def predictions(folder: Path) -> pd.DataFrame:
    """A finished run's label, top5 and correct, a row an image, by and in the order of the image's index in the data set.

    Raises:
        UserError: the run is not finished, or its predictions are not as they were written.
    """
    content = file_of_run(folder, "predictions.parquet")
    try:
        return pd.read_parquet(io.BytesIO(content)).set_index("index").sort_index()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder}/predictions.parquet: missing or damaged ({type(error).__name__}); compute the run again with force=true"
        ) from error


def finished_runs(results_dir: str) -> pd.DataFrame:
    """The metrics of all finished runs, one row each, knobs and layers as they were configured."""
    files = sorted(path_given(results_dir, "results_dir").glob("*/metrics.json"))
    return pd.DataFrame([_read_metrics(file) for file in files])


def _read_metrics(file: Path) -> dict:
    try:
        metrics = json.loads(file.read_bytes())
        if not isinstance(metrics, dict) or metrics.get("sha256") not in (None, _sealed(metrics)["sha256"]):
            raise ValueError("it has changed since the run")
        return metrics
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); remove it, or compute the run again with force=true") from error


def _sealed(metrics: dict) -> dict:
    """Metrics with the SHA-256 of all the others."""
    others = {key: value for key, value in metrics.items() if key != "sha256"}
    return {**others, "sha256": _sha256(json.dumps(others, sort_keys=True).encode())}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


@contextlib.contextmanager
def locked(path: Path, message: str) -> Iterator[None]:
    """Hold a lock, which the system takes from a process that dies; where another has it, say the message and wait.

    The holder may remove the file: who waited for it locks the next one.

    Raises:
        UserError: the file cannot be written.
    """
    with contextlib.ExitStack() as held:
        while True:
            try:
                file = held.enter_context(path.open("w"))
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info(message)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # a file system without locks: what is written is whole all the same, if twice
                log.debug("%s: this file system has no locks", path)
            if _is_at(file, path):
                break
        yield


def _is_at(file: IO, path: Path) -> bool:
    try:
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in its place; a crash leaves the old file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    """Write a file of JSON, atomically."""
    write_atomically(path, lambda file: file.write_bytes(_json(value)))


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    return {"python": platform.python_version(), **{package: metadata.version(package) for package in PACKAGES}}


def git_commit() -> str | None:
    """The commit of this checkout, with "-dirty" where tracked files differ from it; None outside a checkout."""
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").decode().strip() or None


def uncommitted() -> bytes:
    """How the code of this checkout differs from its commit, as `git diff` shows it; nothing outside a checkout."""
    return _git("diff", "HEAD", "--", "dhtm", "baselines", "scripts", "configs")


def _git(*arguments: str) -> bytes:
    """What git prints of this checkout; nothing outside one, or without git."""
    try:
        return subprocess.run(["git", *arguments], cwd=_LIBRARY.parent, capture_output=True, check=False).stdout
    except OSError:
        return b""


def environment() -> dict:
    """The machine and the software of a run, without names of hosts, users or secrets."""
    cuda = torch.cuda.is_available()
    return {
        "versions": versions(),
        "git_commit": git_commit(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "driver": _driver() if cuda else None,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _driver() -> str | None:
    """The version of NVIDIA's kernel module."""
    try:
        said = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    version = re.search(r"\b\d+\.\d+(\.\d+)?\b", said)
    return version[0] if version else None
