"""Make the project's dashboard on W&B: `python scripts/dashboard.py --help`."""

from omegaconf import DictConfig

from dhtm.harness import config as door
from dhtm.harness.core.command import start
from dhtm.report.dashboard import save_dashboard


def main(config: DictConfig) -> None:
    print(door.call(save_dashboard, config))


if __name__ == "__main__":
    start(main, "dashboard")
