"""Sweeps: record the outcome of each run beside the results, and continue after a run that fails.

The configs name :class:`Sweep` under ``hydra.callbacks``. Hydra calls it in the process that the user starts and in those
that a launcher starts, on this machine or another. :mod:`dhtm.harness.sweeps.status` shows the records.
"""

import atexit
import contextlib
import datetime
import hashlib
import importlib
import itertools
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dhtm.harness.core.command import command, register_resolvers
from dhtm.harness.core.devices import take_gpu
from dhtm.harness.core.errors import UserError, one_line
from dhtm.harness.core.files import require_writable, write_json
from dhtm.harness.core.ranks import rank, world_size
from dhtm.harness.sweeps import status

log = logging.getLogger(__name__)

register_resolvers()  # a launcher's processes compose configs before they run anything else of this project

_RECORD = "DHTM_RUN_RECORD"  # the environment variable that names the JSON file of the current run


class Sweep(Callback):
    """Records of a sweep: ``root/sweeps/<name>-<hash>`` holds sweep.json, and a JSON, a log and a lock for each run.

    The hash is that of the command, so the same command replaces its earlier records.

    Args:
        root: where the runs' results go, on a disk that all machines share.
    """

    def __init__(self, root: str):
        self.root, self.folder, self.process = root, None, None
        self.end = None  # the clean-up after this process's current run

    @command(resumes=False)  # Hydra would turn an exception into a warning
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Record the runs of the sweep; raise at once for settings that every run would fail with."""
        _require_launcher(config.hydra.runtime.choices["hydra/launcher"], config.hydra.launcher["_target_"])
        setting = "results_dir" if "results_dir" in config else "checkpoints_dir"
        if not isinstance(self.root, str):
            raise UserError(f"{setting}={self.root}: it must be a path")
        # With interpolations as typed, because their values may differ from run to run.
        overrides = OmegaConf.to_container(config.hydra.overrides.task)
        typed = " ".join([config.hydra.job.name, *overrides])
        name = re.sub(r"\W+", "-", config.get("experiment") or config.hydra.job.name)
        name = f"{name}-{hashlib.sha256(typed.encode()).hexdigest()[:8]}"
        self.folder, self.process = Path(self.root).expanduser().absolute() / "sweeps" / name, os.getpid()
        if rank() > 0:
            return
        require_writable(self.folder, f"{setting}={self.root}")
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self.folder}: this sweep is running already; make status shows it") from None
        for file in self.folder.glob("[0-9]*.json"):
            file.unlink()
        write_json(
            self.folder / "sweep.json",
            {"command": typed, "runs": _runs(config.hydra.sweeper.params or {}, overrides)},
        )
        atexit.register(self._print_table)  # however the sweep ends
        atexit.register(lock.release)  # runs before that, because the order is reversed

    def _print_table(self) -> None:
        if self.end:  # stopped during a run
            self.end.close()
        print(f"\n{status.table(self.folder)}")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Record that a run has started, and keep its log."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        launched = os.getpid() != self.process
        if launched and config.device in ("auto", "cuda"):
            take_gpu()
        if rank() > 0:
            return
        number = config.hydra.job.num
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

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Record how a run ended. If it failed, hide that from Hydra, which would end the sweep."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        failed = job_return.status == JobStatus.FAILED
        outcome = job_return._return_value  # the property ``return_value`` raises exceptions
        job_return.return_value, job_return.status = None, JobStatus.COMPLETED
        if rank() == 0:
            self._record_end(outcome)
        if failed and world_size() > 1:
            sys.exit(1)  # torchrun's other processes are elsewhere in this run and cannot continue

    def _record_end(self, outcome: Any) -> None:
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

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
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


def _runs(params: Mapping[str, str], overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each run of a sweep, as Hydra's basic sweeper sets them.

    Args:
        params: the sweep that the config asks for: the values of each key, separated by commas.
        overrides: those of the command line.
    """
    given = [f"{key}={values}" for key, values in params.items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    choices = {}  # a later override replaces an earlier one of the same key
    for override in parser.parse_overrides([*given, *overrides]):
        swept = override.is_sweep_override()
        values = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
        key = override.get_key_element()
        choices[key] = [f"{key}={value}" for value in values]
    return [list(run) for run in itertools.product(*choices.values())]


def _require_launcher(name: str, target: str) -> None:
    module = target.rpartition(".")[0]
    try:
        importlib.import_module(module)
    except ImportError:
        extra = "ray" if name == "ray" else "harness"
        raise UserError(f"hydra/launcher={name}: {module} is not installed; pip install -e '.[{extra}]'") from None


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
