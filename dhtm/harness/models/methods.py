"""From a config of the group ``method`` to a patched model with the weights that belong to it."""

import copy
import inspect
import json
from pathlib import Path

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import dhtm
from dhtm.harness.core.errors import UnavailableError, UserError, one_line, path_given
from dhtm.harness.models.backbones import bare_backbone, fit, load_backbone
from dhtm.harness.runs.store import write_atomically
from dhtm.reducer import Reducer
from dhtm.vit import patch

# Keys of the group that are not arguments of the method's class.
_ABOUT = ("name", "knob", "weights")
SHIPPED = Path(dhtm.__file__).parent.parent / "results" / "embedded" / "weights"


def build_reducer(method: DictConfig) -> Reducer:
    """The reducer that a config of the group ``method`` names."""
    if not isinstance(method.knob, str | None):
        raise UserError(f"method.knob={method.knob}: it must be the name of an option, or null")
    knob = method.get(method.knob) if method.knob else None
    if isinstance(knob, bool):  # which Python would take for a number
        raise UserError(f"method.{method.knob}={knob}: it must be a number")
    try:
        return instantiate({key: value for key, value in method.items() if key not in _ABOUT}, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise UserError(f"method={method.name}: {one_line(cause)}") from error


def knobs(method: DictConfig) -> dict:
    """A method's options as configured, all but its layers."""
    options = OmegaConf.to_container(method, resolve=True)
    return {key: value for key, value in options.items() if key not in (*_ABOUT, "_target_", "layers")}


def unusual(method: DictConfig) -> str:
    """The options in which a method differs from its class's defaults, to name a run by."""
    signature = inspect.signature(type(build_reducer(method))).parameters
    defaults = {name: option.default for name, option in signature.items()}
    return " ".join(f"{name}={value}" for name, value in knobs(method).items() if value != defaults[name])


def pretrained(backbone: DictConfig) -> VisionTransformer:
    """The trained model that a config of the group ``backbone`` names; shared, see :func:`load_backbone`."""
    return load_backbone(**{key: value for key, value in backbone.items() if key != "name"})


def patched(backbone: nn.Module, backbone_config: DictConfig, method: DictConfig) -> VisionTransformer:
    """A copy of a backbone, patched with a method."""
    model, reducer = copy.deepcopy(backbone), build_reducer(method)
    try:
        return patch(model, reducer)
    except (ValueError, TypeError) as error:
        raise UserError(f"backbone={backbone_config.name}, method={method.name}: {one_line(error)}") from error


def load_model(config: DictConfig, method: DictConfig) -> tuple[VisionTransformer, Path | None]:
    """The backbone of a config patched with a method, off the shelf or with the weights trained for both.

    Args:
        config: with backbone, seed, checkpoints_dir and allow_untrained.
        method: of the config group; its ``weights`` are null, "trained" or a file.

    Returns:
        The model, and the file of the trained weights; None off the shelf.

    Raises:
        UnavailableError: nobody has trained the weights.
        UserError: weights cannot be read, belong to something else, or are needed and not given.
    """
    file = _find(config, method)
    if file is None:
        backbone = pretrained(config.backbone)
        torch.manual_seed(config.seed)  # of parameters that no training has seen
        model = patched(backbone, config.backbone, method)
        if any(True for _ in model.reducer.parameters()) and not config.allow_untrained:
            raise UserError(
                f"method={method.name} has parameters of its own and method.weights=null gives none: set "
                "method.weights=trained or a file, or allow_untrained=true to run it with random ones"
            )
        return model, None
    model = patched(bare_backbone(config.backbone.architecture, config.backbone.num_classes), config.backbone, method)
    state, about = _read(file)
    source = f"method.weights={file}"
    for key, wanted in identity(config.backbone, method).items():
        if about.get(key) != wanted:
            raise UserError(f"{source}: trained with {key}={about.get(key)}, not {key}={wanted}")
    if method.weights == "trained" and about.get("epoch") != about.get("epochs"):
        raise UserError(
            f"{file}: trained for {about.get('epoch')} of {about.get('epochs')} epochs so far; the command that began it goes "
            f"on, or take them as they are, method.weights={file}"
        )
    fit(model, state, source, f"{config.backbone.name} with {method.name}")
    return model, file


def identity(backbone: DictConfig, method: DictConfig) -> dict[str, str]:
    """What trained weights belong to, as strings: backbone, method, layers and every option that changes the result."""
    options = {key: value for key, value in knobs(method).items() if key not in ("backend", "seed")}
    layers = OmegaConf.to_container(method, resolve=True)["layers"]
    named = {"backbone": backbone.architecture, "num_classes": backbone.num_classes, "method": method.name}
    return {key: json.dumps(value).strip('"') for key, value in {**named, "layers": layers, **options}.items()}


def place(backbone: DictConfig, method: DictConfig) -> Path:
    """Where weights for a backbone and a method lie, below a folder of weights; without an ending."""
    knob = f"_{method.knob}_{method[method.knob]}" if method.knob else ""
    return Path(backbone.name) / f"{method.name}{knob}"


def save_weights(model: nn.Module, config: DictConfig, dtype: torch.dtype, epoch: int, file: Path) -> None:
    """Write a patched model's parameters, with what they belong to and how they were trained; atomically.

    Args:
        config: of the training.
        dtype: in which they are written.
        epoch: after how many of the training's epochs this is.
    """
    state = {key: value.to("cpu", dtype).contiguous() for key, value in model.state_dict().items()}
    history = {"epoch": epoch, "epochs": config.epochs, "init": config.init, "data": config.data.name}
    about = {**identity(config.backbone, config.method), **{key: str(value) for key, value in history.items()}}
    # Not by save_file, whose files nobody else may read.
    write_atomically(file, lambda path: path.write_bytes(save(state, about)))


def _find(config: DictConfig, method: DictConfig) -> Path | None:
    """The file of weights that a method's config asks for."""
    if method.weights is None:
        return None
    if not isinstance(method.weights, str):
        raise UserError(f"method.weights={method.weights}: it must be null, trained or a file")
    if method.weights != "trained":
        return path_given(method.weights, "method.weights")
    name = place(config.backbone, method)
    own = path_given(config.checkpoints_dir, "checkpoints_dir") / name / "last.safetensors"
    shipped = SHIPPED / f"{name}.safetensors"
    for file in (own, shipped):
        if file.is_file():
            return file
    if config.allow_untrained:
        return None
    raise UnavailableError(
        f"method={method.name}: no weights trained for {name.name} in {config.backbone.name} ({own} is not there); train "
        "them, scripts/train.py with the same backbone and method, give a file, method.weights=FILE, or run it untrained, "
        "allow_untrained=true"
    )


def _read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as content:
            names = content.keys()
            return {name: content.get_tensor(name) for name in names}, content.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"method.weights={file}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"method.weights={file}: not weights of scripts/train.py, or damaged ({one_line(error)})"
        ) from error
