"""Train a backbone with a method: `python scripts/train.py --help`; data-parallel with torchrun."""

import hydra
from omegaconf import DictConfig

from dhtm.harness import config as door
from dhtm.harness.core.command import command, start
from dhtm.harness.training.trainer import train


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
@command(resumes=True)
def main(config: DictConfig) -> None:
    train(door.training(config))


if __name__ == "__main__":
    start(main, resumes=True)
