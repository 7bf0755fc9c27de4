"""Backend ``triton``: all merges of an image in one program on the GPU, without synchronising with the host.

The edges of the region adjacency graph stay in registers from the first merge to the last, each with the tokens at its
ends and their similarity. A merge finds the best edge by one reduction, averages two rows of tokens, lists the edges at the
new token, and measures its neighbours against it. So it takes time in proportion to these neighbours, plus a few operations
on registers. Nothing depends on the order in which threads run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dhtm.kernels import ALL_PAIRS, KINDS, gpu_pairs
from dhtm.kernels.batched import all_similarities, discount
from dhtm.kernels.gpu_common import VARYING, compare, describe_all, finish, join, scores_to, store_places
from dhtm.regions import Regions

agglomerate = gpu_pairs.agglomerate


def merge(tokens, features, masses, regions, k, connectivity, similarity, linkage, threshold):
    """Make k merges in each image of a batch; arguments and results are those of every backend, see :mod:`dhtm.kernels`."""
    batch, n, channels = tokens.shape
    wide = torch.promote_types(tokens.dtype, torch.float32)
    contiguous = {"memory_format": torch.contiguous_format, "copy": True}
    carried = tokens.to(wide, **contiguous)
    measured = carried if features is None else features.to(wide, **contiguous)
    n_features = measured.shape[2]
    assignment, sizes = regions.assignment.contiguous(), regions.sizes.contiguous()
    height, width = regions.grid

    def scratch(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=tokens.device)

    log_p = scratch(*(measured.shape if similarity == "kl" else (1,)), dtype=torch.float64)
    inverse = scratch(batch, n, dtype=torch.float64)
    mass = scratch(1, dtype=torch.float64) if masses is None else masses.to(torch.float64, **contiguous)
    n_left = n - k if threshold is None else n
    merged = scratch(batch, n_left, channels, dtype=wide).zero_()
    token_map, weights = scratch(batch, n, dtype=torch.int64), scratch(batch, n, dtype=torch.float32)

    # Products and sums are rounded one by one, as in the other backends.
    options = {
        "KIND": KINDS[similarity],
        "BLOCK_D": min(128, triton.next_power_of_2(n_features)),
        "enable_fp_fusion": False,
    }
    more = {
        "TWO": features is not None,
        "MASSIVE": masses is not None,
        "BY_SIZE": linkage == "size",
        "BLOCK_N": triton.next_power_of_2(n),
        "BLOCK_C": 16,
    }
    least = torch.tensor(-torch.inf if threshold is None else threshold, dtype=torch.float32)
    results = merged, token_map, weights, k
    shape = n_left, n, channels, n_features
    with torch.cuda.device_of(tokens):  # Triton launches on the current device, which may be another
        describe_all[(batch, n)](measured, log_p, inverse, n, n_features, **options)
        if connectivity == ALL_PAIRS:
            scores = discount(all_similarities(measured, similarity), similarity, masses)
            neighbours, to_new = scratch(batch, n, dtype=torch.int32), scratch(batch, n, dtype=torch.float32)
            gpu_pairs.merge_image[(batch,)](
                carried, measured, log_p, inverse, mass, sizes, scores, to_new, neighbours, *results, least.item(),
                *shape, **more, **options, num_warps=4,
            )  # fmt: skip
        else:
            n_edges, edges = _edge_options(regions.grid, connectivity)
            scores = scratch(batch, n_edges, dtype=torch.float32)
            neighbours = scratch(batch, max(n, n_edges), dtype=torch.int32)
            _edge_scores[(batch, triton.cdiv(n_edges, 16))](
                measured, log_p, inverse, mass, assignment, scores, n, n_features, height, width,
                MASSIVE=masses is not None, BLOCK_C=16, STEPS=edges["STEPS"], **options,
            )  # fmt: skip
            _merge_image[(batch,)](
                carried, measured, log_p, inverse, mass, sizes, scores, neighbours, *results, _sort_key(least), *shape,
                assignment, height, width, **edges, **more, **options,
            )  # fmt: skip
    return merged.to(tokens.dtype), token_map, weights


def draw(regions: Regions, image_ids: Tensor, k: int, connectivity: int, seed: int) -> tuple[Tensor, Tensor]:
    """Make k merges at random in each image; arguments and results are those of every backend, see :mod:`dhtm.kernels`."""
    batch, n = regions.sizes.shape
    device = regions.sizes.device
    token_map = torch.empty(batch, n, dtype=torch.int64, device=device)
    weights = torch.empty(batch, n, dtype=torch.float32, device=device)
    places = torch.empty(batch, n, dtype=torch.int32, device=device)
    _, edges = _edge_options(regions.grid, connectivity)
    with torch.cuda.device_of(regions.sizes):
        _draw_image[(batch,)](
            regions.assignment.contiguous(), image_ids.contiguous(), places, token_map, weights,
            seed, k, n, *regions.grid, BLOCK_N=triton.next_power_of_2(n), enable_fp_fusion=False, **edges,
        )  # fmt: skip
    return token_map, weights


def _edge_options(grid: tuple[int, int], connectivity: int) -> tuple[int, dict[str, int]]:
    """Return the number of edges that :func:`_edges` numbers, and the options of a kernel that holds them all."""
    steps = {4: 2, 8: 4}[connectivity]
    n_edges = grid[0] * grid[1] * steps
    block_e = triton.next_power_of_2(n_edges)
    return n_edges, {"STEPS": steps, "BLOCK_E": block_e, "num_warps": min(16, max(4, block_e // 256))}


def _sort_key(least: Tensor) -> int:
    """Return the integer that :func:`_merge_image` compares a float32 by."""
    bits = least.view(torch.int32).item()
    return bits ^ 0x7FFFFFFF if bits < 0 else bits


@triton.jit
def _edges(assignment, edge, height, width, STEPS: tl.constexpr):
    """Return the tokens at both ends of edge ``edge``, int32, the lower first; and whether the grid has such an edge.

    An edge goes from patch edge // STEPS to the right, or down: left, straight, right. Numbering the edges avoids a table
    of pairs, which would have to be on the device before a CUDA graph is captured.
    """
    patch, step = edge // STEPS, edge % STEPS
    row = patch // width + (step > 0).to(tl.int32)
    if STEPS == 4:
        column = patch % width + tl.where(step == 0, 1, step - 2)
    else:
        column = patch % width + (step == 0).to(tl.int32)
    there = (patch < height * width) & (row < height) & (column >= 0) & (column < width)
    a = tl.load(assignment + patch, there, 0).to(tl.int32)
    b = tl.load(assignment + row * width + column, there, 0).to(tl.int32)
    return tl.minimum(a, b), tl.maximum(a, b), there


@triton.jit(do_not_specialize=VARYING)
def _edge_scores(
    x, log_p, inverse, mass, assignment, scores, n, n_features, height, width,
    KIND: tl.constexpr, MASSIVE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Compute the first similarities, BLOCK_C edges of an image per program; a dead edge compares a token with itself."""
    image = tl.program_id(0).to(tl.int64)
    edge = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n_patches = height * width
    a, b, inside = _edges(assignment + image * n_patches, edge, height, width, STEPS)
    first = image * n
    score = compare(
        x + first * n_features, log_p + first * n_features, inverse + first, mass + first, a, b, inside, n_features,
        KIND, MASSIVE, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    tl.store(scores + image * n_patches * STEPS + edge, score, inside)


@triton.jit(do_not_specialize=[*VARYING, "least"])
def _merge_image(
    carried, measured, log_p, inverse, mass, sizes, scores, neighbours, merged, token_map, weights,
    k, least, n_left, n, channels, n_features, assignment, height, width,
    KIND: tl.constexpr, TWO: tl.constexpr, MASSIVE: tl.constexpr, BY_SIZE: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Make all merges of one image. ``scores`` and ``neighbours`` are overwritten; barriers make that visible to threads."""
    image = tl.program_id(0).to(tl.int64)
    carried += image * n * channels
    measured += image * n * n_features
    log_p += image * n * n_features
    inverse += image * n
    mass += image * n
    n_edges = height * width * STEPS
    scores += image * n_edges
    neighbours += image * tl.maximum(n, n_edges)

    token = tl.arange(0, BLOCK_N)
    is_token = token < n
    size = tl.load(sizes + image * n + token, is_token, 0).to(tl.int32)
    size_before = size
    owner = token
    weight = tl.full((BLOCK_N,), 1.0, tl.float32)

    edge = tl.arange(0, BLOCK_E)
    low, high, is_edge = _edges(assignment + image * height * width, edge, height, width, STEPS)
    score = tl.load(scores + edge, is_edge & (low != high), float("-inf"))
    tl.debug_barrier()

    for _ in range(k):
        # One reduction finds the best score and, among equals, the lexicographically smallest pair: the bits of the float32,
        # changed so that integers have its order, are placed above those of the pair.
        bits = score.to(tl.int32, bitcast=True)
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        pair = 0x7FFFFFFF - (low * n + high)
        best = tl.max(ordered * 4294967296 + pair)
        code = 0x7FFFFFFF - (best & 0xFFFFFFFF).to(tl.int32)
        i, j = code // n, code % n
        if best >> 32 >= least:  # in every thread alike
            size, owner, weight = join(
                carried, measured, log_p, inverse, mass, size, owner, weight, token, i, j, channels, n_features,
                KIND, TWO, MASSIVE, BY_SIZE, BLOCK_D,
            )  # fmt: skip

            a, b = tl.where(low == j, i, low), tl.where(high == j, i, high)
            low, high = tl.minimum(a, b), tl.maximum(a, b)
            dead = low == high
            touched = ((low == i) | (high == i)) & (dead == 0) & is_edge
            to_new = scores_to(
                i, touched, low + high - i, scores, neighbours, measured, log_p, inverse, mass, n_features,
                KIND, MASSIVE, BLOCK_C, BLOCK_D,
            )  # fmt: skip
            score = tl.where(touched, to_new, tl.where(dead, float("-inf"), score))

    finish(
        carried, merged + image * n_left * channels, neighbours, inverse, token_map + image * n, weights + image * n,
        size, size_before, owner, weight, n, n_left, channels, BY_SIZE, BLOCK_N, BLOCK_C, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _hash(state, key):
    """Hash one more key, as in :mod:`dhtm.kernels.batched`."""
    state = state + key + -7046029254386353131
    state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    state = (state ^ ((state >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return state ^ ((state >> 31) & 0x1FFFFFFFF)


@triton.jit(do_not_specialize=[*VARYING, "seed"])
def _draw_image(
    assignment, ids, places, token_map, weights, seed, k, n, height, width,
    STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Make all merges at random of one image; ``places`` is overwritten."""
    image = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK_N)
    is_token = token < n
    owner = token
    weight = tl.full((BLOCK_N,), 1.0, tl.float32)
    edge = tl.arange(0, BLOCK_E)
    low, high, is_edge = _edges(assignment + image * height * width, edge, height, width, STEPS)
    of_image = _hash(_hash(tl.full((), 0, tl.int64), seed), tl.load(ids + image))
    for step in range(k):
        lots = _hash(_hash(of_image, n - step), (low * n + high).to(tl.int64)) & 0x3FFFFFFFFFFFFFFF
        lots = tl.where(is_edge & (low != high), lots, -1)
        code = tl.min(tl.where(lots == tl.max(lots), low * n + high, n * n))
        i, j = code // n, code % n
        joined = (owner == i) | (owner == j)
        owner = tl.where(joined, i, owner)
        weight = tl.where(joined, weight * 0.5, weight)
        a, b = tl.where(low == j, i, low), tl.where(high == j, i, high)
        low, high = tl.minimum(a, b), tl.maximum(a, b)
    store_places(places + image * n, token_map + image * n, owner, token, is_token)
    tl.store(weights + image * n + token, weight, is_token)
