"""Every config composes, and names things that exist."""

import pytest
from conftest import ROOT
from hydra.utils import get_class, get_method
from omegaconf import OmegaConf

from dhtm import Reducer
from dhtm.harness.models.backbones import bare_backbone

CONFIGS = ROOT / "configs"
GROUPS = [
    (folder.name, file.stem)
    for folder in sorted(CONFIGS.iterdir())
    if folder.is_dir()
    for file in sorted(folder.glob("*.yaml"))
]


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_choice_composes_and_names_what_exists(composed, group, name):
    config = composed(f"{group}={name}", config_name="train" if group == "recipe" else "evaluate")
    if group == "recipe":
        assert config.epochs > 0
        return
    if group == "experiment":
        assert config.experiment == name
        return
    if group == "method":  # variants, dhtm_all say, are the same method
        assert name.startswith(config.method.name)
        assert issubclass(get_class(config.method["_target_"]), Reducer)
        assert config.method.weights in (None, "trained")
        assert config.method.knob is None or config.method.knob in config.method
        return
    assert config[group].name == name
    target = config[group].get("_target_")
    if group == "backbone":
        assert bare_backbone(config.backbone.architecture, config.backbone.num_classes)
    elif target:
        assert callable(get_method(target))


@pytest.mark.parametrize("name", sorted(file.stem for file in CONFIGS.glob("*.yaml")))
def test_every_top_level_config_composes(composed, name):
    assert composed(config_name=name)


def test_the_training_protocol_is_that_of_which_tokens_to_use(composed):
    """Haurum et al. 2023, as METHODS lists it."""
    config = composed(config_name="train")
    protocol = {
        "init": "pretrained", "epochs": 30, "optimiser": "adamw", "weight_decay": 0.05, "base_lr": 1e-3,
        "warmup_epochs": 20, "drop_path": 0.1, "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0,
        "auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25, "augment": True,
    }  # fmt: skip
    assert {key: config[key] for key in protocol} == protocol
    assert composed("recipe=scratch", config_name="train").epochs == 300


def test_table_2_and_figure_1_are_swept_at_equal_cost():
    params = {
        name: OmegaConf.load(CONFIGS / "experiment" / f"{name}.yaml").hydra.sweeper.params
        for name in ("table2", "figure1")
    }
    learned = ["sinkhorn", "patch_merger", "sit", "token_mergence"]
    trained = ["dpc_knn_trained", "k_medoids_trained", "tome_trained"]
    off_the_shelf = ["tome", "lotm", "dhtm", "dpc_knn", "k_medoids"]
    assert set(params["table2"].method.split(",")) == {"unmerged", *learned, *trained, *off_the_shelf}
    shown = ["dhtm", "dhtm_all", "tome", "lotm", "sit", *trained]
    assert set(params["figure1"].method.split(",")) == {"unmerged", *shown}
    assert params["figure1"]["target.reduction_pct"] == "10,20,30,40,50,60"


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
    for key in set(composed(config_name=name)) - {"experiment", "backbone", "method", "data", "recipe"}:
        assert key in explained
    assert name != "evaluate" or "method: dhtm, dhtm_all" in explained
