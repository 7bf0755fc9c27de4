"""W&B: offline runs are really written, and W&B's failures stop nothing."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest
import wandb
from conftest import ROOT
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record
from wandb_server import WandbServer

from dhtm.harness import tracking
from dhtm.harness.core.errors import UserError
from dhtm.harness.runs import evaluate as evaluation
from dhtm.harness.runs import predict as prediction
from dhtm.harness.runs.evaluate import evaluate
from dhtm.harness.training import trainer as training
from dhtm.harness.training.trainer import train
from dhtm.report.dashboard import save_dashboard
from dhtm.report.regions import sample_regions
from dhtm.report.style import METHODS


def records(folder):
    """Everything in the .wandb files below a folder, oldest first; W&B may still be writing when it says it has finished."""
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.parent.name):
        deadline = time.monotonic() + 20
        while not any(record.HasField("exit") for record in records_of(file)) and time.monotonic() < deadline:
            time.sleep(0.1)
        yield from records_of(file)


def records_of(file):
    """After a header of 7 bytes, LevelDB's log of protobuf records."""
    data, offset, record = file.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        if 2**15 - offset % 2**15 < 7:  # too little is left of this block of 32 KiB for a chunk's header
            offset += 2**15 - offset % 2**15
            continue
        length, kind = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
        record += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last chunk
            yield Record.FromString(record)
            record = b""


@pytest.fixture(autouse=True)
def fresh_wandb(monkeypatch):
    """W&B as at the start of a process, and without a login."""
    monkeypatch.setattr(tracking, "_LIMIT", [])
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_DATA_DIR", "WANDB_ERROR_REPORTING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    yield
    tracking._tear_down()


@pytest.fixture
def log_in(fresh_wandb, monkeypatch):
    """Be logged in to W&B at an address."""

    def log_in_at(url):
        tracking._tear_down()  # which has read the environment
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)

    return log_in_at


@pytest.fixture
def wandb_server(log_in):
    """Start a server, and be logged in to it: wandb_server(broken_after=10)."""
    with contextlib.ExitStack() as running:

        def start(**options):
            server = running.enter_context(WandbServer(**options))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            running.callback(server.shutdown)
            log_in(server.url)
            return server

        yield start


@pytest.fixture
def tracked(composed, tmp_path):
    """The config of a small evaluation with W&B offline; cut it with more overrides."""
    small = ["data.limit=40", "batch_size=4", "device=cpu", f"results_dir={tmp_path}/runs", f"tracker.dir={tmp_path}"]

    def compose(*overrides):
        return composed("method.k=10", *small, "tracker=wandb", "tracker.mode=offline", *overrides)

    return compose


def logged(folder):
    """Of the .wandb files below a folder: the description of each run, all rows by step, and the summary."""
    runs, rows, summary = [], [], {}
    for record in records(folder):
        if record.HasField("run"):
            runs.append(record.run)
        for item in record.summary.update:
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        if row:
            rows.append(row | {"step": record.history.step.num})
    return runs, rows, summary


def test_an_offline_run_holds_all_there_is(tracked, tmp_path):
    metrics = evaluate(tracked("experiment=table1"), sample_regions)
    (run,), rows, summary = logged(tmp_path)
    assert (run.run_id, run.run_group, run.job_type) == (metrics["run_id"], "table1", "evaluation")
    assert run.display_name == "deit_micro dhtm k=10, digits"
    assert json.loads(next(item.value_json for item in run.config.update if item.key == "method"))["k"] == 10
    running = [row for row in rows if "running/top1" in row]
    assert [row["step"] for row in running] == list(range(4, 41, 4))
    assert running[-1]["running/top1"] == metrics["top1"] == summary["top1"]
    assert all(row["running/images_per_s"] > 0 for row in running)
    assert summary["flops_g"] == metrics["flops_g"]
    assert [row["tokens"] for row in rows if "tokens" in row] == metrics["tokens_by_layer"]
    (pictures,) = [row for row in rows if "regions/_type" in row]
    assert pictures["regions/count"] == 6
    assert "tokens: 186 after layer 4, 176 after layer 7, 166 after layer 11" in pictures["regions/captions"][0]
    assert all(
        (tmp_path / "wandb/latest-run/files" / name).stat().st_size > 1000 for name in pictures["regions/filenames"]
    )
    (artifact,) = [record.artifact for record in records(tmp_path) if record.HasField("artifact")]
    assert (artifact.type, artifact.name) == ("run", f"run-{metrics['run_id']}")
    stored = {file.name for file in (tmp_path / "runs" / metrics["run_id"]).iterdir()} - {"changes.diff"}
    assert {file.path for file in artifact.manifest.contents} == stored
    for file in artifact.manifest.contents:  # which wait beside the rest, to be uploaded
        assert file.local_path.startswith(str(tmp_path / "wandb"))


def test_an_evaluation_that_goes_on_goes_on_in_the_same_wandb_run(tracked, wandb_server, tmp_path, monkeypatch):
    predict = prediction.predict
    with monkeypatch.context() as patched:
        patched.setattr(prediction, "predict", lambda *a: itertools.islice(predict(*a), 5))
        patched.setattr(evaluation, "_metrics", lambda *a: 1 / 0)
        with pytest.raises(RuntimeError, match="images were lost"):
            evaluate(tracked())
    time.sleep(1)  # W&B names folders by the second
    metrics = evaluate(tracked())
    runs, rows, _ = logged(tmp_path)
    assert [(run.run_id, run.resume) for run in runs] == [(metrics["run_id"], False), (metrics["run_id"], True)]
    running = [row for row in rows if "running/top1" in row]
    assert [row["step"] for row in running] == list(range(4, 41, 4))
    assert running[-1]["running/top1"] == metrics["top1"]
    server, parts = wandb_server(), sorted(map(str, tmp_path.glob("wandb/offline-run-*")))
    subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *parts], cwd=tmp_path, capture_output=True, timeout=120, check=True
    )
    synced = [json.loads(line) for line in server.lines["wandb-history.jsonl"]]
    assert [row["_step"] for row in synced if "running/top1" in row] == list(range(4, 41, 4))
    assert json.loads(server.lines["wandb-summary.json"][-1])["top1"] == metrics["top1"]


def test_a_run_that_was_finished_without_it_is_logged_once(tracked, tmp_path):
    metrics = evaluate(tracked("tracker.mode=disabled"))
    for _ in range(2):
        assert evaluate(tracked(), sample_regions) == metrics
    (run,), _, summary = logged(tmp_path)
    assert run.run_id == metrics["run_id"]
    assert summary["top1"] == metrics["top1"]


def kill_core():
    """W&B's own process, in the middle of things."""
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True, check=True)
    for process in found.stdout.split():
        os.kill(int(process), signal.SIGKILL)


def test_wandb_killed_half_way_does_not_matter(tracked, tmp_path, monkeypatch, caplog):
    predict = prediction.predict

    def killing(*arguments):
        for i, part in enumerate(predict(*arguments)):
            if i == 5:
                time.sleep(2)  # W&B has started by now
                kill_core()
            yield part

    monkeypatch.setattr(prediction, "predict", killing)
    metrics = evaluate(tracked(), sample_regions)
    assert "W&B failed, what follows is logged offline" in caplog.text
    whole = max(tmp_path.glob("wandb/offline-run-*"), key=lambda folder: len(list(folder.glob("logged-to-*"))))
    summary = {item.key: item.value_json for r in records_of(next(whole.glob("*.wandb"))) for item in r.summary.update}
    assert json.loads(summary["top1"]) == metrics["top1"]
    rows = [r for r in records_of(next(whole.glob("*.wandb"))) if r.HasField("history")]
    assert [row.history.step.num for row in rows][:10] == list(range(4, 41, 4))


def test_online_rows_summary_and_pictures_reach_the_server(tracked, wandb_server):
    server = wandb_server()
    metrics = evaluate(tracked("tracker.mode=null"), sample_regions)
    rows = [json.loads(line) for line in server.lines["wandb-history.jsonl"]]
    assert [row["_step"] for row in rows if "running/top1" in row] == list(range(4, 41, 4))
    assert json.loads(server.lines["wandb-summary.json"][-1])["top1"] == metrics["top1"]
    assert sum(name.endswith(".png") for name in server.uploaded) == 6


def test_what_cannot_be_uploaded_in_time_is_left_to_sync(tracked, wandb_server, monkeypatch, caplog, tmp_path):
    monkeypatch.setitem(tracking._SETTINGS, "finish_timeout", 1)
    wandb_server(broken_after=2)
    with tracking.training_log(tracked("tracker.mode=null"), "a training", "abc", first=True) as tell:
        tell({"epoch": 1})
    (folder,) = tmp_path.glob("wandb/run-*")
    assert f"the rest can be had by: wandb sync {folder}" in caplog.text
    tracking._tear_down()  # as at the end of the process
    (row,) = [r for r in records_of(next(folder.glob("*.wandb"))) if r.HasField("history")]
    assert "epoch" in str(row)


@pytest.mark.stress
def test_a_server_that_breaks_half_way_leaves_an_offline_run(tracked, wandb_server, caplog, tmp_path):
    """W&B's client asks for a while before it says that an artifact cannot be logged."""
    wandb_server(broken_after=1)
    start = time.monotonic()
    metrics = evaluate(tracked("tracker.mode=null"), sample_regions)
    assert time.monotonic() - start < 60
    assert "W&B failed, what follows is logged offline" in caplog.text
    _, rows, summary = logged(tmp_path)
    assert summary["top1"] == metrics["top1"]
    assert [row["step"] for row in rows if "running/top1" in row] == list(range(4, 41, 4))


@pytest.mark.parametrize("listening", [False, True])
def test_without_a_network_it_goes_on_offline(tracked, log_in, monkeypatch, caplog, tmp_path, listening):
    """Connections are refused, or accepted and never answered."""
    monkeypatch.setitem(tracking._SETTINGS, "init_timeout", 2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listening:
            silent.listen()
        log_in(f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        metrics = evaluate(tracked("tracker.mode=online"))
        assert time.monotonic() - start < 30
    assert "W&B failed, what follows is logged offline" in caplog.text
    _, rows, summary = logged(tmp_path)
    assert summary["top1"] == metrics["top1"]
    assert [row["step"] for row in rows if "running/top1" in row] == list(range(4, 41, 4))


def test_wandb_that_hangs_is_left_alone(tracked, monkeypatch, caplog):
    monkeypatch.setattr(wandb, "init", lambda **options: time.sleep(60))
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.5)
    start = time.monotonic()
    for limit in (4, 8):
        assert evaluate(tracked(f"data.limit={limit}"))["n_images"] == limit
    assert time.monotonic() - start < 30
    assert caplog.text.count("W&B does not answer") == 1


def test_no_secret_host_or_variable_is_written(tmp_path):
    """By the real script, in files of any kind; under another host name, where one may be set."""
    named = ["unshare", "--user", "--map-root-user", "--uts", "sh", "-c", 'hostname planted-host; exec "$0" "$@"']
    may = subprocess.run([*named, "true"], capture_output=True, check=False).returncode == 0
    overrides = [
        "+hub_token=planted-token", "+source='https://me:planted-word@host/x?planted-query=1'", "method.k=10",
        f"+place={tmp_path}/planted-home/x", "data.limit=8", "device=cpu", f"results_dir={tmp_path}/written/runs",
        f"tracker.dir={tmp_path}/written", "tracker=wandb", "tracker.mode=offline",
    ]  # fmt: skip
    planted = {"SOME_SECRET": "planted-variable", "HOME": f"{tmp_path}/planted-home", "OMP_NUM_THREADS": "1"}
    script_file = str(ROOT / "scripts" / "evaluate.py")
    result = subprocess.run(
        [*(named if may else []), sys.executable, script_file, *overrides], cwd=ROOT, env=os.environ | planted,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    written = [file for file in (tmp_path / "written").rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in written)
    for file in written:
        found = set(re.findall(rb"planted-[\w-]+", file.read_bytes()))
        assert found <= ({b"planted-home"} if file.parent.parent.name == "runs" else set()), file


def short_training(folder):
    """Overrides of a training of seconds, with W&B offline."""
    short = ["recipe=embedded", "data.limit=16", "batch_size=8", "epochs=2", "num_workers=0", f"output={folder}/out"]
    return [*short, "tracker=wandb", f"tracker.dir={folder}", "tracker.mode=offline"]


def rows_of(folder):
    """What was logged by step."""
    rows = (
        {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(folder)
    )
    return [row for row in rows if row]


def test_a_training_logs_its_epochs(composed, tmp_path):
    last = train(composed(*short_training(tmp_path), "device=cpu", config_name="train"))
    rows = rows_of(tmp_path)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[-1]["top1"] == last["top1"] and rows[-1]["loss"] == last["loss"]


def test_a_training_that_goes_on_goes_on_in_the_same_wandb_run(composed, tmp_path, monkeypatch):
    config = composed(*short_training(tmp_path), "device=cpu", config_name="train")
    with monkeypatch.context() as patched:

        def stopped(config, model, validation, epoch, micro_batch, ranks):
            if epoch == 2:
                raise KeyboardInterrupt
            return top1(config, model, validation, epoch, micro_batch, ranks)

        top1 = training._top1
        patched.setattr(training, "_top1", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    time.sleep(1)  # W&B names folders by the second
    train(config)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    assert len({record.run.run_id for record in records(tmp_path) if record.run.run_id}) == 1
    assert [row["epoch"] for row in rows_of(tmp_path)] == [1, 2]


@pytest.mark.parametrize("works", [True, False])
def test_a_training_that_fails_fails_with_a_tracker_too(composed, tmp_path, monkeypatch, works):
    if not works:
        monkeypatch.setattr(wandb, "init", None)
    bad = ["base_lr=1e30", "warmup_epochs=0", "device=cpu"]
    with pytest.raises(UserError, match=r"not finite|the loss is"):
        train(composed(*short_training(tmp_path), *bad, config_name="train"))


def test_a_report_is_logged_with_its_tables_and_figures(composed, tmp_path):
    config = composed("tracker=wandb", f"tracker.dir={tmp_path}", "tracker.mode=offline", config_name="report")
    picture = tmp_path / "figure4.png"
    Image.new("RGB", (20, 10)).save(picture)
    table = pd.DataFrame({"k": [0, 40], "top1": [96.5, 96.25]})
    tracking.log_report(config, {"table1": table}, {"figure4": picture})
    logged = {
        "/".join(item.nested_key): json.loads(item.value_json)
        for record in records(tmp_path)
        for item in record.history.item
    }
    assert logged["table1/_type"] == "table-file"
    assert logged["figure4/_type"] == "image-file"
    (stored,) = tmp_path.glob(f"wandb/offline-run-*/files/{logged['table1/path']}")
    assert json.loads(stored.read_text())["data"] == table.to_numpy().tolist()


def test_without_a_login_it_is_offline(tracked, tmp_path, monkeypatch, caplog):
    evaluate(tracked("tracker.mode=online"))
    assert "no login to W&B: logged offline" in caplog.text
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_mode_is_checked(tracked):
    with pytest.raises(UserError, match=r"tracker.mode=sometimes: choose one of online, offline, disabled"):
        tracking.check(tracked("tracker.mode=sometimes").tracker)
    with pytest.raises(UserError, match=r"tracker.dir=5: it must be a path"):
        tracking.check(tracked("tracker.dir=5").tracker)


@pytest.mark.parametrize("override", ["tracker.dir=/proc/nowhere", "tracker.project=a/b/c"])
def test_no_failure_of_wandb_ends_the_run(tracked, override, caplog):
    assert evaluate(tracked(override))["n_images"] == 40
    assert "W&B failed twice, this run is not logged" in caplog.text


def test_a_wandb_that_cannot_be_imported_whole_does_not_end_the_run(tracked, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb.apis.public", None)
    assert evaluate(tracked())["n_images"] == 40


def test_pictures_that_fail_do_not_matter(tracked, tmp_path, caplog):
    metrics = evaluate(tracked(), lambda model, split: 1 / 0)
    assert "no pictures of regions for W&B: division by zero" in caplog.text
    assert logged(tmp_path)[2]["top1"] == metrics["top1"]


@pytest.mark.parametrize("override", ["tracker=none", "tracker.mode=disabled"])
def test_by_default_and_disabled_nothing_is_started(composed, tmp_path, monkeypatch, override):
    monkeypatch.setattr(wandb, "init", lambda **options: pytest.fail("W&B was started"))
    wanted = [] if override == "tracker=none" else ["tracker=wandb", override]
    evaluate(composed("data.limit=4", "device=cpu", f"results_dir={tmp_path}", *wanted))
    assert len(list(tmp_path.iterdir())) == 1


def test_the_dashboard_is_saved_with_its_panels(wandb_server, composed, tmp_path, tracked):
    server = wandb_server()
    metrics = evaluate(tracked("tracker.mode=disabled", "data.limit=4"))
    config = composed(f"results_dir={tmp_path}/runs", config_name="dashboard")
    address = save_dashboard(config.tracker, config.name, config.results_dir)
    assert address.startswith(f"{server.url}/us/dhtm")
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("us", "dhtm", "DHTM")
    section = json.loads(view["spec"])["section"]
    panels = {part["name"]: part["panels"][0] for part in section["panelBankConfig"]["sections"]}
    assert list(panels) == ["Accuracy against FLOPs", "Throughput", "Tokens by layer", "Table 2", "Regions"]
    scatter, bars, lines = (list(panels.values())[i]["config"] for i in range(3))
    assert (scatter["xAxis"], scatter["yAxis"]) == ("summary:flops_g", "summary:top1")
    assert bars["metrics"] == ["images_per_s"]
    assert (lines["xAxis"], lines["metrics"]) == ("layer", ["tokens"])
    assert '"table2"' in json.dumps(panels["Table 2"])
    assert section["customRunColors"] == {metrics["run_id"]: METHODS["dhtm"][1]}


def test_without_a_login_there_is_no_dashboard(composed):
    config = composed(config_name="dashboard")
    with pytest.raises(UserError, match="no login to W&B: `wandb login` once, or set WANDB_API_KEY"):
        save_dashboard(config.tracker, config.name, config.results_dir)


@pytest.mark.stress
def test_a_dashboard_that_cannot_be_saved_says_why(composed, log_in):
    """W&B's client asks for a while."""
    log_in("http://127.0.0.1:9")
    config = composed(config_name="dashboard")
    with pytest.raises(UserError, match=r"tracker\.project=dhtm: W&B saved no dashboard"):
        save_dashboard(config.tracker, config.name, config.results_dir)
