"""Check that commands and snippets of README.md and docs/ run, that links are valid, and that numbers match results/."""

import itertools
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
from conftest import ROOT, only
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser as torchrun_parser

from dhtm.harness.core.command import accept_method_lists
from dhtm.harness.models.backbones import Backbone
from dhtm.report.runs import load_runs
from dhtm.report.table2 import table2

PAGES = {page: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
EMBEDDED = ROOT / "results" / "embedded" / "tables"
needs_make = pytest.mark.skipif(not (ROOT / ".venv" / ".ready").exists(), reason="needs the .venv of `make setup`")

# The kind of a command is that of the first key here that it contains; for each kind there is a test.
KINDS = {
    "checkerboard": "method",
    "python scripts/report.py": "sweep",  # a sweep makes a report
    "--from ": "reproduce",  # tests/harness/test_reproduce.py
    "make setup TORCH=": "setup",  # tests/project/test_makefile.py
    "--help": "help",  # tests/project/test_configs.py
    "dashboard.py": "dashboard",
    "make sweep ": "composed",  # test_make_sweep runs one with overrides
    "make sweep": "sweep",
    "make status": "sweep",
    'make bench ARGS="backbone=deit_base': "composed",  # the one of deit_mini is run
    'make bench ARGS="backbone.arch': "composed",
    "make bench ": "script",
    "make bench": "bench",
    "make test": "test",
    # These differ only in values from a command that is run here or in the named test.
    "--cfg ": "script",
    "hydra/launcher=": "composed",  # tests/harness/test_sweep.py
    "premise.py": "composed",  # tests/report/test_premise.py
    "data=imagefolder": "composed",  # tests/harness/test_photographs.py
    "output=regions.png": "composed",
    "method.k=": "composed",
    "method.threshold=": "composed",
    "torchrun ": "script",
    "recipe=embedded method=": "composed",
    "method=patch_merger,": "composed",
    "amp=bfloat16": "composed",  # a training on ImageNet
    "init=pretrained": "script",
    "recipe=imagenette ": "composed",
    "target.reduction_pct=30 method=sit": "composed",
    "python scripts/": "script",
}


def blocks(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(kind):
    """Return the commands of one kind on all pages, without repetitions."""
    lines = dict.fromkeys(
        line for text in PAGES.values() for block in blocks(text, "bash") for line in block.splitlines()
    )
    return [line for line in lines if next((KINDS[part] for part in KINDS if part in line), None) == kind]


def run(*command, cwd=ROOT, **options):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900, check=False, **options)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return a folder of checkpoints with random weights, because tests cannot download pretrained ones."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(timm.create_model("deit_tiny_patch16_224").state_dict(), folder / "deit_tiny.pth")
    save_file(Backbone("deit_mini", "deit_mini", 10).bare().state_dict(), folder / "deit_mini.safetensors")
    return folder


@pytest.fixture(scope="module")
def imagenette(photos, tmp_path_factory):
    """Return a data root with the ten classes of Imagenette, each with ten copies of one photograph."""
    root, photograph = tmp_path_factory.mktemp("imagenette"), next((photos / "val").glob("*/*"))
    numbers = "01440764 02102040 02979186 03000684 03028079 03394916 03417042 03425413 03445777 03888257"
    for split, number, i in itertools.product(("train", "val"), numbers.split(), range(10)):
        folder = root / split / f"n{number}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(photograph, folder / f"{i}.JPEG")
    return root


@pytest.fixture
def shortened(photos, imagenette, weights, tmp_path):
    """Return a function that changes a command's arguments to small data and temporary folders."""
    paths = {"/imagenette": imagenette, "/imagenet": photos, "/photos": photos / "val", "/weights": weights}
    small = {
        "benchmark": [
            "backbone=deit_micro", "scaling.grids=[4]", "scaling.ks=[2]", "scaling.batch_sizes=[1]", "rounds=1", "batch_size=2",
            "device=cpu", "dtype=float32", f"output_dir={tmp_path}",
        ],
        "train_micro": [
            "stages=[{steps: 1, batch_size: 4, window: 8, difficulty: [0, 1]}]", f"output={tmp_path}/micro.safetensors",
        ],
        "train": ["epochs=1", "warmup_epochs=0", "batch_size=8", "device=cpu", f"checkpoints_dir={tmp_path}", "data.limit=8"],
        "visualize": [],
        "choose": ["data.limit=2", "rounds=1", *(f"{name}_dir={tmp_path}/{name}" for name in ("output", "results", "cache"))],
    }  # fmt: skip
    evaluation = ["data.limit=2", f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache"]

    def shorten(script, *arguments):
        if "--cfg" in arguments:
            return arguments
        for placeholder, path in paths.items():
            arguments = [arg.replace(f"={placeholder}", f"={path}") for arg in arguments]
        extra = list(small.get(script, evaluation))
        if "backbone=deit_small" in arguments:
            file = "deit_tiny.pth" if "data=imagenet" in arguments else "deit_mini.safetensors"
            arguments = [arg for arg in arguments if not arg.startswith("backbone")]
            extra += [f"backbone={Path(file).stem}", f"backbone.checkpoint={weights / file}"]
        if script == "benchmark":
            arguments = [re.sub(r"=\[(\d+),.*\]", r"=[\1]", arg) for arg in arguments if arg != "backbone=deit_mini"]
            extra += only("dhtm")
        if script in ("train", "choose"):
            arguments = [arg.split(",")[0] for arg in arguments]  # of several methods
        if script == "visualize":
            image = next((photos / "val").glob("*/*"))
            arguments = [arg.replace("output=", f"output={tmp_path}/") for arg in arguments]
            arguments = [f"image={image}" if arg.startswith("image=") else arg for arg in arguments]
        if "tracker=wandb" in arguments:
            extra += ["method.k=40", f"tracker.dir={tmp_path}", "tracker.mode=offline"]
        return [*arguments, *extra]

    return shorten


def test_every_command_is_run_by_a_test():
    assert not commands(None)
    assert all(map(commands, {*KINDS.values()}))


def parse_command(command):
    """Return the script that a command runs, the words before it, and its arguments."""
    words = shlex.split(command)
    if words[0] == "make":
        script = {"sweep": "evaluate", "bench": "benchmark"}[words[1]]
        arguments = shlex.split(words[2].removeprefix("ARGS="))
        return script, [], [arg for arg in arguments if not arg.startswith("output_dir=")]  # an option of the report
    position = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
    return Path(words[position]).stem, words[:position], words[position + 1 :]


@pytest.mark.parametrize("command", commands("script"))
def test_script_runs(command, shortened, ranks):
    name, before, arguments = parse_command(command)
    processes = 1
    if before[:1] == ["torchrun"]:
        processes = int(torchrun_parser().parse_args([*before[1:], name]).nproc_per_node)
    for result in ranks(processes, name, *shortened(name, *arguments)):
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", commands("composed"))
def test_arguments_compose(composed, command, monkeypatch):
    """Check that all choices of groups exist, and that the first run of a sweep gets the values."""
    name, _, arguments = parse_command(command)
    monkeypatch.setattr(sys, "argv", [arg for arg in arguments if arg != "-m"])
    if name == "visualize":
        accept_method_lists()
    expected = {}
    for override in OverridesParser.create().parse_overrides(sys.argv):
        key, group = override.key_or_group, ROOT / "configs" / override.key_or_group
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
        assert not group.is_dir() or all((group / f"{value}.yaml").exists() for value in values)
        expected[key] = str(values[0])
    overrides = [f"{key}={value}" for key, value in expected.items()]
    config = composed(*overrides, config_name=name, return_hydra_config=True)
    choices = config.hydra.runtime.choices
    assert expected == {key: str(choices[key] if key in choices else OmegaConf.select(config, key)) for key in expected}


def test_dashboard_requires_a_login(script, monkeypatch):
    """tests/harness/test_tracking.py runs the script with a login."""
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", "/nowhere")
    result = script("dashboard")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: no login to W&B: run `wandb login` once, or set WANDB_API_KEY\n"


@needs_make
def test_make_sweep(shortened, tmp_path):
    """Sweep over one run of one experiment. tests/harness/test_sweep.py checks the order of the experiments."""
    overrides = shortened("evaluate", "experiment=figure4", "method=dhtm", "method.k=40")
    result = run("make", "sweep", f"ARGS={shlex.join([*overrides, f'output_dir={tmp_path}'])}")
    assert result.returncode == 0, result.stderr
    tables = [f"tables/table{number}.{ending}" for number in (1, 2) for ending in ("csv", "md", "tex")]
    for file in (*tables, *(f"figures/figure{number}.{ending}" for number in (1, 4) for ending in ("pdf", "png"))):
        assert (tmp_path / file).stat().st_size > 1000
    assert "**DeiT-Tiny on ImageNet-1K" in result.stdout
    status = run("make", "--no-print-directory", "status", f"ARGS=results_dir={tmp_path}/runs").stdout
    assert status in result.stdout and " done" in status


@needs_make
def test_make_bench_and_make_test():
    """Check that they call scripts/benchmark.py, which is run above, and pytest."""
    bench = run("make", "-n", "--no-print-directory", "bench", "ARGS=rounds=3")
    assert bench.stdout == ".venv/bin/python scripts/benchmark.py rounds=3\n"
    assert "pytest" in run("make", "test", "ARGS=--version").stdout


def test_snippets_run(monkeypatch, tmp_path, capsys):
    """Run the snippets of each page one after the other, as in one session."""
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
    monkeypatch.chdir(tmp_path)  # docs/library.md writes a run that docs/results.md reads
    scopes = {}
    for page, text in PAGES.items():
        scope = scopes[page.stem] = {}
        for code in blocks(text, "python"):
            exec(code.replace("Digits(limit=200)", "Digits(limit=20)"), scope)
    readme, library, results = (scopes[name] for name in ("README", "library", "results"))
    assert readme["logits"].shape == (8, 1000)
    assert readme["merged"].shape == (2, 156, 384)
    assert library["program"].module()(torch.randn(2, 3, 224, 224)).shape == (2, 1000)
    assert library["regions"].grid == (14, 14)
    assert (library["metrics"]["n_images"], len(results["runs"])) == (20, 2), "the second run is the unmerged model's"
    printed = capsys.readouterr().out.split()
    assert [round(float(number), 2) for number in printed[:2]] == [3.34, 3.34]
    assert float(printed[-1]) == pytest.approx(library["metrics"]["top1"] / 100)


def test_adding_a_method_works_as_documented(tmp_path):
    """In a copy of the project, the page's two files and its command give the method a row in Table 2."""
    page = PAGES[ROOT / "docs" / "adding-a-method.md"]
    names = re.findall(r"^`((?:baselines|configs)/[\w/]+\.(?:py|yaml))`:$", page, re.MULTILINE)
    files = blocks(page, "py") + blocks(page, "yaml")
    assert sum(block.count("\n") for block in files) <= 40
    for folder in ("baselines", "configs", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, block in zip(names, files, strict=True):
        (tmp_path / name).write_text(block, encoding="utf-8")
    (evaluate,) = commands("method")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    result = run(sys.executable, *shlex.split(f"{evaluate} data.limit=20")[1:], cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    results = tmp_path / "results" / "runs"
    table = table2(load_runs(results), results)
    (row,) = table.data.query("data == 'digits' and method == 'checkerboard'").itertuples()
    assert row.flops_reduction_pct == pytest.approx(30, abs=1.5)
    assert 0 <= row.p <= 1
    assert "checkerboard" in table.markdown()


def test_copied_tables_and_numbers_match_the_results():
    pattern = r"<!-- ([\w ]+): from (\S+) -->\n\n(.*?)\n\n<!-- end of \1 -->"
    copied = [found for text in PAGES.values() for found in re.findall(pattern, text, re.DOTALL)]
    assert [name for name, _, _ in copied] == ["table 2", "table 1", "speed"]
    for _, file, shown in copied:
        assert shown in (ROOT / file).read_text(encoding="utf-8")
    runs = pd.read_csv(EMBEDDED / "runs.csv")
    top1 = runs[runs.layers.eq("4,7,11") & runs.k.eq(56)].groupby("method").top1.first()
    readme = " ".join(PAGES[ROOT / "README.md"].split())
    assert f"DHTM has a top-1 of {top1.dhtm:.2f}%" in readme
    assert f"at random has {top1.random:.2f}%" in readme


def table_below(page, heading):
    """Return the cells of the first table below a heading of a page: the header, then the rows, without marks for bold."""
    text = PAGES[ROOT / "docs" / page].partition(f"## {heading}\n")[2]
    lines = re.search(r"^(\|.*\|\n)+", text, re.MULTILINE)[0].replace("**", "").splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])]


def shows(cell, values):
    """Return whether a cell shows the one value, rounded, the range of several, or a dash for none."""
    bounds = [min(values), max(values)] if len(values) > 1 else values
    shown = [] if cell == "–" else cell.split(" to ")
    return shown == [f"{value:.{len(text.partition('.')[2])}f}" for value, text in zip(bounds, shown, strict=True)]


BY_TARGET_AND_METHOD = [
    ("evidence.md", "On photographs, DHTM+ changes the outputs least", "imagenette/tables/runs.csv", "kl"),
    ("dense.md", "What merging costs a segmentation", "dense/dense.csv", "miou"),
]


@pytest.mark.parametrize(("page", "heading", "file", "column"), BY_TARGET_AND_METHOD)
def test_values_by_target_and_method_match_the_results(page, heading, file, column):
    """Compare off-the-shelf runs, and of DHTM only those in layers 4, 7 and 11."""
    runs = pd.read_csv(ROOT / "results" / file)
    runs = runs[~runs.trained & (runs.method.ne("dhtm") | runs.layers.eq("4,7,11"))]
    names = {"DHTM+": "dhtm_plus", "DHTM+ threshold": "dhtm_threshold", "K-Medoids": "k_medoids", "DPC-KNN": "dpc_knn"}
    (_, *methods), *rows = table_below(page, heading)
    for target, *cells in rows:
        for method, cell in zip(methods, cells, strict=True):
            found = runs[runs.method.eq(names.get(method, method.lower()))]
            assert len(found), f"{method} has no runs"
            found = found[found.targets.eq(float(target.rstrip("%")))]
            assert shows(cell, found[column].tolist()), (target, method)


def test_ablation_of_the_evidence_matches_the_results():
    runs = (
        pd.read_csv(ROOT / "results" / "ablation" / "ablation.csv")
        .fillna({"options": ""})
        .query("data == 'imagenette'")
    )
    plus = [[value] for value in ("", "proportional_attention=False", "linkage=mean")]
    features = ["similarity=euclidean", "similarity=manhattan", "similarity=kl", "features=keys"]
    rows = [("dhtm", "4,7,11", [""]), ("dhtm", "4,7,11", ["proportional_attention=True"])]
    rows += [("dhtm_plus", "all", options) for options in plus] + [("dhtm_plus", "4,7,10", [""])]
    rows += [("dhtm_plus", "all", options) for options in (features, ["inflect=0"], ["connectivity=all"])]
    (_, *targets), *shown = table_below("evidence.md", "Where it comes from")
    for (method, layers, options), (label, *cells) in zip(rows, shown, strict=True):
        for target, cell in zip(targets, cells, strict=True):
            found = runs[runs.method.eq(method) & runs.layers.eq(layers) & runs.target.eq(float(target.rstrip("%")))]
            assert shows(cell, found.kl[found.options.isin(options)].tolist()), (label, target)


def test_values_with_thresholds_match_the_results():
    runs = pd.read_csv(ROOT / "results" / "thresholds" / "thresholds.csv")
    data = {"photographs": "imagenette", "embedded task": "digits"}
    _, *rows = table_below("thresholds.md", "What it changes")
    for i, row in enumerate(rows):
        label = rows[i - i % 2][0]  # each label is for two rows
        method, where = label.split(", ")
        found = runs[runs.data.eq(data[where]) & runs.target.eq(float(row[1].rstrip("%")))].set_index("label")
        without, thresholds = found.loc[method], found.loc[f"{method}, thresholds"]
        assert shows(row[2], [without.kl]) and shows(row[3], [thresholds.kl]), (label, row)
        assert shows(row[4], [thresholds.kl_p]) or (row[4] == "<0.0001" and thresholds.kl_p < 0.0001), (label, row)


def test_evidence_has_the_only_significant_difference_from_lotm_and_tome():
    folders = (EMBEDDED, ROOT / "results" / "imagenette" / "tables")
    rows = pd.concat(pd.read_csv(folder / "table2.csv") for folder in folders)
    rows = rows[rows.reference.eq("DHTM") & rows.method.isin(["LoTM", "ToMe OTS"]) & rows.p_holm.lt(0.05)]
    (found,) = rows.itertuples()
    assert (found.data, found.target, found.method, found.group) == ("digits", 40, "LoTM", "w/o train")
    assert f"against {found.top1:.2f}%, {found.difference:+.2f} points" in PAGES[ROOT / "docs" / "evidence.md"]


def test_configuration_page_names_every_choice():
    page = PAGES[ROOT / "docs" / "configuration.md"]
    for group in ("backbone", "data", "experiment", "method", "tracker"):
        assert all(f"`{file.stem}`" in page for file in (ROOT / "configs" / group).glob("*.yaml"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_short_and_their_links_are_valid(page):
    assert len(PAGES[page].splitlines()) <= (200 if page.name == "README.md" else 150)
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", PAGES[page]):
        file = page.parent / target if target else page
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings]
