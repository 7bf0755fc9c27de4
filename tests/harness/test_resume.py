"""Every image is counted exactly once, whatever stops a run and however many processes share it."""

import errno
import itertools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT
from processes import start_script, wait_for

from dhtm.harness import config as door
from dhtm.harness.core.command import command
from dhtm.harness.core.errors import UserError
from dhtm.harness.runs import evaluate as evaluation
from dhtm.harness.runs.evaluate import evaluate

# Of the unmerged model, because every other run would evaluate it first.
RUN = ["method=unmerged", "data.limit=40", "batch_size=4", "store_every_s=0", "device=cpu"]


@pytest.fixture
def run(composed, tmp_path):
    """Return a function that evaluates in this process and returns the predictions and the metrics."""

    def evaluate_with(*overrides):
        metrics = evaluate(door.evaluation(composed(*RUN, *overrides, f"results_dir={tmp_path}/runs")))
        return read(tmp_path / "runs"), metrics

    return evaluate_with


@pytest.fixture(scope="module")
def expected(composed, tmp_path_factory):
    """Return the predictions of an undisturbed run."""
    results = tmp_path_factory.mktemp("runs")
    metrics = evaluate(door.evaluation(composed(*RUN, f"results_dir={results}")))
    assert (metrics["batch_size"], metrics["first_nonfinite"]) == (4, None)
    return read(results)


def read(results):
    (folder,) = results.glob("[0-9a-f]*")  # not sweeps or locks
    assert sorted(file.name for file in folder.iterdir() if file.name != "changes.diff") == [
        "config.yaml", "environment.json", "metrics.json", "outputs.parquet", "predictions.parquet",
    ]  # fmt: skip
    predictions, outputs = (pd.read_parquet(folder / f"{name}.parquet") for name in ("predictions", "outputs"))
    assert outputs["index"].equals(predictions["index"])
    return predictions


def start_fork(run, slow, carry_out=evaluate):
    """Fork a process that carries out a run with the test's patches; return it and a function that counts its batches.

    Every batch takes ``slow`` seconds longer and appends a byte to the file "predicting", beside the results.
    """
    marks = run.results_dir.with_name("predicting")

    def slowly(*arguments):
        for part in predict(*arguments):
            with marks.open("a") as file:
                file.write("x")
            time.sleep(slow)
            yield part

    def work():
        torch.set_num_threads(1)  # OpenMP's other threads are not forked
        torch.cuda.is_available = lambda: False  # CUDA does not work after a fork
        evaluation.predict = slowly
        carry_out(run)

    predict = evaluation.predict
    marks.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process, lambda: marks.stat().st_size if marks.exists() else 0


@pytest.mark.parametrize("n_kills", [4, pytest.param(200, marks=pytest.mark.stress)])
def test_killed_run_loses_no_image_and_counts_none_twice(expected, composed, tmp_path, n_kills):
    """Kill runs at random moments, from the first batch to after the last, and resume them; let the last one finish."""
    results = tmp_path / "killed"
    rng, run = random.Random(0), door.evaluation(composed(*RUN, f"results_dir={results}"))
    n_shards = []  # after each kill
    while len(n_shards) < n_kills:
        process, n_batches = start_fork(run, slow=0.02)
        wait_for(lambda process=process, n=n_batches: n() or process.exitcode is not None)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        if list(results.glob("*/metrics.json")):  # it had finished: start another run
            evaluate(run)
            read(results)
            results.rename(results.with_name(f"{results.name}.{len(n_shards)}"))
        n_shards.append(len(list(results.glob("*/shards/[0-9]*.parquet"))))
    evaluate(run)
    assert max(n_shards) > 0, "some must be killed half-way"
    for results in tmp_path.glob("killed*"):
        pd.testing.assert_frame_equal(read(results), expected)


def test_interrupted_run_resumes_after_a_damaged_shard_is_removed(run, expected, tmp_path, monkeypatch, caplog):
    """The first run is interrupted after five batches."""
    predict, requested = evaluation.predict, []  # the images that each run predicts

    def interrupted(model, split, indices, *arguments):
        requested.append(list(indices))
        yield from itertools.islice(predict(model, split, indices, *arguments), 5 if len(requested) == 1 else None)
        if len(requested) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    shards = sorted(tmp_path.glob("runs/*/shards/*"))
    assert [file.name[:8] for file in shards] == [f"{4 * i:08d}" for i in range(5)]
    os.truncate(shards[1], 100)
    with pytest.raises(UserError, match=rf"{shards[1].name}: damaged .*; remove it, and the same command"):
        run()
    shards[1].unlink()
    rows, metrics = run()
    assert requested[1] == [4, 5, 6, 7, *range(20, 40)]
    assert "resuming after 16 of 40 images" in caplog.text
    pd.testing.assert_frame_equal(rows, expected)
    assert metrics["n_images"] == 40


def test_run_stopped_by_a_signal_stores_its_predictions_and_exits_with_75(run, expected, composed, tmp_path, capfd):
    slow = door.evaluation(composed(*RUN, "store_every_s=1000", f"results_dir={tmp_path}/runs"))
    process, n_batches = start_fork(slow, slow=0.5, carry_out=command(resumes=True)(evaluate))
    wait_for(lambda: n_batches() == 3)
    os.kill(process.pid, signal.SIGUSR1)
    process.join(60)
    assert process.exitcode == 75
    assert "stopped by SIGUSR1; finished work is kept" in capfd.readouterr().err
    (shard,) = tmp_path.glob("runs/*/shards/*")
    assert 8 <= len(pd.read_parquet(shard)) < 40
    pd.testing.assert_frame_equal(run()[0], expected)


def test_status_shows_running_and_stopped_sweeps(script, tmp_path):
    results = f"results_dir={tmp_path}/runs"
    sweep = ["-m", "method=unmerged", "data.limit=600,601", "device=cpu", results, "batch_size=1", "store_every_s=0"]
    process = start_script("evaluate", *sweep, stderr=tmp_path / "errors")
    wait_for(lambda: len(list(tmp_path.glob("runs/*/shards/*"))) >= 3)
    output = script("status", results).stdout
    assert re.search(
        r"\ndata.limit=600 +running +[1-9]\d* of 600 images stored, .*\n.* waiting\n1 running, 1 waiting\n$", output
    )
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 75
    errors = (tmp_path / "errors").read_text()
    assert "stopped by SIGTERM" in errors and "Traceback" not in errors
    assert 3 <= len(list(tmp_path.glob("runs/*/shards/*"))) < 600
    output = script("status", results).stdout
    assert re.search(r" stopped +.* of 600 images .*\n.* waiting\n1 stopped, 1 waiting; the same command", output)


def test_concurrent_runs_evaluate_the_unmerged_model_once(composed, tmp_path, monkeypatch):
    marks, carry_out = tmp_path / "carried out", evaluation.store_predictions

    def counted(*arguments, **options):
        with marks.open("a") as file:
            file.write("x")
        return carry_out(*arguments, **options)

    monkeypatch.setattr(evaluation, "store_predictions", counted)
    shared = [*RUN, f"results_dir={tmp_path}/runs"]
    runs = [door.evaluation(composed(*shared, *method)) for method in (["method=tome"], ["method=dhtm", "method.k=56"])]
    for process in [start_fork(run, slow=0.05)[0] for run in runs]:
        process.join(120)
        assert process.exitcode == 0
    assert marks.read_text() == "xxx"
    assert len(list(tmp_path.glob("runs/*/outputs.parquet"))) == 1


def test_batch_size_is_halved_when_memory_runs_out(run, expected, monkeypatch, caplog):
    predict = evaluation.predict

    def small_device(model, split, indices, batch_size, *arguments):
        for part in predict(model, split, indices, batch_size, *arguments):
            if batch_size > largest:
                raise torch.OutOfMemoryError
            yield part

    monkeypatch.setattr(evaluation, "predict", small_device)
    largest = 3
    rows, metrics = run("batch_size=16")
    pd.testing.assert_frame_equal(rows, expected)
    assert metrics["batch_size"] == 2
    assert "out of memory: resuming with batch_size=2" in caplog.text
    largest = 0
    with pytest.raises(UserError, match="out of memory with one image at a time"):
        run("batch_size=3", "force=true")


def test_full_disk_is_reported_and_stored_predictions_are_kept(run, tmp_path, monkeypatch):
    replace, calls = Path.replace, itertools.count()

    def full(self, target):
        if "shards" in str(target) and next(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(
        UserError, match=r"cannot be written \(.*No space left on device\); stored predictions are kept"
    ):
        run()
    assert len(list(tmp_path.glob("runs/*/shards/*"))) >= 3
    rows, _ = run()
    assert rows["index"].tolist() == list(range(40))


def test_nonfinite_logits_are_counted_and_the_first_image_is_named(run, monkeypatch, caplog):
    predict = evaluation.predict

    def broken(*arguments):
        for part in predict(*arguments):
            yield part.assign(nonfinite=part["index"].isin([17, 30]))

    monkeypatch.setattr(evaluation, "predict", broken)
    _, metrics = run()
    assert (metrics["n_nonfinite"], metrics["first_nonfinite"]) == (2, 17)
    assert "2 images have logits that are not finite, the first is image 17" in caplog.text


def test_ranks_share_the_images_of_a_run(ranks, composed, tmp_path):
    """They also share the unmerged model's run, which comes first. In one run there are more ranks than images."""
    _, *shared = RUN
    results = ranks(3, "evaluate", "-m", "method.k=10", *shared, "data.limit=2,11", f"results_dir={tmp_path}/runs")
    assert [result.returncode for result in results] == [0, 0, 0], results[0].stderr
    for limit in (2, 11):
        alone = ["method.k=10", *shared, f"data.limit={limit}", f"results_dir={tmp_path}/alone"]
        run_id = evaluate(door.evaluation(composed(*alone)))["run_id"]
        rows, rows_alone = (
            pd.read_parquet(tmp_path / folder / run_id / "predictions.parquet") for folder in ("runs", "alone")
        )
        close = {"rtol": 0.01, "atol": 1e-6}  # other batches are rounded differently
        pd.testing.assert_series_equal(rows.pop("kl"), rows_alone.pop("kl"), **close)
        pd.testing.assert_frame_equal(rows, rows_alone)
        assert "".join(result.stdout for result in results).count(run_id) == 1, "exactly one rank must print the run"


def torchrun_command(world, *overrides):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return [*torchrun, str(ROOT / "scripts/evaluate.py"), "-m", *RUN, *overrides]


@pytest.mark.stress
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_predictions_do_not_depend_on_the_number_of_ranks(expected, tmp_path, world, batch_size):
    arguments = torchrun_command(world, f"results_dir={tmp_path}/runs", f"batch_size={batch_size}")
    subprocess.run(arguments, cwd=ROOT, capture_output=True, timeout=600, check=True)
    pd.testing.assert_frame_equal(read(tmp_path / "runs"), expected)


@pytest.mark.stress
def test_killed_rank_ends_the_run_and_is_named(tmp_path):
    arguments = torchrun_command(2, "data.limit=2000", f"results_dir={tmp_path}/runs")
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list(tmp_path.glob("runs/*/shards/*"))) >= 3)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[1]), signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "rank      : 1 (local_rank: 1)" in errors and "SIGKILL" in errors
