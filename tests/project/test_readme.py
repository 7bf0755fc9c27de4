"""Every command and every line of code in the README, run; and its figures are the committed ones."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
SHORT_TRAINING = "stages=[{steps: 1, batch_size: 4, window: 8, difficulty: [0, 1]}]"

needs_make = pytest.mark.skipif(
    not (ROOT / ".venv" / ".ready").exists(), reason="needs the .venv that `make setup` builds"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """For each DeiT a checkpoint of random weights: pretrained ones are not to be had in a test."""
    folder = tmp_path_factory.mktemp("weights")
    for size in ("tiny", "small"):
        model = timm.create_model(f"deit_{size}_patch16_224")
        torch.save(model.state_dict(), folder / f"deit_{size}.pth")
    return folder


@pytest.fixture
def shortened(photos, weights, tmp_path):
    """A command's arguments on small data, with results in a folder of the test's own."""

    def shorten(arguments):
        script = arguments[0]
        arguments = [
            argument.replace("/imagenet", str(photos)).replace("/weights", str(weights)) for argument in arguments
        ]
        if script.endswith("train_micro.py"):
            return [*arguments, SHORT_TRAINING, "data.limit=4", f"output={tmp_path}/micro.safetensors"]
        if script.endswith("benchmark.py"):
            small = ["backbone=deit_micro" if "backbone=" in argument else argument for argument in arguments]
            grown = ["scaling.grids=[4]", "scaling.ks=[2]", "scaling.batch_sizes=[1]"]
            slow = ("lotm", "dpc_knn", "k_medoids", "patch_merger", "sinkhorn", "sit", "token_mergence", "random")
            dropped = [f"~methods.{name}" for name in slow]
            return [*small, *grown, *dropped, "rounds=1", "batch_size=2", f"output_dir={tmp_path}"]
        if script.endswith("report.py"):
            (tmp_path / "runs").mkdir()
            return [script, f"results_dir={tmp_path}/runs", f"output_dir={tmp_path}"]
        if "data=imagenet" in arguments or "data=imagefolder" in arguments:
            arguments = ["backbone=deit_tiny" if "," in argument else argument for argument in arguments]
            if not any(argument.startswith("backbone.checkpoint") for argument in arguments):
                arguments = ["backbone=deit_tiny" if "backbone=" in argument else argument for argument in arguments]
                arguments.append(f"backbone.checkpoint={weights}/deit_tiny.pth")
        if "scripts/train.py" in arguments:
            arguments = [argument.split(",")[0] for argument in arguments]  # of several methods the first
            limit = "data.limit=8" if "data=imagenet" in arguments else "data.limit=32"
            epochs = ["epochs=1", "warmup_epochs=0", "batch_size=8", "device=cpu"]
            return [*arguments, *epochs, limit, f"checkpoints_dir={tmp_path}"]
        if "tracker=wandb" in arguments:
            arguments += ["method.k=20,40", f"tracker.dir={tmp_path}", "tracker.mode=offline"]
        if "--help" not in arguments:
            arguments += ["data.limit=2", f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache"]
        return arguments

    return shorten


def on_a_launcher(command):
    return "hydra/launcher=" in command  # which are tried in test_sweep.py


@pytest.mark.parametrize("command", [command for command in COMMANDS if on_a_launcher(command)])
def test_launchers_are_composed(command):
    words = shlex.split(command)
    overrides = shlex.split(words[2].removeprefix("ARGS=")) if words[0] == "make" else words[3:]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("evaluate", overrides, return_hydra_config=True)
    assert config.hydra.launcher["_target_"].startswith("hydra_plugins.")


def is_script(command):
    again = "--from" in command  # tests/test_reproduce.py runs it on a run that is there
    own_test = "checkerboard" in command or command in ("python scripts/report.py", "python scripts/dashboard.py")
    return command.startswith(("python ", "torchrun ")) and not (own_test or again or on_a_launcher(command))


@pytest.mark.parametrize("command", [command for command in COMMANDS if is_script(command)])
def test_script(command, shortened, script):
    arguments = shortened(shlex.split(command)[1:])
    if command.startswith("torchrun") or "tracker=wandb" in arguments:  # which begin processes of their own
        torchrun = ["-m", "torch.distributed.run", "--standalone"] if command.startswith("torchrun") else []
        result = subprocess.run(
            [sys.executable, *torchrun, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
    else:
        result = script(Path(arguments[0]).stem, *arguments[1:])
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr


def test_the_dashboard_wants_a_login(script, monkeypatch):
    """There it ends here; what it does with one is in test_tracking.py."""
    assert "python scripts/dashboard.py" in COMMANDS
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", "/nowhere")
    result = script("dashboard")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: no login to W&B: `wandb login` once, or set WANDB_API_KEY\n"


@needs_make
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make sweep") and not on_a_launcher(c)])
def test_make_sweep(command, shortened, tmp_path):
    overrides = shlex.split(command)[2:]
    arguments = shlex.split(overrides[0].removeprefix("ARGS=")) if overrides else []
    # Every experiment once on the embedded model, where one budget of Figure 1 is enough; one run on ImageNet.
    arguments += ["experiment=table1", "method.k=40"] if overrides else ["target.reduction_pct=20"]
    arguments = " ".join([*shortened(["evaluate", *arguments])[1:], f"output_dir={tmp_path}"])
    result = subprocess.run(
        ["make", "sweep", f"ARGS={arguments}"], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert result.returncode == 0, result.stderr
    tables = [f"tables/table{number}.{ending}" for number in (1, 2) for ending in ("csv", "md", "tex")]
    for file in (*tables, *(f"figures/figure{number}.{ending}" for number in (1, 4) for ending in ("pdf", "png"))):
        assert (tmp_path / file).stat().st_size > 1000
    assert "**DeiT-Tiny on ImageNet-1K" in result.stdout
    told = subprocess.run(
        ["make", "--no-print-directory", "status", f"ARGS=results_dir={tmp_path}/runs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert told in result.stdout and " done" in told


@needs_make
@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make bench")])
def test_make_bench(command, shortened, tmp_path):
    overrides = shlex.split(command)[2:]
    arguments = shlex.split(overrides[0].removeprefix("ARGS=")) if overrides else ["backbone=deit_micro"]
    arguments = " ".join([*shortened(["benchmark.py", *arguments])[1:], "device=cpu", "dtype=float32"])
    result = subprocess.run(
        ["make", "bench", f"ARGS={arguments}"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "speed.png").exists()


@needs_make
def test_make_test():
    assert "make test" in COMMANDS
    result = subprocess.run(
        ["make", "test", "ARGS=--collect-only -n 0 tests/test_readme.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "test_readme.py" in result.stdout


def test_every_command_is_of_a_kind_that_is_run_here():
    kinds = (
        "python scripts/",
        "torchrun ",
        "make sweep",
        "make status",  # after the sweeps
        "make bench",
        "make test",
        "make setup TORCH=",
    )  # the last in test_makefile.py
    assert all(command.startswith(kinds) for command in COMMANDS)
    assert {"make sweep", "make test"} <= set(COMMANDS)


def test_code(monkeypatch, capsys):
    """All blocks one after the other, as in one session."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, pretrained=False))
    scope = {}
    for kind, code in BLOCKS:
        if kind == "python":
            exec(code, scope)
    assert scope["logits"].shape == (8, 1000)
    assert scope["program"].module()(torch.randn(2, 3, 224, 224)).shape == (2, 1000)
    assert scope["merged"].shape == (2, 156, 384)
    assert round(float(capsys.readouterr().out), 2) == 3.34


def test_adding_a_method_is_what_the_readme_says(tmp_path):
    """Its two files go into a copy of the project, its two commands give the method its rows."""
    section = README.partition("## Adding a method")[2].partition("\n## ")[0]
    names = re.findall(r"`((?:baselines|configs)/[\w/]+\.(?:py|yaml))`", section)
    files = [block for kind, block in re.findall(r"^```(py|yaml)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)]
    assert names == ["baselines/checkerboard.py", "configs/method/checkerboard.yaml"]
    assert sum(block.count("\n") for block in files) <= 40
    for folder in ("dhtm", "baselines", "configs", "scripts", "results/paper"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, block in zip(names, files, strict=True):
        (tmp_path / name).write_text(block, encoding="utf-8")
    evaluate, report = re.search(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL).group(1).splitlines()
    for command in (f"{evaluate} data.limit=40", report):
        result = subprocess.run(
            [sys.executable, *shlex.split(command)[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=300,
            check=False, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    rows = pd.read_csv(tmp_path / "results/tables/table2.csv").set_index(["data", "method"])
    ours = rows.loc[("digits", "checkerboard")]
    assert ours.flops_reduction_pct == pytest.approx(30, abs=1.5)
    assert 0 <= ours.p <= 1
    assert "checkerboard" in (tmp_path / "results/tables/table2.md").read_text(encoding="utf-8")


def test_the_results_are_the_committed_ones():
    shown = re.search(r"<!-- table 2:.*?-->\n(.*?)<!-- end of table 2 -->", README, re.DOTALL).group(1).strip()
    assert shown
    assert shown in (ROOT / "results" / "embedded" / "tables" / "table2.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- results:.*?-->\n(.*?)<!-- end of results -->", README, re.DOTALL).group(1).strip()
    table = (ROOT / "results" / "embedded" / "tables" / "table1.md").read_text(encoding="utf-8")
    assert shown
    assert shown in table
    shown = re.search(r"<!-- speed:.*?-->\n(.*?)<!-- end of speed -->", README, re.DOTALL).group(1).strip()
    assert shown
    assert shown in (ROOT / "results" / "speed" / "cpu" / "speed.md").read_text(encoding="utf-8")
    runs = pd.read_csv(ROOT / "results" / "embedded" / "tables" / "runs.csv")
    runs = runs[runs.targets.isna()].set_index(["method", "k"])
    assert f"at random keeps {runs.loc[('random', 56), 'top1']:.2f}%" in README


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
