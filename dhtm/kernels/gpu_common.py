"""What the Triton kernels share: the arithmetic of merging, and storing its result."""

import torch
import triton
import triton.language as tl

from dhtm.kernels import KINDS

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_COSINE, _EUCLIDEAN, _KL = (tl.constexpr(KINDS[name]) for name in ("cosine", "euclidean", "kl"))

# These differ between layers, images and runs. Triton would compile a kernel again where one of them is 1 or a multiple of 16,
# in the middle of a run, and gain nothing by it: rows of features are aligned whatever their number.
VARYING = ["k", "n", "n_left"]


@triton.jit
def describe(x, log_p, inverse, n_features, KIND: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store what a similarity needs of a token beside its features: the inverse of its norm, or its log-softmax."""
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
            # In this order tokens that differ by a shift give the same numbers.
            tl.store(log_p + start + columns, value - top - log_total, inside)


@triton.jit(do_not_specialize=VARYING)
def describe_all(x, log_p, inverse, n, n_features, KIND: tl.constexpr, BLOCK_D: tl.constexpr):
    """Run :func:`describe` with one program per token."""
    token = tl.program_id(0).to(tl.int64) * n + tl.program_id(1)
    describe(x + token * n_features, log_p + token * n_features, inverse + token, n_features, KIND, BLOCK_D)


@triton.jit
def compare(
    x, log_p, inverse, mass, a, b, inside, n_features,
    KIND: tl.constexpr, MASSIVE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compare tokens a and b, [BLOCK_C] each: float64 sums rounded to float32, NaN as the lowest, infinities as finite.

    With MASSIVE distances are multiplied by m₁m₂ / (m₁ + m₂) and rounded again.
    """
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
    rounded = _round_score(score)
    if MASSIVE:
        distance = rounded.to(tl.float64) - (1 if KIND == _COSINE else 0)
        mass_a, mass_b = tl.load(mass + a, inside, 1.0), tl.load(mass + b, inside, 1.0)
        rounded = _round_score(distance * (mass_a * mass_b / (mass_a + mass_b)))
    return rounded


@triton.jit
def scores_to(
    i, selected, other, scores, listed, x, log_p, inverse, mass, n_features,
    KIND: tl.constexpr, MASSIVE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compare token i with the selected others, BLOCK_C at a time. ``scores`` and ``listed`` are overwritten."""
    place = tl.cumsum(selected.to(tl.int32), axis=0) - 1
    n_selected = tl.sum(selected.to(tl.int32))
    tl.store(listed + place, other, selected)
    tl.debug_barrier()
    for start in range(0, n_selected, BLOCK_C):
        at = start + tl.arange(0, BLOCK_C)
        b = tl.load(listed + at, at < n_selected, 0)
        a = tl.zeros((BLOCK_C,), tl.int32) + i
        score = compare(x, log_p, inverse, mass, a, b, at < n_selected, n_features, KIND, MASSIVE, BLOCK_C, BLOCK_D)
        tl.store(scores + at, score, at < n_selected)
    tl.debug_barrier()
    found = tl.load(scores + place, selected, 0.0)
    tl.debug_barrier()
    return found


@triton.jit
def _round_score(score):
    rounded = score.to(tl.float32)
    rounded = tl.where(rounded != rounded, _LOWEST, rounded)
    rounded = tl.where(rounded == 0.0, 0.0, rounded)  # not -0.0, whose bits are lower
    return tl.minimum(tl.maximum(rounded, _LOWEST), -_LOWEST)


@triton.jit
def average(x, i, j, n_i, n_j, width, BLOCK_D: tl.constexpr):
    """Replace row i by the average of rows i and j, weighted by the float64 n_i and n_j and rounded once."""
    columns = tl.arange(0, BLOCK_D)
    for start in range(0, width, BLOCK_D):
        inside = start + columns < width
        a = tl.load(x + i * width + start + columns, inside, 0.0)
        b = tl.load(x + j * width + start + columns, inside, 0.0)
        new = (a.to(tl.float64) * n_i + b.to(tl.float64) * n_j) / (n_i + n_j)
        tl.store(x + i * width + start + columns, new.to(a.dtype), inside)


@triton.jit
def join(
    carried, measured, log_p, inverse, mass, size, owner, weight, token, i, j, channels, n_features,
    KIND: tl.constexpr, TWO: tl.constexpr, MASSIVE: tl.constexpr, BY_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge token j into token i; return the size, the owner and the weight of every token, [BLOCK_N] each."""
    if BY_SIZE:
        n_i = tl.sum(tl.where(token == i, size, 0)).to(tl.float64)
        n_j = tl.sum(tl.where(token == j, size, 0)).to(tl.float64)
    else:
        n_i = tl.full((), 1.0, tl.float64)
        n_j = tl.full((), 1.0, tl.float64)
    average(measured, i, j, n_i, n_j, n_features, BLOCK_D)
    if TWO:
        average(carried, i, j, n_i, n_j, channels, BLOCK_D)
    if MASSIVE:
        tl.store(mass + i, tl.load(mass + i) + tl.load(mass + j))
    tl.debug_barrier()
    describe(measured + i * n_features, log_p + i * n_features, inverse + i, n_features, KIND, BLOCK_D)
    joined = (owner == i) | (owner == j)
    owner = tl.where(joined, i, owner)
    if BY_SIZE:
        size = tl.where(token == i, (n_i + n_j).to(tl.int32), size)
    else:
        weight = tl.where(joined, weight * 0.5, weight)
    return size, owner, weight


@triton.jit
def finish(
    carried, merged, places, scratch, token_map, weights, size, size_before, owner, weight, n, n_left, channels,
    BY_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the result of one image: the remaining tokens without gaps, the token map and the weights.

    ``places`` (int32) and ``scratch`` (float64), of n values each, are overwritten.
    """
    token = tl.arange(0, BLOCK_N)
    is_token = token < n
    store_places(places, token_map, owner, token, is_token)
    if BY_SIZE:
        tl.store(scratch + token, size.to(tl.float64), is_token)
        tl.debug_barrier()
        whole = tl.load(scratch + owner, is_token, 1.0)
        weight = tl.where(whole > 0.0, size_before.to(tl.float64) / whole, 1.0).to(tl.float32)
    tl.store(weights + token, weight, is_token)
    columns = tl.arange(0, BLOCK_D)[None, :]
    for first in range(0, n, BLOCK_C):
        rows = first + tl.arange(0, BLOCK_C)
        to = tl.load(places + rows, rows < n, -1)
        for start in range(0, channels, BLOCK_D):
            mask = ((to >= 0) & (to < n_left))[:, None] & (start + columns < channels)
            value = tl.load(carried + rows[:, None] * channels + start + columns, mask, 0.0)
            tl.store(merged + to[:, None] * channels + start + columns, value, mask)


@triton.jit
def store_places(places, token_map, owner, token, is_token):
    """Store the place of each remaining token, −1 for the others, and the place that each token went to."""
    alive = (owner == token) & is_token
    place = tl.cumsum(alive.to(tl.int32), axis=0) - 1
    tl.store(places + token, tl.where(alive, place, -1), is_token)
    tl.debug_barrier()
    tl.store(token_map + token, tl.load(places + owner, is_token, 0).to(tl.int64), is_token)
