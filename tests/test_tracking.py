"""W&B: offline runs are really written, and W&B's failures stop nothing."""

import json
import time

import pandas as pd
import pytest
import wandb
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from dhtm.harness import tracking, training
from dhtm.harness.errors import UserError
from dhtm.harness.evaluate import evaluate
from dhtm.harness.training import train

MINIMAL = {
    "backbone": "b", "method": "m", "knob": None, "knobs": {}, "trained": False, "run_id": "r", "experiment": None,
}  # fmt: skip


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


def test_an_offline_run_holds_config_and_metrics(composed, tmp_path):
    config = composed(
        "tracker=wandb",
        f"tracker.dir={tmp_path}",
        "tracker.mode=offline",
        "data.limit=4",
        f"results_dir={tmp_path}/runs",
    )
    metrics = evaluate(config)
    tracking.log_run(config, metrics)
    logged, described = {}, {}
    for record in records(tmp_path):
        for item in record.summary.update:
            logged[item.key] = json.loads(item.value_json)
        for item in record.run.config.update:
            described[item.key] = json.loads(item.value_json)
    assert logged["top1"] == metrics["top1"]
    assert logged["flops_g"] == metrics["flops_g"]
    assert described["method"]["k"] == 40


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


def test_without_a_login_it_is_offline(composed, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = composed("tracker=wandb", f"tracker.dir={tmp_path}")
    with tracking._run(config.tracker, name="x") as run:
        assert run.settings._offline


def test_failing_to_start_is_a_warning(composed, tmp_path, monkeypatch, caplog):
    def fail(**options):
        raise wandb.errors.CommError("no route")

    monkeypatch.setattr(wandb, "init", fail)
    config = composed("tracker=wandb", f"tracker.dir={tmp_path}", "tracker.mode=offline")
    tracking.log_run(config, MINIMAL)
    assert "nothing is logged" in caplog.text


def test_mode_is_checked(composed, tmp_path):
    config = composed("tracker=wandb", f"tracker.dir={tmp_path}", "tracker.mode=sometimes")
    with pytest.raises(UserError, match=r"tracker.mode=sometimes: choose one of online, offline, disabled"):
        tracking.check(config.tracker)


@pytest.mark.parametrize("override", ["tracker.dir=/proc/nowhere", "tracker.project=a/b/c"])
def test_no_failure_of_wandb_ends_the_run(composed, tmp_path, override):
    config = composed("tracker=wandb", f"tracker.dir={tmp_path}", "tracker.mode=offline", override)
    metrics = MINIMAL | {"odd": object()}
    tracking.log_run(config, metrics)


def test_by_default_there_is_no_tracker(composed, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **options: pytest.fail("W&B was started"))
    tracking.log_run(composed(), MINIMAL)
