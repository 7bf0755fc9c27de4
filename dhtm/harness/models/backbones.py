"""The Vision Transformers that can be evaluated: any timm architecture, and the two small ones of this project."""

import copy
import functools
import hashlib
from pathlib import Path

import timm
import torch
from pydantic import FilePath, PositiveInt
from pydantic.dataclasses import dataclass
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, load_state_dict, register_model
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

import dhtm
from dhtm.harness.core.errors import UserError, explain
from dhtm.harness.core.files import PROJECT

EMBEDDED_WEIGHTS = Path(dhtm.__file__).parent / "assets" / "deit_micro.safetensors"

_BOTH = {"num_classes": 10, "crop_pct": 1.0, "interpolation": "bicubic", "classifier": "head"}
# timm's register_model looks up this variable by its name.
default_cfgs = generate_default_cfgs(
    {
        "deit_micro": {
            **_BOTH,
            "file": str(EMBEDDED_WEIGHTS),
            "input_size": (1, 56, 56),
            "mean": (0.5,),
            "std": (0.5,),
            "first_conv": "patch_embed.proj",
        },
        "deit_mini": {
            **_BOTH,
            "file": str(PROJECT / "results" / "imagenette" / "weights" / "deit_mini.safetensors"),
            "input_size": (3, 112, 112),
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.backbone.0.conv",
        },
    }
)


@register_model
def deit_micro(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """The embedded model: DeiT's depth and 14×14 grid at a third of DeiT-Tiny's width, for 56×56 grey images."""
    size = {"img_size": 56, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 12, "num_heads": 2}
    return build_model_with_cfg(VisionTransformer, "deit_micro", pretrained, **{**size, "num_classes": 10, **kwargs})


@register_model
def deit_mini(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """A DeiT of 128 channels and a 14×14 grid for 112×112 photographs.

    Three strided convolutions come before the patch projection (Xiao et al. 2021, "Early convolutions help transformers see
    better").
    """
    stem = functools.partial(HybridEmbed, backbone=ConvStem(channels=(32, 64, 128), norm_layer=nn.BatchNorm2d))
    size = {"img_size": 112, "patch_size": 1, "embed_dim": 128, "depth": 12, "num_heads": 4, "embed_layer": stem}
    return build_model_with_cfg(VisionTransformer, "deit_mini", pretrained, **{**size, "num_classes": 10, **kwargs})


@dataclass(frozen=True)
class Backbone:
    """A timm model and where its weights come from.

    Attributes:
        name: in tables, figures and directories.
        architecture: as timm names it.
        num_classes: outputs of the model.
        checkpoint: a file that ``safetensors`` or ``torch.load(weights_only=True)`` reads, with the parameters at its top
            or under "model" or "state_dict"; None for timm's pretrained weights.
    """

    name: str
    architecture: str
    num_classes: PositiveInt = 1000
    checkpoint: FilePath | None = None

    def __post_init__(self):
        if not timm.is_model(self.architecture):
            raise UserError(
                f"backbone.architecture={self.architecture}: timm has no such model; timm.list_models() names them"
            )

    @functools.lru_cache(maxsize=4)  # noqa: B019  the runs of a sweep follow each other and mostly share their backbone
    def bare(self) -> VisionTransformer:
        """Return the model without trained weights, in evaluation mode. It is shared: copy it before changing it."""
        return timm.create_model(self.architecture, pretrained=False, num_classes=self.num_classes).eval()

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def load(self) -> VisionTransformer:
        """Return the model with its weights, in evaluation mode. It is shared: copy it before changing it.

        Raises:
            UserError: the weights are not available, cannot be read, or do not fit.
        """
        if self.checkpoint is not None:
            model = copy.deepcopy(self.bare())
            remedy = "; give model.state_dict() saved by itself; backbone.num_classes sets the size of the head"
            with explain(
                f"backbone.checkpoint={self.checkpoint}: not the weights of {self.architecture}", remedy=remedy
            ):
                model.load_state_dict(load_state_dict(str(self.checkpoint), weights_only=True, use_ema=False))
            return model
        pretrained = timm.get_pretrained_cfg(self.architecture)
        if pretrained and pretrained.num_classes != self.num_classes:
            raise UserError(
                f"backbone.num_classes={self.num_classes}: the pretrained weights of {self.architecture} have "
                f"{pretrained.num_classes} outputs; give weights of your own, backbone.checkpoint=FILE"
            )
        remedy = "; give a local file, backbone.checkpoint=FILE"
        with explain(f"backbone {self.architecture}: its pretrained weights are not available", remedy=remedy):
            return timm.create_model(self.architecture, pretrained=True, num_classes=self.num_classes).eval()


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers by name, independent of the file they came from."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
