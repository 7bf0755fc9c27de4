"""Logging to W&B: what is logged is complete, and no failure of W&B ends a run."""

import contextlib
import dataclasses
import itertools
import json
import re
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pandas as pd
import pytest
import wandb
from made_up import write_run
from PIL import Image
from processes import start_script
from wandb.proto.wandb_internal_pb2 import Record
from wandb_workspaces.workspaces import Workspace

from dhtm.harness import config, tracking
from dhtm.harness.core.errors import UserError
from dhtm.harness.models.methods import UNMERGED
from dhtm.harness.runs import evaluate as evaluation
from dhtm.harness.runs.evaluate import evaluate
from dhtm.harness.tracking import Tracker, WandbRun
from dhtm.harness.training import trainer
from dhtm.report.dashboard import save_dashboard
from dhtm.report.regions import sample_regions
from dhtm.report.registry import METHODS

STEPS = list(range(4, 41, 4))  # after each batch of 4 of 40 images


@pytest.fixture(autouse=True)
def fresh_wandb(monkeypatch):
    """Put W&B into the state of a new process without a login."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_DATA_DIR", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(name, "")  # so that monkeypatch removes a value set during the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", "/nowhere")
    yield
    with contextlib.suppress(ConnectionError):  # W&B's process was killed
        wandb.teardown()


@pytest.fixture
def log_in(fresh_wandb, monkeypatch):
    """Return a function that logs in to W&B at a URL."""

    def log_in_at(url):
        wandb.teardown()  # it reads the environment only when it starts
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)

    return log_in_at


@pytest.fixture
def tracked(composed, tmp_path):
    """Return a function that describes a small evaluation with W&B offline and further overrides."""
    small = ["method.k=10", "data.limit=40", "batch_size=4", "device=cpu", "tracker=wandb", "tracker.mode=offline"]

    def describe(*overrides):
        folders = [f"results_dir={tmp_path}/runs", f"tracker.dir={tmp_path}"]
        return config.evaluation(composed(*small, *folders, *overrides))

    return describe


def records(folder):
    """Yield the protobuf records of the .wandb files below a folder, oldest first; each file is a LevelDB log with a header."""
    for file in sorted(folder.glob("wandb/*run-*/run-*.wandb"), key=lambda file: file.parent.name):
        data, offset, record = file.read_bytes(), 7, b""
        while offset + 7 <= len(data):
            if 2**15 - offset % 2**15 < 7:  # no space is left for a chunk's header in this block of 32 KiB
                offset += 2**15 - offset % 2**15
                continue
            length, kind = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
            record += data[offset + 7 : offset + 7 + length]
            offset += 7 + length
            if kind in (1, 4):  # a whole record, or its last chunk
                yield Record.FromString(record)
                record = b""


def logged(folder):
    """Return the contents of the .wandb files below a folder: runs, rows, the summary, artifacts and exit codes."""
    wandb.teardown()  # W&B may still be writing after a run has finished
    found = SimpleNamespace(runs=[], rows=[], summary={}, artifacts=[], exit_codes=[])
    for record in records(folder):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.runs.append(record.run)
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "exit":
            found.exit_codes.append(record.exit.exit_code)
        elif kind == "summary":
            for item in record.summary.update:
                found.summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        elif kind == "history":
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            found.rows.append(row | {"step": record.history.step.num})
    return found


def log_epochs(n_epochs=1, run_id="abc", **options):
    with WandbRun(Tracker(**options), {}, id=run_id) as run:
        for epoch in range(1, n_epochs + 1):
            run.do(lambda run, epoch=epoch: run.log({"epoch": epoch}))


def steps(rows):
    return [row["step"] for row in rows if "running/top1" in row]


def test_offline_run_has_metrics_pictures_and_files(tracked, tmp_path):
    metrics = evaluate(tracked("experiment=table1"), sample_regions)
    found = logged(tmp_path)
    (run,), rows = found.runs, found.rows
    assert (run.run_id, run.run_group, run.job_type) == (metrics["run_id"], "table1", "evaluation")
    assert run.display_name == "deit_micro · dhtm k=10 · digits"
    assert json.loads(next(item.value_json for item in run.config.update if item.key == "method"))["k"] == 10
    assert steps(rows) == STEPS
    running = [row for row in rows if "running/top1" in row]
    assert running[-1]["running/top1"] == metrics["top1"] == found.summary["top1"]
    assert all(row["running/images_per_s"] > 0 for row in running)
    assert found.summary["flops_g"] == metrics["flops_g"]
    assert [row["tokens"] for row in rows if "tokens" in row] == metrics["tokens_by_layer"]
    (pictures,) = [row for row in rows if "regions/_type" in row]
    assert pictures["regions/count"] == 6
    assert "tokens: 186 after layer 4, 176 after layer 7, 166 after layer 11" in pictures["regions/captions"][0]
    for name in pictures["regions/filenames"]:
        assert (tmp_path / "wandb/latest-run/files" / name).stat().st_size > 1000
    (artifact,) = found.artifacts
    assert (artifact.type, artifact.name) == ("run", f"run-{metrics['run_id']}")
    stored = {file.name for file in (tmp_path / "runs" / metrics["run_id"]).iterdir()} - {"changes.diff"}
    assert {file.path for file in artifact.manifest.contents} == stored
    for file in artifact.manifest.contents:  # copies that wait for upload
        assert file.local_path.startswith(str(tmp_path / "wandb"))
    assert found.exit_codes == [0]


def test_resumed_or_finished_run_continues_its_wandb_run(tracked, tmp_path, monkeypatch):
    evaluate(dataclasses.replace(tracked(), method=UNMERGED, tracker=None))
    predict = evaluation.predict
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "predict", lambda *a: itertools.islice(predict(*a), 5))
        with pytest.raises(UserError, match="predictions of other processes are missing"):
            evaluate(tracked())
    time.sleep(1)  # W&B names folders by the second
    metrics = evaluate(tracked())
    time.sleep(1)
    assert evaluate(tracked()) == metrics
    found = logged(tmp_path)
    assert [run.run_id for run in found.runs] == 3 * [metrics["run_id"]]
    assert found.exit_codes == [1, 0, 0]
    assert steps(found.rows) == STEPS
    assert found.summary["top1"] == metrics["top1"]


class BreakingServer(BaseHTTPRequestHandler):
    """A server that starts a run as W&B's does, and answers all other requests with an error."""

    def do_POST(self):
        query, answer = self.rfile.read(int(self.headers["Content-Length"])), None
        project = {"id": "p", "name": "dhtm", "entity": {"id": "e", "name": "us"}}
        if b"RunResumeStatus" in query:
            answer = {"model": {**project, "bucket": None}}
        elif b"upsertBucket(" in query:
            bucket = {"id": "b", "name": "abc", "config": "{}", "project": project, "historyLineCount": 0}
            answer = {"upsertBucket": {"bucket": bucket, "inserted": True}}
        self.send_response(200 if answer else 500)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"data": answer}).encode())

    def log_message(self, *arguments):
        pass


def test_logging_gives_up_on_a_server_that_breaks_half_way(log_in, monkeypatch, caplog, tmp_path):
    monkeypatch.setitem(tracking._SETTINGS, "finish_timeout", 1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), BreakingServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    log_in(f"http://127.0.0.1:{server.server_port}")
    start = time.monotonic()
    log_epochs(dir=tmp_path)
    found = logged(tmp_path)  # ends W&B, as the end of the process does
    assert time.monotonic() - start < 30
    server.shutdown()
    assert not list(tmp_path.glob("wandb/offline-*")), "must log online, because there is a login"
    assert "W&B failed, nothing more is logged to this run" in caplog.text
    assert [row["epoch"] for row in found.rows] == [1], "must be stored, so that `wandb sync` can upload it later"


def test_logging_is_offline_if_the_server_never_answers(log_in, monkeypatch, caplog, tmp_path):
    monkeypatch.setitem(tracking._SETTINGS, "init_timeout", 2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        log_in(f"http://127.0.0.1:{silent.getsockname()[1]}")
        for run_id in ("first", "second"):
            log_epochs(run_id=run_id, dir=tmp_path)
        found = logged(tmp_path)
    assert caplog.text.count("W&B cannot be reached, this process logs offline") == 1
    assert [row["epoch"] for row in found.rows] == [1, 1]


def test_logging_is_offline_without_a_login(caplog, tmp_path):
    log_epochs(mode="online", dir=tmp_path)
    assert "no login to W&B: logged offline" in caplog.text
    assert [row["epoch"] for row in logged(tmp_path).rows] == [1]


def test_host_variables_command_line_and_home_are_not_logged(tmp_path):
    """Check all files that the script writes; only those of the run directory may contain the home folder."""
    overrides = [
        "method.k=10", f"checkpoints_dir={tmp_path}/planted-home/x", "data.limit=8", "device=cpu", "tracker=wandb",
        "tracker.mode=offline", f"results_dir={tmp_path}/written/runs", f"tracker.dir={tmp_path}/written",
    ]  # fmt: skip
    planted = {"SOME_SECRET": "planted-variable", "HOME": f"{tmp_path}/planted-home"}
    process = start_script("evaluate", *overrides, stderr=tmp_path / "errors", **planted)
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "errors").read_text()
    assert [run.host for run in logged(tmp_path / "written").runs] == ["-"]
    for file in (file for file in (tmp_path / "written").rglob("*") if file.is_file()):
        found = set(re.findall(rb"planted-[\w-]+", file.read_bytes()))
        assert found <= ({b"planted-home"} if file.parent.parent.name == "runs" else set()), file


def test_resumed_training_logs_all_epochs_to_one_wandb_run(composed, tmp_path, monkeypatch):
    options = ["recipe=embedded", "data.limit=16", "batch_size=8", "epochs=2", "num_workers=0", "device=cpu"]
    wandb_options = ["tracker=wandb", f"tracker.dir={tmp_path}", "tracker.mode=offline", f"output={tmp_path}/out"]
    training, top1 = config.training(composed(*options, *wandb_options, config_name="train")), trainer._Trainer.top1

    epochs = itertools.count(1)

    def stopped(*arguments):
        if next(epochs) == 2:
            raise KeyboardInterrupt
        return top1(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(trainer._Trainer, "top1", stopped)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(training)
    time.sleep(1)  # W&B names folders by the second
    last = trainer.train(training)
    found = logged(tmp_path)
    assert len(found.runs) == 2 and len({run.run_id for run in found.runs}) == 1
    assert [row["epoch"] for row in found.rows] == [1, 2]
    assert (found.rows[-1]["top1"], found.rows[-1]["loss"]) == (last["top1"], last["loss"])


def test_report_is_logged_with_tables_and_figures(tmp_path):
    picture = tmp_path / "figure4.png"
    Image.new("RGB", (20, 10)).save(picture)
    table = pd.DataFrame({"k": [0, 40], "top1": [96.5, 96.25]})
    tracking.log_report(Tracker(mode="offline", dir=tmp_path), {"table1": table}, {"figure4": picture})
    row = {key: value for row in logged(tmp_path).rows for key, value in row.items()}
    assert (row["table1/_type"], row["figure4/_type"]) == ("table-file", "image-file")
    (stored,) = tmp_path.glob(f"wandb/offline-run-*/files/{row['table1/path']}")
    assert json.loads(stored.read_text())["data"] == table.to_numpy().tolist()


def test_nothing_more_is_logged_after_a_failure(monkeypatch, caplog, tmp_path):
    calls = []
    for name in ("log", "finish"):
        monkeypatch.setattr(f"wandb.Run.{name}", lambda *a, name=name, **o: calls.append(name) or 1 / 0)
    log_epochs(2, mode="offline", dir=tmp_path)
    assert calls == ["log", "finish"]
    assert caplog.text.count("W&B failed, nothing more is logged to this run") == 1, "must warn once per run"


@pytest.mark.parametrize(("broken", "folder"), [("wandb.init", None), (None, "/proc/nowhere")])
def test_failing_start_of_wandb_only_warns(monkeypatch, caplog, tmp_path, broken, folder):
    if broken:
        monkeypatch.setattr(broken, lambda *a, **o: 1 / 0)
    log_epochs(2, mode="offline", dir=folder or tmp_path)
    assert caplog.text.count("W&B failed, nothing more is logged to this run") == 1, "must warn once per run"


def test_missing_wandb_and_failing_pictures_only_warn(tracked, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "wandb", None)
        metrics = evaluate(tracked())
    assert metrics["n_images"] == 40 and "W&B failed" in caplog.text
    assert evaluate(tracked(), lambda model, split: 1 / 0) == metrics
    assert "W&B failed, nothing more is logged to this run: division by zero" in caplog.text
    found = logged(tmp_path)
    assert found.summary["top1"] == metrics["top1"] and found.exit_codes == [0]


def test_wandb_is_not_started_by_default_or_if_disabled(evaluated, monkeypatch):
    monkeypatch.setattr("wandb.init", lambda **options: pytest.fail("W&B was started"))
    for options in ([], ["tracker=wandb", "tracker.mode=disabled"]):
        evaluated("data.limit=2", *options)


def test_dashboard_has_all_panels_and_the_colours_of_methods(log_in, monkeypatch, tmp_path):
    write_run(tmp_path, 7, method="dhtm")
    log_in("http://127.0.0.1")
    saved = []
    monkeypatch.setattr(Workspace, "save", lambda view: saved.append(view) or SimpleNamespace(url="its address"))
    assert save_dashboard(Tracker(entity="us"), "DHTM", tmp_path) == "its address"
    (view,) = saved
    assert (view.entity, view.project, view.name) == ("us", "dhtm", "DHTM")
    panels = {section.name: section.panels[0] for section in view.sections}
    assert list(panels) == [
        "Accuracy against FLOPs", "KL against FLOPs", "Throughput", "Tokens by layer", "Table 2", "Regions",
    ]  # fmt: skip
    kl = panels["KL against FLOPs"]
    assert (kl.x.name, kl.y.name) == ("flops_g", "kl")
    assert view.runset_settings.run_settings[f"{7:016x}"].color == METHODS["dhtm"].colour
