"""Every command and every Python snippet of README.md and docs/ runs; their tables, numbers and links are right."""

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
import transformers
from conftest import ROOT
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file

from dhtm.harness.models.backbones import Backbone

PAGES = {page: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
EMBEDDED = ROOT / "results" / "embedded" / "tables"
needs_make = pytest.mark.skipif(not (ROOT / ".venv" / ".ready").exists(), reason="needs the .venv of `make setup`")

# Which test runs a command: the first of these that it contains.
KINDS = {
    "checkerboard": "method",
    "python scripts/report.py": "method",
    "--from ": "reproduce",  # tests/harness/test_reproduce.py
    "make setup TORCH=": "setup",  # tests/project/test_makefile.py
    "hydra/launcher=": "launcher",  # composed here, and run in tests/harness/test_sweep.py
    "dashboard.py": "dashboard",
    "make sweep ": "sweep with overrides",
    "make sweep": "sweep",
    "make status": "status",
    "make bench ": "bench with overrides",
    "make bench": "bench",
    "make test": "test",
    "torchrun ": "script",
    "python scripts/": "script",
}


def blocks(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(kind):
    """The commands of all pages that one test runs, each once."""
    lines = dict.fromkeys(
        line for text in PAGES.values() for block in blocks(text, "bash") for line in block.splitlines()
    )
    return [line for line in lines if next((KINDS[part] for part in KINDS if part in line), None) == kind]


def run(*command, cwd=ROOT, **options):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900, check=False, **options)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of random weights for each DeiT: a test cannot download pretrained ones."""
    folder = tmp_path_factory.mktemp("weights")
    for size in ("tiny", "small"):
        torch.save(timm.create_model(f"deit_{size}_patch16_224").state_dict(), folder / f"deit_{size}.pth")
    save_file(Backbone("deit_mini", "deit_mini", 10).bare().state_dict(), folder / "deit_mini.safetensors")
    return folder


@pytest.fixture(scope="module")
def imagenette(photos, tmp_path_factory):
    """The ten classes of Imagenette, each with ten copies of one photograph."""
    root = tmp_path_factory.mktemp("imagenette")
    for number in ("01440764", "02102040", "02979186", "03000684", "03028079", "03394916", "03417042", "03425413", "03445777",
                   "03888257"):  # fmt: skip
        for split in ("train", "val"):
            folder = root / split / f"n{number}"
            folder.mkdir(parents=True)
            for i in range(10):
                shutil.copy(next((photos / "val").glob("*/*")), folder / f"{i}.JPEG")
    return root


@pytest.fixture
def shortened(photos, imagenette, weights, tmp_path):
    """Shorten a command's arguments: small data, and results in a folder of the test's own."""

    def shorten(script, *arguments):
        is_mini = any("imagenette" in one for one in arguments)
        places = {"/imagenette": imagenette, "/imagenet": photos, "/photos": photos / "val", "/weights": weights}
        for place, own in places.items():
            arguments = [one.replace(f"={place}", f"={own}") for one in arguments]
        photographs = any(one.startswith("data.root=") for one in arguments)
        if script == "train_micro":
            short = "stages=[{steps: 1, batch_size: 4, window: 8, difficulty: [0, 1]}]"
            return [*arguments, short, "data.limit=4", f"output={tmp_path}/micro.safetensors"]
        if script == "benchmark":
            slow = "lotm dpc_knn k_medoids patch_merger sinkhorn sit token_mergence random pitome atc dhtm_plus dhtm_threshold"
            small = ["scaling.grids=[4]", "scaling.ks=[2]", "scaling.batch_sizes=[1]", "rounds=1", "batch_size=2"]
            small += ["backbone=deit_micro", "device=cpu", "dtype=float32", f"output_dir={tmp_path}"]
            others = [re.sub(r"=\[(\d+),.*\]", r"=[\1]", one) for one in arguments if not one.startswith("backbone=")]
            return [*others, *small, *(f"~methods.{name}" for name in slow.split())]
        if photographs and not is_mini and not any(one.startswith("backbone.checkpoint") for one in arguments):
            arguments = ["backbone=deit_tiny" if one.startswith("backbone=") else one for one in arguments]
            arguments.append(f"backbone.checkpoint={weights}/deit_tiny.pth")
        if script == "visualize":
            outputs = [
                f"output={tmp_path}/{one.removeprefix('output=')}" for one in arguments if one.startswith("output=")
            ]
            others = [one for one in arguments if not one.startswith(("output=", "backbone=", "image="))]
            image = [f"image={next((photos / 'val').glob('*/*'))}"] if len(others) < len(arguments) - 1 else []
            return [*others, *outputs, *image]
        if script == "premise":
            return [*arguments, "n_images=4", "methods=[dhtm]", "distances=[1]", f"output_dir={tmp_path}"]
        if script == "train":
            first = [one.split(",")[0] for one in arguments]  # of several methods
            limit = "data.limit=8" if photographs else "data.limit=32"
            small = ["epochs=1", "warmup_epochs=0", "batch_size=8", "device=cpu", f"checkpoints_dir={tmp_path}"]
            return [*first, *small, limit]
        if script == "choose":
            arguments = [one.split(",")[0] for one in arguments]  # of several methods
            arguments += ["rounds=1", f"output_dir={tmp_path}"]
        if "tracker=wandb" in arguments:
            arguments += ["method.k=20,40", f"tracker.dir={tmp_path}", "tracker.mode=offline"]
        if not {"--help", "--cfg"} & set(arguments):
            arguments += ["data.limit=2", f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache"]
        return arguments

    return shorten


def test_every_command_is_run_by_a_test():
    assert not commands(None)
    assert {"make sweep", "make test"} <= {*commands("sweep"), *commands("test")}
    assert all(map(commands, {*KINDS.values()}))


@pytest.mark.parametrize("command", commands("script"))
def test_script(command, shortened, script):
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
    name = Path(words[at]).stem
    arguments = shortened(name, *words[at + 1 :])
    if "torchrun" in words or "tracker=wandb" in words:  # these start processes of their own
        torchrun = ["-m", "torch.distributed.run", "--standalone", *words[1:at]] if "torchrun" in words else []
        result = run(sys.executable, *torchrun, words[at], *arguments)
    else:
        result = script(name, *arguments)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", commands("launcher"))
def test_launchers_are_composed(command):
    words = shlex.split(command)
    overrides = shlex.split(words[2].removeprefix("ARGS=")) if words[0] == "make" else words[3:]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("evaluate", overrides, return_hydra_config=True)
    assert config.hydra.launcher["_target_"].startswith("hydra_plugins.")


def test_the_dashboard_requires_a_login(script, monkeypatch):
    """With a login it is tested in tests/harness/test_tracking.py."""
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", "/nowhere")
    result = script("dashboard")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: no login to W&B: run `wandb login` once, or set WANDB_API_KEY\n"


@needs_make
def test_make_sweep(shortened, tmp_path):
    """One of its experiments; tests/harness/test_sweep.py looks at their order."""
    overrides = ["experiment=figure4", "method=dhtm,random", "method.k=0,40"]
    result = run("make", "sweep", f"ARGS={shlex.join([*shortened('evaluate', *overrides), f'output_dir={tmp_path}'])}")
    assert result.returncode == 0, result.stderr
    tables = [f"tables/table{number}.{ending}" for number in (1, 2) for ending in ("csv", "md", "tex")]
    for file in (*tables, *(f"figures/figure{number}.{ending}" for number in (1, 4) for ending in ("pdf", "png"))):
        assert (tmp_path / file).stat().st_size > 1000
    assert "**DeiT-Tiny on ImageNet-1K" in result.stdout
    shown = run("make", "--no-print-directory", "status", f"ARGS=results_dir={tmp_path}/runs").stdout
    assert shown in result.stdout and " done" in shown


@pytest.mark.parametrize("command", commands("sweep with overrides") + commands("bench with overrides"))
def test_overrides_of_make(command, shortened, script):
    """By the script behind it."""
    overrides = shlex.split(shlex.split(command)[2].removeprefix("ARGS="))
    if command.startswith("make bench"):
        result = script("benchmark", *shortened("benchmark", *overrides))
    else:
        result = script("evaluate", "-m", *shortened("evaluate", "experiment=table1", "method.k=40", *overrides))
    assert result.returncode == 0, result.stderr


@needs_make
def test_make_bench():
    """The script behind it; tests/harness/test_benchmark.py runs that."""
    assert (
        run("make", "-n", "--no-print-directory", "bench", "ARGS=rounds=3").stdout
        == ".venv/bin/python scripts/benchmark.py rounds=3\n"
    )


@needs_make
def test_make_test():
    result = run("make", "test", "ARGS=--version")
    assert result.returncode == 0, result.stderr
    assert "pytest" in result.stdout


def test_snippets(monkeypatch, tmp_path, capsys):
    """The snippets of a page, one after the other as in one session; the README's model is that of the library page."""
    create = timm.create_model

    def create_offline(name, pretrained=False, **options):  # the embedded model's weights need no download
        return create(name, pretrained=pretrained and name == "deit_micro", **options)

    monkeypatch.setattr(timm, "create_model", create_offline)
    from_pretrained = {
        "AutoModel": transformers.Dinov2Model(transformers.Dinov2Config(hidden_size=48, num_attention_heads=3)),
        "AutoModelForImageClassification": transformers.AutoModelForImageClassification.from_config(
            transformers.TimmWrapperConfig(architecture="deit_small_patch16_224", num_labels=7)
        ),
    }
    for name, model in from_pretrained.items():
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda *_, model=model: model)
    monkeypatch.chdir(tmp_path)  # docs/library.md leaves a run there that docs/results.md reads
    scopes = {}
    for page, text in PAGES.items():
        scope = scopes[page.stem] = {}
        for code in blocks(text, "python"):
            exec(code, scope)
    readme, library, results = (scopes[name] for name in ("README", "library", "results"))
    assert readme["logits"].shape == (8, 1000)
    assert readme["merged"].shape == (2, 156, 384)
    assert library["program"].module()(torch.randn(2, 3, 224, 224)).shape == (2, 1000)
    assert library["regions"].grid == (14, 14)
    assert (library["metrics"]["n_images"], len(results["runs"])) == (200, 2), "the unmerged model's too"
    printed = capsys.readouterr().out.split()
    assert [round(float(number), 2) for number in printed[:2]] == [3.34, 3.34]
    assert float(printed[-1]) == pytest.approx(library["metrics"]["top1"] / 100)


def test_adding_a_method_takes_what_its_page_says(script, tmp_path):
    """In a copy of the project, the two files of the page and its two commands give the method its row."""
    page = PAGES[ROOT / "docs" / "adding-a-method.md"]
    names = re.findall(r"^`((?:baselines|configs)/[\w/]+\.(?:py|yaml))`:$", page, re.MULTILINE)
    files = blocks(page, "py") + blocks(page, "yaml")
    assert sum(block.count("\n") for block in files) <= 40
    for folder in ("baselines", "configs", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, block in zip(names, files, strict=True):
        (tmp_path / name).write_text(block, encoding="utf-8")
    evaluate, report = blocks(page, "bash")[0].splitlines()
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    result = run(sys.executable, *shlex.split(f"{evaluate} data.limit=40")[1:], cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    folders = [f"results_dir={tmp_path}/results/runs", f"output_dir={tmp_path}/results"]
    result = script(Path(report.split()[1]).stem, *folders)
    assert result.returncode == 0, result.stderr
    rows = pd.read_csv(tmp_path / "results/tables/table2.csv").set_index(["data", "method"])
    ours = rows.loc[("digits", "checkerboard")]
    assert ours.flops_reduction_pct == pytest.approx(30, abs=1.5)
    assert 0 <= ours.p <= 1
    assert "checkerboard" in (tmp_path / "results/tables/table2.md").read_text(encoding="utf-8")


def test_tables_and_numbers_are_the_committed_ones():
    pattern = r"<!-- ([\w ]+): from (\S+) -->\n\n(.*?)\n\n<!-- end of \1 -->"
    copied = [found for text in PAGES.values() for found in re.findall(pattern, text, re.DOTALL)]
    assert [name for name, _, _ in copied] == ["table 2", "table 1", "speed"]
    for _, file, shown in copied:
        assert shown in (ROOT / file).read_text(encoding="utf-8")
    runs = pd.read_csv(EMBEDDED / "runs.csv")
    top1 = runs[runs.layers.eq("4,7,11") & runs.k.eq(56)].groupby("method").top1.first()
    readme = " ".join(PAGES[ROOT / "README.md"].split())
    assert f"at k = 56 DHTM keeps {top1.dhtm:.2f}%" in readme
    assert f"at random keeps {top1.random:.2f}%" in readme


@pytest.mark.parametrize("group", ["backbone", "data", "experiment", "method", "tracker"])
def test_the_configuration_page_names_every_choice(group):
    page = PAGES[ROOT / "docs" / "configuration.md"]
    assert all(f"`{file.stem}`" in page for file in (ROOT / "configs" / group).glob("*.yaml"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_short_and_their_links_lead_somewhere(page):
    assert len(PAGES[page].splitlines()) <= (200 if page.name == "README.md" else 150)
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", PAGES[page]):
        file = page.parent / target if target else page
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings]
