"""Logging to Weights & Biases. Nothing here may stop or slow what is logged: what goes wrong is a warning."""

import contextlib
import importlib
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import wandb
from omegaconf import DictConfig
from PIL import Image

from dhtm.harness.core.devices import Ranks
from dhtm.harness.core.errors import UserError, one_line, path_given
from dhtm.harness.core.redaction import redacted_config

log = logging.getLogger(__name__)

ROWS = 100  # of an evaluation's running figures
NICENESS = 10  # of what talks to W&B
PATIENCE_S = 45  # with W&B, at the end of a run
STOPPED_PATIENCE_S = 10  # and where the run was stopped: the system may soon kill what it has asked to stop
_FILES = ("config.yaml", "environment.json", "metrics.json")
_LIMIT: list[str] = []  # "offline" or "disabled", after W&B could not be reached, or hung, in this process
# W&B would note the host, the command line, the paths of programs, the git remote, packages and what is printed.
_SETTINGS = {
    "console": "off",
    "disable_git": True,
    "host": "-",
    "save_code": False,
    "silent": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    "finish_timeout": 20,
    "finish_timeout_raises": True,
    "init_timeout": 10,
    "x_transaction_log_flush_interval": 2,  # what is on disk outlives W&B's own process
}

Action = Callable[[Any], Any]  # of a W&B run
Do = Callable[[Action], None]
Draw = Callable[[], list[tuple[Image.Image, str]]]


class EvaluationLog:
    """The W&B run of one evaluation; without a tracker, nothing.

    Args:
        do: of :func:`_run`.
        n_images: in all.
        done: predictions of an earlier process, which this one goes on from.
        world: ranks that share the images.
    """

    def __init__(self, do: Do | None, n_images: int, done: pd.DataFrame, world: int):
        self._do, self._n_images, self._world = do, n_images, world
        self._n_before, self._n_own = len(done), 0
        self._n_correct = int(done.correct.sum()) if len(done) else 0
        self._row_at, self._row_time = len(done), time.perf_counter()

    def progress(self, predictions: pd.DataFrame) -> None:
        """Log running top-1 and speed after each percent of the images; other ranks are taken to be as far as this one."""
        if self._do is None:
            return
        self._n_own += len(predictions)
        self._n_correct += int(predictions.correct.sum())
        n_done = min(self._n_before + self._n_own * self._world, self._n_images)
        if n_done < self._n_images and n_done - self._row_at < self._n_images / ROWS:
            return
        now = time.perf_counter()
        row = {
            "running/top1": 100 * self._n_correct / (self._n_before + self._n_own),
            "running/images_per_s": (n_done - self._row_at) / max(now - self._row_time, 1e-9),
        }
        self._row_at, self._row_time = n_done, now
        self._do(lambda run: run.log(row, step=n_done))

    def result(self, metrics: dict, folder: Path, draw: Draw) -> None:
        """Log the result.

        Args:
            metrics: of the run; the summary.
            folder: the run's directory; an artifact.
            draw: makes pictures, with a caption each; called only where they are logged.
        """
        if self._do is None:
            return
        self._do(lambda run: run.summary.update(metrics))
        self._do(lambda run: _log_tokens(run, metrics["tokens_by_layer"]))
        self._do(lambda run: run.log_artifact(_artifact(metrics["run_id"], folder)))
        try:
            pictures = draw()
        except Exception as error:  # whatever an image or a method's regions are like, the result stands
            log.warning("no pictures of regions for W&B: %s", one_line(error))
            return
        if pictures:
            self._do(lambda run: run.log({"regions": [wandb.Image(image, caption=text) for image, text in pictures]}))


@contextmanager
def evaluation_log(
    config: DictConfig, run_id: str, trained: bool, n_images: int, done: pd.DataFrame, ranks: Ranks
) -> Iterator[EvaluationLog]:
    """Log an evaluation, from its first rank, to the W&B run of its own id; the same one when it goes on.

    Args:
        config: with the knob solved.
        run_id: of the run directory.
        trained: with weights trained for the method?
        n_images, done, ranks: as for :class:`EvaluationLog`.
    """
    options = _evaluation(config, run_id, trained, resume=len(done) > 0)
    with _run(config.tracker, options, ranks.first) as do:
        yield EvaluationLog(do, n_images, done, ranks.world)


def log_finished_run(config: DictConfig, metrics: dict, folder: Path, draw: Draw) -> None:
    """Log a run that was finished before, unless it was logged whole then; arguments as for :class:`EvaluationLog`."""
    tracker, run_id = config.tracker, metrics["run_id"]
    if tracker.name == "none":
        return
    if any(path_given(tracker.dir, "tracker.dir").glob(f"wandb/*run-*-{run_id}*/{_mark(tracker)}")):
        return
    with _run(tracker, _evaluation(config, run_id, metrics["trained"], resume=True)) as do:
        EvaluationLog(do, metrics["n_images"], pd.DataFrame(), world=1).result(metrics, folder, draw)


def log_report(config: DictConfig, tables: dict[str, pd.DataFrame], figures: dict[str, Path]) -> None:
    """Log the tables and figures of a report under their names, as the next step of the project's one report."""
    options = {"id": "report", "name": "report", "job_type": "report", "resume": "allow"}
    with _run(config.tracker, options) as do:
        if do:
            do(lambda run: run.log({name: wandb.Table(dataframe=table) for name, table in tables.items()}))
            do(lambda run: run.log({name: wandb.Image(str(path)) for name, path in figures.items()}))


@contextmanager
def training_log(config: DictConfig, name: str, log_id: str, first: bool) -> Iterator[Callable[[dict], None]]:
    """Log a training, from its first rank: what this yields takes the figures of one epoch after the other.

    A training that goes on under the same ``log_id`` goes on in the same W&B run.
    """
    described = _portable(redacted_config(config))
    options = {"id": log_id, "name": name, "job_type": "training", "config": described, "resume": "allow"}
    with _run(config.tracker, options, first) as do:
        yield lambda row: do(lambda run: run.log(row)) if do else None


def check(tracker: DictConfig) -> None:
    """Before anything is computed: are a tracker's settings such as W&B takes?"""
    if tracker.name != "none" and tracker.mode not in (None, "online", "offline", "disabled"):
        raise UserError(f"tracker.mode={tracker.mode}: choose one of online, offline, disabled, or null")
    if tracker.name != "none":
        path_given(tracker.dir, "tracker.dir")


def is_logged_in() -> bool:
    """Is there a login to W&B, valid or not? It is never asked for."""
    _quieten()
    return wandb.login(prompt=False, verify=False)


def _quieten() -> None:
    """W&B shall print nothing, and send no reports on itself, for which it would wait at the end of the process."""
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    wandb.setup(wandb.Settings(silent=True))


@contextmanager
def _run(tracker: DictConfig, options: dict[str, Any], first: bool = True) -> Iterator[Do | None]:
    """What this yields takes functions of a W&B run, which are called one after the other; None where nothing is logged."""
    if not first or tracker.name == "none" or "disabled" in (_wanted(tracker), *_LIMIT):
        yield None
        return
    run = _BackgroundRun(tracker, options)
    try:
        yield run.do
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish(exit_code=0)


class _BackgroundRun:
    """A W&B run that is talked to from a thread of its own: whoever logs waits for W&B in the end alone, and not for ever.

    Where W&B fails, it is started once more, offline, and told everything again.
    """

    def __init__(self, tracker: DictConfig, options: dict[str, Any]):
        self._tracker, self._options, self._exit_code = tracker, options, 1
        self._coming, self._told = queue.SimpleQueue(), []
        # wandb.init would load it, for most of a second, while images are predicted; and meets what is wrong with it too.
        with contextlib.suppress(Exception):
            importlib.import_module("wandb.apis.public")
        self._thread = threading.Thread(target=self._work, name="W&B", daemon=True)
        self._thread.start()

    def do(self, action: Action) -> None:
        self._coming.put(action)

    def finish(self, exit_code: int) -> None:
        self._exit_code = exit_code
        self._coming.put(None)
        self._thread.join(STOPPED_PATIENCE_S if exit_code else PATIENCE_S)
        if self._thread.is_alive():
            _LIMIT.append("disabled")
            _tear_down()
            log.warning("W&B does not answer, nothing more is logged to it; %s", self._remedy())

    def _work(self) -> None:
        if sys.platform == "linux":  # where a thread has its own niceness: what is computed goes first if cores are few
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)  # of W&B's own process too
        for _ in range(2):
            try:
                run = _start(self._tracker, self._options)
                for action in self._actions():
                    action(run)
                self._end(run)
                return
            except Exception as error:
                if "disabled" in _LIMIT:  # nobody waits for this any more
                    return
                _LIMIT.append("offline")
                log.warning("W&B failed, what follows is logged offline: %s", one_line(error))
                _tear_down()
        log.warning("W&B failed twice, this run is not logged; %s", self._remedy())

    def _actions(self) -> Iterator[Action]:
        """What there is to do: from the beginning, then as it comes, until :meth:`finish`."""
        yield from self._told
        for action in iter(self._coming.get, None):
            self._told.append(action)
            yield action
        self._coming.put(None)  # for who begins again

    def _end(self, run: Any) -> None:
        folder = Path(run.settings.sync_dir)
        try:
            run.finish(exit_code=self._exit_code)
        except TimeoutError:
            _LIMIT.append("offline")
            log.warning("W&B takes too long to upload, the rest can be had by: wandb sync %s", folder)
        if self._exit_code == 0:
            (folder / _mark(self._tracker)).touch()

    def _remedy(self) -> str:
        return f"once tracker.dir={self._tracker.dir} and W&B are in order, the same command logs finished runs too"


def _start(tracker: DictConfig, options: dict[str, Any]) -> Any:
    folder = path_given(tracker.dir, "tracker.dir").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    _quieten()
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))  # what is to be uploaded waits beside the rest
    return wandb.init(
        project=tracker.project, entity=tracker.entity, dir=str(folder), mode=_mode(tracker), reinit="create_new",
        settings=wandb.Settings(**_SETTINGS), **options,
    )  # fmt: skip


def _mode(tracker: DictConfig) -> str:
    """Online, where that is not ruled out, W&B could be reached so far, and there is a login; it is never asked for."""
    mode = _wanted(tracker)
    if _LIMIT or mode == "offline":
        return "offline"
    if is_logged_in():
        return "online"
    if mode == "online":
        log.warning("no login to W&B: logged offline; `wandb login` once, then `wandb sync` uploads it")
    return "offline"


def _wanted(tracker: DictConfig) -> str | None:
    return tracker.mode or os.environ.get("WANDB_MODE")


def _tear_down() -> None:
    """End W&B's own process, so that the next run starts another; one that hangs is left behind."""
    ending = threading.Thread(target=_ended, daemon=True)
    ending.start()
    ending.join(5)


def _ended() -> None:
    with contextlib.suppress(Exception):
        wandb.teardown()


def _evaluation(config: DictConfig, run_id: str, trained: bool, resume: bool) -> dict[str, Any]:
    knob = config.method.knob
    setting = f" {knob}={config.method[knob]}" if knob else ""
    return {
        "id": run_id,
        "name": f"{config.backbone.name} {config.method.name}{setting}{' trained' if trained else ''}, {config.data.name}",
        "group": config.experiment,
        "job_type": "evaluation",
        "config": _portable(redacted_config(config)),
        "resume": "allow" if resume else None,  # a run that begins again replaces the one of before
    }


def _mark(tracker: DictConfig) -> str:
    return f"logged-to-{tracker.project}"


def _log_tokens(run: Any, tokens_by_layer: list[int]) -> None:
    run.define_metric("layer", hidden=True)
    run.define_metric("tokens", step_metric="layer", summary="none")
    for layer, n_tokens in enumerate(tokens_by_layer, start=1):
        run.log({"layer": layer, "tokens": n_tokens})


def _artifact(run_id: str, folder: Path) -> wandb.Artifact:
    """A run's directory; the config names the user's home by ~."""
    artifact = wandb.Artifact(f"run-{run_id}", type="run")
    for name in _FILES:
        with artifact.new_file(name) as file:
            file.write(_portable((folder / name).read_text()))
    artifact.add_file(str(folder / "predictions.parquet"))
    return artifact


def _portable(value: Any) -> Any:
    """With ~ for the user's home, which tells a name."""
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    if not isinstance(value, str):
        return value
    home = str(Path.home())
    return value if home == "/" else re.sub(rf"{re.escape(home)}(?![\w.-])", "~", value)
