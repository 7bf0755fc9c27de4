"""Put a reducer into a timm VisionTransformer, and remove it again.

No attention is rewritten: the blocks keep their attention modules, so fused kernels, LayerScale, DropPath, query and key
norms, registers and distillation tokens stay as timm has them. A block that reduces after attention runs its two residual
branches with the reducer in between. This module assumes nothing else about a block, and refuses blocks with other parts.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import Attention as TimmAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from dhtm.reducer import Attention, Reducer
from dhtm.regions import Regions

_BLOCK_PARTS = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
_SIMILAR = 16  # images of as many tokens, rounded up to this, are computed together
_READ = frozenset({"keys", "cls", "received"})  # what a reducer may need of queries and keys


class ReducingBlock(Block):
    """A timm Block that reduces its tokens; :func:`patch` and :func:`unpatch` change the class of a block."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **kwargs) -> Tensor:
        if attn_mask is not None:
            raise ValueError("attn_mask is not supported on a patched model: its tokens change from layer to layer")
        x = self.reduction.reduce(x, self.layer, "before_block")
        attended = self.reduction.attend(
            x, self.layer, lambda x, bias: self.attn(self.norm1(x), attn_mask=bias, **kwargs)
        )
        x = x + self.drop_path1(self.ls1(attended))
        x = self.reduction.reduce(x, self.layer, "after_attention", attended)
        return x + self.drop_path2(
            self.ls2(self.reduction.each_token(x, self.layer, lambda x: self.mlp(self.norm2(x))))
        )


@dataclasses.dataclass(frozen=True)
class _UnevenBatch:
    """A batch in which images have different numbers of tokens.

    Attributes:
        used: int64, the tokens of all images, prefix tokens included, among those of the batch.
        groups: the most patch tokens of an image, and the images, int64, of each group.
    """

    used: Tensor
    groups: list[tuple[int, Tensor]]


class _Reduction:
    """The state that the blocks of a patched model share: the reducer, and the regions of the last forward by layer."""

    def __init__(self, reducer: Reducer, layers: tuple[int, ...], n_prefix: int):
        self.reducer, self.layers, self.n_prefix = reducer, layers, n_prefix
        self.regions: dict[int, Regions] = {}  # after each layer that reduces; 0 is before the first block
        self.keys: dict[int, Tensor] = {}  # by the layer that reduces with them
        self.cls: dict[int, Tensor] = {}
        self.received: dict[int, Tensor] = {}
        self.read_layers: set[int] = set()  # whose attention is read, of all images at once
        self.batches: dict[int, _UnevenBatch | None] = {}  # after each layer that reduces by a threshold
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __getstate__(self) -> dict:
        # A copy has seen no image. The last forward's tensors may be those of a trace, which cannot be copied.
        return self.__dict__ | {"regions": {}, "keys": {}, "cls": {}, "received": {}, "batches": {}}

    def start(self, patch_embed: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Start a forward pass, before the patch embedding: every patch is a token."""
        images = args[0]
        grid = tuple(int(n) for n in patch_embed.dynamic_feat_size(images.shape[-2:]))
        for kept in (self.keys, self.cls, self.received, self.batches):
            kept.clear()
        self.regions = {0: Regions.identity(images.shape[0], grid, images.device)}

    def regions_before(self, layer: int) -> Regions:
        return self._last(layer, self.regions)

    def _last(self, layer: int, by_layer: dict[int, Any]) -> Any:
        """Return the last value before a layer. Gradient checkpointing may run a layer again after later ones."""
        return by_layer.get(max((one for one in by_layer if one < layer), default=0))

    def reduce(self, x: Tensor, layer: int, position: str, attended: Tensor | None = None) -> Tensor:
        """Reduce the tokens of x [B, prefix + N, D] if the reducer acts in this layer and position."""
        if layer not in self.layers or self.reducer.position != position:
            return x
        regions = self.regions_before(layer)
        prefix, tokens = x[:, : self.n_prefix], x[:, self.n_prefix :]
        if tokens.shape[1] != regions.n_tokens:
            raise RuntimeError(
                f"layer {layer} got {tokens.shape[1]} patch tokens, but {regions.n_tokens} were expected: "
                "a patched model must see every patch (patch_drop_rate=0)"
            )
        self.reducer.tokens_after(regions.n_tokens, layer, regions.grid)  # raises an error for small images
        output = attended[:, self.n_prefix :] if "output" in self.reducer.needs else None
        attention = Attention(layer, self.keys.get(layer), output, self.cls.get(layer), self.received.get(layer))
        tokens, self.regions[layer] = self.reducer(tokens, regions, attention)
        if position == "after_attention":  # if this layer runs again, its keys are read again
            self.keys.pop(layer, None)
        if self._is_split():
            self._split(layer)
            tokens = tokens[:, : self.regions[layer].n_tokens]
        return torch.cat([prefix, tokens], dim=1)

    def _is_split(self) -> bool:
        """Whether images with different numbers of tokens are computed apart, which compiled and traced models cannot do."""
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
        return self.reducer.adaptive and not tracing and not self.reducer.training

    def _split(self, layer: int) -> None:
        """Cut the regions after a layer to the most tokens of an image, and group images of nearly as many tokens."""
        regions = self.regions[layer]
        lengths = regions.n_tokens_of_images.cpu()
        longest, device = int(lengths.amax()), regions.sizes.device
        self.regions[layer] = Regions(regions.assignment, regions.sizes[:, :longest], regions.grid)
        self.batches[layer] = None
        if (lengths < longest).any():
            used = torch.arange(self.n_prefix + longest) < self.n_prefix + lengths[:, None]
            rounded = (-(-lengths // _SIMILAR) * _SIMILAR).clamp(max=longest)
            groups = [(int(n), (rounded == n).nonzero()[:, 0].to(device)) for n in rounded.unique()]
            self.batches[layer] = _UnevenBatch(used.flatten().nonzero()[:, 0].to(device), groups)

    def attend(self, x: Tensor, layer: int, attention: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """Run a layer's attention, a function of tokens and bias, on images of nearly as many tokens at a time."""
        bias, uneven = self.attention_bias(x.dtype, layer), self._last(layer, self.batches)
        if uneven is None or layer in self.read_layers:
            return attention(x, bias)
        result = torch.zeros_like(x)
        for n_tokens, images in uneven.groups:
            end = self.n_prefix + n_tokens
            result[images, :end] = attention(x[images, :end], bias[images, ..., :end])
        return result

    def each_token(self, x: Tensor, layer: int, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Run a function that treats every token by itself on those of all images, without what fills images up."""
        uneven = self._last(layer + 1, self.batches)
        if uneven is None:
            return function(x)
        rows = x.flatten(0, 1)
        return torch.zeros_like(rows).index_copy_(0, uneven.used, function(rows[uneven.used]).to(x.dtype)).view_as(x)

    def attention_bias(self, dtype: torch.dtype, layer: int) -> Tensor | None:
        """Return the bias of proportional attention, [B, 1, 1, prefix + N]: log sizes, 0 for prefix tokens.

        The zeros that fill up images of fewer tokens have no size, so that no token attends to them. This is all if attention
        is not proportional.
        """
        reduced_first = self.reducer.position == "before_block"
        last, adaptive = layer + 1 if reduced_first else layer, self.reducer.adaptive
        regions, proportional = self.regions_before(last), self.reducer.proportional_attention
        if adaptive and not proportional:
            uneven = self._last(last, self.batches) is not None or not self._is_split()
        else:
            uneven = False
        if not (proportional or uneven) or (regions.n_tokens == self.regions[0].n_tokens and not adaptive):
            return None
        sizes = regions.sizes if proportional else regions.sizes.clamp(max=1)
        bias = torch.cat([sizes.new_ones(sizes.shape[0], self.n_prefix), sizes], dim=1).log()
        return bias.to(dtype)[:, None, None]


class _AttentionReader:
    """Reads queries and keys by forward hooks on their norms, which every attention has (as identities in most models).

    Args:
        reduction: stores what is read.
        source: the layer whose attention is read.
        layer: the layer that reduces with it.
        scale: of the attention logits.
        has_cls: whether the first token is a CLS token.
    """

    def __init__(self, reduction: _Reduction, source: int, layer: int, scale: float, has_cls: bool):
        self.reduction, self.source, self.layer, self.scale, self.has_cls = reduction, source, layer, scale, has_cls

    def read_queries(self, module: nn.Module, args: tuple[Tensor, ...], queries: Tensor) -> None:
        of_cls = self.has_cls and "received" not in self.reduction.reducer.needs
        self.queries = queries[:, :, :1] if of_cls else queries

    def read_keys(self, module: nn.Module, args: tuple[Tensor, ...], keys: Tensor) -> None:
        reduction, needs = self.reduction, self.reduction.reducer.needs
        if "keys" in needs:
            keys_of_patches = keys[:, :, reduction.n_prefix :]
            # Keys of another layer are kept, so they must not keep the graph of that layer alive.
            reduction.keys[self.layer] = keys_of_patches if self.source == self.layer else keys_of_patches.detach()
        if needs & {"cls", "received"}:
            # Kept for the whole forward, and so without a gradient: gradient checkpointing may run the layer that
            # reduces again before this one.
            with torch.no_grad(), torch.autocast(keys.device.type, enabled=False):
                logits = (self.queries.float() * self.scale) @ keys.float().transpose(-2, -1)
                bias = reduction.attention_bias(logits.dtype, self.source)
                shares = (logits if bias is None else logits + bias).softmax(dim=-1)[..., reduction.n_prefix :]
                if "cls" in needs:
                    reduction.cls[self.layer] = (shares[:, :, :1] if self.has_cls else shares).mean(dim=(1, 2))
                if "received" in needs:
                    reduction.received[self.layer] = shares.mean(dim=(1, 2))
            del self.queries


def patch(model: VisionTransformer, reducer: Reducer) -> VisionTransformer:
    """Make a timm VisionTransformer reduce its tokens, in place.

    Parameters keep their names; those of the reducer appear under ``reducer.`` in the state dict. With gradient
    checkpointing, which runs layers again in the backward pass, call backward() before the next forward pass.

    Args:
        model: any timm VisionTransformer of plain blocks: DeiT, distilled DeiT, DeiT-III, AugReg, DINOv2, SigLIP, …
        reducer: the method, such as :class:`dhtm.DHTM`.

    Returns:
        The same model.

    Raises:
        TypeError: the class of the model or of one of its blocks is not supported.
        ValueError: the model is already patched, a layer is outside it, or a layer has fewer tokens than needed.
    """
    _check_supported(model, reducer)
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
    reducer.attach(model.embed_dim, model.num_prefix_tokens, tuple(model.patch_embed.grid_size), layers)
    _plan(reducer, layers, depth, model.patch_embed.grid_size)
    weight = next(model.blocks.parameters())
    reducer.to(device=weight.device, dtype=weight.dtype).train(model.training)

    reduction = _Reduction(reducer, layers, model.num_prefix_tokens)
    reduction.hooks.append(model.patch_embed.register_forward_pre_hook(reduction.start))
    for layer, block in enumerate(model.blocks, start=1):
        # Attention with a bias, or on images of different numbers of tokens, concerns the layers after the first one too.
        if layer in layers or ((reducer.proportional_attention or reducer.adaptive) and layer > layers[0]):
            block.__class__, block.reduction, block.layer = ReducingBlock, reduction, layer
        if layer in layers and read:
            source = layer - 1 if before else layer
            reduction.read_layers.add(source)
            attn = model.blocks[source - 1].attn
            reader = _AttentionReader(reduction, source, layer, attn.scale, model.has_class_token)
            if read & {"cls", "received"}:
                reduction.hooks.append(attn.q_norm.register_forward_hook(reader.read_queries))
            reduction.hooks.append(attn.k_norm.register_forward_hook(reader.read_keys))
    model.reduction, model.reducer = reduction, reducer
    model.forward_intermediates = functools.partial(_forward_intermediates, model)
    return model


def unpatch(model: VisionTransformer) -> VisionTransformer:
    """Remove the reducer, in place: the model is what it was before :func:`patch`.

    Raises:
        ValueError: the model is not patched.
    """
    for hook in _reduction(model).hooks:
        hook.remove()
    for block in model.blocks:
        if isinstance(block, ReducingBlock):
            block.__class__ = Block
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
    options = {"return_prefix_tokens": True, "norm": norm, "stop_early": stop_early, "output_fmt": "NLC"}
    final, found = plain(model, x, indices, **options, **kwargs)
    n_prefix, depth = model.num_prefix_tokens, len(model.blocks)
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
        layer: the layer, from 1, whose output tokens are meant; by default the last.

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
    depth, grid = len(model.blocks), model.patch_embed.grid_size
    return _plan(reduction.reducer, reduction.layers, depth, grid) if reduction else [grid[0] * grid[1]] * depth


@contextlib.contextmanager
def image_ids(model: VisionTransformer, ids: Tensor) -> Iterator[None]:
    """Give the reducer the ids of the images in a batch, int64 [B], within this context.

    Random draws depend on the ids, so that they are the same whatever batch an image is in. A model that is not patched
    ignores them.
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


def _reduction(model: nn.Module) -> _Reduction:
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
    if not isinstance(model, VisionTransformer):
        hint = "; patch the model before wrapping or compiling it" if hasattr(model, "_orig_mod") else ""
        raise TypeError(f"cannot patch a {name}: only timm's VisionTransformer and its subclasses are supported{hint}")
    if reducer.position == "before_block" and "output" in reducer.needs:
        raise ValueError(f"{type(reducer).__name__} acts before a block, where its attention has no output yet")
    if reducer.adaptive and model.global_pool != "token":
        raise ValueError(
            f"{type(reducer).__name__} leaves each image its own number of tokens, but this {name} pools all "
            f"(global_pool={model.global_pool!r}): choose a model that classifies by its CLS token, or k"
        )
    if hasattr(model, "reduction"):
        raise ValueError(f"this {name} is already patched: call dhtm.unpatch(model) first")
    for layer, block in enumerate(model.blocks, start=1):
        parts = {part for part, _ in block.named_children()}
        if type(block) is not Block or parts != _BLOCK_PARTS:
            raise TypeError(
                f"cannot patch this {name}: layer {layer} is a {type(block).__name__} with the parts "
                f"{', '.join(sorted(parts))}, not timm's plain Block"
            )
        if reducer.needs & _READ and not isinstance(block.attn, TimmAttention):
            raise TypeError(
                f"cannot read the queries and keys of {type(block.attn).__name__} in layer {layer} of this {name}"
            )
