"""Evaluate one backbone with one method on one data set: `python scripts/evaluate.py --help`."""

import logging
import sys

import hydra
from omegaconf import DictConfig

from dhtm.harness import tracking
from dhtm.harness.core.errors import UnavailableError, UserError, command
from dhtm.harness.runs.evaluate import evaluate
from dhtm.harness.runs.reproduce import reproduce
from dhtm.harness.sweeps import callback
from dhtm.report.regions import sample_regions

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
@command(goes_on=True)
def main(config: DictConfig) -> dict | None:
    """Returns the run's metrics, for a sweep's notes, or None where it was left out."""
    tracking.check(config.tracker)
    try:
        return evaluate(config, sample_regions)
    except UnavailableError as error:
        if not config.skip_unavailable:
            raise
        log.warning("left out: %s", error)
        callback.note(state="skipped", reason=str(error))
        return None


@command(goes_on=True)
def again(arguments: list[str]) -> None:
    """--from DIR key=value ...: carry out a finished run again; exit code 1 if predictions differ."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("timm").setLevel(logging.WARNING)
    at = arguments.index("--from")
    if not "".join(arguments[at + 1 : at + 2]):
        raise UserError("--from: give a run's directory, --from results/runs/<run id>")
    overrides = arguments[:at] + arguments[at + 2 :]
    sys.exit(1 if reproduce(arguments[at + 1], overrides) else 0)


if __name__ == "__main__":
    given = [part for one in sys.argv[1:] for part in (one.split("=", 1) if one.startswith("--from=") else [one])]
    if "--from" in given:
        again(given)
    command(goes_on=True)(main)()  # also between the runs of a sweep
