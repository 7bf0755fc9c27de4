"""The Vision Transformers that can be evaluated: any timm architecture, and the embedded ``deit_micro``."""

import copy
import functools
import hashlib
from pathlib import Path

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, load_state_dict, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import dhtm
from dhtm.harness.core.errors import UserError, one_line, path_given

MICRO_WEIGHTS = Path(dhtm.__file__).parent / "assets" / "deit_micro.safetensors"

# timm's register_model looks these up by this name.
default_cfgs = generate_default_cfgs(
    {
        "deit_micro": {
            "file": str(MICRO_WEIGHTS),
            "input_size": (1, 56, 56),
            "num_classes": 10,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.5,),
            "std": (0.5,),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model
def deit_micro(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """The embedded model: DeiT's depth and 14×14 grid at a third of DeiT-Tiny's width, for 56×56 grey images."""
    size = {"img_size": 56, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 12, "num_heads": 2}
    return build_model_with_cfg(VisionTransformer, "deit_micro", pretrained, **{**size, "num_classes": 10, **kwargs})


@functools.lru_cache(maxsize=4)
def bare_backbone(architecture: str, num_classes: int) -> VisionTransformer:
    """A timm model without trained weights, in evaluation mode; shared between calls, so to be left as it is.

    Raises:
        UserError: the architecture is unknown.
    """
    check_known(architecture)
    return timm.create_model(architecture, pretrained=False, num_classes=num_classes).eval()


# The runs of a sweep follow each other in one process and mostly share their backbone.
@functools.lru_cache(maxsize=4)
def load_backbone(architecture: str, checkpoint: str | None, num_classes: int) -> VisionTransformer:
    """A timm model with its weights, in evaluation mode; shared between calls, so to be copied before it is changed.

    Args:
        architecture: as timm names it.
        checkpoint: a file that ``safetensors`` or ``torch.load(weights_only=True)`` reads, with the parameters at its
            top or under "model" or "state_dict"; None for timm's pretrained weights.
        num_classes: outputs of the model.

    Raises:
        UserError: the architecture is unknown, or the weights cannot be had, read, or fitted to it.
    """
    check_known(architecture)
    if checkpoint is None:
        pretrained = timm.get_pretrained_cfg(architecture)
        if pretrained and pretrained.num_classes != num_classes:
            raise UserError(
                f"backbone.num_classes={num_classes}: the pretrained weights of {architecture} have {pretrained.num_classes} "
                "outputs; give weights of your own, backbone.checkpoint=FILE"
            )
        try:
            return timm.create_model(architecture, pretrained=True, num_classes=num_classes).eval()
        except Exception as error:  # the hub's client raises whatever its transport does
            raise UserError(
                f"backbone {architecture}: its pretrained weights cannot be had ({type(error).__name__}: {one_line(error)}); "
                "give a local file, backbone.checkpoint=FILE"
            ) from error
    model = copy.deepcopy(bare_backbone(architecture, num_classes))
    fit(model, _read(checkpoint), f"backbone.checkpoint={checkpoint}", architecture)
    return model


def check_known(architecture: str) -> None:
    """Raise a UserError unless timm knows an architecture."""
    if not timm.is_model(architecture):
        raise UserError(
            f"backbone.architecture={architecture}: not a model of timm, whose timm.list_models() names them"
        )


def _read(checkpoint: str) -> dict[str, torch.Tensor]:
    file = path_given(checkpoint, "backbone.checkpoint")
    try:
        state = load_state_dict(str(file), weights_only=True, use_ema=False)
    except FileNotFoundError:
        raise UserError(f"backbone.checkpoint={checkpoint}: no such file") from None
    except Exception as error:  # the file may hold anything, and its readers raise as much
        if "weights_only" in str(error):
            what = "damaged, or holds more than weights, which is not loaded; save model.state_dict() by itself"
        else:
            what = f"cannot be read as weights, it may be damaged ({type(error).__name__}: {one_line(error)})"
        raise UserError(f"backbone.checkpoint={checkpoint}: {what}") from error
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"backbone.checkpoint={checkpoint}: holds no parameters; save model.state_dict()")
    return state


def fit(model: nn.Module, state: dict[str, torch.Tensor], source: str, name: str) -> None:
    """Load a state dict, every parameter of it and no other.

    Raises:
        UserError: parameters are missing, unknown or of another shape; the message begins with the source.
    """
    wanted = model.state_dict()
    for kind, keys in (("lacks", wanted.keys() - state.keys()), ("has", state.keys() - wanted.keys())):
        if keys:
            whose = "that it needs" if kind == "lacks" else "that it does not know"
            raise UserError(
                f"{source}: not the weights of {name}: it {kind} {len(keys)} parameters {whose}, {min(keys)} for one"
            )
    for key, value in wanted.items():
        if state[key].shape != value.shape:
            hint = "; set backbone.num_classes" if key.startswith("head") else ""
            raise UserError(
                f"{source}: not the weights of {name}: {key} is {list(state[key].shape)}, not {list(value.shape)}{hint}"
            )
    model.load_state_dict(state)


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over all parameters and buffers, by name, so that it does not depend on the file they came from."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
