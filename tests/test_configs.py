"""Every config composes, and names things that exist."""

import pytest
from conftest import ROOT
from hydra.utils import get_class, get_method

CONFIGS = ROOT / "configs"
GROUPS = [
    (folder.name, file.stem)
    for folder in sorted(CONFIGS.iterdir())
    if folder.is_dir()
    for file in sorted(folder.glob("*.yaml"))
]


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_choice_composes_and_names_what_exists(composed, group, name):
    config = composed(f"{group}={name}")
    if group == "experiment":
        assert config.experiment == name
        return
    assert config[group].name == name
    target = config[group].get("_target_")
    if group == "method":
        assert issubclass(get_class(target), __import__("dhtm").Reducer)
    elif target:
        assert callable(get_method(target))


@pytest.mark.parametrize("name", sorted(file.stem for file in CONFIGS.glob("*.yaml")))
def test_every_top_level_config_composes(composed, name):
    assert composed(config_name=name)


def test_common_keys(composed):
    config = composed()
    keys = {"batch_size", "device", "dtype", "seed", "force", "results_dir", "tracker", "backbone", "method", "data"}
    assert keys <= set(config)
    assert {"k", "layers"} <= set(config.method)
    assert {"root", "limit"} <= set(composed("data=imagenet").data)
    assert (config.backbone.name, config.method.name, config.data.name, config.tracker.name) == (
        "deit_micro", "dhtm", "digits", "none",
    )  # fmt: skip
    assert config.results_dir == "results/runs"


@pytest.mark.parametrize("name", sorted(file.stem for file in CONFIGS.glob("*.yaml")))
def test_help_explains_every_key(script, composed, name):
    result = script(name, "--help")
    assert result.returncode == 0, result.stderr
    explained, _, _ = result.stdout.partition("All of them as they are set now")
    for key in set(composed(config_name=name)) - {"experiment", "backbone", "method", "data"}:
        assert key in explained
    assert name != "evaluate" or "method: dhtm, random" in explained
