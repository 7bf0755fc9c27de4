"""Train the embedded model from scratch: `python scripts/train_micro.py --help`."""

import hydra
from omegaconf import DictConfig

from dhtm.harness import config as door
from dhtm.harness.core.command import command, start
from dhtm.harness.training.embedded import train_embedded


@hydra.main(version_base="1.3", config_path="../configs", config_name="train_micro")
@command(resumes=False)
def main(config: DictConfig) -> None:
    train_embedded(door.embedded_training(config))


if __name__ == "__main__":
    start(main, resumes=False)
