"""Repeat a finished run and compare its predictions with the first ones."""

import dataclasses
import json
import logging
from pathlib import Path

from dhtm.harness.core.errors import UserError
from dhtm.harness.runs.directory import predictions
from dhtm.harness.runs.evaluate import Evaluation, evaluate
from dhtm.harness.runs.predict import CLASSES

log = logging.getLogger(__name__)

# The metrics that name what a prediction may depend on.
_CAUSES = (
    "device", "dtype", "batch_size", "knobs", "layers", "seed", "weights_sha256", "data_fingerprint", "code_version",
    "versions", "git_commit",
)  # fmt: skip


def reproduce(folder: Path, evaluation: Evaluation) -> int:
    """Repeat the run of a directory, in its subfolder ``again``, and log where predictions differ.

    Args:
        folder: the run's directory.
        evaluation: the run's own settings, perhaps with another device or data directory.

    Returns:
        The number of images for which any of the five best classes differs.

    Raises:
        UserError: the run is not finished or damaged, or its data are not the same.
    """
    first = predictions(folder)
    before = json.loads((folder / "metrics.json").read_text())
    again = folder / "again"
    after = evaluate(dataclasses.replace(evaluation, results_dir=again, target_pct=None, tracker=None, force=True))
    second = predictions(again / after["run_id"])
    if not first.label.equals(second.label):
        raise UserError(
            f"{folder}: the data are not those of the run: {len(first)} images then, {len(second)} now, or other labels"
        )
    for cause in _CAUSES:
        if before.get(cause) != after.get(cause):
            log.info("%s was %s, now %s", cause, before.get(cause), after.get(cause))
    differs = first[CLASSES].ne(second[CLASSES])
    different = first.index[differs.any(axis=1)]
    top1 = "" if before["top1"] is None else f"; top-1 {before['top1']:.2f}% then, {after['top1']:.2f}% now"
    log.info(
        "%s: of %d images, %d differ in the best class and %d in any of the five best%s%s",
        folder, len(first), differs.class_1.sum(), len(different),
        f", the first is image {different[0]}" if len(different) else "", top1,
    )  # fmt: skip
    return len(different)
