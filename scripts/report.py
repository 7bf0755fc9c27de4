"""Make the tables and figures from the finished runs: `python scripts/report.py --help`."""

import hydra
from omegaconf import DictConfig

from dhtm.harness import config as door
from dhtm.harness.core.command import command, start
from dhtm.report.report import report


@hydra.main(version_base="1.3", config_path="../configs", config_name="report")
@command(resumes=False)
def main(config: DictConfig) -> None:
    report(**vars(door.report(config)))


if __name__ == "__main__":
    start(main, resumes=False)
