"""Train a backbone with a method on: `python scripts/train.py --help`; data-parallel with torchrun."""

import hydra
from omegaconf import DictConfig

from dhtm.harness import tracking
from dhtm.harness.core.errors import command
from dhtm.harness.training.trainer import train


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
@command(goes_on=True)
def main(config: DictConfig) -> None:
    tracking.check(config.tracker)
    train(config)


if __name__ == "__main__":
    main()
