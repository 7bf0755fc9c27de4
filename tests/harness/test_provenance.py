"""The version of the code, which is part of run ids, and the environment that a run records."""

import hashlib
import importlib

import pandas as pd
import pytest

from dhtm.harness.runs import provenance

# The predicted class of each of the first 40 test scenes at 40% fewer FLOPs, in version 2.
PREDICTED = {
    "dhtm": "9087906398456837654222716257255729291035",
    "tome": "9087906398456837654222716257255729291035",
    "random": "4087903398458139657223716257255729238035",
}


@pytest.mark.parametrize("method", PREDICTED)
def test_predictions_are_those_of_the_current_version(evaluated, tmp_path, method):
    """If predictions change on purpose, raise provenance.VERSION and put the new predictions into PREDICTED.

    Those were computed in one batch; this test uses six, which must not matter.
    """
    metrics = evaluated(f"method={method}", "target.reduction_pct=40", "data.limit=40", "batch_size=7")
    predictions = pd.read_parquet(tmp_path / "runs" / metrics["run_id"] / "predictions.parquet")
    assert (provenance.VERSION, "".join(map(str, predictions.class_1))) == (2, PREDICTED[method])


def test_code_version_is_the_version_and_a_hash_of_the_methods_file(tmp_path, monkeypatch):
    """The hash is of the file's bytes, so it does not depend on how a version of Python parses them."""
    file = tmp_path / "new_method.py"
    file.write_text("from dhtm.reducer import Reducer\n\n\nclass New(Reducer):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    reducer = importlib.import_module("new_method").New(layers=(4,))
    before = provenance.code_version(reducer)
    file.write_text("# a comment\n" + file.read_text())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    assert before != provenance.code_version(reducer) == f"{provenance.VERSION}-{digest}"


def test_only_listed_environment_variables_are_recorded(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted-word")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    recorded = provenance.environment()
    assert recorded["variables"]["OMP_NUM_THREADS"] == "3"
    assert "planted-word" not in str(recorded)
