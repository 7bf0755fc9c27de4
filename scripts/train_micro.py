"""Train the embedded model from scratch: `python scripts/train_micro.py --help`."""

from omegaconf import DictConfig

from dhtm.harness import config as door
from dhtm.harness.core.command import start
from dhtm.harness.training.embedded import train_embedded


def main(config: DictConfig) -> None:
    door.call(train_embedded, config)


if __name__ == "__main__":
    start(main, "train_micro")
