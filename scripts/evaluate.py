"""Evaluate one backbone with one method on one data set: `python scripts/evaluate.py --help`."""

import logging

import hydra
from omegaconf import DictConfig

from dhtm.harness import sweep, tracking
from dhtm.harness.devices import rank
from dhtm.harness.errors import UnavailableError, command
from dhtm.harness.evaluate import evaluate

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
@command(goes_on=True)
def main(config: DictConfig) -> dict | None:
    """Returns the run's metrics, for a sweep's notes, or None where it was left out."""
    tracking.check(config.tracker)
    try:
        metrics = evaluate(config)
    except UnavailableError as error:
        if not config.skip_unavailable:
            raise
        log.warning("left out: %s", error)
        sweep.note(state="skipped", reason=str(error))
        return None
    if rank() == 0:
        tracking.log_run(config, metrics)
    return metrics


if __name__ == "__main__":
    command(goes_on=True)(main)()  # also between the runs of a sweep
