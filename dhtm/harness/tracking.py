"""Logging to Weights & Biases. If W&B fails, the run that is logged continues with a warning."""

import functools
import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic.dataclasses import dataclass

from dhtm.harness.core.errors import one_line
from dhtm.harness.core.ranks import Ranks

log = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Tracker:
    """Where to log; ``configs/tracker/wandb.yaml`` explains the settings."""

    project: str = "dhtm"
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None
    dir: Path = Path("results")


class WandbRun:
    """A W&B run, from entering a ``with`` block to leaving it. An existing run of the same id is continued.

    Args:
        tracker: None to log nothing.
        settings: what is logged, as plain values.
        options: more of wandb.init's, such as id, name and group.
    """

    def __init__(self, tracker: Tracker | None, settings: dict, **options: Any):
        self._tracker, self._run, self._failed = tracker, None, False
        self._options = options | {"config": json.loads(_portable(json.dumps(settings, ensure_ascii=False)))}

    def __enter__(self):
        if self._tracker is not None:
            self._try(self._start)
        return self

    def __exit__(self, kind, *_):
        if self._run is not None:
            self._try(lambda: self._run.finish(exit_code=0 if kind is None else 1))

    def do(self, action: Callable[[Any], Any]) -> None:
        """Let an action log to the run, which it gets from wandb; do nothing once W&B has failed."""
        if self._run is not None and not self._failed:
            self._try(lambda: action(self._run))

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # W&B's exceptions have no common base class
            if not self._failed:
                log.warning("W&B failed, nothing more is logged to this run: %s", one_line(error))
            self._failed = True

    def _start(self) -> None:
        import wandb  # here, because it takes a second

        tracker, folder = self._tracker, self._tracker.dir.resolve()
        mode = tracker.mode or os.environ.get("WANDB_MODE") or "online"
        if mode == "disabled":
            return
        folder.mkdir(parents=True, exist_ok=True)
        # Otherwise W&B waits for its own error reports at the end of the process.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))  # files that wait for upload, beside the rest
        wandb.setup(wandb.Settings(silent=True))
        if mode == "online" and not is_logged_in():
            if tracker.mode == "online":
                log.warning("no login to W&B: logged offline; run `wandb login` once, then upload with `wandb sync`")
            mode = "offline"
        init = functools.partial(
            wandb.init, project=tracker.project, entity=tracker.entity, dir=str(folder), reinit="create_new",
            resume="allow", settings=wandb.Settings(**_SETTINGS), **self._options,
        )  # fmt: skip
        try:
            self._run = init(mode=mode)
        except Exception as error:
            log.warning("W&B cannot be reached, this process logs offline: %s", one_line(error))
            os.environ["WANDB_MODE"] = "offline"  # so that the next run of this process need not wait
            wandb.teardown()  # else the run's id is still in use
            self._run = init(mode="offline")


class WandbEvaluation(WandbRun):
    """The W&B run of an evaluation; ``done`` are the predictions of earlier processes. Of the ranks, the first logs."""

    def __init__(self, evaluation: Any, name: str, run_id: str, n_images: int, done: pd.DataFrame, ranks: Ranks):
        tracker, group = evaluation.tracker if ranks.first else None, evaluation.experiment
        super().__init__(tracker, evaluation.settings(), id=run_id, name=name, group=group, job_type="evaluation")
        self._n_images, self._world, self._n_before, self._n_own = n_images, ranks.world, len(done), 0
        self._n_correct = int(done.correct.sum()) if len(done) else 0
        self._row_at, self._started = len(done), time.perf_counter()

    def progress(self, predictions: pd.DataFrame) -> None:
        """Log running top-1 and speed after each percent of the images, assuming that all ranks are equally far."""
        self._n_own += len(predictions)
        self._n_correct += int(predictions.correct.sum())
        n_done = min(self._n_before + self._n_own * self._world, self._n_images)
        if n_done < self._n_images and n_done - self._row_at < self._n_images / 100:
            return
        self._row_at = n_done
        row = {"running/images_per_s": (n_done - self._n_before) / (time.perf_counter() - self._started)}
        if (predictions.label >= 0).all():
            row["running/top1"] = 100 * self._n_correct / (self._n_before + self._n_own)
        self.do(lambda run: run.log(row, step=n_done))

    def result(self, metrics: dict, folder: Path, draw: Callable[[], list]) -> None:
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

        self.do(log_all)


def log_report(tracker: Tracker | None, tables: dict[str, pd.DataFrame], figures: dict[str, Path]) -> None:
    """Log the tables and figures of a report under their names, as the next step of the project's one report."""

    def log_all(run: Any) -> None:
        import wandb

        run.log({name: wandb.Table(dataframe=table) for name, table in tables.items()})
        run.log({name: wandb.Image(str(path)) for name, path in figures.items()})

    with WandbRun(tracker, {}, id="report", name="report", job_type="report") as run:
        run.do(log_all)


def is_logged_in() -> bool:
    """Return whether there is a login to W&B, valid or not, without asking for one."""
    import wandb

    return wandb.login(prompt=False, verify=False)


def _portable(text: str) -> str:
    """Replace the path of the user's home by ~ in a text, because it may contain a name."""
    home = str(Path.home())
    return text if home == "/" else re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
