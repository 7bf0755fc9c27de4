"""Every config composes, names things that exist, and explains its keys."""

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from dhtm.harness import config as door
from dhtm.report.registry import SERIES
from dhtm.report.runs import read_published

CONFIGS = ROOT / "configs"
SCRIPTS = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
GROUPS = [(file.parent.name, file.stem) for file in sorted(CONFIGS.glob("*/*.yaml")) if file.parent.name != "hydra"]


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_choice_composes_and_builds(composed, group, name):
    if group == "recipe":
        assert door.training(composed("recipe=" + name, config_name="train")).epochs > 0
        return
    config = composed(f"{group}={name}", *(["data.root=/nowhere"] if name.startswith("image") else []))
    run = door.evaluation(config)
    if group == "experiment":
        assert run.experiment == name
    elif group == "method":  # variants, such as dhtm_all, begin with their method's name
        assert name.startswith(run.method.name)
        assert run.method.reducer()
        assert run.method.checkpoint in (None, "trained")
        assert run.method.knob is None or run.method.knob in run.method.options
    elif group == "tracker":
        assert (run.tracker is None) == (name == "none")
    else:
        assert getattr(run, group).name == name
        assert group != "backbone" or run.backbone.bare()


def test_help_explains_every_key(composed, script):
    for name in SCRIPTS:
        config = composed(config_name=name, return_hydra_config=True)
        text = config.hydra.help.template
        groups = {"hydra", "experiment", "backbone", "method", "methods", "data", "recipe", "tracker"}
        assert all(key in text for key in set(config) - groups), name
        assert ("\nrecipe: embedded, " in text) == (name == "train"), "the help lists only the groups of this script"
    result = script("evaluate", "--help")
    assert result.returncode == 0, result.stderr
    assert "dhtm, dhtm_all" in result.stdout and "  batch_size:" in result.stdout


def test_training_protocol_is_the_published_one(composed):
    """Compare it with "Which Tokens to Use?" (Haurum et al., 2023)."""
    config = composed(config_name="train")
    protocol = {
        "init": "pretrained", "epochs": 30, "optimiser": "adamw", "weight_decay": 0.05, "base_lr": 1e-3,
        "warmup_epochs": 20, "drop_path": 0.1, "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0,
        "auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25, "augment": True,
    }  # fmt: skip
    assert {key: config[key] for key in protocol} == protocol
    assert composed("recipe=scratch", config_name="train").epochs == 300


def test_experiments_cover_every_row_and_line(composed):
    names = "table1", "figure4", "table2", "figure1"
    sweeps = [OmegaConf.load(CONFIGS / f"experiment/{name}.yaml").hydra.sweeper.params for name in names]
    table1, figure4, table2, figure1 = sweeps
    assert table1["method.k"] == figure4["method.k"] == ",".join(map(str, read_published("table1").k.unique()))
    rows = [series for name, series in SERIES.items() if name != "DHTM all"]  # a line of Figure 1 only
    found = {}
    for name in {*table2.method.split(","), *figure1.method.split(",")}:
        method = composed(f"method={name}").method
        layers = method.layers if method.layers == "all" else ",".join(map(str, method.layers))
        found[name] = method.name, layers, method.checkpoint == "trained"
    for params, wanted in ((table2, rows), (figure1, [series for series in SERIES.values() if series.label])):
        swept = {found[name] for name in params.method.split(",")}
        assert {(series.method, series.layers, series.trained) for series in wanted} <= swept
