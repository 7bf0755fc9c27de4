"""Backend ``numba`` where all pairs of tokens are adjacent: DHTM with ``connectivity="all"`` and agglomerative clustering.

The scores of all pairs are a symmetric matrix, and every token knows its best partner among the tokens after it. A merge
replaces one row and one column, and searches again only the rows whose best partner has merged.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numba import bool_, float32, float64, int64, types, void
from torch import Tensor

from dhtm.kernels import CLUSTER_LINKAGES
from dhtm.kernels.compiled import (
    array,
    average,
    collect,
    compare,
    compiled,
    describe,
    discount,
    given,
    halve,
    in_parallel,
    join,
    load,
    number,
    rounded,
    share,
)

_PRODUCTS = types.Array(float64, 3, "C", readonly=True)


def agglomerate(features: Tensor, k: int, linkage: str) -> Tensor:
    """Merge clusters k times in each image; arguments and result are those of every backend, see :mod:`dhtm.kernels`."""
    token_map = torch.empty(features.shape[:2], dtype=torch.int64)
    made = np.empty(len(features), dtype=np.int64)
    products = array(all_products(features))
    in_parallel(_cluster_images_compiled(), made, k, products, CLUSTER_LINKAGES[linkage], token_map.numpy())
    return token_map


def all_products(features: Tensor) -> Tensor:
    """Return the products of all pairs of features [B, N, F]: float64 [B, N, N]."""
    features = features.double()
    return features @ features.transpose(1, 2)


@cache
def merge_images_of(dtype: np.dtype) -> Callable:
    """Compile :func:`_merge_images` for float32 or float64 tokens of any strides, when first called."""
    real = {"float32": float32, "float64": float64}[dtype.name]
    signature = void(
        int64, int64, int64[::1], int64, _PRODUCTS, given(real, 3), given(real, 3), bool_, given(int64, 2),
        given(float64, 2), int64, bool_, float32, real[:, :, ::1], int64[:, ::1], float32[:, ::1],
    )  # fmt: skip
    return compiled(signature)(_merge_images)


def _merge_images(
    first,
    last,
    made,
    k,
    products,
    carried,
    measured,
    two,
    sizes,
    masses,
    kind,
    by_size,
    least,
    merged,
    token_map,
    weights,
):
    """Merge in images first, …, last - 1 of the batch, and fill the arrays of the result."""
    n, channels = carried.shape[1], carried.shape[2]
    x = np.empty((n, measured.shape[2]), measured.dtype)  # what similarity is measured on
    y = np.empty((n, channels), carried.dtype) if two else x  # the tokens themselves
    described = (n, measured.shape[2]) if kind == 3 else (1, 1)
    log_p, p = np.empty(described, np.float64), np.empty(described, np.float64)
    inverse = np.empty(n, np.float64)
    n_patches, mass = np.empty(n, np.int64), np.empty(masses.shape[1], np.float64)
    score, to_new = np.empty((n, n), np.float32), np.empty(n, np.float32)
    best, partner = np.empty(n, np.float32), np.empty(n, np.int64)
    member, last_member = np.empty(n, np.int64), np.empty(n, np.int64)
    gone, dead = np.empty(n, np.bool_), np.empty(n, np.bool_)

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
            dead[t] = n_patches[t] == 0  # a token without a patch touches no other
        for t in range(n):
            for other in range(t, n):
                if t == other or dead[t] or dead[other]:
                    s = np.float32(-np.inf)
                elif products.shape[1] > 0:
                    s = rounded(products[image, t, other] * (inverse[t] * inverse[other]))
                else:
                    s = compare(kind, x, inverse, log_p, p, t, other)
                score[t, other] = score[other, t] = s if s == -np.inf else discount(s, kind, mass, t, other)
        for t in range(n):
            best[t], partner[t] = _first_highest(score[t], t + 1)

        made[image] = k
        for step in range(k):
            i = _first_highest(best, 0)[1]
            if i < 0 or best[i] < least:
                made[image] = step if least == -np.inf else k
                break
            j = partner[i]
            n_i, n_j = (n_patches[i], n_patches[j]) if by_size else (1, 1)
            average(x, i, j, n_i, n_j)
            if two:
                average(y, i, j, n_i, n_j)
            describe(kind, x, inverse, log_p, p, i)
            n_patches[i] += n_patches[j]
            if len(mass) > 0:
                mass[i] += mass[j]
            join(i, j, member, last_member, gone)
            dead[j] = True
            if not by_size:
                halve(i, member, weights[image])
            for t in range(n):
                to_new[t] = -np.inf
                if not dead[t] and t != i:
                    to_new[t] = discount(compare(kind, x, inverse, log_p, p, i, t), kind, mass, i, t)
            _contract(score, to_new, best, partner, i, j)

        number(member, gone, token_map[image])
        collect(y, gone, token_map[image], merged[image])
        if by_size:
            share(sizes[image], n_patches, gone, member, weights[image])


@cache
def _cluster_images_compiled() -> Callable:
    return compiled(void(int64, int64, int64[::1], int64, _PRODUCTS, int64, int64[:, ::1]))(_cluster_images)


def _cluster_images(first, last, made, k, products, linkage, token_map):
    """Merge clusters in images first, …, last - 1 of the batch, and fill the token map."""
    n = products.shape[1]
    score, to_new, inverse = np.empty((n, n), np.float64), np.empty(n, np.float64), np.empty(n, np.float64)
    best, partner, count = np.empty(n, np.float64), np.empty(n, np.int64), np.empty(n, np.int64)
    member, last_member, gone = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.bool_)
    for image in range(first, last):
        for t in range(n):
            count[t], member[t], last_member[t], gone[t] = 1, -1, t, False
            inverse[t] = 1 / np.sqrt(products[image, t, t]) if products[image, t, t] > 0 else 0.0
        for t in range(n):
            for other in range(n):  # minus the distance
                score[t, other] = np.float64(rounded(products[image, t, other] * (inverse[t] * inverse[other]))) - 1
            score[t, t] = -np.inf
            best[t], partner[t] = _first_highest(score[t], t + 1)
        made[image] = k
        for _ in range(k):
            i = _first_highest(best, 0)[1]
            j = partner[i]
            join(i, j, member, last_member, gone)
            n_i, n_j = np.float64(count[i]), np.float64(count[j])
            for t in range(n):
                a, b = score[i, t], score[j, t]
                if linkage == 0:
                    to_new[t] = max(a, b)
                elif linkage == 1:
                    to_new[t] = min(a, b)
                else:
                    to_new[t] = (n_i * a + n_j * b) / (n_i + n_j)
            count[i] += count[j]
            _contract(score, to_new, best, partner, i, j)
        number(member, gone, token_map[image])


@compiled(fastmath={"nnan", "nsz", "reassoc"})
def _first_highest(values, start):
    """Return the highest of values[start:] and the first place that has it; -inf and -1 if there is no other value."""
    best = -np.inf
    for t in range(start, len(values)):
        best = max(best, values[t])
    if best > -np.inf:
        for t in range(start, len(values)):
            if values[t] == best:
                return best, t
    return best, -1


@compiled()
def _contract(score, to_new, best, partner, i, j):
    """Replace the scores of token i by those of the token that it and j have become, ``to_new``; j becomes dead.

    Dead tokens have the score -inf with all others, and every token has it with itself.
    """
    to_new[i] = to_new[j] = best[j] = -np.inf
    partner[j] = -1
    score[i] = to_new
    for t in range(len(best)):
        score[t, i], score[t, j] = to_new[t], -np.inf
    for t in range(j):
        if t == i or partner[t] == i or partner[t] == j:
            best[t], partner[t] = _first_highest(score[t], t + 1)
        elif t < i and (to_new[t] > best[t] or (to_new[t] == best[t] and i < partner[t])):
            best[t], partner[t] = to_new[t], i
