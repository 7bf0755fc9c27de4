"""The merges of DHTM, of random merging and of agglomerative clustering as PyTorch operators, ``torch.ops.dhtm.*``.

Each operator has several backends, which all make the same merges. A backend is a module with these functions:

- ``merge(tokens, features, masses, regions, k, connectivity, similarity, linkage, threshold)`` takes the arguments of
  :func:`dhtm.hierarchical_merge` (``connectivity=ALL_PAIRS`` means "all"), in the types of the operator below. It returns
  ``merged`` [B, N - k, D], or [B, N, D] with a threshold, in the tokens' dtype; ``token_map`` int64 [B, N], the place of
  each token among the new ones; and ``weights`` float32 [B, N], the weight of each token in its average.
- ``draw(regions, image_ids, k, connectivity, seed)`` takes the arguments of :class:`baselines.RandomMerge`, and
  image_ids int64 [B]. It returns ``token_map`` and ``weights``.
- ``agglomerate(features, k, linkage)`` takes the arguments of :func:`agglomerate` below and returns ``token_map``.
"""

import functools
import math
import os
import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from dhtm.regions import Regions

KINDS = {"cosine": 0, "euclidean": 1, "manhattan": 2, "kl": 3}  # the numbers of the similarities in compiled code
CLUSTER_LINKAGES = {"single": 0, "complete": 1, "average": 2}  # the same for the linkages of agglomerative clustering
_LARGEST = torch.finfo(torch.float32).max
ALL_PAIRS = 0  # the number of connectivity="all" in the operators, where 4 and 8 stand for themselves

HAS_NUMBA, HAS_TRITON = find_spec("numba") is not None, find_spec("triton") is not None
BACKENDS = {"torch": "batched", "numba": "cpu", "triton": "gpu", "reference": "reference"}  # and their modules
DRAWS = CLUSTERINGS = ("torch", "numba", "triton")  # the backends with ``draw`` and ``agglomerate``


def _module(backend: str, device: torch.device) -> ModuleType:
    """Import the backend for a device; not before it is used, because it takes time and needs optional packages."""
    return import_module(f"dhtm.kernels.{BACKENDS[pick(backend, device)]}")


def pick(backend: str, device: torch.device) -> str:
    """Return the backend to use for tensors on a device; "auto" is the fastest available there.

    Raises:
        ValueError: the backend is not available.
    """
    if backend == "auto":
        if device.type == "cpu":
            return "numba" if HAS_NUMBA else "torch"
        return "triton" if device.type == "cuda" and HAS_TRITON and _triton_works(device) else "torch"
    if (backend == "numba" and not HAS_NUMBA) or (backend == "triton" and not HAS_TRITON):
        raise ValueError(
            f"backend={backend!r}: the package {backend} is not installed; install it, or choose backend='auto'"
        )
    wrong = (backend == "numba" and device.type != "cpu") or (
        backend == "triton" and device.type != "cuda" and not os.environ.get("TRITON_INTERPRET")
    )
    if wrong:
        raise ValueError(f"backend={backend!r} does not support tokens on {device.type}: choose backend='auto'")
    return backend


def _triton_works(device: torch.device) -> bool:
    # Nothing can be tried while a CUDA graph is captured.
    return torch.cuda.is_current_stream_capturing() or _triton_compiles(device)


@functools.cache
def _triton_compiles(device: torch.device) -> bool:
    """Check that Triton can compile for a GPU: it needs a C compiler and supports no old GPUs."""
    try:
        two = torch.ones(1, 2, 16, device=device), None, None, Regions.identity(1, (1, 2), device)
        import_module("dhtm.kernels.gpu").merge(*two, 1, 8, "cosine", "mean", None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"backend='auto': Triton does not work on {device} ({reason}); using the slower 'torch'", stacklevel=2
        )
        return False
    return True


def _require_tokens(sizes: Tensor, k: int) -> None:
    """Raise ValueError if an image runs out of adjacent tokens before k merges are made.

    A grid is connected, so that only tokens without a patch touch no other; a soft method may leave some. On a GPU an
    assertion fails on the device, because raising an exception would need a synchronisation.
    """
    too_few = (sizes > 0).sum(dim=1) <= k
    if sizes.is_cuda:
        torch._assert_async(~too_few.any(), f"k={k} merges, but an image runs out of adjacent tokens before that")
    elif too_few.any():
        image = int(too_few.nonzero()[0])
        raise ValueError(f"k={k} merges, but image {image} of the batch runs out of adjacent tokens before that")


@torch.library.custom_op("dhtm::hierarchical_merge", mutates_args=())
def hierarchical_merge(
    tokens: Tensor,
    features: Tensor | None,
    masses: Tensor | None,
    assignment: Tensor,
    sizes: Tensor,
    k: int,
    height: int,
    width: int,
    connectivity: int,
    similarity: str,
    linkage: str,
    threshold: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run ``merge`` of a backend; :func:`dhtm.hierarchical_merge` checks the arguments."""
    if threshold is None:
        _require_tokens(sizes, k)
    elif math.isnan(threshold):
        raise ValueError("threshold=nan: it must be a number")
    else:
        threshold = min(max(threshold, -_LARGEST), _LARGEST)  # as scores are; compiled code takes -inf as no threshold
    regions = Regions(assignment, sizes, (height, width))
    module = _module(backend, tokens.device)  # picked here so that an exported model may run on another device
    return module.merge(tokens.detach(), features, masses, regions, k, connectivity, similarity, linkage, threshold)


@hierarchical_merge.register_fake
def _(
    tokens, features, masses, assignment, sizes, k, height, width, connectivity, similarity, linkage, threshold, backend
):  # fmt: skip
    batch, n, channels = tokens.shape
    return (
        tokens.new_empty(batch, n if threshold is not None else n - k, channels),
        assignment.new_empty(batch, n),
        tokens.new_empty(batch, n, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):
    _, token_map, weights = output
    ctx.save_for_backward(token_map, weights)
    ctx.mark_non_differentiable(token_map, weights)


def _backward(ctx, grad_merged, _grad_map, _grad_weights):
    """Return the gradient of the averages; the choice of the pairs has none."""
    token_map, weights = ctx.saved_tensors
    grad = grad_merged.gather(1, token_map[..., None].expand(-1, -1, grad_merged.shape[-1]))
    return (grad * weights[..., None].to(grad.dtype), *[None] * 12)


hierarchical_merge.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("dhtm::random_merge", mutates_args=())
def random_merge(
    assignment: Tensor,
    sizes: Tensor,
    image_ids: Tensor,
    k: int,
    height: int,
    width: int,
    connectivity: int,
    seed: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Run ``draw`` of a backend; :class:`baselines.RandomMerge` checks the arguments."""
    _require_tokens(sizes, k)
    regions = Regions(assignment, sizes, (height, width))
    return _module(backend, assignment.device).draw(regions, image_ids, k, connectivity, seed)


@random_merge.register_fake
def _(assignment, sizes, image_ids, k, height, width, connectivity, seed, backend):
    return sizes.new_empty(sizes.shape), sizes.new_empty(sizes.shape, dtype=torch.float32)


@torch.library.custom_op("dhtm::agglomerate", mutates_args=())
def agglomerate(features: Tensor, k: int, linkage: str, backend: str) -> Tensor:
    """Merge the two nearest clusters of features k times in every image, by cosine distance (:class:`baselines.ATC`).

    Cosines are summed in float64 and rounded to float32, as in DHTM; distances between clusters are float64. Ties go to
    the lexicographically smallest pair, where a merged cluster takes the place of the lower one.

    Args:
        features: [B, N, F], each a cluster of its own at first.
        k: merges in each image, 0 ≤ k < N.
        linkage: the distance of two clusters: "single" (of their nearest members), "complete" (of their farthest) or
            "average" (the mean over all pairs of members).
        backend: "torch", "numba", "triton" or "auto".

    Returns:
        token_map: int64 [B, N], the cluster of each feature; clusters are in the order of their lowest members.
    """
    return _module(backend, features.device).agglomerate(features.detach(), k, linkage)


@agglomerate.register_fake
def _(features, k, linkage, backend):
    return features.new_empty(features.shape[:2], dtype=torch.int64)


def merge_flops(n_tokens: int, k: int, channels: int, n_pairs: int, n_patches: int, connectivity: int) -> int:
    """Count the multiply-adds of k merges, by a convention that depends on neither image nor backend.

    The count is of the products in the similarities, one per channel: first for every adjacent pair of tokens, then, at
    each merge, for the new token and its neighbours. On a grid, the number of adjacent pairs is taken as the grid's pairs
    times the share of tokens left. A new token is taken to have the neighbours of two patches side by side: 10 with
    8-connectivity, 6 with 4. If all pairs are adjacent, both numbers are exact. As in fvcore, element-wise arithmetic
    (averages, norms, comparisons) is not counted.
    """
    if k == 0:
        return 0
    if connectivity == ALL_PAIRS:
        return channels * (n_tokens * (n_tokens - 1) // 2 + sum(n_tokens - step for step in range(2, k + 2)))
    neighbours = {8: 10, 4: 6}[connectivity]
    return round(channels * (n_pairs * n_tokens / n_patches + k * neighbours))
