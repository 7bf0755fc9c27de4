"""Evaluate one backbone with one method on one data set: `python scripts/evaluate.py --help`."""

import hydra
from omegaconf import DictConfig

from dhtm.harness import tracking
from dhtm.harness.errors import command
from dhtm.harness.evaluate import evaluate


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
@command
def main(config: DictConfig) -> None:
    tracking.check(config.tracker)
    metrics = evaluate(config)
    tracking.log_run(config, metrics)


if __name__ == "__main__":
    main()
