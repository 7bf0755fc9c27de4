"""Record the outcome of each run of a sweep beside the results; :mod:`dhtm.harness.sweeps.status` shows the records."""

import atexit
import contextlib
import datetime
import hashlib
import json
import logging
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dhtm.harness.core.devices import take_gpu
from dhtm.harness.core.errors import UserError, one_line
from dhtm.harness.core.files import require_writable, write_json
from dhtm.harness.core.ranks import rank, world_size
from dhtm.harness.sweeps import status

log = logging.getLogger(__name__)

_RECORD = "DHTM_RUN_RECORD"  # the environment variable that names the JSON file of the current run


class SweepRecords:
    """Records of a sweep: ``root/sweeps/<name>-<hash>`` holds sweep.json, and a JSON, a log and a lock for each run.

    The hash is that of the command, so the same command replaces its earlier records. A launcher's processes, on this
    machine or another, use a copy of the object of the process that the user starts.
    """

    def __init__(self):
        self.folder, self.process = None, None
        self.end = None  # the clean-up after this process's current run

    def start(self, root: Path, setting: str, name: str, typed: str, runs: list[list[str]]) -> None:
        """Record the runs of a sweep that begins.

        Args:
            root: where the runs' results go, on a disk that all machines share.
            setting: the key that sets root, for messages.
            name: the experiment, or the script.
            typed: the command.
            runs: the overrides of each run.

        Raises:
            UserError: root cannot be written, or the same sweep is running.
        """
        name, digest = re.sub(r"\W+", "-", name), hashlib.sha256(typed.encode()).hexdigest()
        self.folder, self.process = root.absolute() / "sweeps" / f"{name}-{digest[:8]}", os.getpid()
        if rank() > 0:
            return
        require_writable(self.folder, f"{setting}={root}")
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self.folder}: this sweep is running already; make status shows it") from None
        for file in self.folder.glob("[0-9]*.json"):
            file.unlink()
        write_json(self.folder / "sweep.json", {"command": typed, "runs": runs})
        atexit.register(self._print_table)  # however the sweep ends
        atexit.register(lock.release)  # runs before that, because the order is reversed

    def _print_table(self) -> None:
        if self.end:  # stopped during a run
            self.end.close()
        print(f"\n{status.table(self.folder)}")

    def start_run(self, number: int, device: str | None) -> None:
        """Record that a run has started, and keep its log."""
        launched = os.getpid() != self.process
        if launched and device in ("auto", "cuda"):
            take_gpu()
        if rank() > 0:
            return
        file, log_file, lock_file = (status.run_file(self.folder, number, ending) for ending in ("json", "log", "lock"))
        self.end, root = contextlib.ExitStack(), logging.getLogger()
        self.end.enter_context(FileLock(lock_file))
        handler = self.end.enter_context(contextlib.closing(logging.FileHandler(log_file, mode="w")))
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        root.addHandler(handler)
        self.end.callback(root.removeHandler, handler)
        if launched and sys.stderr.isatty():  # progress bars of several runs would overwrite each other
            self.end.enter_context(contextlib.redirect_stderr(handler.stream))
        os.environ[_RECORD] = str(file)
        file.unlink(missing_ok=True)
        record(state="running", started=_now())
        log.info("%s", status.progress(self.folder, number))

    def end_run(self, outcome: dict | BaseException | None) -> None:
        """Record how a run ended: with metrics, with an exception, or None if it was skipped."""
        if rank() == 0:
            self._record_end(outcome)
        if isinstance(outcome, BaseException) and world_size() > 1:
            sys.exit(1)  # torchrun's other processes are elsewhere in this run and cannot continue

    def _record_end(self, outcome: dict | BaseException | None) -> None:
        file = Path(os.environ[_RECORD])
        recorded = json.loads(file.read_text())
        if isinstance(outcome, BaseException):
            is_bug = not isinstance(outcome, UserError)
            reason = (f"{type(outcome).__name__}: " if is_bug else "") + one_line(outcome)
            log.error("failed: %s", reason)
            if is_bug:
                with file.with_suffix(".log").open("a") as log_file:
                    traceback.print_exception(outcome, file=log_file)
            record(state="failed", reason=reason)
        elif recorded["state"] == "running":
            before = outcome is not None and outcome["finished"] < recorded["started"]
            record(state="done", ended=_now(), before=before)
        del os.environ[_RECORD]
        self.end.close()
        self.end = None

    def finish(self) -> None:
        """Exit with code 1 unless every run is done, or skipped as the config allows."""
        if rank() == 0 and any(run["state"] not in ("done", "skipped") for run in status.states(self.folder)):
            sys.exit(1)


def record(**facts: Any) -> None:
    """Record facts about this process's current run of a sweep; outside a sweep, do nothing."""
    if _RECORD not in os.environ:
        return
    file = Path(os.environ[_RECORD])
    try:
        write_json(file, (json.loads(file.read_text()) if file.exists() else {}) | facts)
    except OSError as error:  # no reason to end the run
        log.warning("%s: cannot be written (%s)", file, error.strerror)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
