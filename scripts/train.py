"""Train a backbone with a method: `python scripts/train.py --help`; data-parallel with torchrun."""

from omegaconf import DictConfig

from dhtm.harness import config as door
from dhtm.harness.core.command import start
from dhtm.harness.training.trainer import train


def main(config: DictConfig) -> None:
    train(door.training(config))


if __name__ == "__main__":
    start(main, "train", resumes=True)
