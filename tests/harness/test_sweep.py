"""Sweeps: a run that fails does not end the others, on any launcher, and the state of every run is reported at any time."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from processes import start_script, wait_for
from safetensors.torch import save_file

from dhtm.harness import config as door
from dhtm.harness.core import devices
from dhtm.harness.core.errors import UserError
from dhtm.harness.models.backbones import Backbone

LAUNCHERS = sorted(file.stem for file in (ROOT / "configs/hydra/launcher").glob("*.yaml"))
SHORT = ["data.limit=4", "device=cpu"]
TOO_MANY = "k=100 merges in layer 7, but only N=96 tokens are left there"


@pytest.fixture
def swept(script):
    """Run scripts/evaluate.py -m with overrides; return its exit code and its output."""

    def run(*overrides):
        result = script("evaluate", "-m", *overrides, *SHORT)
        return result.returncode, result.stdout + result.stderr

    return run


def status(results, *more):
    command = [sys.executable, ROOT / "scripts/status.py", f"results_dir='{results}'", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def records(results):
    """Return the record of each run, in order."""
    return [json.loads(file.read_text()) for file in sorted(results.glob("sweeps/*/[0-9]*.json"))]


@pytest.mark.parametrize("name", ["benchmark", "train_micro"])
def test_scripts_without_a_results_directory_record_sweeps_in_the_default_one(composed, name):
    config = composed("hydra.job.name=any", config_name=name, return_hydra_config=True)
    assert config.hydra.callbacks.sweep.root == "results/runs"


def test_sweep_prints_the_state_of_each_run_and_the_same_command_repeats_the_failed_ones(swept, tmp_path):
    weights = tmp_path / "weights.safetensors"
    overrides = [
        "method.k=8", "seed=${method.k}", f"backbone.checkpoint=null,{weights}", "target.reduction_pct=null,99",
        "skip_unavailable=true", f"results_dir={tmp_path}/runs",
    ]  # fmt: skip
    code, output = swept(*overrides)
    assert code == 1
    rows = output[output.index("\nevaluate method.k=8") :].splitlines()
    assert rows[1].startswith("evaluate method.k=8 seed=${method.k} "), "as typed"
    assert [row.split()[2] for row in rows[2:6]] == ["done", "skipped", "failed", "failed"]
    (log,) = tmp_path.glob("runs/sweeps/evaluate-*/002.log")
    error = f"backbone.checkpoint={weights}: Path does not point to a file"
    assert error in rows[4] and rows[4].endswith(f"{os.path.relpath(log)})")
    assert error in log.read_text()
    assert rows[6] == "1 done, 1 skipped, 2 failed; the same command carries out the rest"
    assert status(tmp_path / "runs").stdout == "\n".join(rows[1:]) + "\n"

    save_file(Backbone("deit_micro", "deit_micro", 10).bare().state_dict(), weights)
    code, output = swept(*overrides)
    assert code == 0
    assert output.endswith("\n2 done (1 already finished), 2 skipped\n")
    assert re.search(r"^run 3 of 4; this sweep will be done at about \d\d:\d\d$", output, re.MULTILINE)
    assert [run.get("before") for run in records(tmp_path / "runs")] == [True, None, False, None]


def test_bug_in_a_method_is_one_line_in_the_table_and_a_traceback_in_the_log(swept, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(
        "import dhtm\n\nclass Broken(dhtm.DHTM):\n    def forward(self, *arguments):\n        return 1 / 0\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])  # the script inherits it
    code, output = swept("method._target_=broken.Broken,dhtm.DHTM", "method.k=8", f"results_dir={tmp_path}/runs")
    assert code == 1
    assert "method._target_=broken.Broken  failed  ZeroDivisionError: division by zero (log: " in output
    assert re.search("method._target_=dhtm.DHTM +done", output)
    assert "Traceback" not in output
    (log,) = tmp_path.glob("runs/sweeps/*/000.log")
    assert "Traceback" in log.read_text()


def test_error_that_every_run_would_meet_is_reported_once(swept):
    code, output = swept("method.k=8,9", "results_dir=/proc/nowhere")
    assert code == 1
    assert output.count("error: results_dir=/proc/nowhere: cannot write there") == 1 and output.count("\n") == 1


def test_running_sweep_is_not_started_again(swept, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    sweep = ("method.k=8,9", f"results_dir=~/{tmp_path.name}/é")  # Hydra accepts ~ and é only in quotes
    tmp_path /= "é"
    assert swept(*sweep)[0] == 0
    recorded = records(tmp_path)
    (folder,) = tmp_path.glob("sweeps/*")
    with FileLock(folder / "lock"):
        code, output = swept(*sweep)
    assert code == 1
    assert f"error: {folder}: this sweep is running already; make status shows it" in output
    assert records(tmp_path) == recorded


@pytest.mark.parametrize(
    "launcher",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        # test_slurm_receives_a_job_array uses the same plugin
        pytest.param(["hydra/launcher=submitit_local"], marks=pytest.mark.stress),
    ],
)
def test_launchers_run_two_processes_side_by_side(tmp_path, launcher):
    """Start a real process, not a forked one: those that a launcher starts import everything themselves."""
    overrides = ["method.k=8,9,100", *SHORT, f"results_dir={tmp_path}/runs", *launcher]
    command = [sys.executable, ROOT / "scripts/evaluate.py", "-m", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}  # two processes share the cores
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr and "validated against ConfigStore" not in result.stderr
    assert re.search(
        rf"k=8 +done .*\n.*k=9 +done .*\n.*k=100 +failed .*{TOO_MANY}.*\n2 done, 1 failed; the same", result.stdout
    )
    first, second, failed = records(tmp_path / "runs")
    assert (first["before"], second["before"], failed["state"]) == (False, False, "failed")
    assert max(first["started"], second["started"]) <= min(first["ended"], second["ended"]), "the two runs overlap"


def test_make_sweep_continues_after_an_experiment_with_failed_runs(tmp_path):
    """It stops if no run could start, because of a mistake in the overrides, and after a signal. Its scripts are stubs here."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/sweep.py", tmp_path / "scripts")
    stub = "import pathlib, sys; print(pathlib.Path(__file__).stem, *sys.argv[1:], flush=True)\n"
    for name in ("evaluate", "report", "status"):
        (tmp_path / f"scripts/{name}.py").write_text(stub)

    command = [sys.executable, "scripts/sweep.py", "hydra/launcher=joblib", "results_dir='runs'"]

    def make_sweep():
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return result.returncode, result.stdout.splitlines()

    names, given = ("figure1", "figure4", "table1", "table2"), "hydra/launcher=joblib results_dir='runs'"
    expected = [f"evaluate -m experiment={name} {given}" for name in names]
    expected += ["report results_dir='runs'", "status results_dir='runs'"]
    (tmp_path / "runs/sweeps/figure1").mkdir(parents=True)
    starts = "pathlib.Path('runs/sweeps/figure1/sweep.json').touch()\n"
    fails = "if 'figure1' in sys.argv[2]: sys.exit(1)\n"
    for more, outcome in (("", (0, expected)), (fails, (1, expected[:1])), (starts + fails, (1, expected))):
        (tmp_path / "scripts/evaluate.py").write_text(stub + more)
        assert make_sweep() == outcome
    asked = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "`python scripts/evaluate.py --help` explains" in asked.stdout and "results_dir='runs'" not in asked.stdout

    (tmp_path / "scripts/evaluate.py").write_text(stub + "import signal; signal.pause()\n")
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == f"{expected[0]}\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "" and process.returncode == 75, "no other script ran after the signal"


def test_slurm_receives_a_job_array(tmp_path):
    """sbatch is a stub that keeps a copy of the job script; the command waits for the jobs until a signal stops it."""
    for name in ("sbatch", "srun", "sacct"):
        (tmp_path / name).write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/script\necho Submitted batch job 7\n')
        (tmp_path / name).chmod(0o755)
    overrides = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.array_parallelism=2"]
    sweep = ["-m", "method.k=8,9,10", f"results_dir={tmp_path}/runs", *overrides]
    printed = tmp_path / "printed"
    process = start_script("evaluate", *sweep, stdout=printed, PATH=f"{tmp_path}:{os.environ['PATH']}")
    wait_for((tmp_path / "script").exists)
    assert status(tmp_path / "runs").stdout.endswith("\n3 waiting\n")
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 75
    assert printed.read_text().endswith("\n3 waiting; the same command carries out the rest\n")
    lines = (tmp_path / "script").read_text().splitlines()
    options = [
        "array=0-2%2", "job-name=evaluate", "partition=gpu", "gpus-per-node=1", "cpus-per-task=8", "mem=32GB", "time=240",
        "signal=USR2@120", "requeue", "nodes=1", "open-mode=append",
    ]  # fmt: skip
    assert {f"#SBATCH --{option}" for option in options} <= set(lines)
    (jobs,) = [line for line in lines if line.startswith("srun ")]
    assert f"{sys.executable} -u -m submitit.core._submit {tmp_path}/runs/sweeps/submitit/%j" in jobs


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_compose_and_a_missing_plugin_is_named(composed, name):
    config = composed(f"hydra/launcher={name}", return_hydra_config=True)
    assert config.hydra.launcher["_target_"].startswith(f"hydra_plugins.hydra_{name.split('_')[0]}_launcher.")
    extra = "ray" if name == "ray" else "harness"
    with pytest.raises(UserError, match=rf"hydra/launcher={name}: .* not installed; pip install -e '.\[{extra}\]'"):
        door._require_launcher(name, "hydra_plugins.hydra_missing_launcher.Launcher")


def test_each_process_takes_the_gpu_that_fewest_others_use(tmp_path, monkeypatch):
    """Start four processes with two GPUs; end one and start a fifth; start a sixth that sees only GPUs 3 and 1."""
    fork = multiprocessing.get_context("fork")
    taken, processes = fork.Queue(), []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.put)

    def work():
        for _ in range(2):  # two runs of one process share a GPU
            devices.take_gpu()
        signal.pause()

    def start():
        processes.append(fork.Process(target=work))
        processes[-1].start()
        return taken.get(timeout=30)

    assert [start() for _ in range(4)] == [0, 1, 0, 1]
    processes[1].kill()
    processes[1].join()
    assert start() == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert start() == 0, "GPU 3, which no process uses"
    for process in processes:
        process.kill()


def test_status_names_a_damaged_sweep(tmp_path):
    (tmp_path / "sweeps/table1-0").mkdir(parents=True)
    (tmp_path / "sweeps/table1-0/sweep.json").write_text('{"runs": [["a"')
    result = status(tmp_path)
    assert result.stdout.startswith(f"{tmp_path}/sweeps/table1-0: damaged")
    assert not result.stderr


def test_status_without_sweeps_is_a_one_line_error(tmp_path):
    result = status(tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "no sweep was started there" in result.stderr
    assert status(tmp_path, "limit=3").stderr == "error: limit: only results_dir=DIR can be set here\n"


def test_status_imports_nothing_slow():
    program = "import runpy, sys; runpy.run_path(sys.argv[1]); print('torch' in sys.modules, 'dhtm' in sys.modules)"
    command = [sys.executable, "-c", program, ROOT / "dhtm/harness/sweeps/status.py"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False False\n"
