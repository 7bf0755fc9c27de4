"""Draw the regions of an image under one method or several: `python scripts/visualize.py --help`."""

import logging

from omegaconf import DictConfig

from dhtm.harness import config as door
from dhtm.harness.core.command import accept_method_lists, start
from dhtm.report.visualize import visualize

log = logging.getLogger(__name__)


def main(config: DictConfig) -> None:
    """Draw."""
    log.info("%s", door.call(visualize, config))


if __name__ == "__main__":
    accept_method_lists()
    start(main, "visualize")
