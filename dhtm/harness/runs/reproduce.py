"""A finished run carried out again, and its predictions compared with those of the first time."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dhtm.harness.core.errors import UserError, one_line, path_given
from dhtm.harness.runs.evaluate import evaluate
from dhtm.harness.runs.store import file_of_run, predictions

log = logging.getLogger(__name__)

# What a prediction may depend on, of the metrics.
_CAUSES = (
    "device",
    "dtype",
    "batch_size",
    "knobs",
    "layers",
    "seed",
    "weights_sha256",
    "data_fingerprint",
    "code_version",
    "versions",
    "git_commit",
)


def reproduce(folder: str, overrides: Sequence[str]) -> int:
    """Carry out the run of a directory again, in ``again`` within it, and say where predictions differ.

    Args:
        folder: the run's directory.
        overrides: key=value, of its config: another device, say, or place of the data.

    Returns:
        The number of images whose five best classes differ.

    Raises:
        UserError: there is no such run, or no such key; or other images are found.
    """
    path = path_given(folder, "--from")
    before = json.loads(file_of_run(path, "metrics.json"))
    config = _config(path, overrides)
    after = evaluate(config)
    first, second = (predictions(run) for run in (path, path / "again" / after["run_id"]))
    if first.index.tolist() != second.index.tolist() or first.label.tolist() != second.label.tolist():
        raise UserError(
            f"{path}: the data are not those of the run: {len(first)} images then, {len(second)} now, or others"
        )
    for cause in _CAUSES:
        if before.get(cause) != after.get(cause):
            log.info("%s was %s, and is %s", cause, before.get(cause), after.get(cause))
    different = first.index[first.top5.map(list) != second.top5.map(list)]
    other_class = (first.top5.str[0] != second.top5.str[0]).sum()
    log.info(
        "%s: of %d images %d have another class, %d others of the five best%s; top-1 %.2f%%, and %.2f%% again",
        path, len(first), other_class, len(different), f", the first is image {different[0]}" if len(different) else "",
        before["top1"], after["top1"],
    )  # fmt: skip
    return len(different)


def _config(folder: Path, overrides: Sequence[str]) -> DictConfig:
    config = OmegaConf.create(file_of_run(folder, "config.yaml").decode())
    OmegaConf.set_struct(config, True)
    # The knob is solved, and a run that was stopped goes on.
    again = {"results_dir": str(folder / "again"), "target": {"reduction_pct": None, "flops_g": None}, "force": True}
    try:
        return OmegaConf.merge(config, {"tracker": {"name": "none"}}, OmegaConf.from_dotlist(list(overrides)), again)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(
            f"{' '.join(overrides)}: not of the run's config ({one_line(error)}); give key=value"
        ) from error
