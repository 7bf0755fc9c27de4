"""The door: turn Hydra's composed config into the typed, frozen objects that everything below takes.

Each function takes the config of one script. Pydantic checks types and ranges and makes the objects of nested settings; an
invalid value raises a :class:`UserError` that names its key. Hydra reports the runs of a sweep to :class:`SweepCallback`.
"""

import copy
import dataclasses
import importlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar

import yaml
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError, validate_call
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dhtm.harness.benchmark import Benchmark
from dhtm.harness.choose import Choice
from dhtm.harness.core.command import command, register_resolvers
from dhtm.harness.core.devices import exact
from dhtm.harness.core.errors import UnavailableError, UserError, explain
from dhtm.harness.core.files import lock, require_writable, write_json
from dhtm.harness.core.ranks import Ranks
from dhtm.harness.data.splits import choice_images
from dhtm.harness.locality import Premise
from dhtm.harness.models.backbones import Backbone, weights_sha256
from dhtm.harness.models.cost import Target, solve, solve_thresholds
from dhtm.harness.models.methods import UNMERGED, Method
from dhtm.harness.runs.evaluate import Evaluation
from dhtm.harness.runs.provenance import VERSION
from dhtm.harness.sweeps.records import SweepRecords
from dhtm.harness.training.trainer import Training

register_resolvers()  # here, because scripts and a launcher's processes import this module before they compose configs

T = TypeVar("T")


def evaluation(config: DictConfig) -> Evaluation:
    """Return the run that a config of scripts/evaluate.py describes, with the method's knob solved for the target.

    Raises:
        UnavailableError: the target is out of reach.
        UserError: a value does not fit its key.
    """
    values = _values(config)
    del values["skip_unavailable"]
    options = values.pop("options")
    if options is not None and not isinstance(options, dict):
        raise UserError(f"options={options}: give options of the method, options='{{linkage: size}}'")
    values["method"] |= options or {}
    target = _convert(Target, values.pop("target"), "target")
    run = _build(Evaluation, values)
    if run.method.knob != "threshold" or target == Target():
        method, target_pct = solve(run.backbone, run.method, target)
        return dataclasses.replace(run, method=method, target_pct=target_pct)
    return _with_thresholds(run, target)


def _with_thresholds(run: Evaluation, target: Target) -> Evaluation:
    """Find a method's thresholds for a target, or read them from ``results_dir`` if they were found before."""
    device, split = Ranks(run.device).device, run.data.choice_split
    model = copy.deepcopy(run.backbone.load()).to(device)
    images = _images_for_thresholds(run, split, model)
    found_on = {"split": split, "n_images": len(images), "sha256": sha256(images.cpu().numpy().tobytes()).hexdigest()}
    key = sha256(repr([VERSION, weights_sha256(model), run.method, target, found_on]).encode()).hexdigest()[:16]
    file = run.results_dir / ".thresholds" / f"{key}.json"
    require_writable(file.parent, f"results_dir={run.results_dir}")
    with lock(file.with_suffix(".lock"), f"waiting for another process to write the thresholds to {file}"):
        if not file.exists():
            with exact(device):
                method, target_pct = solve_thresholds(run.backbone, model, run.method, target, images)
            write_json(file, {"threshold": method.options["threshold"], "target_pct": target_pct})
    found = json.loads(file.read_text())
    method = dataclasses.replace(run.method, options={**run.method.options, "threshold": found["threshold"]})
    return dataclasses.replace(run, method=method, target_pct=found["target_pct"], thresholds_from=found_on)


def _images_for_thresholds(run: Evaluation, split: str, model: VisionTransformer) -> Tensor:
    """Return images of a split that has other images than the run's own."""
    what = f"method={run.method.name}: its thresholds are found on images other than data.split={run.data.split}"
    try:
        images = choice_images(run.data, split, model)
        found, own = (run.data.open(name, None).fingerprint for name in (split, run.data.split))
    except UserError as error:
        raise UnavailableError(f"{what} ({error})") from error
    if split != run.data.split and found == own:
        raise UnavailableError(f"{what}; give a data.root that holds a folder for each split")
    return images


def evaluation_of_run(folder: Path, overrides: Sequence[str]) -> Evaluation:
    """Return the run of a directory with overrides such as "device=cpu".

    Raises:
        UserError: the directory has no readable config, or an override is not one of its keys.
    """
    file = folder / "config.yaml"
    with explain(f"{file}: missing or damaged", remedy="; give a finished run's directory"):
        config = OmegaConf.create(yaml.safe_load(file.read_text(encoding="utf-8")))
        OmegaConf.set_struct(config, True)
    with explain(f"{' '.join(overrides)}: not in the run's config", remedy="; give key=value"):
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides)))
    return _build(Evaluation, _values(config) | {"tracker": {"name": "none"}})


def choice(config: DictConfig) -> Choice:
    """Return the choice that a config of scripts/choose.py describes."""
    values = _values(config)
    methods = _named_methods(values.pop("methods"), values["seed"])
    own = {name: values.pop(name) for name in Choice.__dataclass_fields__.keys() & values.keys()}
    evaluation = _build(Evaluation, values | {"method": UNMERGED})
    return _convert(Choice, own | {"evaluation": evaluation, "methods": methods})


def premise(config: DictConfig) -> Premise:
    """Return the measurement that a config of scripts/premise.py describes."""
    return _build(Premise, _solve_knobs(_values(config)))


def training(config: DictConfig) -> Training:
    """Return the training that a config of scripts/train.py describes."""
    values = _values(config)
    target = _convert(Target, values.pop("target"), "target")
    run = _build(Training, values)
    return dataclasses.replace(run, method=solve(run.backbone, run.method, target)[0])


def benchmark(config: DictConfig) -> Benchmark:
    """Return the benchmark that a config of scripts/benchmark.py describes."""
    values = _values(config)
    del values["seed"]  # used only by methods, which refer to it
    target = values.pop("target")
    reductions = target["reduction_pct"] if isinstance(target, dict) else None
    targets = [target | {"reduction_pct": one} for one in reductions] if isinstance(reductions, list) else [target]
    groups = {
        "targets": [_convert(Target, one, "target") for one in targets],
        "methods": {name: _method(given) for name, given in values["methods"].items()},
    }
    return _convert(Benchmark, values | groups)


def call(function: Callable[..., T], config: DictConfig) -> T:
    """Call a function with the values of a config, checked against its annotations, and methods solved for the target."""
    values = _values(config)
    return _build(validate_call(function), _solve_knobs(values) if "target" in values else values)


def _solve_knobs(values: dict[str, Any]) -> dict[str, Any]:
    """Replace the backbone's settings and the methods' names by objects, with knobs solved for ``target``."""
    target = _convert(Target, values.pop("target"), "target")
    backbone = _convert(Backbone, values["backbone"], "backbone")
    methods = _named_methods(values["methods"], values["seed"])
    solved = {name: solve(backbone, method, target)[0] for name, method in methods.items()}
    return values | {"backbone": backbone, "methods": solved}


def _named_methods(names: Sequence[str], seed: int) -> dict[str, Method]:
    """Return methods by name, each as method=NAME composes it."""
    return {name: _method(_values(compose("evaluate", [f"method={name}", f"seed={seed}"]).method)) for name in names}


def _values(config: DictConfig) -> dict[str, Any]:
    """Return a config as plain values, with ~ expanded in every string that starts with it."""
    return _expand_home(OmegaConf.to_container(config, resolve=True))


def _expand_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _expand_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand_home(item) for item in value]
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    with explain(value, RuntimeError, "; write the path in full"):
        return str(Path(value).expanduser())


def _convert(cls: Callable[..., T], values: Any, group: str = "") -> T:
    if not isinstance(values, dict):
        raise UserError(f"{group}={values}: it has keys of its own, set {group}.KEY=VALUE")
    try:
        return cls(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, filter(None, [group, *first["loc"]])))
        raise UserError(f"{key}={first['input']}: {first['msg']}") from error


def _build(cls: Callable[..., T], values: dict[str, Any]) -> T:
    """Make an object from a config's values, with its groups as objects and the method's knob as given."""
    makers = {"method": _method, "data": _data, "tracker": _tracker}
    made = {key: makers[key](value) for key, value in values.items() if key in makers and isinstance(value, dict)}
    return _convert(cls, values | made)


def _method(values: dict[str, Any]) -> Method:
    about = {key: values.pop(key) for key in ("name", "knob", "checkpoint")}
    return _convert(Method, about | {"target": values.pop("_target_"), "options": values}, "method")


def _data(values: dict[str, Any]) -> Any:
    target = values.pop("_target_")
    with explain(f"data._target_={target}: cannot be imported"):
        data = resolve_name(target)
    return _convert(data, values, "data")


def _tracker(values: dict[str, Any]) -> dict[str, Any] | None:
    return None if values.pop("name") == "none" else values


class SweepCallback(Callback):
    """Hydra's callback that records sweeps; configs/hydra/default.yaml names it.

    Args:
        root: where the runs' results go.
    """

    def __init__(self, root: Any):
        self.root, self.records = root, SweepRecords()

    @command(resumes=False)  # Hydra would turn an exception into a warning
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Record the runs of the sweep; raise at once for settings that every run would fail with."""
        hydra = config.hydra
        _require_launcher(hydra.runtime.choices["hydra/launcher"], hydra.launcher["_target_"])
        keys = ("results_dir", "checkpoints_dir")
        setting = next((key for key in keys if key in config), "hydra.callbacks.sweep.root")
        if not isinstance(self.root, str):
            raise UserError(f"{setting}={self.root}: it must be a path")
        # With interpolations as typed, because their values may differ from run to run.
        overrides = OmegaConf.to_container(hydra.overrides.task)
        typed, runs = " ".join([hydra.job.name, *overrides]), _runs(hydra.sweeper.params or {}, overrides)
        name = config.get("experiment") or hydra.job.name
        self.records.start(Path(_expand_home(self.root)), setting, name, typed, runs)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Record that a run has started."""
        if config.hydra.mode == RunMode.MULTIRUN:
            self.records.start_run(config.hydra.job.num, config.get("device"))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Record how a run ended. If it failed, hide that from Hydra, which would end the sweep."""
        if config.hydra.mode == RunMode.MULTIRUN:
            outcome = job_return._return_value  # the property ``return_value`` raises exceptions
            job_return.return_value, job_return.status = None, JobStatus.COMPLETED
            self.records.end_run(outcome)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Exit with code 1 unless every run is done, or skipped as the config allows."""
        self.records.finish()


def _runs(params: Mapping[str, str], overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each run of a sweep, as Hydra's basic sweeper sets them.

    Args:
        params: the sweep that the config asks for: the values of each key, separated by commas.
        overrides: those of the command line.
    """
    given = [f"{key}={values}" for key, values in params.items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    choices = {}  # a later override replaces an earlier one of the same key
    for override in parser.parse_overrides([*given, *overrides]):
        swept = override.is_sweep_override()
        values = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
        key = override.get_key_element()
        choices[key] = [f"{key}={value}" for value in values]
    return [list(run) for run in itertools.product(*choices.values())]


def _require_launcher(name: str, target: str) -> None:
    """Raise a UserError that names what to install if the plugin of a launcher, whose class is ``target``, is missing."""
    module = target.rpartition(".")[0]
    try:
        importlib.import_module(module)
    except ImportError:
        extra = "ray" if name == "ray" else "harness"
        raise UserError(f"hydra/launcher={name}: {module} is not installed; pip install -e '.[{extra}]'") from None
