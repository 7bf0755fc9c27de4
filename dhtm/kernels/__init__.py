"""The merges of DHTM and those at random behind two PyTorch operators, ``torch.ops.dhtm.*``, with several backends.

Every backend is a module of two functions, and all make the same merges. ``merge`` takes (tokens, features, regions, k,
connectivity, similarity, linkage), as they are explained in :func:`dhtm.hierarchical_merge`, and returns merged [B, N - k, D]
in the tokens' dtype; token_map int64 [B, N], the place of each token among the new ones; and weights float32 [B, N], with
which it entered its average. ``draw`` takes (regions, image_ids int64 [B], k, connectivity, seed), as they are explained in
:class:`baselines.RandomMerge`, and returns token_map and weights.
"""

import functools
import os
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from dhtm.regions import Regions

HAS_NUMBA, HAS_TRITON = find_spec("numba") is not None, find_spec("triton") is not None
_MODULES = {"torch": "batched", "numba": "cpu", "triton": "gpu"}


def _function(name: str, backend: str) -> Callable:
    """A function of a backend, whose module its first call imports: that takes time, and packages that may not be there."""
    return lambda *arguments: getattr(import_module(f"dhtm.kernels.{_MODULES[backend]}"), name)(*arguments)


# dhtm.merge adds "reference".
BACKENDS: dict[str, Callable] = {backend: _function("merge", backend) for backend in _MODULES}
DRAWS: dict[str, Callable] = {backend: _function("draw", backend) for backend in _MODULES}


def pick(backend: str, device: torch.device) -> str:
    """The backend to use for tensors on a device; "auto" is the fastest that works there.

    Raises:
        ValueError: the backend is not to be had.
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
        raise ValueError(f"backend={backend!r} is not for tokens on {device.type}: choose backend='auto'")
    return backend


def _triton_works(device: torch.device) -> bool:
    return torch.cuda.is_current_stream_capturing() or _triton_compiles(device)  # a capture is no place to try things


@functools.cache
def _triton_compiles(device: torch.device) -> bool:
    """Whether Triton makes code for a GPU: one may be too old for it, and it needs a C compiler."""
    try:
        two = torch.ones(1, 2, 16, device=device), None, Regions.identity(1, (1, 2), device)
        BACKENDS["triton"](*two, 1, 8, "cosine", "mean")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"backend='auto': Triton does not work on {device} ({reason}); the slower 'torch' does", stacklevel=2
        )
        return False
    return True


@torch.library.custom_op("dhtm::hierarchical_merge", mutates_args=())
def hierarchical_merge(
    tokens: Tensor,
    features: Tensor | None,
    assignment: Tensor,
    sizes: Tensor,
    k: int,
    height: int,
    width: int,
    connectivity: int,
    similarity: str,
    linkage: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`dhtm.hierarchical_merge`, which checks the arguments; it returns what the backends return."""
    regions = Regions(assignment, sizes, (height, width))
    merge = BACKENDS[pick(backend, tokens.device)]  # here, so that an exported model may run on another device
    return merge(tokens.detach(), features, regions, k, connectivity, similarity, linkage)


@hierarchical_merge.register_fake
def _(tokens, features, assignment, sizes, k, height, width, connectivity, similarity, linkage, backend):
    batch, n, channels = tokens.shape
    return (
        tokens.new_empty(batch, n - k, channels),
        assignment.new_empty(batch, n),
        tokens.new_empty(batch, n, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):
    _, token_map, weights = output
    ctx.save_for_backward(token_map, weights)
    ctx.mark_non_differentiable(token_map, weights)


def _backward(ctx, grad_merged, _grad_map, _grad_weights):
    """The gradient of an average; the choice of what to average has none."""
    token_map, weights = ctx.saved_tensors
    grad = grad_merged.gather(1, token_map[..., None].expand(-1, -1, grad_merged.shape[-1]))
    return (grad * weights[..., None].to(grad.dtype), *[None] * 10)


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
    """See :class:`baselines.RandomMerge`, which checks the arguments; it returns what the backends return."""
    draw = DRAWS[pick(backend, assignment.device)]
    return draw(Regions(assignment, sizes, (height, width)), image_ids, k, connectivity, seed)


@random_merge.register_fake
def _(assignment, sizes, image_ids, k, height, width, connectivity, seed, backend):
    return sizes.new_empty(sizes.shape), sizes.new_empty(sizes.shape, dtype=torch.float32)


def merge_flops(n_tokens: int, k: int, channels: int, n_pairs: int, n_patches: int, connectivity: int) -> int:
    """What k merges cost in multiply-adds, by convention, so that it depends on neither image nor backend.

    Counted are the products of the similarities: one a channel for every adjacent pair of tokens at the start (taken
    as the grid's pairs in proportion to the tokens left), then, at each merge, for every neighbour of the new token
    (taken as those of two patches side by side: 10 with 8-connectivity, 6 with 4). Averages, norms and comparisons
    are not counted, as fvcore counts no element-wise arithmetic.
    """
    if k == 0:
        return 0
    neighbours = {8: 10, 4: 6}[connectivity]
    return round(channels * (n_pairs * n_tokens / n_patches + k * neighbours))
