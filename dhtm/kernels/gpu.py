"""Backend ``triton``: all merges of an image in one program on the GPU, without a word to the host.

The edges of the region adjacency graph stay in registers from the first merge to the last, each with the tokens at its
ends and their similarity. A step picks the best edge by one reduction, averages two rows of tokens, lists the edges at the
new token, and measures these against it: as much as there are neighbours of the two merged regions, besides a few
operations on registers. Nothing depends on the order in which threads run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dhtm.kernels.batched import KINDS
from dhtm.regions import Regions

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_COSINE, _EUCLIDEAN, _KL = (tl.constexpr(KINDS[name]) for name in ("cosine", "euclidean", "kl"))


def merge(
    tokens: Tensor, features: Tensor | None, regions: Regions, k: int, connectivity: int, similarity: str, linkage: str
) -> tuple[Tensor, Tensor, Tensor]:
    """k merges in each image of a batch; arguments and results as of every backend, see :mod:`dhtm.kernels`.

    Where an image runs out of adjacent tokens before k merges are made, the device fails an assertion: to raise an
    exception would mean to wait for the device.
    """
    batch, n, channels = tokens.shape
    wide = torch.promote_types(tokens.dtype, torch.float32)
    contiguous = {"memory_format": torch.contiguous_format, "copy": True}
    carried = tokens.to(wide, **contiguous)
    measured = carried if features is None else features.to(wide, **contiguous)
    n_features = measured.shape[2]
    assignment, sizes = regions.assignment.contiguous(), regions.sizes.contiguous()
    height, width = regions.grid
    n_edges, edges = _edge_options(regions.grid, connectivity)

    def scratch(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=tokens.device)

    log_p = scratch(*(measured.shape if similarity == "kl" else (1,)), dtype=torch.float64)
    inverse = scratch(batch, n, dtype=torch.float64)
    scores = scratch(batch, n_edges, dtype=torch.float32)
    neighbours = scratch(batch, max(n, n_edges), dtype=torch.int32)
    merged = scratch(batch, n - k, channels, dtype=wide)
    token_map, weights = scratch(batch, n, dtype=torch.int64), scratch(batch, n, dtype=torch.float32)
    stuck = scratch(batch, dtype=torch.int32)

    # Products and sums are rounded one by one, as in the other backends.
    options = {
        "KIND": KINDS[similarity],
        "BLOCK_D": min(128, triton.next_power_of_2(n_features)),
        "enable_fp_fusion": False,
    }
    with torch.cuda.device_of(tokens):  # Triton launches on the current device, which may be another
        _describe_all[(batch, n)](measured, log_p, inverse, n, n_features, **options)
        _edge_scores[(batch, triton.cdiv(n_edges, 16))](
            measured,
            log_p,
            inverse,
            assignment,
            scores,
            n,
            n_features,
            height,
            width,
            BLOCK_C=16,
            STEPS=edges["STEPS"],
            **options,
        )
        _merge_image[(batch,)](
            carried, measured, log_p, inverse, assignment, sizes, scores, neighbours, merged, token_map, weights, stuck,
            k, n, channels, n_features, height, width,
            TWO=features is not None, BY_SIZE=linkage == "size", BLOCK_N=triton.next_power_of_2(n), BLOCK_C=16,
            **edges, **options,
        )  # fmt: skip
    _raise_where_stuck(stuck, k)
    return merged.to(tokens.dtype), token_map, weights


def draw(regions: Regions, image_ids: Tensor, k: int, connectivity: int, seed: int) -> tuple[Tensor, Tensor]:
    """k merges at random in each image of a batch; arguments and results as of every backend, see :mod:`dhtm.kernels`.

    An image that runs out of adjacent tokens is treated as in :func:`merge`.
    """
    batch, n = regions.sizes.shape
    device = regions.sizes.device
    token_map = torch.empty(batch, n, dtype=torch.int64, device=device)
    weights = torch.empty(batch, n, dtype=torch.float32, device=device)
    places = torch.empty(batch, n, dtype=torch.int32, device=device)
    stuck = torch.empty(batch, dtype=torch.int32, device=device)
    _, edges = _edge_options(regions.grid, connectivity)
    with torch.cuda.device_of(regions.sizes):
        _draw_image[(batch,)](
            regions.assignment.contiguous(), image_ids.contiguous(), places, token_map, weights, stuck,
            seed, k, n, *regions.grid, BLOCK_N=triton.next_power_of_2(n), **edges,
        )  # fmt: skip
    _raise_where_stuck(stuck, k)
    return token_map, weights


def _edge_options(grid: tuple[int, int], connectivity: int) -> tuple[int, dict[str, int]]:
    """How many edges :func:`_edges` numbers, and the options of a kernel that holds them all."""
    steps = {4: 2, 8: 4}[connectivity]
    n_edges = grid[0] * grid[1] * steps
    block_e = triton.next_power_of_2(n_edges)
    return n_edges, {"STEPS": steps, "BLOCK_E": block_e, "num_warps": min(16, max(4, block_e // 256))}


def _raise_where_stuck(stuck: Tensor, k: int) -> None:
    torch._assert_async((stuck == 0).all(), f"k={k} merges, but an image runs out of adjacent tokens before that")


@triton.jit
def _edges(assignment, edge, height, width, STEPS: tl.constexpr):
    """Edge ``edge`` of the grid, which goes from patch edge // STEPS to the right, or down: left, straight, right.

    Returns:
        The tokens at both ends, int32, the lower first; and whether there is such an edge. Tables of pairs would have to
        be on the device before a CUDA graph is captured.
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


@triton.jit
def _describe(x, log_p, inverse, n_features, KIND: tl.constexpr, BLOCK_D: tl.constexpr):
    """What a similarity needs of one token beside its features: one over its norm, or the logarithm of its softmax."""
    columns = tl.arange(0, BLOCK_D)
    if KIND == _COSINE:
        squares = tl.zeros((BLOCK_D,), tl.float64)
        for start in range(0, n_features, BLOCK_D):
            value = tl.load(x + start + columns, start + columns < n_features, 0.0).to(tl.float64)
            squares += value * value
        norm = tl.sqrt(tl.sum(squares))
        tl.store(inverse, tl.where(norm == 0.0, 0.0, 1.0 / norm))
    elif KIND == _KL:
        highest = tl.full((BLOCK_D,), float("-inf"), tl.float64)
        for start in range(0, n_features, BLOCK_D):
            value = tl.load(x + start + columns, start + columns < n_features, float("-inf")).to(tl.float64)
            highest = tl.maximum(highest, value, propagate_nan=tl.PropagateNan.ALL)
        top = tl.max(highest)
        total = tl.zeros((BLOCK_D,), tl.float64)
        for start in range(0, n_features, BLOCK_D):
            value = tl.load(x + start + columns, start + columns < n_features, float("-inf")).to(tl.float64)
            total += tl.exp(value - top)
        log_total = tl.log(tl.sum(total))
        for start in range(0, n_features, BLOCK_D):
            inside = start + columns < n_features
            value = tl.load(x + start + columns, inside, 0.0).to(tl.float64)
            tl.store(
                log_p + start + columns, value - top - log_total, inside
            )  # so tokens that differ by a shift are alike


@triton.jit
def _similarity(
    x, log_p, inverse, a, b, inside, n_features, KIND: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Of tokens a and b, [BLOCK_C] each: float64 sums, rounded to float32; NaN is lowest, and infinity finite."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    sums = tl.zeros((BLOCK_C, BLOCK_D), tl.float64)
    for start in range(0, n_features, BLOCK_D):
        mask = inside[:, None] & (start + columns < n_features)
        at_a, at_b = a[:, None] * n_features + start + columns, b[:, None] * n_features + start + columns
        if KIND == _KL:  # Jensen's symmetric form: KL(p‖q) + KL(q‖p) = Σ (p - q)(log p - log q)
            p, q = tl.load(log_p + at_a, mask, 0.0), tl.load(log_p + at_b, mask, 0.0)
            sums -= 0.5 * (tl.exp(p) - tl.exp(q)) * (p - q)
        else:
            p, q = tl.load(x + at_a, mask, 0.0).to(tl.float64), tl.load(x + at_b, mask, 0.0).to(tl.float64)
            if KIND == _COSINE:
                sums += p * q
            elif KIND == _EUCLIDEAN:
                sums += (p - q) * (p - q)
            else:
                sums -= tl.abs(p - q)
    score = tl.sum(sums, axis=1)
    if KIND == _COSINE:
        score *= tl.load(inverse + a, inside, 0.0) * tl.load(inverse + b, inside, 0.0)
    elif KIND == _EUCLIDEAN:
        score = -tl.sqrt(score)
    rounded = score.to(tl.float32)
    rounded = tl.where(rounded != rounded, _LOWEST, rounded)
    rounded = tl.where(rounded == 0.0, 0.0, rounded)  # not -0.0, whose bits are lower
    return tl.minimum(tl.maximum(rounded, _LOWEST), -_LOWEST)


@triton.jit
def _describe_all(x, log_p, inverse, n, n_features, KIND: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program a token."""
    token = tl.program_id(0).to(tl.int64) * n + tl.program_id(1)
    _describe(x + token * n_features, log_p + token * n_features, inverse + token, n_features, KIND, BLOCK_D)


@triton.jit
def _edge_scores(
    x, log_p, inverse, assignment, scores, n, n_features, height, width,
    KIND: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The first similarities, a program for BLOCK_C edges of an image; of a dead edge that of a token with itself."""
    image = tl.program_id(0).to(tl.int64)
    edge = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n_patches = height * width
    a, b, inside = _edges(assignment + image * n_patches, edge, height, width, STEPS)
    first = image * n
    score = _similarity(
        x + first * n_features,
        log_p + first * n_features,
        inverse + first,
        a,
        b,
        inside,
        n_features,
        KIND,
        BLOCK_C,
        BLOCK_D,
    )
    tl.store(scores + image * n_patches * STEPS + edge, score, inside)


@triton.jit
def _average(x, i, j, n_i, n_j, width, BLOCK_D: tl.constexpr):
    """Row i becomes the average of rows i and j, weighted by the float64 n_i and n_j; rounded once."""
    columns = tl.arange(0, BLOCK_D)
    for start in range(0, width, BLOCK_D):
        inside = start + columns < width
        a = tl.load(x + i * width + start + columns, inside, 0.0)
        b = tl.load(x + j * width + start + columns, inside, 0.0)
        new = (a.to(tl.float64) * n_i + b.to(tl.float64) * n_j) / (n_i + n_j)
        tl.store(x + i * width + start + columns, new.to(a.dtype), inside)


@triton.jit
def _merge_image(
    carried, measured, log_p, inverse, assignment, sizes, scores, neighbours, merged, token_map, weights, stuck,
    k, n, channels, n_features, height, width,
    KIND: tl.constexpr, TWO: tl.constexpr, BY_SIZE: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All merges of one image. ``scores`` and ``neighbours`` are written over; a barrier lets all threads see it."""
    image = tl.program_id(0).to(tl.int64)
    carried += image * n * channels
    measured += image * n * n_features
    log_p += image * n * n_features
    inverse += image * n
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

    failed = 0
    for _ in range(k):
        # One reduction finds the best score and, among equals, the lexicographically smallest pair: a float32's bits,
        # turned so that integers have its order, stand above those of the pair.
        bits = score.to(tl.int32, bitcast=True)
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        pair = 0x7FFFFFFF - (low * n + high)
        best = tl.max(ordered * 4294967296 + pair)
        code = 0x7FFFFFFF - (best & 0xFFFFFFFF).to(tl.int32)
        i, j = code // n, code % n
        failed = tl.where(i == j, 1, failed)  # only dead edges are left

        if BY_SIZE:
            n_i = tl.sum(tl.where(token == i, size, 0)).to(tl.float64)
            n_j = tl.sum(tl.where(token == j, size, 0)).to(tl.float64)
        else:
            n_i = tl.full((), 1.0, tl.float64)
            n_j = tl.full((), 1.0, tl.float64)
        _average(measured, i, j, n_i, n_j, n_features, BLOCK_D)
        if TWO:
            _average(carried, i, j, n_i, n_j, channels, BLOCK_D)
        tl.debug_barrier()
        _describe(measured + i * n_features, log_p + i * n_features, inverse + i, n_features, KIND, BLOCK_D)
        joined = (owner == i) | (owner == j)
        owner = tl.where(joined, i, owner)
        if BY_SIZE:
            size = tl.where(token == i, (n_i + n_j).to(tl.int32), size)
        else:
            weight = tl.where(joined, weight * 0.5, weight)

        a, b = tl.where(low == j, i, low), tl.where(high == j, i, high)
        low, high = tl.minimum(a, b), tl.maximum(a, b)
        dead = low == high
        touched = ((low == i) | (high == i)) & (dead == 0) & is_edge
        place = tl.cumsum(touched.to(tl.int32), axis=0) - 1
        n_touched = tl.sum(touched.to(tl.int32))
        tl.store(neighbours + place, low + high - i, touched)
        tl.debug_barrier()
        for start in range(0, n_touched, BLOCK_C):
            at = start + tl.arange(0, BLOCK_C)
            others = tl.load(neighbours + at, at < n_touched, 0)
            new = tl.zeros((BLOCK_C,), tl.int32) + i
            to_new = _similarity(
                measured, log_p, inverse, new, others, at < n_touched, n_features, KIND, BLOCK_C, BLOCK_D
            )
            tl.store(scores + at, to_new, at < n_touched)
        tl.debug_barrier()
        score = tl.where(touched, tl.load(scores + place, touched, 0.0), tl.where(dead, float("-inf"), score))
        tl.debug_barrier()
    tl.store(stuck + image, failed)

    # The tokens that are left move up into the gaps.
    _store_places(neighbours, token_map + image * n, owner, token, is_token)
    if BY_SIZE:
        tl.store(inverse + token, size.to(tl.float64), is_token)
        tl.debug_barrier()
        whole = tl.load(inverse + owner, is_token, 1.0)
        weight = tl.where(whole > 0.0, size_before.to(tl.float64) / whole, 1.0).to(tl.float32)
    tl.store(weights + image * n + token, weight, is_token)
    columns = tl.arange(0, BLOCK_D)[None, :]
    for first in range(0, n, BLOCK_C):
        rows = first + tl.arange(0, BLOCK_C)
        to = tl.load(neighbours + rows, rows < n, -1)
        for start in range(0, channels, BLOCK_D):
            mask = ((to >= 0) & (to < n - k))[:, None] & (start + columns < channels)
            value = tl.load(carried + rows[:, None] * channels + start + columns, mask, 0.0)
            tl.store(merged + (image * (n - k) + to)[:, None] * channels + start + columns, value, mask)


@triton.jit
def _hashed(state, key):
    """One more key into a hash of int64, as in :mod:`dhtm.kernels.batched`."""
    state = state + key + -7046029254386353131
    state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    state = (state ^ ((state >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return state ^ ((state >> 31) & 0x1FFFFFFFF)


@triton.jit
def _draw_image(
    assignment, ids, places, token_map, weights, stuck, seed, k, n, height, width,
    STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """All merges at random of one image; ``places`` is written over."""
    image = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK_N)
    is_token = token < n
    owner = token
    weight = tl.full((BLOCK_N,), 1.0, tl.float32)
    edge = tl.arange(0, BLOCK_E)
    low, high, is_edge = _edges(assignment + image * height * width, edge, height, width, STEPS)
    of_image = _hashed(_hashed(tl.full((), 0, tl.int64), seed), tl.load(ids + image))
    failed = 0
    for step in range(k):
        lots = _hashed(_hashed(of_image, n - step), (low * n + high).to(tl.int64)) & 0x3FFFFFFFFFFFFFFF
        lots = tl.where(is_edge & (low != high), lots, -1)
        best = tl.max(lots)
        code = tl.min(tl.where(lots == best, low * n + high, n * n))
        i, j = code // n, code % n
        failed = tl.where(best < 0, 1, failed)
        joined = (owner == i) | (owner == j)
        owner = tl.where(joined, i, owner)
        weight = tl.where(joined, weight * 0.5, weight)
        a, b = tl.where(low == j, i, low), tl.where(high == j, i, high)
        low, high = tl.minimum(a, b), tl.maximum(a, b)
    tl.store(stuck + image, failed)
    _store_places(places + image * n, token_map + image * n, owner, token, is_token)
    tl.store(weights + image * n + token, weight, is_token)


@triton.jit
def _store_places(places, token_map, owner, token, is_token):
    """Where the tokens that are left come to stand, −1 for the others; and where each token went."""
    alive = (owner == token) & is_token
    place = tl.cumsum(alive.to(tl.int32), axis=0) - 1
    tl.store(places + token, tl.where(alive, place, -1), is_token)
    tl.debug_barrier()
    tl.store(token_map + token, tl.load(places + owner, is_token, 0).to(tl.int64), is_token)
