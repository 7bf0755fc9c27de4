"""Sweeps: what becomes of each run is noted beside the results, and a run that fails does not take the others down.

Hydra calls :class:`Sweep`, which the configs name under ``hydra.callbacks``, in the process that the user starts and in those
that a launcher starts, on this machine or another. ``dhtm.harness.sweeps.status`` tells what it noted, at any time.
"""

import atexit
import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import importlib
import logging
import os
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import IO, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from dhtm.harness.core.devices import rank, take_gpu
from dhtm.harness.core.errors import UserError, command, one_line, path_given
from dhtm.harness.runs.store import require_writable, write_json
from dhtm.harness.sweeps import status

log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Run:
    """The run that this process carries out: where it is noted, what is, its log, and what is to be done when it ends."""

    file: Path
    noted: dict
    log: IO
    end: contextlib.ExitStack


_run: _Run | None = None


def note(**facts: Any) -> None:
    """Note something of the run that this process carries out; outside a sweep, nothing."""
    if _run:
        _run.noted |= facts
        try:
            write_json(_run.file, _run.noted)
        except OSError as error:  # which a run may well survive
            log.warning("%s: cannot be written (%s)", _run.file, error.strerror)


class Sweep(Callback):
    """Notes of a sweep: ``root/sweeps/<name>-<hash>`` holds sweep.json, the runs' overrides, and a JSON and a log for each.

    The hash is that of the command: given again, it takes the place of what it left before.

    Args:
        root: where the runs' results go; on a disk that all machines share.
    """

    def __init__(self, root: str):
        self.root, self.folder, self.process = root, None, None

    @command(goes_on=False)  # Hydra would make a warning of an exception
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note which runs there are to be; refuse what none of them could do with."""
        _require_launcher(config.hydra)
        setting = "results_dir" if "results_dir" in config else "checkpoints_dir"
        root = path_given(self.root, setting)
        told = " ".join([config.hydra.job.name, *config.hydra.overrides.task])
        name = re.sub(r"\W+", "-", config.get("experiment") or config.hydra.job.name)
        name = f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
        self.folder, self.process = root.absolute() / "sweeps" / name, os.getpid()
        if rank() > 0:
            return
        require_writable(self.folder, f"{setting}={self.root}")
        for file in self.folder.glob("[0-9]*.json"):
            file.unlink()
        write_json(self.folder / "sweep.json", {"command": told, "runs": _overrides(config)})
        lock = (self.folder / "lock").open("a")
        _lock(lock)
        atexit.register(self._tell)  # whatever ends it
        atexit.register(lock.close)  # before that

    def _tell(self) -> None:
        if _run:  # stopped half way
            _run.end.close()
        print(f"\n{status.table(self.folder)}")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note that a run has begun, and keep its log."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        launched = os.getpid() != self.process
        if launched and config.device in ("auto", "cuda"):
            take_gpu()
        if rank() == 0:
            _begin(self.folder, config.hydra.job.num, launched)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Note how a run ended. Where it failed, hide that from Hydra, which would end the sweep."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        failed = job_return.status == JobStatus.FAILED
        outcome = job_return._return_value  # without the underscore it would be raised
        job_return.return_value, job_return.status = None, JobStatus.COMPLETED
        if rank() == 0:
            _end(outcome, failed)
        if failed and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            sys.exit(1)  # torchrun's other processes are somewhere else in this run: no going on together

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Exit with code 1 unless every run is done, or was left out as the config asks."""
        if rank() == 0 and any(run["state"] not in ("done", "skipped") for run in status.states(self.folder)):
            sys.exit(1)


def _begin(folder: Path, number: int, launched: bool) -> None:
    global _run
    end, root = contextlib.ExitStack(), logging.getLogger()
    handler = logging.FileHandler(status.log_file(folder, number), mode="w")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    end.callback(handler.close)
    root.addHandler(handler)
    end.callback(root.removeHandler, handler)
    _lock(handler.stream)
    if launched and sys.stderr.isatty():  # progress bars of several runs would overwrite each other
        end.enter_context(contextlib.redirect_stderr(handler.stream))
    _run = _Run(status.run_file(folder, number), {}, handler.stream, end)
    note(state="running", started=_now())


def _end(outcome: Any, failed: bool) -> None:
    global _run
    if failed:
        reason = one_line(outcome)
        if not isinstance(outcome, UserError):
            traceback.print_exception(outcome, file=_run.log)
            reason = f"{type(outcome).__name__}: {reason}"
        log.error("failed: %s", reason)
        note(state="failed", reason=reason)
    elif _run.noted["state"] == "running":
        before = outcome is not None and outcome["finished"] < _run.noted["started"]
        note(state="done", ended=_now(), before=before)
    _run.end.close()
    _run = None


def _overrides(config: DictConfig) -> list[list[str]]:
    """Of each run of a sweep its overrides, as Hydra's sweeper will set them."""
    swept = [f"{key}={values}" for key, values in (config.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    (runs,) = BasicSweeper.split_arguments(parser.parse_overrides([*swept, *config.hydra.overrides.task]), None)
    return runs


def _require_launcher(hydra: DictConfig) -> None:
    name, module = hydra.runtime.choices["hydra/launcher"], hydra.launcher["_target_"].rpartition(".")[0]
    try:
        importlib.import_module(module)
    except ImportError:
        extra = "ray" if name == "ray" else "harness"
        raise UserError(f"hydra/launcher={name}: {module} is not installed; pip install -e '.[{extra}]'") from None
    if name == "submitit_slurm" and not shutil.which("srun"):
        raise UserError(f"hydra/launcher={name}: there is no srun here; give the command on a machine of the cluster")


def _lock(file: IO) -> None:
    """Lock a file for as long as it is open, beside others that do; for status to see."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_SH)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
