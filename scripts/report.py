"""Make the tables and figures from the finished runs: `python scripts/report.py --help`."""

from omegaconf import DictConfig

from dhtm.harness import config as door
from dhtm.harness.core.command import start
from dhtm.report.report import report


def main(config: DictConfig) -> None:
    door.call(report, config)


if __name__ == "__main__":
    start(main, "report")
