"""Train the embedded model from scratch: `python scripts/train.py --help`."""

import hydra
from omegaconf import DictConfig

from dhtm.harness.errors import command
from dhtm.harness.training import train


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
@command
def main(config: DictConfig) -> None:
    train(config)


if __name__ == "__main__":
    main()
