"""Evaluate one backbone with one method on one data set: `python scripts/evaluate.py --help`."""

import argparse
import logging
import sys
from pathlib import Path

from omegaconf import DictConfig

from dhtm.harness import config as door
from dhtm.harness.core.command import command, start
from dhtm.harness.core.errors import UnavailableError
from dhtm.harness.runs.evaluate import evaluate
from dhtm.harness.runs.reproduce import reproduce
from dhtm.harness.sweeps.records import record
from dhtm.report.regions import sample_regions

log = logging.getLogger(__name__)


def main(config: DictConfig) -> dict | None:
    """Return the run's metrics, for a sweep's records, or None if it was skipped."""
    try:
        return evaluate(
            door.evaluation(config),
            sample_regions,
            on_start=lambda path, n: record(path=str(path.absolute()), n_images=n),
        )
    except UnavailableError as error:
        if not config.skip_unavailable:
            raise
        log.warning("skipped: %s", error)
        record(state="skipped", reason=str(error))
        return None


def again(folder: Path, overrides: list[str]) -> None:
    """Repeat a finished run; exit with code 1 if predictions differ."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("timm").setLevel(logging.WARNING)
    sys.exit(1 if reproduce(folder, door.evaluation_of_run(folder, overrides)) else 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--from", dest="folder", type=Path)
    given, overrides = parser.parse_known_args()
    if given.folder is not None:
        command(resumes=True)(again)(given.folder, overrides)
    else:
        start(main, "evaluate", resumes=True)
