"""The Makefile's set-up: when it runs, with what, and what a failure leaves; pip is a stub that writes down its arguments."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT
from test_readme import COMMANDS

INHERITED = ("ARGS", "MAKEFLAGS", "MFLAGS", "PYTHON", "TORCH")
STUB = """#!/bin/sh
# Stands for every Python: makes a .venv whose python is this stub, and notes what pip was asked for.
case "$*" in
  -c*) exit 0 ;;
  "-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python"; echo "$*" >> log ;;
  *pip*) echo "$*" >> log; [ ! -e fail ] ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """Run make setup in a copy; returns its result and what was noted meanwhile."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("python3.98", "python3.99"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"

    def run(*arguments):
        log.write_text("")
        command = ["make", "setup", *arguments]
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60, "check": False}
        # Run by `make test`, the tests inherit what it was called with.
        environment = {name: value for name, value in os.environ.items() if name not in INHERITED}
        result = subprocess.run(command, env=environment, **options)
        return result, log.read_text()

    return run


def test_set_up_runs_once_and_again_when_stale(setup, tmp_path):
    _, log = setup("PYTHON=./python3.99")
    assert "-e .[dev]" in log
    assert setup()[1] == ""
    (tmp_path / "pyproject.toml").touch()
    # Older than what it is made from: file times of one clock tick count as equal, hence a time in the past.
    subprocess.run(["touch", "-d", "2020-01-01", tmp_path / ".venv" / ".ready"], check=True)
    assert "-e .[dev]" in setup("PYTHON=./python3.99")[1]


def test_a_failed_set_up_is_not_ready(setup, tmp_path):
    setup("PYTHON=./python3.99")
    (tmp_path / "fail").touch()
    result, _ = setup("PYTHON=./python3.99", "TORCH=torch==2.11.0")
    assert result.returncode != 0
    assert not (tmp_path / ".venv" / ".ready").exists()


def test_another_torch_is_installed_unconstrained_and_remembered(setup, tmp_path):
    (command,) = [command for command in COMMANDS if command.startswith("make setup")]
    torch = command.partition("TORCH=")[2].strip("'")
    _, log = setup("PYTHON=./python3.99", f"TORCH={torch}")
    assert f" {torch} -e .[dev]" in log
    constraints = (tmp_path / ".venv" / "constraints.txt").read_text()
    assert "timm==" in constraints
    # Nor are those that an older torch contradicts: 2.11 wants setuptools below 82, 2.6 another sympy.
    assert not any(f"\n{name}==" in constraints for name in ("torch", "torchvision", "triton", "setuptools", "sympy"))
    (tmp_path / ".venv" / ".ready").unlink()
    assert f" {torch} -e .[dev]" in setup("PYTHON=./python3.99")[1], "remembered"
    assert " torch>=2.9,<2.12 -e" in setup("PYTHON=./python3.99", "TORCH=torch>=2.9,<2.12")[1], "no shell redirection"
    assert " torch" not in setup("PYTHON=./python3.99", "TORCH=")[1], "back to the tested one"
    assert "\ntorch==" in (tmp_path / ".venv" / "constraints.txt").read_text()


def test_another_python_makes_the_environment_anew(setup):
    setup("PYTHON=./python3.99")
    assert "venv --clear .venv" in setup("PYTHON=./python3.98")[1]
    assert setup("PYTHON=./python3.98")[1] == ""


def test_a_chosen_python_is_remembered(setup, tmp_path):
    setup("PYTHON=./python3.99")
    assert (tmp_path / ".venv" / ".python").read_text().strip() == "./python3.99"
    (tmp_path / ".venv" / ".ready").unlink()
    log = setup()[1]
    assert "-m venv .venv" in log, "by the stub: the machine's own python3 writes nothing down"
    assert "-e .[dev]" in log


def test_no_python_and_an_old_one_are_told(setup, tmp_path):
    result, _ = setup("PYTHON=python3.97")
    assert "python3.97 is not there: make setup PYTHON=python3.12" in result.stdout
    (tmp_path / "python2").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python2").chmod(0o755)
    result, _ = setup("PYTHON=./python2")
    assert "./python2 is too old: Python 3.10 or newer is needed" in result.stdout
