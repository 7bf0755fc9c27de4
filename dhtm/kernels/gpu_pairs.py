"""Backend ``triton`` where all pairs of tokens are adjacent: DHTM with ``connectivity="all"`` and agglomerative clustering.

One program makes all merges of an image. The scores of all pairs i < j are the upper triangle of a matrix in memory; each
token's best score with the tokens after it, and its partner, stay in registers. A merge replaces one row and one column,
and searches again only the rows whose best partner has merged.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dhtm.kernels import CLUSTER_LINKAGES
from dhtm.kernels.batched import all_similarities
from dhtm.kernels.gpu_common import VARYING, finish, join, scores_to, store_places


def agglomerate(features: Tensor, k: int, linkage: str) -> Tensor:
    """Merge clusters k times in each image; arguments and result are those of every backend, see :mod:`dhtm.kernels`."""
    batch, n, _ = features.shape
    scores = all_similarities(features, "cosine").double() - 1
    token_map = torch.empty(batch, n, dtype=torch.int64, device=scores.device)
    scratch = torch.empty(batch, n, dtype=torch.int32, device=scores.device)
    with torch.cuda.device_of(scores):
        cluster_image[(batch,)](
            scores, scratch, token_map, k, n,
            LINKAGE=CLUSTER_LINKAGES[linkage], BLOCK_N=triton.next_power_of_2(n), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return token_map


@triton.jit(do_not_specialize=VARYING)
def merge_image(
    carried, measured, log_p, inverse, mass, sizes, scores, to_new, neighbours, merged, token_map, weights,
    k, least, n_left, n, channels, n_features,
    KIND: tl.constexpr, TWO: tl.constexpr, MASSIVE: tl.constexpr, BY_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Make all merges of one image. ``scores``, ``to_new`` and ``neighbours`` are overwritten."""
    image = tl.program_id(0).to(tl.int64)
    carried += image * n * channels
    measured += image * n * n_features
    log_p += image * n * n_features
    inverse += image * n
    mass += image * n
    scores += image * n * n
    to_new += image * n
    neighbours += image * n

    token = tl.arange(0, BLOCK_N)
    size = tl.load(sizes + image * n + token, token < n, 0).to(tl.int32)
    size_before = size
    owner = token
    weight = tl.full((BLOCK_N,), 1.0, tl.float32)
    alive = size > 0  # a token without a patch touches no other
    best, partner = _first_best(scores, alive, token, n, BLOCK_N)

    for _ in range(k):
        if tl.max(best) >= least:  # in every thread alike
            i, j = _best_pair(best, partner, token, BLOCK_N)
            size, owner, weight = join(
                carried, measured, log_p, inverse, mass, size, owner, weight, token, i, j, channels, n_features,
                KIND, TWO, MASSIVE, BY_SIZE, BLOCK_D,
            )  # fmt: skip
            alive = alive & (token != j)
            tl.debug_barrier()

            others = alive & (token != i)
            score = scores_to(
                i, others, token, to_new, neighbours, measured, log_p, inverse, mass, n_features,
                KIND, MASSIVE, BLOCK_C, BLOCK_D,
            )  # fmt: skip
            best, partner = _contract(scores, neighbours, score, best, partner, alive, token, i, j, n, BLOCK_N)
    finish(
        carried, merged + image * n_left * channels, neighbours, inverse, token_map + image * n, weights + image * n,
        size, size_before, owner, weight, n, n_left, channels, BY_SIZE, BLOCK_N, BLOCK_C, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def cluster_image(scores, scratch, token_map, k, n, LINKAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Merge the clusters of one image. ``scores`` and ``scratch`` are overwritten."""
    image = tl.program_id(0).to(tl.int64)
    scores += image * n * n
    scratch += image * n
    token = tl.arange(0, BLOCK_N)
    is_token = token < n
    alive = is_token
    owner = token
    count = tl.full((BLOCK_N,), 1.0, tl.float64)
    best, partner = _first_best(scores, alive, token, n, BLOCK_N)
    for _ in range(k):
        i, j = _best_pair(best, partner, token, BLOCK_N)
        n_i, n_j = tl.sum(tl.where(token == i, count, 0.0)), tl.sum(tl.where(token == j, count, 0.0))
        alive = alive & (token != j)
        owner = tl.where(owner == j, i, owner)
        count = tl.where(token == i, n_i + n_j, count)
        others = alive & (token != i)
        a = tl.load(scores + tl.minimum(i, token) * n + tl.maximum(i, token), others, 0.0)
        b = tl.load(scores + tl.minimum(j, token) * n + tl.maximum(j, token), others, 0.0)
        if LINKAGE == 0:
            score = tl.maximum(a, b)
        elif LINKAGE == 1:
            score = tl.minimum(a, b)
        else:
            score = (n_i * a + n_j * b) / (n_i + n_j)
        tl.debug_barrier()
        best, partner = _contract(scores, scratch, score, best, partner, alive, token, i, j, n, BLOCK_N)
    store_places(scratch, token_map + image * n, owner, token, is_token)


@triton.jit
def _best_pair(best, partner, token, BLOCK_N: tl.constexpr):
    """Return the lexicographically smallest pair of the best score."""
    i = tl.min(tl.where(best == tl.max(best), token, BLOCK_N))
    return i, tl.min(tl.where(token == i, partner, BLOCK_N))


@triton.jit
def _first_best(scores, alive, token, n, BLOCK_N: tl.constexpr):
    """Search the rows of all tokens."""
    best = tl.full((BLOCK_N,), float("-inf"), scores.dtype.element_ty)
    partner = tl.full((BLOCK_N,), BLOCK_N, tl.int32)
    for row in range(n):
        best, partner = _search(scores, best, partner, alive, token, row, n, BLOCK_N)
    return tl.where(alive, best, float("-inf")), tl.where(alive, partner, BLOCK_N)


@triton.jit
def _search(scores, best, partner, alive, token, row, n, BLOCK_N: tl.constexpr):
    """Find the best score of one token with those after it, and the first partner that has it."""
    is_row, after = token == row, alive & (token > row)
    score = tl.load(scores + row * n + token, after, float("-inf"))
    highest = tl.max(score)
    first = tl.min(tl.where(after & (score == highest), token, BLOCK_N))
    return tl.where(is_row, highest, best), tl.where(is_row, first, partner)


@triton.jit
def _contract(scores, scratch, score, best, partner, alive, token, i, j, n, BLOCK_N: tl.constexpr):
    """Replace the scores of token i by ``score`` [BLOCK_N], those of i merged with j."""
    others = alive & (token != i)
    tl.store(scores + tl.minimum(i, token) * n + tl.maximum(i, token), score, others)
    again = alive & ((token == i) | (partner == i) | (partner == j))  # rows to search again
    better = others & (token < i) & ((score > best) | ((score == best) & (i < partner))) & (again == 0)
    best = tl.where(token == j, float("-inf"), tl.where(better, score, best))
    partner = tl.where(token == j, BLOCK_N, tl.where(better, i, partner))
    place = tl.cumsum(again.to(tl.int32), axis=0) - 1
    tl.store(scratch + place, token, again)
    tl.debug_barrier()
    for at in range(tl.sum(again.to(tl.int32))):
        best, partner = _search(scores, best, partner, alive, token, tl.load(scratch + at), n, BLOCK_N)
    tl.debug_barrier()
    return best, partner
