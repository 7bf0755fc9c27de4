"""Draw the regions of an image under one method or several: `python scripts/visualize.py --help`."""

import logging
import re
import sys

import hydra
from omegaconf import DictConfig

from dhtm.harness import config as door
from dhtm.harness.core.command import command, start
from dhtm.report.visualize import visualize

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../configs", config_name="visualize")
@command(resumes=False)
def main(config: DictConfig) -> None:
    """Draw."""
    wanted = door.visualization(config)
    visualize(wanted)
    log.info("%s", wanted.output)


if __name__ == "__main__":
    # method=a,b would be a sweep to Hydra.
    sys.argv = [re.sub(r"^method=\[?([^\]]*)\]?$", r"methods=[\1]", argument) for argument in sys.argv]
    start(main, resumes=False)
