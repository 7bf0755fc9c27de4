"""Make the project's dashboard on W&B: `python scripts/dashboard.py --help`."""

import hydra
from omegaconf import DictConfig

from dhtm.harness.core.errors import command
from dhtm.report.dashboard import save_dashboard


@hydra.main(version_base="1.3", config_path="../configs", config_name="dashboard")
@command(goes_on=False)
def main(config: DictConfig) -> None:
    print(save_dashboard(config.tracker, config.name, config.results_dir))


if __name__ == "__main__":
    main()
