"""Evaluate one backbone with one method on one data set: `python scripts/evaluate.py --help`."""

import logging

import hydra
from omegaconf import DictConfig

from dhtm.harness import tracking
from dhtm.harness.errors import UnavailableError, command
from dhtm.harness.evaluate import evaluate
from dhtm.report.regions import sample_regions

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
@command(goes_on=True)
def main(config: DictConfig) -> None:
    tracking.check(config.tracker)
    try:
        evaluate(config, sample_regions)
    except UnavailableError as error:
        if not config.skip_unavailable:
            raise
        log.warning("left out: %s", error)


if __name__ == "__main__":
    command(goes_on=True)(main)()  # also between the runs of a sweep
