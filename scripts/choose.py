"""Choose a method's setting on images without labels: `python scripts/choose.py --help`."""

import logging

from omegaconf import DictConfig

from dhtm.harness import config as door
from dhtm.harness.choose import choose, python_line
from dhtm.harness.core.command import accept_method_lists, start
from dhtm.harness.core.files import require_writable
from dhtm.report.choices import choice_figure, choice_table

log = logging.getLogger(__name__)


def main(config: DictConfig) -> None:
    """Choose, then write and print the table, and print the line of Python that applies each choice."""
    choice = door.choice(config)
    require_writable(choice.output_dir, f"output_dir={choice.output_dir}")
    frame, chosen, missed = choose(choice)
    table = choice_table(frame, missed, choice)
    table.save(choice.output_dir / "choice", choice_figure(frame, choice))
    log.info("\n%s\n%s", table.markdown(), choice.output_dir)
    for method in chosen.values():
        log.info("%s", python_line(method))


if __name__ == "__main__":
    accept_method_lists()
    start(main, "choose", resumes=True)
