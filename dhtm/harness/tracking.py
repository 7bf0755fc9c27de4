"""Logging to Weights & Biases. If W&B fails, the run that is logged continues with a warning."""

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic.dataclasses import dataclass

from dhtm.harness.core.errors import one_line
from dhtm.harness.core.ranks import Ranks

log = logging.getLogger(__name__)

ROWS = 100  # how often an evaluation logs its running metrics
_FILES = ("config.yaml", "environment.json", "metrics.json")
# By default W&B records the host, the command line, the paths of programs, the git remote, packages and all output.
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
}

Action = Callable[[Any], Any]  # takes a W&B run
Draw = Callable[[], list]


@dataclass(frozen=True)
class Tracker:
    """Where to log.

    Attributes:
        project, entity: of W&B; the default entity is the user.
        mode: None for the value of WANDB_MODE; if that is not set, online with a login and offline without.
        dir: holds W&B's own files, in ``dir/wandb``.
    """

    project: str = "dhtm"
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None
    dir: Path = Path("results")


class TrackedEvaluation:
    """The W&B run of one evaluation.

    Args:
        do: the function that :func:`_run` yields.
        n_images: the number of images of the evaluation.
        done: the predictions of earlier processes, after which this one resumes.
        world: the number of ranks that share the images.
    """

    def __init__(self, do: Callable[[Action], None], n_images: int, done: pd.DataFrame, world: int):
        self._do, self._n_images, self._world = do, n_images, world
        self._n_before, self._n_own = len(done), 0
        self._n_correct = int(done.correct.sum()) if len(done) else 0
        self._row_at, self._row_time = len(done), time.perf_counter()

    def progress(self, predictions: pd.DataFrame) -> None:
        """Log running top-1 and speed after each percent of the images, assuming that all ranks are equally far."""
        self._n_own += len(predictions)
        self._n_correct += int(predictions.correct.sum())
        n_done = min(self._n_before + self._n_own * self._world, self._n_images)
        if n_done < self._n_images and n_done - self._row_at < self._n_images / ROWS:
            return
        now = time.perf_counter()
        row = {"running/images_per_s": (n_done - self._row_at) / max(now - self._row_time, 1e-9)}
        if (predictions.label >= 0).all():
            row["running/top1"] = 100 * self._n_correct / (self._n_before + self._n_own)
        self._row_at, self._row_time = n_done, now
        self._do(lambda run: run.log(row, step=n_done))

    def result(self, metrics: dict, folder: Path, draw: Draw) -> None:
        """Log the metrics as the summary, the tokens by layer, the run's directory as an artifact, and pictures.

        Args:
            draw: makes pictures, each with a caption; called only if they are logged.
        """

        def log_all(run: Any) -> None:
            import wandb

            run.summary.update(metrics)
            run.define_metric("layer", hidden=True)
            run.define_metric("tokens", step_metric="layer", summary="none")
            for layer, n_tokens in enumerate(metrics["tokens_by_layer"], start=1):
                run.log({"layer": layer, "tokens": n_tokens})
            artifact = wandb.Artifact(f"run-{metrics['run_id']}", type="run")
            for name in _FILES:
                with artifact.new_file(name) as file:
                    file.write(_portable((folder / name).read_text()))
            artifact.add_file(str(folder / "predictions.parquet"))
            run.log_artifact(artifact)
            if pictures := draw():
                run.log({"regions": [wandb.Image(image, caption=text) for image, text in pictures]})

        self._do(log_all)


@contextlib.contextmanager
def track_evaluation(
    evaluation: Any, run_id: str, trained: bool, n_images: int, done: pd.DataFrame, ranks: Ranks
) -> Iterator[TrackedEvaluation]:
    """Log an evaluation, from its first rank, to the W&B run with the run's id; a resumed evaluation continues that run.

    Args:
        evaluation: what is logged, with its ``tracker`` and ``settings()``.
        trained: whether its weights were trained with the method.
        n_images, done, ranks: as for :class:`TrackedEvaluation`.
    """
    settings = evaluation.settings()
    method = settings["method"]
    knob = f" {method['knob']}={method[method['knob']]}" if method["knob"] else ""
    trained = " trained" if trained else ""
    options = {
        "id": run_id,
        "name": f"{settings['backbone']['name']} {method['name']}{knob}{trained}, {settings['data']['name']}",
        "group": settings["experiment"],
        "job_type": "evaluation",
        "config": _portable_settings(settings),
    }
    with _run(evaluation.tracker if ranks.first else None, options) as do:
        yield TrackedEvaluation(do, n_images, done, ranks.world)


@contextlib.contextmanager
def track_training(tracker: Tracker | None, settings: dict, name: str, log_id: str) -> Iterator[Callable[[dict], None]]:
    """Log a training: yield a function that takes the metrics of one epoch. The same ``log_id`` continues the W&B run."""
    options = {"id": log_id, "name": name, "job_type": "training", "config": _portable_settings(settings)}
    with _run(tracker, options) as do:
        yield lambda row: do(lambda run: run.log(row))


def log_report(tracker: Tracker | None, tables: dict[str, pd.DataFrame], figures: dict[str, Path]) -> None:
    """Log the tables and figures of a report under their names, as the next step of the project's one report."""

    def log_all(run: Any) -> None:
        import wandb

        run.log({name: wandb.Table(dataframe=table) for name, table in tables.items()})
        run.log({name: wandb.Image(str(path)) for name, path in figures.items()})

    with _run(tracker, {"id": "report", "name": "report", "job_type": "report"}) as do:
        do(log_all)


def is_logged_in() -> bool:
    """Return whether there is a login to W&B, valid or not, without asking for one."""
    import wandb

    return wandb.login(prompt=False, verify=False)


@contextlib.contextmanager
def _run(tracker: Tracker | None, options: dict[str, Any]) -> Iterator[Callable[[Action], None]]:
    """Yield a function that lets an action log to a W&B run; it does nothing without a tracker, or once W&B has failed."""
    working = True

    def guard(action: Callable[[], Any]) -> Any:
        nonlocal working
        try:
            return action()
        except Exception as error:  # W&B's exceptions have no common base class
            if working:
                log.warning("W&B failed, nothing more is logged to this run: %s", one_line(error))
            working = False

    is_wanted = tracker is not None and _mode(tracker) != "disabled"
    run = guard(lambda: _start(tracker, options)) if is_wanted else None

    def do(action: Action) -> None:
        if run is not None and working:
            guard(lambda: action(run))

    exit_code = 1
    try:
        yield do
        exit_code = 0
    finally:
        if run is not None:
            guard(lambda: run.finish(exit_code=exit_code))


def _start(tracker: Tracker, options: dict[str, Any]) -> Any:
    import wandb  # here, because it takes a second

    tracker.dir.mkdir(parents=True, exist_ok=True)
    folder = tracker.dir.resolve()
    os.environ["WANDB_ERROR_REPORTING"] = "false"  # else W&B waits for its own error reports at the end of the process
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))  # files that wait for upload, beside the rest
    wandb.setup(wandb.Settings(silent=True))
    mode = _mode(tracker)
    if mode != "offline" and not is_logged_in():
        if mode == "online":
            log.warning("no login to W&B: logged offline; run `wandb login` once, then upload with `wandb sync`")
        mode = "offline"
    settings = wandb.Settings(**_SETTINGS)
    arguments = {
        "project": tracker.project,
        "entity": tracker.entity,
        "dir": str(folder),
        "reinit": "create_new",
        "resume": "allow",
        **options,
    }
    try:
        return wandb.init(mode=mode or "online", settings=settings, **arguments)
    except Exception as error:
        log.warning("W&B cannot be reached, this process logs offline: %s", one_line(error))
        os.environ["WANDB_MODE"] = "offline"  # so that the next run of this process need not wait
        wandb.teardown()  # else the run's id is still in use
        return wandb.init(mode="offline", settings=settings, **arguments)


def _mode(tracker: Tracker) -> str | None:
    return tracker.mode or os.environ.get("WANDB_MODE")


def _portable_settings(settings: dict) -> dict:
    return json.loads(_portable(json.dumps(settings, ensure_ascii=False)))


def _portable(text: str) -> str:
    """Replace the path of the user's home by ~ in a text, because it may contain a name."""
    home = str(Path.home())
    return text if home == "/" else re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
