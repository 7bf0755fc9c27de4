"""Measure the premise that close patches share more information: `python scripts/premise.py --help`."""

import logging

from omegaconf import DictConfig

from dhtm.harness import config as door
from dhtm.harness.core.command import accept_method_lists, start
from dhtm.harness.core.files import require_writable
from dhtm.harness.locality import measure
from dhtm.report.premise import premise_figure, premise_table

log = logging.getLogger(__name__)


def main(config: DictConfig) -> None:
    """Measure, then write and print the table and the figure."""
    premise = door.premise(config)
    require_writable(premise.output_dir, f"output_dir={premise.output_dir}")
    frames = measure(premise)
    table = premise_table(frames, premise)
    table.save(premise.output_dir / "premise", premise_figure(frames, premise))
    log.info("\n%s\n%s", table.markdown(), premise.output_dir)


if __name__ == "__main__":
    accept_method_lists()
    start(main, "premise")
