"""Backend ``numba`` where all pairs of tokens are adjacent: DHTM with ``connectivity="all"`` and agglomerative clustering.

The scores of all pairs are a symmetric matrix, and every token knows its best partner among the tokens after it. A merge
replaces one row and one column. A token whose best partner has merged keeps its score as a bound, and its row is searched
again only when that bound is the highest score of all.

The highest score is found among integers that are in the same order, because compilers vectorise the maximum of integers
but not that of floating-point numbers.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numba import from_dtype, int64, void
from torch import Tensor

from dhtm.kernels import CLUSTER_LINKAGES
from dhtm.kernels.compiled import (
    SUMS,
    array,
    compare,
    describe,
    discount,
    finish,
    fuse,
    in_parallel,
    jit,
    join,
    load,
    number,
    round_score,
    view,
)

_STALE = -1  # the partner of a token whose best partner has merged
_LOW = np.int64(-(2**63))
_BLOCK = 96  # rows that are multiplied with all before them at a time; a multiple of 3


def agglomerate(features: Tensor, k: int, linkage: str) -> Tensor:
    """Merge clusters k times in each image; arguments and result are those of every backend, see :mod:`dhtm.kernels`."""
    token_map = torch.empty(features.shape[:2], dtype=torch.int64)
    given_features = array(features.to(torch.promote_types(features.dtype, torch.float32)))
    cluster_images = _cluster_images_of(given_features.dtype)
    in_parallel(cluster_images, len(features), k, given_features, CLUSTER_LINKAGES[linkage], token_map.numpy())
    return token_map


def merge_images(
    first, last, k, carried, measured, two, sizes, masses, kind, by_size, least, merged, token_map, weights,
):  # fmt: skip
    """Merge in images first, …, last - 1 of the batch, and fill the arrays of the result."""
    n, channels = carried.shape[1], carried.shape[2]
    x = np.empty((n, measured.shape[2]), measured.dtype)  # what similarity is measured on
    y = np.empty((n, channels), carried.dtype) if two else x  # the tokens themselves
    described = (n, measured.shape[2]) if kind == 3 else (1, 1)
    log_p, p = np.empty(described, np.float64), np.empty(described, np.float64)
    inverse = np.empty(n, np.float64)
    n_patches, mass = np.empty(n, np.int64), np.empty(masses.shape[1], np.float64)
    if kind == 0:
        wide, product = np.empty(x.shape, np.float64), np.empty((n, n), np.float64)
    score, to_new = np.empty((n, n), np.float32), np.empty(n, np.float32)
    best, partner = np.empty(n, np.float32), np.empty(n, np.int64)
    bits, best_bits = score.view(np.int32), best.view(np.int32)
    member, last_member, gone = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.bool_)
    alive = np.empty(n, np.int64)  # -1 (all bits), or 0 for tokens without a patch and those already merged away

    for image in range(first, last):
        load(measured[image], x)
        if two:
            load(carried[image], y)
        mass[:] = masses[image]
        for t in range(n):
            describe(kind, x, inverse, log_p, p, t)
            n_patches[t] = sizes[image, t]
            weights[image, t] = 1
            member[t], last_member[t], gone[t] = -1, t, False
            alive[t] = -1 if n_patches[t] > 0 else 0
        if kind == 0:
            load(measured[image], wide)
            _multiply(wide, product)
        for t in range(n):
            for other in range(t + 1, n):
                if kind == 0:
                    s = round_score(product[t, other] * (inverse[t] * inverse[other]))
                else:
                    s = compare(kind, x, inverse, log_p, p, t, other)
                score[t, other] = score[other, t] = discount(s, kind, mass, t, other)
        for t in range(n):
            _search(t, score, bits, best, partner, alive)

        for _ in range(k):
            i = _first_of_best_pair(score, bits, best, best_bits, partner, alive)
            if i < 0 or best[i] < least:
                break
            j = partner[i]
            fuse(
                i, j, kind, two, by_size, x, y, inverse, log_p, p, n_patches, mass, member, last_member, gone,
                weights[image],
            )  # fmt: skip
            alive[j] = 0
            for t in range(n):
                if alive[t] and t != i:
                    to_new[t] = discount(compare(kind, x, inverse, log_p, p, i, t), kind, mass, i, t)
            _contract(score, bits, to_new, best, partner, alive, i, j)

        finish(y, by_size, sizes[image], n_patches, member, gone, token_map[image], merged[image], weights[image])


@cache
def _cluster_images_of(dtype: np.dtype) -> Callable:
    """Compile :func:`_cluster_images` for float32 or float64 features of any strides, when first called."""
    return jit(void(int64, int64, int64, view(from_dtype(dtype), 3), int64, int64[:, ::1]))(_cluster_images)


def _cluster_images(first, last, k, features, linkage, token_map):
    """Merge clusters in images first, …, last - 1 of the batch, and fill the token map."""
    n = features.shape[1]
    x = np.empty((n, features.shape[2]), np.float64)
    score, to_new, inverse = np.empty((n, n), np.float64), np.empty(n, np.float64), np.empty(n, np.float64)
    best, partner, count = np.empty(n, np.float64), np.empty(n, np.int64), np.empty(n, np.int64)
    bits, best_bits, alive = score.view(np.int64), best.view(np.int64), np.empty(n, np.int64)
    member, last_member, gone = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.bool_)
    for image in range(first, last):
        for t in range(n):
            count[t], member[t], last_member[t], gone[t], alive[t] = 1, -1, t, False, -1
        load(features[image], x)
        _multiply(x, score)
        _to_scores(score, inverse)
        for t in range(n):
            _search(t, score, bits, best, partner, alive)
        for _ in range(k):
            i = _first_of_best_pair(score, bits, best, best_bits, partner, alive)
            j = partner[i]
            join(i, j, member, last_member, gone)
            alive[j] = 0
            _link(linkage, score[i], score[j], np.float64(count[i]), np.float64(count[j]), to_new)
            count[i] += count[j]
            _contract(score, bits, to_new, best, partner, alive, i, j)
        number(member, gone, token_map[image])


@jit(fastmath=SUMS)
def _multiply(x, product):
    """Fill the upper triangle with the products of all pairs of rows of x [N, F]."""
    last = len(x) - 1
    # Nine pairs at once read x a third as often; the last ones may be the same pair again. Blocks of rows stay in the cache.
    for block in range(0, len(x), _BLOCK):
        end = min(block + _BLOCK, len(x))
        for t in range(0, end, 3):
            t_1, t_2 = min(t + 1, last), min(t + 2, last)
            a, b, c = x[t], x[t_1], x[t_2]
            for i in range(max(t, block), end, 3):
                i_1, i_2 = min(i + 1, last), min(i + 2, last)
                e, f, g = x[i], x[i_1], x[i_2]
                ae = af = ag = be = bf = bg = ce = cf = cg = 0.0
                for d in range(len(a)):
                    ae += a[d] * e[d]
                    af += a[d] * f[d]
                    ag += a[d] * g[d]
                    be += b[d] * e[d]
                    bf += b[d] * f[d]
                    bg += b[d] * g[d]
                    ce += c[d] * e[d]
                    cf += c[d] * f[d]
                    cg += c[d] * g[d]
                product[t, i], product[t, i_1], product[t, i_2] = ae, af, ag
                product[t_1, i], product[t_1, i_1], product[t_1, i_2] = be, bf, bg
                product[t_2, i], product[t_2, i_1], product[t_2, i_2] = ce, cf, cg


@jit()
def _to_scores(score, inverse):
    """Turn the products of all pairs (upper triangle) into scores, which are cosines - 1 (whole matrix)."""
    for t in range(len(score)):
        inverse[t] = 1 / np.sqrt(score[t, t]) if score[t, t] > 0 else 0.0
    for t in range(len(score)):
        row, others = score[t, t:], inverse[t:]
        for i in range(len(row)):
            row[i] = np.float64(round_score(row[i] * (others[0] * others[i]))) - 1
    for t in range(len(score)):
        for other in range(t + 1, len(score)):
            score[other, t] = score[t, other]


@jit()
def _link(linkage, a, b, n_a, n_b, joined):
    """Fill in the scores of the union of two clusters of n_a and n_b tokens, from their own scores a and b."""
    if linkage == 0:
        for t in range(len(joined)):
            joined[t] = a[t] if a[t] > b[t] else b[t]
    elif linkage == 1:
        for t in range(len(joined)):
            joined[t] = a[t] if a[t] < b[t] else b[t]
    else:
        for t in range(len(joined)):
            joined[t] = (n_a * a[t] + n_b * b[t]) / (n_a + n_b)


@jit()
def _sort_key(bits, alive):
    """Return an integer in the order of the floating-point numbers with these bits; the lowest where ``alive`` is 0."""
    return ((bits ^ ((bits >> 63) & ~_LOW)) & alive) | (_LOW & ~alive)


@jit()
def _first_highest(bits, alive):
    """Return the first place with the highest score of all that are alive; -1 if none is."""
    n, highest = len(bits), _LOW
    for t in range(n):
        highest = max(highest, _sort_key(bits[t], alive[t]))
    if highest == _LOW:
        return -1
    place = n
    for t in range(n):
        place = min(place, t if _sort_key(bits[t], alive[t]) == highest else n)
    return place


@jit()
def _search(t, score, bits, best, partner, alive):
    """Find the best partner of a token among those after it; its number is N if there is none."""
    place = _first_highest(bits[t, t + 1 :], alive[t + 1 :])
    if place < 0:
        best[t], partner[t] = -np.inf, len(best)
    else:
        best[t], partner[t] = score[t, t + 1 + place], t + 1 + place


@jit()
def _first_of_best_pair(score, bits, best, best_bits, partner, alive):
    """Return the first token of the first pair with the highest score; -1 if there is no pair."""
    while True:
        i = _first_highest(best_bits, alive)
        if i < 0 or partner[i] == len(best):
            return -1
        if partner[i] != _STALE:
            return i
        _search(i, score, bits, best, partner, alive)


@jit()
def _contract(score, bits, to_new, best, partner, alive, i, j):
    """Replace the scores of token i by ``to_new``, those of i merged with j; j is no longer alive."""
    for t in range(len(to_new)):
        score[i, t] = to_new[t]
    for t in range(len(to_new)):
        score[t, i] = to_new[t]
    for t in range(i):
        s, highest, other = to_new[t], best[t], partner[t]
        wins = (alive[t] != 0) & ((s > highest) | ((s == highest) & (i < other)))
        best[t] = s if wins else highest
        partner[t] = i if wins else (_STALE if (other == i) | (other == j) else other)
    for t in range(i + 1, j):
        partner[t] = _STALE if partner[t] == j else partner[t]
    _search(i, score, bits, best, partner, alive)
