"""Count FLOPs with fvcore, as the paper does: 1 multiply-add = 1 FLOP, attention products included."""

import copy
import dataclasses
import math
import warnings
from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer

from dhtm import kernels
from dhtm.regions import grid_pairs


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """The FLOPs of a model for one image.

    Attributes:
        total: of the whole model, merging included.
        merging: of the reducer, summed over all layers.
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
    """
    with warnings.catch_warnings():  # fvcore compiles a loss when imported, in a way that PyTorch has deprecated
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis  # imported here so that merging alone needs no fvcore

    size = model.patch_embed.img_size if image_size is None else image_size
    height, width = (size, size) if isinstance(size, int) else size
    # Tracing runs the model, so trace a copy that shares the parameters but not the mode and the last regions.
    model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}).eval()
    stem = next(parameter for parameter in model.parameters() if parameter.dim() == 4)  # the first convolution
    images = torch.zeros(1, stem.shape[1], height, width, dtype=stem.dtype, device=stem.device)
    count = FlopCountAnalysis(model, images).ancestor_mode("caller")
    count.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    count.set_op_handle("aten::scaled_dot_product_attention", _attention_flops)
    count.set_op_handle("dhtm::hierarchical_merge", _merge_flops)
    count.set_op_handle("dhtm::agglomerate", _agglomerate_flops)
    with torch.no_grad():
        by_module = count.by_module()
    blocks = [int(by_module[f"blocks.{i}"]) for i in range(len(model.blocks))]
    return FlopCount(int(by_module[""]), int(by_module["reducer"]), tuple(blocks))


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
