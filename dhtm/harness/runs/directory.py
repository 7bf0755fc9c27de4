"""Run directories: one per evaluation, named by the hash of what determines its result."""

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import yaml

from dhtm.harness.core.errors import UserError, explain
from dhtm.harness.core.files import lock, require_writable, write_atomically, write_json, write_text
from dhtm.harness.data.splits import UnreadableError
from dhtm.harness.runs.provenance import environment, uncommitted_changes

FAILED = "failed.csv"  # in a run's directory: the images that could not be read
OUTPUTS = "outputs.parquet"  # log-probabilities of an unmerged run, for comparison with other runs


class RunDirectory:
    """``results_dir/<run id>``: config.yaml, environment.json, predictions.parquet, and metrics.json, written last.

    Until the run is finished, ``shards`` holds the predictions so far.

    Raises:
        UserError: nothing can be written there.
    """

    def __init__(self, results_dir: Path, run_id: str):
        self.path = results_dir / run_id
        self._lock = results_dir / ".locks" / f"{run_id}.lock"
        self._shards = self.path / "shards"
        for folder in (self.path, self._lock.parent):
            require_writable(folder, f"results_dir={results_dir}")

    def metrics(self) -> dict | None:
        """Return the run's metrics; None if it is not finished."""
        file = self.path / "metrics.json"
        return _read_metrics(file) if file.exists() else None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Let one process at a time carry out the run; others wait, and then find it finished."""
        with lock(self._lock, f"waiting for another process to finish {self.path}"):
            yield
            shutil.rmtree(self._shards, ignore_errors=True)
            for file in self.path.glob(".*"):  # unfinished files of processes that were killed
                if file.is_file():
                    file.unlink()

    def append(self, predictions: pd.DataFrame) -> None:
        """Store predictions of an unfinished run as one more shard."""
        file = self._shards / f"{predictions['index'].iloc[0]:08d}-{uuid.uuid4().hex[:8]}.parquet"
        with self._explain_failed_write():
            file.parent.mkdir(exist_ok=True)
            _write(predictions, file)

    def predictions_so_far(self) -> pd.DataFrame:
        """Return what :meth:`append` stored, one row per image.

        Raises:
            UserError: a shard is damaged.
        """
        shards = []
        for file in sorted(self._shards.glob("[0-9]*.parquet")):
            with explain(f"{file}: damaged", remedy="; remove it, and the same command predicts its images again"):
                shards.append(_read(file))
        if not shards:
            return pd.DataFrame(columns=["index"], dtype="int64")
        return pd.concat(shards, ignore_index=True).drop_duplicates("index", ignore_index=True)

    def forget(self) -> list[float]:
        """Remove the results of earlier processes, so that the run is computed again; return the targets that led to it."""
        targets = []
        with contextlib.suppress(UserError):  # damaged
            targets = (self.metrics() or {}).get("targets_reduction_pct", [])
        (self.path / "metrics.json").unlink(missing_ok=True)
        shutil.rmtree(self._shards, ignore_errors=True)
        return targets

    def _explain_failed_write(self) -> contextlib.AbstractContextManager:
        remedy = "; stored predictions are kept, the same command resumes from there once this is fixed"
        return explain(f"{self.path}: cannot be written", OSError, remedy=remedy)

    def list_failed(self, failed: list[UnreadableError]) -> None:
        """Write the list of unreadable images; remove an earlier list if there are none."""
        file = self.path / FAILED
        if not failed:
            file.unlink(missing_ok=True)
            return
        rows = pd.DataFrame([(one.index, one.name, one.reason) for one in failed], columns=["index", "file", "reason"])
        with self._explain_failed_write():
            write_atomically(file, lambda path: rows.to_csv(path, index=False))

    def add_target(self, metrics: dict, target: float | None) -> dict:
        """Record that a finished run is also the nearest to another target, a FLOPs reduction in percent."""
        targets = metrics["targets_reduction_pct"]
        if target is not None and target not in targets:
            metrics = {**metrics, "targets_reduction_pct": sorted([*targets, target])}
            write_json(self.path / "metrics.json", metrics)
        return metrics

    def save(self, settings: dict, predictions: pd.DataFrame, metrics: dict) -> dict:
        """Write the files of the finished run. A killed process leaves the run finished or unfinished, nothing in between.

        Returns:
            The stored metrics, with the SHA-256 of predictions.parquet.
        """
        with self._explain_failed_write():
            write_text(self.path / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
            write_json(self.path / "environment.json", environment())
            if changes := uncommitted_changes():
                write_text(self.path / "changes.diff", changes)
            if "log_probabilities" in predictions:
                _write(predictions[["index", "class_1", "log_probabilities"]], self.path / OUTPUTS)
                predictions = predictions.drop(columns="log_probabilities")
            file = self.path / "predictions.parquet"
            _write(predictions, file)
            metrics = {**metrics, "predictions_sha256": _sha256(file)}
            write_json(self.path / "metrics.json", metrics)
        return metrics


def predictions(folder: Path) -> pd.DataFrame:
    """Return a finished run's label, class_1 … class_5, correct and, if the run has them, kl and unmerged_class, by index.

    Raises:
        UserError: the run is not finished, or its predictions are damaged.
    """
    file = folder / "predictions.parquet"
    with explain(f"{file}: missing or damaged", remedy="; compute the run again with force=true"):
        if _sha256(file) != _read_metrics(folder / "metrics.json")["predictions_sha256"]:
            raise ValueError("it has changed since the run")
        return _read(file).set_index("index").sort_index()


def outputs(folder: Path) -> pd.DataFrame:
    """Return an unmerged run's index, class_1 and log_probabilities [C], one row per image.

    Raises:
        UserError: the run has none, or they are damaged.
    """
    file = folder / OUTPUTS
    with explain(f"{file}: missing or damaged", remedy="; compute the run again with method=unmerged force=true"):
        return _read(file)


def finished_runs(results_dir: Path) -> pd.DataFrame:
    """Return the metrics of all finished runs, one row each, with knobs and layers as configured.

    Raises:
        UserError: a run is damaged, or its directory was copied or renamed.
    """
    runs = []
    for file in sorted(results_dir.glob("*/metrics.json")):
        runs.append(_read_metrics(file))
        if (run_id := runs[-1]["run_id"]) != file.parent.name:
            raise UserError(f"{file.parent}: it holds the run {run_id}; name it so, or move it out of {results_dir}")
    return pd.DataFrame(runs)


def _write(predictions: pd.DataFrame, file: Path) -> None:
    write_atomically(file, lambda path: predictions.to_parquet(path, index=False, write_page_checksum=True))


def _read(file: Path) -> pd.DataFrame:
    return pd.read_parquet(file, page_checksum_verification=True)


def _read_metrics(file: Path) -> dict:
    with explain(f"{file}: damaged", remedy="; remove it, or compute the run again with force=true"):
        return dict(json.loads(file.read_bytes()))


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
