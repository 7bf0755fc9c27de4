"""`make setup`: when it runs, what it installs, and how it fails. A stub that logs its arguments replaces Python and pip."""

import importlib.metadata
import os
import shlex
import shutil

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from test_docs import commands, run

INHERITED = ("ARGS", "MAKEFLAGS", "MFLAGS", "PYTHON", "TORCH")
STUB = """#!/bin/sh
# Replaces every Python: makes a .venv whose python is this stub, and logs the arguments of pip.
case "$*" in
  -c*) exit 0 ;;
  "-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python"; echo "$*" >> log ;;
  *pip*) echo "$*" >> log; [ ! -e fail ] ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """Return a function that runs `make setup` in a copy of the project, and returns its result and the log of the stub."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name, script in (("python3.98", STUB), ("python3.99", STUB), ("python2", "#!/bin/sh\nexit 1\n")):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    # Under `make test`, the tests inherit the variables of that command.
    environment = {name: value for name, value in os.environ.items() if name not in INHERITED}

    def make_setup(*arguments):
        (tmp_path / "log").write_text("")
        result = run("make", "setup", *arguments, cwd=tmp_path, env=environment)
        return result, (tmp_path / "log").read_text()

    return make_setup


def test_set_up_runs_once_and_again_when_stale(setup, tmp_path):
    assert "-e .[dev]" in setup("PYTHON=./python3.99")[1]
    assert setup()[1] == ""
    (tmp_path / "pyproject.toml").touch()
    os.utime(tmp_path / ".venv" / ".ready", (0, 0))  # clearly older: file times within one clock tick are equal
    assert "-e .[dev]" in setup()[1], "the first call's Python is used: the stub logs, the machine's python3 would not"


def test_failed_set_up_is_not_marked_ready(setup, tmp_path):
    setup("PYTHON=./python3.99")
    (tmp_path / "fail").touch()
    assert setup("TORCH=torch==2.11.0")[0].returncode != 0
    assert not (tmp_path / ".venv" / ".ready").exists()


def test_another_torch_is_installed_unconstrained_and_remembered(setup, tmp_path):
    (command,) = commands("setup")
    torch = shlex.split(command)[2].removeprefix("TORCH=")
    assert f" {torch} -e .[dev]" in setup("PYTHON=./python3.99", f"TORCH={torch}")[1]
    constraints = (tmp_path / ".venv" / "constraints.txt").read_text()
    assert "timm==" in constraints
    # An older torch contradicts other constraints too: 2.11 requires setuptools below 82, 2.6 another sympy.
    assert not any(f"\n{name}==" in constraints for name in ("torch", "torchvision", "triton", "setuptools", "sympy"))
    (tmp_path / ".venv" / ".ready").unlink()
    assert f" {torch} -e .[dev]" in setup()[1], "remembered"
    assert " torch>=2.9,<2.12 -e" in setup("TORCH=torch>=2.9,<2.12")[1], "not taken as redirections"
    assert " torch" not in setup("TORCH=")[1], "the tested version again"
    assert "\ntorch==" in (tmp_path / ".venv" / "constraints.txt").read_text()


def test_another_python_builds_a_new_environment(setup):
    setup("PYTHON=./python3.99")
    assert "venv --clear .venv" in setup("PYTHON=./python3.98")[1]
    assert setup("PYTHON=./python3.98")[1] == ""


def test_missing_or_old_python_is_reported(setup):
    message = "choose another, for example: make setup PYTHON=python3.12"
    assert f"python3.97 was not found; {message}" in setup("PYTHON=python3.97")[0].stdout
    old = f"./python2 is too old, Python 3.10 or newer is required; {message}"
    assert old in setup("PYTHON=./python2")[0].stdout


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_can_be_installed_with_every_python(python):
    """Check which Python the packages that are installed here in the constrained version require."""
    installed = {package.name: package for package in importlib.metadata.distributions()}
    version = f"{python}.99"
    checked = 0
    for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]:
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate({"python_full_version": version})
        package = installed.get(requirement.name)
        if applies and package and requirement.specifier.contains(package.version):
            checked += 1
            assert version in SpecifierSet(package.metadata["Requires-Python"] or ""), line
    assert checked > 100


def test_help_lists_every_declared_target():
    targets = set((ROOT / "Makefile").read_text().partition(".PHONY:")[2].splitlines()[0].split()) - {"force"}
    listed = {line.split()[1] for line in run("make", "help").stdout.splitlines() if line.startswith("  make ")}
    assert listed == targets
