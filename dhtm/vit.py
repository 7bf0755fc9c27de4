"""Put a reducer into a timm VisionTransformer, Eva or NaFlexVit, and remove it again.

No attention is rewritten: the blocks keep their attention modules, so fused kernels, LayerScale, DropPath, query and key
norms, registers and distillation tokens stay as timm has them. A block that reduces after attention runs its two residual
branches with the reducer in between. This module assumes nothing else about a block, and refuses blocks with other parts.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import Attention as TimmAttention
from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from dhtm.reducer import Reducer
from dhtm.reduction import AttentionReader, Reduction
from dhtm.regions import Regions

_POOLS = ("token", "avg", "avgmax", "max")  # supported poolings of images with different numbers of tokens
_READ = frozenset({"keys", "cls", "received"})  # what a reducer may need of queries and keys


class ReducingBlock(Block):
    """A timm Block that reduces its tokens; :func:`patch` and :func:`unpatch` change the class of a block."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **kwargs) -> Tensor:
        if attn_mask is not None:
            raise ValueError("attn_mask is not supported on a patched model: its tokens change from layer to layer")
        x = self.reduction.reduce(x, self.layer, "before_block")
        attended = self.reduction.attend(
            x, self.layer, lambda x, bias, _: self.attn(self.norm1(x), attn_mask=bias, **kwargs)
        )
        x = x + self.drop_path1(self.ls1(attended))
        x = self.reduction.reduce(x, self.layer, "after_attention", attended)
        return self.reduction.add_branch(x, self.layer, lambda x: self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))


class ReducingEvaBlock(EvaBlock):
    """The same for timm's EvaBlock, whose attention rotates queries and keys."""

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, **kwargs) -> Tensor:
        if attn_mask is not None:
            raise ValueError("attn_mask is not supported on a patched model: its tokens change from layer to layer")
        x = self.reduction.reduce(x, self.layer, "before_block")
        attended = self.reduction.attend(
            x, self.layer, lambda x, bias, rope: self.attn(self.norm1(x), rope=rope, attn_mask=bias, **kwargs), rope
        )
        x = x + self.drop_path1(attended if self.gamma_1 is None else self.gamma_1 * attended)
        x = self.reduction.reduce(x, self.layer, "after_attention", attended)
        return self.reduction.add_branch(x, self.layer, self._second_branch)

    def _second_branch(self, x: Tensor) -> Tensor:
        branch = self.mlp(self.norm2(x))
        return self.drop_path2(branch if self.gamma_2 is None else self.gamma_2 * branch)


_REDUCING = {Block: ReducingBlock, EvaBlock: ReducingEvaBlock}
_PLAIN = {reducing: plain for plain, reducing in _REDUCING.items()}
_PARTS = {
    Block: {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"},
    EvaBlock: {"norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"},
}
_ATTENTION = (TimmAttention, EvaAttention, AttentionRope)  # whose keys can be read

ViT = VisionTransformer | Eva | NaFlexVit


def patch(model: ViT, reducer: Reducer, rope: str = "unit") -> ViT:
    """Make a timm VisionTransformer, Eva or NaFlexVit reduce its tokens, in place.

    Parameters keep their names; those of the reducer appear under ``reducer.`` in the state dict. With gradient
    checkpointing, which runs layers again in the backward pass, call backward() before the next forward pass.

    Args:
        model: any timm VisionTransformer of plain blocks: DeiT, distilled DeiT, DeiT-III, AugReg, DINOv2, SigLIP, …; or Eva,
            whose attention rotates queries and keys by position: DINOv3, EVA-02, ``vit_*_rope_*``; or NaFlexVit, given images
            [B, C, H, W] of one size, which need no mask.
        reducer: the method, such as :class:`dhtm.DHTM`.
        rope: what rotates a merged token in a model with rotary embeddings: the mean of its patches' sines and cosines, scaled
            to the unit circle at each frequency ("unit"), or not scaled ("mean"). The latter shortens the queries and keys
            of large regions at high frequencies, like a higher softmax temperature.

    Returns:
        The same model.

    Raises:
        TypeError: the class of the model or of one of its blocks is not supported.
        ValueError: rope is unknown, the model is already patched, a layer is outside it, or a layer has too few tokens.
    """
    _check_supported(model, reducer)
    if rope not in ("unit", "mean"):
        raise ValueError(f"rope={rope!r}: choose 'unit' or 'mean'")
    depth = len(model.blocks)
    layers = tuple(range(1, depth + 1)) if reducer.layers == "all" else reducer.layers
    if layers[-1] > depth:
        raise ValueError(f"layers={list(layers)}: the model has layers 1 to {depth}")
    before = reducer.position == "before_block"
    read = reducer.needs & _READ
    if before and read and layers[0] == 1:
        raise ValueError(
            f"layers={list(layers)}: {type(reducer).__name__} reads the attention of the layer before, so it starts from 2"
        )
    reducer.attach(model.embed_dim, model.num_prefix_tokens, patch_grid(model), layers)
    _plan(reducer, layers, depth, patch_grid(model))
    weight = next(model.blocks.parameters())
    reducer.to(device=weight.device, dtype=weight.dtype).train(model.training)

    rotary = getattr(model, "rope", None) is not None
    reduction = Reduction(reducer, layers, model.num_prefix_tokens, rope if rotary else None)
    reduction.hooks.append(_embedding(model).register_forward_pre_hook(reduction.start))
    if reducer.adaptive:
        reduction.hooks.append(model.norm.register_forward_hook(functools.partial(reduction.fill_up, model)))
    for layer, block in enumerate(model.blocks, start=1):
        # A bias, rotations, and different numbers of tokens per image also affect the attention of later layers.
        later = reducer.proportional_attention or reducer.adaptive or rotary
        if layer in layers or (later and layer > layers[0]):
            block.__class__, block.reduction, block.layer = _REDUCING[type(block)], reduction, layer
        if layer in layers and read:
            source = layer - 1 if before else layer
            reduction.read_layers.add(source)
            attn = model.blocks[source - 1].attn
            has_cls = getattr(model, "embeds", model).cls_token is not None  # NaFlexVit keeps it in its embedding
            reader = AttentionReader(reduction, source, layer, attn.scale, has_cls)
            if read & {"cls", "received"}:
                reduction.hooks.append(attn.q_norm.register_forward_hook(reader.read_queries))
            reduction.hooks.append(attn.k_norm.register_forward_hook(reader.read_keys))
    model.reduction, model.reducer = reduction, reducer
    model.forward_intermediates = functools.partial(_forward_intermediates, model)
    return model


def unpatch(model: ViT) -> ViT:
    """Remove the reducer, in place: the model is what it was before :func:`patch`.

    Raises:
        ValueError: the model is not patched.
    """
    for hook in _reduction(model).hooks:
        hook.remove()
    for block in model.blocks:
        if type(block) in _PLAIN:
            block.__class__ = _PLAIN[type(block)]
            del block.reduction, block.layer
    del model.reduction, model.reducer, model.forward_intermediates
    return model


def _forward_intermediates(
    model: VisionTransformer,
    x: Tensor,
    indices: int | list[int] | None = None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
    output_dict: bool = False,
    **kwargs,
) -> Any:
    """Run timm's method of this name, which its other feature interfaces call; every patch gets the token that it is in."""
    plain = type(model).forward_intermediates
    n_prefix, depth = model.num_prefix_tokens, len(model.blocks)
    options = {"return_prefix_tokens": n_prefix > 0, "norm": norm, "stop_early": stop_early, "output_fmt": "NLC"}
    final, found = plain(model, x, indices, **options, **kwargs)
    if indices is None or isinstance(indices, int):
        taken = range(depth - (indices or depth), depth)
    else:
        taken = sorted({index % depth for index in indices})
    last = model.reduction.regions_before(depth + 1)
    final = torch.cat([final[:, :n_prefix], last.unmerge(final[:, n_prefix:])], dim=1)
    prefixes, grids = [], []
    for index, tokens in zip(taken, found, strict=True):
        tokens, prefix = tokens if n_prefix else (tokens, None)
        after = model.reduction.regions_before(index + 2)
        grid = after.unmerge(tokens)
        grids.append(grid.transpose(1, 2).unflatten(2, after.grid).contiguous() if output_fmt == "NCHW" else grid)
        prefixes.append(prefix)
    with_prefix = return_prefix_tokens and n_prefix > 0
    if output_dict:
        result = {"image_intermediates": grids} | ({"image_intermediates_prefix": prefixes} if with_prefix else {})
        return result if intermediates_only else result | {"image_features": final}
    grids = list(zip(grids, prefixes, strict=True)) if with_prefix else grids
    return grids if intermediates_only else (final, grids)


def regions(model: VisionTransformer, layer: int | None = None) -> Regions:
    """Return the regions of the last forward pass of a patched model: the patches that each token stood for.

    Args:
        model: a patched model.
        layer: the regions are those of this layer's output, from 1; by default of the last layer's.

    Raises:
        ValueError: the model is not patched, has not been run, or has no such layer.
    """
    reduction = _reduction(model)
    if not reduction.regions:
        raise ValueError("the patched model has not seen an image yet")
    if layer is not None and not 1 <= layer <= len(model.blocks):
        raise ValueError(f"layer={layer}: the model has layers 1 to {len(model.blocks)}")
    return reduction.regions_before(len(model.blocks) + 1 if layer is None else layer + 1)


def tokens_by_layer(model: VisionTransformer) -> list[int]:
    """Return the number of patch tokens after each layer of a model, patched or not, at its own image size."""
    reduction = getattr(model, "reduction", None)
    depth, grid = len(model.blocks), patch_grid(model)
    return _plan(reduction.reducer, reduction.layers, depth, grid) if reduction else [grid[0] * grid[1]] * depth


def tokens_of_images(model: VisionTransformer) -> Tensor:
    """Return the number of patch tokens of each image of the last forward pass after each layer: int64 [B, depth].

    Raises:
        ValueError: the model is not patched or has not been run.
    """
    return torch.stack([regions(model, layer).n_tokens_of_images for layer in range(1, len(model.blocks) + 1)], dim=1)


@contextlib.contextmanager
def image_ids(model: VisionTransformer, ids: Tensor) -> Iterator[None]:
    """Give the reducer the ids of the images in a batch, int64 [B], within this context.

    Random draws depend on the ids, so they do not depend on the batch that an image is in. A model that is not patched
    ignores the ids.
    """
    if not hasattr(model, "reduction"):
        yield
        return
    reducer = model.reduction.reducer
    before, reducer.image_ids = reducer.image_ids, ids
    try:
        yield
    finally:
        reducer.image_ids = before


def patch_grid(model: ViT) -> tuple[int, int]:
    """Return the rows and columns of patches at a model's own image size."""
    return tuple(int(n) for n in _embedding(model).dynamic_feat_size(image_shape(model)[1:]))


def image_shape(model: ViT) -> tuple[int, int, int]:
    """Return the channels, height and width of the images that a model was made for; NaFlexVit takes others too."""
    if isinstance(model, NaFlexVit):
        made_for = getattr(model, "pretrained_cfg", None)  # a model that timm.create_model did not make has none
        if made_for:
            return tuple(made_for["input_size"])
        rows, columns = model.embeds.pos_embed_grid_size
        return (model.embeds.in_chans, rows * model.embeds.patch_size[0], columns * model.embeds.patch_size[1])
    first_convolution = next(parameter for parameter in model.patch_embed.parameters() if parameter.dim() == 4)
    return (first_convolution.shape[1], *model.patch_embed.img_size)


def _embedding(model: ViT) -> nn.Module:
    return model.embeds if isinstance(model, NaFlexVit) else model.patch_embed


def _reduction(model: nn.Module) -> Reduction:
    if not hasattr(model, "reduction"):
        raise ValueError(f"this {type(model).__name__} is not patched: call dhtm.patch(model, reducer) first")
    return model.reduction


def _plan(reducer: Reducer, layers: tuple[int, ...], depth: int, grid: tuple[int, int]) -> list[int]:
    n_tokens, plan = grid[0] * grid[1], []
    for layer in range(1, depth + 1):
        if layer in layers:
            n_tokens = reducer.tokens_after(n_tokens, layer, grid)
        plan.append(n_tokens)
    return plan


def _check_supported(model: nn.Module, reducer: Reducer) -> None:
    name = type(model).__name__
    if not isinstance(model, ViT):
        hint = "; patch the model before wrapping or compiling it" if hasattr(model, "_orig_mod") else ""
        if type(model).__module__.startswith("transformers."):
            hint = "; copy it into a timm model by dhtm.to_timm"
        raise TypeError(
            f"cannot patch a {name}: only timm's VisionTransformer, Eva, NaFlexVit and their subclasses are supported{hint}"
        )
    if getattr(model, "rope", None) is not None and reducer.needs & {"cls", "received"}:
        raise TypeError(
            f"cannot patch this {name} with {type(reducer).__name__}: it reads attention from queries and keys, which this "
            "model rotates afterwards"
        )
    if reducer.position == "before_block" and "output" in reducer.needs:
        raise ValueError(f"{type(reducer).__name__} acts before a block, where its attention has no output yet")
    if reducer.adaptive and model.global_pool not in _POOLS:
        raise ValueError(
            f"{type(reducer).__name__} leaves each image its own number of tokens, which this {name} cannot pool "
            f"(global_pool={model.global_pool!r}): choose one with {', '.join(_POOLS)}, or k in place of a threshold"
        )
    if hasattr(model, "reduction"):
        raise ValueError(f"this {name} is already patched: call dhtm.unpatch(model) first")
    for layer, block in enumerate(model.blocks, start=1):
        parts = {part for part, _ in block.named_children()}
        if parts != _PARTS.get(type(block)):
            raise TypeError(
                f"cannot patch this {name}: layer {layer} is a {type(block).__name__} with the parts "
                f"{', '.join(sorted(parts))}, not timm's plain Block"
            )
        if reducer.needs & _READ and not isinstance(block.attn, _ATTENTION):
            raise TypeError(
                f"cannot read the queries and keys of {type(block.attn).__name__} in layer {layer} of this {name}"
            )
