"""Make the tables and figures from the finished runs: `python scripts/report.py --help`."""

import hydra
from omegaconf import DictConfig

from dhtm.harness.core.errors import command
from dhtm.report.report import report


@hydra.main(version_base="1.3", config_path="../configs", config_name="report")
@command(goes_on=False)
def main(config: DictConfig) -> None:
    report(config)


if __name__ == "__main__":
    main()
