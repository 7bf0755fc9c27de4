"""Train the embedded model from scratch: `python scripts/train_micro.py --help`."""

import hydra
from omegaconf import DictConfig

from dhtm.harness.core.errors import command
from dhtm.harness.training.embedded import train_micro


@hydra.main(version_base="1.3", config_path="../configs", config_name="train_micro")
@command(goes_on=False)
def main(config: DictConfig) -> None:
    train_micro(config)


if __name__ == "__main__":
    main()
