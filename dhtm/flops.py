"""Count FLOPs with fvcore, as the paper does: 1 multiply-add = 1 FLOP, attention products included."""

import copy
import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dhtm import kernels
from dhtm.regions import grid_pairs
from dhtm.vit import image_shape, patch_grid, unpatch


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """The FLOPs of a model for one image.

    Attributes:
        total: of the whole model, merging included.
        merging: of the reducer, summed over all layers. The attention that it reads counts in the layer where it is read.
        by_layer: of each block, its merging included.
    """

    total: int
    merging: int
    by_layer: tuple[int, ...]


def count_flops(model: VisionTransformer, image_size: int | Sequence[int] | None = None) -> FlopCount:
    """Count the FLOPs of a timm VisionTransformer, patched or not, for one image.

    The count is the same on every device, for every backend, and for fused and unfused attention. As in fvcore,
    element-wise arithmetic is not counted, and norms count 5 per value. :func:`dhtm.kernels.merge_flops` counts merging.

    Args:
        model: on any device but "meta"; it is not changed.
        image_size: side, or height and width, in pixels; by default the size that the model was made for.

    Raises:
        ValueError: the model is patched with a method that leaves each image its own number of tokens.
    """
    if getattr(getattr(model, "reducer", None), "adaptive", False):
        raise ValueError("the FLOPs of this model depend on the image: use count_flops_of_images")
    channels, *size = image_shape(model)
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
    model = _copy(model)
    weight = next(model.parameters())
    images = torch.zeros(1, channels, *size, dtype=weight.dtype, device=weight.device)
    by_module = _flops_by_module(model, images)
    blocks = [by_module[f"blocks.{i}"] for i in range(len(model.blocks))]
    return FlopCount(by_module[""], by_module["reducer"], tuple(blocks))


def count_flops_of_images(model: VisionTransformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Count the FLOPs for each image of a model with :class:`dhtm.DHTM` and a threshold, at the model's own image size.

    The convention is that of :func:`count_flops`: an image costs what it would if all images made the same merges in each
    layer.

    Args:
        model: patched.
        tokens: int64 [B, depth], the patch tokens of each image after each layer.

    Returns:
        The total, and the part of it that is merging, int64 [B] each.
    """
    reducer, grid = model.reducer, patch_grid(model)
    before = nn.functional.pad(tokens[:, :-1], (1, 0), value=grid[0] * grid[1])
    merging = torch.zeros_like(tokens[:, 0])
    for layer in reducer.schedule:
        pairs = zip(before[:, layer - 1].tolist(), tokens[:, layer - 1].tolist(), strict=True)
        merging += tokens.new_tensor([reducer.merge_flops(n, n - left, model.embed_dim, grid) for n, left in pairs])
    return CostOfTokens.of(model)(tokens) + merging, merging


@dataclasses.dataclass(frozen=True)
class CostOfTokens:
    """The FLOPs of a model by its numbers of tokens, which fall between attention and MLP. Merging itself is not counted.

    Attributes:
        unmerged: of the model with all tokens.
        n_patches, n_prefix: of the model.
        square, linear: attention with its norm costs square·n² + linear·n for n tokens.
        each: an MLP with its norm, per token.
        norm: the last norm, per token.
    """

    unmerged: int
    n_patches: int
    n_prefix: int
    square: int
    linear: int
    each: int
    norm: int

    @classmethod
    def of(cls, model: VisionTransformer) -> "CostOfTokens":
        """Measure a model, patched or not, with :func:`count_flops` and with one and two tokens in its first block."""
        bare = _copy(model)
        bare = unpatch(bare) if hasattr(bare, "reducer") else bare
        weight = next(bare.blocks.parameters())
        one, two = (_flops_by_module(bare.blocks[0], weight.new_zeros(1, n, bare.embed_dim)) for n in (1, 2))
        of_one, of_two = (count["norm1"] + count["attn"] for count in (one, two))
        square = (of_two - 2 * of_one) // 2
        return cls(
            unmerged=count_flops(bare).total,
            n_patches=math.prod(patch_grid(bare)),
            n_prefix=bare.num_prefix_tokens,
            square=square,
            linear=of_one - square,
            each=one["norm2"] + one["mlp"],
            norm=_flops_by_module(bare.norm, weight.new_zeros(1, 1, bare.embed_dim))[""],
        )

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the FLOPs of images from their numbers of patch tokens after each layer: int64 [B, depth] → [B]."""
        before = nn.functional.pad(tokens[:, :-1], (1, 0), value=self.n_patches)
        n, left, whole = before + self.n_prefix, tokens + self.n_prefix, self.n_patches + self.n_prefix
        saved = self.square * (whole**2 - n * n) + self.linear * (whole - n) + self.each * (whole - left)
        return self.unmerged - saved.sum(dim=1) - self.norm * (whole - left[:, -1])


def _copy(model: nn.Module) -> nn.Module:
    """Copy a model for tracing, which runs it. The copy shares the parameters, but not the mode and the last regions."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}).eval()


def _flops_by_module(model: nn.Module, inputs: Tensor) -> Counter[str]:
    """Return the FLOPs of a module for an input, under the key "", and those of all modules in it, by name."""
    with warnings.catch_warnings():  # fvcore compiles a loss when imported, in a way that PyTorch has deprecated
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis, jit_handles  # imported here so that merging alone needs no fvcore

    count = FlopCountAnalysis(model, inputs).ancestor_mode("caller")
    count.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    count.set_op_handle("aten::scaled_dot_product_attention", _attention_flops)
    count.set_op_handle("aten::rms_norm", jit_handles.norm_flop_counter(2))  # its third argument is the weight
    count.set_op_handle("dhtm::hierarchical_merge", _merge_flops)
    count.set_op_handle("dhtm::agglomerate", _agglomerate_flops)
    with torch.no_grad():
        return Counter({name: int(flops) for name, flops in count.by_module().items()})


def _shape(value) -> list[int] | None:
    """Return the shape of a value in a traced graph, or None if it is not a tensor."""
    return value.type().sizes() if value.isCompleteTensor() else None


def _attention_flops(inputs, outputs) -> int:
    """Count Q·Kᵀ and the product with V, [B, heads, N, d] each; fvcore does not know the fused operator."""
    queries, keys, values = (_shape(value) for value in inputs[:3])
    return math.prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])


def _merge_flops(inputs, outputs) -> int:
    tokens, features, _, assignment = (_shape(value) for value in inputs[:4])
    k, height, width, connectivity = (value.toIValue() for value in inputs[5:9])
    batch, n, channels = tokens
    channels = channels if features is None else features[-1]
    n_pairs = 0 if connectivity == kernels.ALL_PAIRS else len(grid_pairs((height, width), connectivity))
    return batch * kernels.merge_flops(n, k, channels, n_pairs, assignment[-1], connectivity)


def _agglomerate_flops(inputs, outputs) -> int:
    """Count the similarities of all pairs; the distances of merged clusters are element-wise arithmetic."""
    batch, n, channels = _shape(inputs[0])
    return batch * channels * n * (n - 1) // 2
