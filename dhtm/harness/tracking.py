"""Logging to Weights & Biases. Nothing here may stop an evaluation: what goes wrong is a warning."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import wandb
from omegaconf import DictConfig, OmegaConf

from dhtm.harness.errors import UserError, one_line

log = logging.getLogger(__name__)


def log_run(config: DictConfig, metrics: dict) -> None:
    """Log a finished evaluation: its config, and its metrics as the summary."""
    knob = metrics["knob"]
    setting = f" {knob}={metrics['knobs'][knob]}" if knob else ""
    name = f"{metrics['backbone']} {metrics['method']}{setting}{' trained' if metrics['trained'] else ''}"
    described = OmegaConf.to_container(config, resolve=True)
    with _run(config.tracker, id=metrics["run_id"], name=name, group=metrics["experiment"], config=described) as run:
        if run:
            run.summary.update(metrics)


def log_report(config: DictConfig, tables: dict[str, pd.DataFrame], figures: dict[str, Path]) -> None:
    """Log the tables and figures of a report under their names."""
    with _run(config.tracker, name="report", job_type="report") as run:
        if run:
            run.log({name: wandb.Table(dataframe=table) for name, table in tables.items()})
            run.log({name: wandb.Image(str(path)) for name, path in figures.items()})


@contextmanager
def training_log(config: DictConfig, name: str, log_id: str, first: bool) -> Iterator[Callable[[dict], None]]:
    """Log a training, from its first rank: what this yields takes the figures of one epoch after the other.

    A training that goes on under the same ``log_id`` goes on in the same W&B run.
    """
    if not first or config.tracker.name == "none":
        yield lambda row: None
        return
    described = OmegaConf.to_container(config, resolve=True)
    run = _start(config.tracker, {"id": log_id, "name": name, "job_type": "training", "config": described})

    def tell(row: dict) -> None:
        with _warning():
            if run:
                run.log(row)

    try:
        yield tell
    finally:
        with _warning():
            if run:
                run.finish()


def check(tracker: DictConfig) -> None:
    """Before anything is computed: are a tracker's settings such as W&B takes?"""
    if tracker.name != "none" and tracker.mode not in (None, "online", "offline", "disabled"):
        raise UserError(f"tracker.mode={tracker.mode}: choose one of online, offline, disabled, or null")


@contextmanager
def _run(tracker: DictConfig, **options: Any) -> Iterator[Any]:
    """A W&B run, or None where the tracker is "none" or W&B cannot be started; what fails inside is a warning too."""
    run = _start(tracker, options) if tracker.name != "none" else None
    with _warning():
        yield run
        if run:
            run.finish()


@contextmanager
def _warning() -> Iterator[None]:
    """Whatever fails in W&B within this is a warning; so nothing else belongs there."""
    try:
        yield
    except Exception as error:
        log.warning("W&B failed, nothing more is logged to it: %s", one_line(error))


def _start(tracker: DictConfig, options: dict[str, Any]) -> Any:
    try:
        Path(tracker.dir).mkdir(parents=True, exist_ok=True)
        return wandb.init(
            project=tracker.project, entity=tracker.entity, dir=tracker.dir, reinit="finish_previous", resume="allow",
            mode=tracker.mode or ("online" if wandb.api.api_key else "offline"),
            settings=wandb.Settings(silent=True), **options,
        )  # fmt: skip
    except Exception as error:
        log.warning("W&B could not be started, nothing is logged to it: %s", one_line(error))
        return None
