"""Copy encoders of Hugging Face transformers into timm models, which :func:`dhtm.patch` takes."""

import functools
import re

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

_NAMES = {  # transformers' names of parameters, and timm's
    r".*embeddings\.cls_token": "cls_token",
    r".*embeddings\.position_embeddings?(\.weight)?": "pos_embed",
    r".*embeddings\.patch_embedding(s\.projection)?": "patch_embed.proj",
    r"^(encoder\.)?layers?\.": "blocks.",
    r"layernorm_before|layer_norm1": "norm1",
    r"layernorm_after|layer_norm2": "norm2",
    r"self_attn|attention": "attn",
    r"(o|out)_proj": "proj",
    r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
    r"^(post_)?layernorm": "norm",
}
_NOT_COPIED = ("pooler.", "head.", "embeddings.mask_token")  # pooling, and pretraining's stand-in for patches


def to_timm(encoder: nn.Module, image_size: int | None = None) -> VisionTransformer:
    """Copy an encoder of transformers 5 into a timm VisionTransformer, in evaluation mode.

    ``forward_features`` of the result gives the encoder's ``last_hidden_state``. It has no classifier and no attention
    pooling.

    Args:
        encoder: a ViTModel, Dinov2Model or SiglipVisionModel.
        image_size: the side of the images in pixels, for which the encoder interpolates its position embeddings; by default
            the size in its config.

    Raises:
        TypeError: its parameters are not those of such an encoder.
    """
    config, state = encoder.config, {}
    for name, value in encoder.state_dict().items():
        for pattern, replacement in _NAMES.items():
            name = re.sub(pattern, replacement, name)
        state[name] = value
    try:
        has_cls = "cls_token" in state
        if image_size is None:
            image_size, state["pos_embed"] = config.image_size, state["pos_embed"].reshape(1, -1, config.hidden_size)
        else:
            embedded = torch.empty(1, (image_size // config.patch_size) ** 2 + has_cls, config.hidden_size)
            state["pos_embed"] = encoder.embeddings.interpolate_pos_encoding(embedded, image_size, image_size)
        for block in range(config.num_hidden_layers):
            for part in ("weight", "bias"):
                name = f"blocks.{block}.attn"
                state[f"{name}.qkv.{part}"] = torch.cat([state.pop(f"{name}.{which}_proj.{part}") for which in "qkv"])
        model = VisionTransformer(
            img_size=image_size,
            patch_size=config.patch_size,
            in_chans=config.num_channels,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=len(state["blocks.0.mlp.fc1.bias"]) / config.hidden_size,
            init_values=1.0 if "blocks.0.ls1.gamma" in state else None,
            class_token=has_cls,
            global_pool="token" if has_cls else "avg",
            fc_norm=False,
            num_classes=0,
            norm_layer=functools.partial(nn.LayerNorm, eps=config.layer_norm_eps),
            act_layer={"gelu_pytorch_tanh": "gelu_tanh"}.get(config.hidden_act, config.hidden_act),
        )
        copied = {name: state[name] for name in model.state_dict()}
    except (AttributeError, KeyError) as error:
        missing = error.name if isinstance(error, AttributeError) else error.args[0]
        raise TypeError(f"cannot copy a {type(encoder).__name__} into a timm model: it has no {missing!r}") from error
    other = [name for name in state.keys() - model.state_dict().keys() if not name.startswith(_NOT_COPIED)]
    if other:
        raise TypeError(f"cannot copy a {type(encoder).__name__} into a timm model: it also has {min(other)!r}")
    model.load_state_dict(copied)
    return model.eval()
