"""Make the project's dashboard on W&B: `python scripts/dashboard.py --help`."""

import hydra
from omegaconf import DictConfig

from dhtm.harness import config as door
from dhtm.harness.core.command import command, start
from dhtm.report.dashboard import save_dashboard


@hydra.main(version_base="1.3", config_path="../configs", config_name="dashboard")
@command(resumes=False)
def main(config: DictConfig) -> None:
    print(save_dashboard(**vars(door.dashboard(config))))


if __name__ == "__main__":
    start(main, resumes=False)
