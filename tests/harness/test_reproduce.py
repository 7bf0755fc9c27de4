"""Repeating a finished run: predictions are the same bit for bit, or the differences are reported."""

import shutil

import pandas as pd
import pytest

from dhtm.harness import config as door
from dhtm.harness.core.errors import UserError
from dhtm.harness.runs import reproduce as reproduction
from dhtm.harness.runs.evaluate import evaluate
from dhtm.harness.runs.predict import CLASSES


@pytest.fixture(scope="module")
def run(composed, tmp_path_factory):
    """Return the directory of a finished run."""
    results = tmp_path_factory.mktemp("runs")
    overrides = ["target.reduction_pct=20", "data.limit=60", "device=cpu", f"results_dir={results}"]
    metrics = evaluate(door.evaluation(composed(*overrides)))
    return results / metrics["run_id"]


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / run.name)


def reproduce(folder, *overrides):
    return reproduction.reproduce(folder, door.evaluation_of_run(folder, overrides))


def test_repeated_run_has_the_same_predictions_bit_for_bit(copy, script, caplog):
    before = (copy / "predictions.parquet").read_bytes()
    result = script("evaluate", "--from", copy, "device=cpu", "batch_size=7")
    assert result.returncode == 0, result.stderr
    assert "of 60 images, 0 differ in the best class and 0 in any of the five best; top-1" in result.stdout
    assert "batch_size was 64, now 7" in result.stdout
    assert reproduce(copy) == 0
    assert "already finished" not in caplog.text, "the second repetition must not reuse the first"
    assert (copy / "again" / copy.name / "predictions.parquet").read_bytes() == before


def test_differences_are_counted(copy, caplog):
    n_different = reproduce(copy, "dtype=bfloat16")
    (repeated,) = [file.parent for file in (copy / "again").glob("*/metrics.json") if '"dhtm"' in file.read_text()]
    first, second = (pd.read_parquet(folder / "predictions.parquet") for folder in (copy, repeated))
    pairs = list(zip(first[CLASSES].to_numpy().tolist(), second[CLASSES].to_numpy().tolist(), strict=True))
    different = [index for index, (one, other) in enumerate(pairs) if one != other]
    assert n_different == len(different) > 0
    other_class = sum(one[0] != other[0] for one, other in pairs)
    assert f"images, {other_class} differ in the best class and {n_different} in any of the five best" in caplog.text
    assert f"the first is image {different[0]}" in caplog.text and "dtype was float32, now bfloat16" in caplog.text


def test_missing_runs_unknown_keys_and_other_data_are_refused(copy, script, tmp_path):
    result = script("evaluate", f"--from={tmp_path}")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"error: {tmp_path}/config.yaml: missing or damaged ([Errno 2] No such file or directory" in result.stderr
    for override in ("data.size=3", "batch"):
        with pytest.raises(UserError, match=f"{override}: not in the run's config"):
            reproduce(copy, override)
    with pytest.raises(UserError, match=r"the data are not those of the run: 60 images then, 59 now"):
        reproduce(copy, "data.limit=59")


@pytest.mark.parametrize(
    ("name", "reason"), [("metrics.json", ""), ("predictions.parquet", r"\(it has changed since the run\)")]
)
def test_modified_run_is_refused(copy, name, reason):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-9] if name == "metrics.json" else content.replace(b"6", b"7", 1))
    with pytest.raises(UserError, match=rf"{name}: .*damaged {reason}.*force=true"):
        reproduce(copy)
