"""Backend ``numba``: the images in parallel, each in compiled loops whose time follows the number of merges.

The region adjacency graph is kept as a list of edges per token, and every token knows its best partner among the tokens
after it. A merge joins two lists, measures the new token against its neighbours, and searches again only the tokens whose
best partner has merged. So a merge takes time in proportion to the neighbours of its two tokens, plus one pass over N
numbers to find the best pair.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numba import float32, int64, void
from torch import Tensor

from dhtm.kernels import ALL_PAIRS, KINDS, cpu_pairs
from dhtm.kernels.compiled import (
    SUMS,
    array,
    compare,
    compile_merging,
    describe,
    discount,
    finish,
    fuse,
    in_parallel,
    jit,
    load,
    view,
)
from dhtm.regions import Regions, grid_pairs

agglomerate = cpu_pairs.agglomerate


def merge(tokens, features, masses, regions, k, connectivity, similarity, linkage, threshold):
    """Make k merges in each image of a batch; arguments and results are those of every backend, see :mod:`dhtm.kernels`.

    Raises:
        ValueError: the regions name tokens that do not exist.
    """
    batch, n, channels = tokens.shape
    wide = torch.promote_types(tokens.dtype, torch.float32)
    carried = tokens.to(wide)
    measured = carried if features is None else features.to(wide)
    if threshold is None:
        merged = torch.empty(batch, n - k, channels, dtype=wide)
    else:
        merged = torch.zeros(batch, n, channels, dtype=wide)
    token_map = torch.empty(batch, n, dtype=torch.int64)
    weights = torch.empty(batch, n, dtype=torch.float32)
    masses = torch.empty(batch, 0, dtype=torch.float64) if masses is None else masses.double()
    arguments = (
        array(carried), array(measured), features is not None, array(regions.sizes), array(masses), KINDS[similarity],
        linkage == "size", np.float32(-np.inf if threshold is None else threshold), merged.numpy(), token_map.numpy(),
        weights.numpy(),
    )  # fmt: skip
    if connectivity == ALL_PAIRS:
        in_parallel(compile_merging(cpu_pairs.merge_images, arguments[0].dtype), batch, k, *arguments)
    else:
        merge_images = compile_merging(_merge_images, arguments[0].dtype, *_EDGES)
        in_parallel(merge_images, batch, k, *_edges(regions, connectivity), *arguments)
    return merged.to(tokens.dtype), token_map, weights


def draw(regions: Regions, image_ids: Tensor, k: int, connectivity: int, seed: int) -> tuple[Tensor, Tensor]:
    """Make k merges at random in each image; arguments and results are those of every backend, see :mod:`dhtm.kernels`.

    Raises:
        ValueError: as in :func:`merge`.
    """
    token_map = torch.empty(regions.sizes.shape, dtype=torch.int64)
    weights = torch.empty(regions.sizes.shape, dtype=torch.float32)
    arguments = array(image_ids.contiguous()), seed, token_map.numpy(), weights.numpy()
    in_parallel(_compile_drawing(), len(token_map), k, *_edges(regions, connectivity), *arguments)
    return token_map, weights


def _edges(regions: Regions, connectivity: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the assignment and the grid's pairs, after checking the assignment: compiled code checks no index."""
    assignment, n = array(regions.assignment), regions.n_tokens
    if len(assignment) and not (assignment.min() >= 0 and assignment.max() < n):
        raise ValueError(f"regions.assignment has tokens from {assignment.min()} to {assignment.max()}, but N={n}")
    return assignment, array(grid_pairs(regions.grid, connectivity))


_EDGES = view(int64, 2), view(int64, 2)  # the assignment, and the pairs of patches


def _merge_images(
    first, last, k, assignment, pairs, carried, measured, two, sizes, masses, kind, by_size, least, merged,
    token_map, weights,
):  # fmt: skip
    """Merge in images first, …, last - 1 of the batch, and fill the arrays of the result."""
    n, channels = carried.shape[1], carried.shape[2]
    n_features, n_edges = measured.shape[2], pairs.shape[0]
    x = np.empty((n, n_features), measured.dtype)  # what similarity is measured on
    y = np.empty((n, channels), carried.dtype) if two else x  # the tokens themselves
    described = (n, n_features) if kind == 3 else (1, 1)
    log_p, p = np.empty(described, np.float64), np.empty(described, np.float64)
    inverse = np.empty(n, np.float64)
    n_patches, mass = np.empty(n, np.int64), np.empty(masses.shape[1], np.float64)

    # Edge e has two halves: 2e is in the list of one of its tokens, 2e + 1 in that of the other; half h leads to to[h].
    to, after = np.empty(2 * n_edges, np.int64), np.empty(2 * n_edges, np.int64)
    head, tail = np.empty(n, np.int64), np.empty(n, np.int64)
    score, alive = np.empty(n_edges, np.float32), np.empty(n_edges, np.bool_)
    seen = np.empty(n, np.int64)
    best, partner = np.empty(n, np.float32), np.empty(n, np.int64)
    # The tokens that went into each token, itself first, as linked lists.
    member, last_member, gone = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.bool_)

    for image in range(first, last):
        load(measured[image], x)
        if two:
            load(carried[image], y)
        mass[:] = masses[image]
        for t in range(n):
            describe(kind, x, inverse, log_p, p, t)
            n_patches[t] = sizes[image, t]
            weights[image, t] = 1
            head[t] = tail[t] = seen[t] = member[t] = -1
            last_member[t], gone[t] = t, False

        for e in range(n_edges):
            a, b = assignment[image, pairs[e, 0]], assignment[image, pairs[e, 1]]
            alive[e] = a != b
            if alive[e]:
                _append(head, tail, after, a, 2 * e)
                _append(head, tail, after, b, 2 * e + 1)
                to[2 * e], to[2 * e + 1] = b, a
        for t in range(n):
            h, before = head[t], -1
            while h >= 0:
                e, other = h >> 1, to[h]
                if alive[e] and other > t:  # tokens that touch in several places need one edge
                    alive[e] = seen[other] != t
                    seen[other] = t
                if alive[e]:
                    before = h
                else:
                    _unlink(head, tail, after, t, before, h)
                h = after[h]
            best[t], partner[t] = -np.inf, -1
        _score(kind, x, inverse, log_p, p, to, alive, score)
        for e in range(n_edges):
            if alive[e]:
                a, b = min(to[2 * e], to[2 * e + 1]), max(to[2 * e], to[2 * e + 1])
                score[e] = discount(score[e], kind, mass, a, b)
                if score[e] > best[a] or (score[e] == best[a] and b < partner[a]):
                    best[a], partner[a] = score[e], b

        for step in range(k):
            i = 0  # the first token among equal scores, with its first partner
            for t in range(1, n):
                if best[t] > best[i]:
                    i = t
            j = partner[i]
            if j < 0 or best[i] < least:
                break
            fuse(
                i, j, kind, two, by_size, x, y, inverse, log_p, p, n_patches, mass, member, last_member, gone,
                weights[image],
            )  # fmt: skip
            best[j] = -np.inf

            if head[i] < 0:
                head[i] = head[j]
            elif head[j] >= 0:
                after[tail[i]] = head[j]
            if head[j] >= 0:
                tail[i] = tail[j]
            h, before = head[i], -1
            while h >= 0:
                e, other = h >> 1, to[h]
                if alive[e] and (other in (i, j) or seen[other] == n + step):
                    alive[e] = False
                if alive[e]:
                    seen[other] = n + step
                    to[h ^ 1] = i
                    score[e] = discount(compare(kind, x, inverse, log_p, p, i, other), kind, mass, i, other)
                    before = h
                else:
                    _unlink(head, tail, after, i, before, h)
                h = after[h]
            best[i], partner[i] = _best(head, tail, after, to, score, alive, i)
            h = head[i]
            while h >= 0:
                other, s = to[h], score[h >> 1]
                if partner[other] == i or partner[other] == j:
                    best[other], partner[other] = _best(head, tail, after, to, score, alive, other)
                elif other < i and (s > best[other] or (s == best[other] and i < partner[other])):
                    best[other], partner[other] = s, i
                h = after[h]

        finish(y, by_size, sizes[image], n_patches, member, gone, token_map[image], merged[image], weights[image])


@cache
def _compile_drawing() -> Callable:
    return jit(void(int64, int64, int64, *_EDGES, view(int64, 1), int64, int64[:, ::1], float32[:, ::1]))(_draw_images)


@jit()
def _hash(state, key):
    """Hash one more key, as in :mod:`dhtm.kernels.batched`."""
    state += np.uint64(key) + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _draw_images(first, last, k, assignment, pairs, ids, seed, token_map, weights):
    """Merge at random in images first, …, last - 1 of the batch, and fill the arrays of the result."""
    n, n_pairs = token_map.shape[1], pairs.shape[0]
    low, high = np.empty(n_pairs, np.int64), np.empty(n_pairs, np.int64)
    owner, place = np.empty(n, np.int64), np.empty(n, np.int64)
    for image in range(first, last):
        n_edges = 0
        for e in range(n_pairs):
            a, b = assignment[image, pairs[e, 0]], assignment[image, pairs[e, 1]]
            if a != b:
                low[n_edges], high[n_edges] = min(a, b), max(a, b)
                n_edges += 1
        for t in range(n):
            owner[t], weights[image, t] = t, 1
        of_image = _hash(_hash(np.uint64(0), seed), ids[image])
        for step in range(k):
            if n_edges == 0:
                break
            state, best, drawn = _hash(of_image, n - step), np.uint64(0), 0
            for e in range(n_edges):
                lot = _hash(state, low[e] * n + high[e]) & np.uint64(2**62 - 1)
                if lot > best:
                    best, drawn = lot, e
            i, j, left = low[drawn], high[drawn], 0
            for e in range(n_edges):
                a, b = (i if low[e] == j else low[e]), (i if high[e] == j else high[e])
                if a != b:
                    low[left], high[left] = min(a, b), max(a, b)
                    left += 1
            n_edges = left
            for t in range(n):
                if owner[t] == i or owner[t] == j:
                    owner[t] = i
                    weights[image, t] /= 2
        left = 0
        for t in range(n):  # a token comes before those that went into it
            if owner[t] == t:
                place[t] = left
                left += 1
            token_map[image, t] = place[owner[t]]


@jit(fastmath=SUMS)
def _score(kind, x, inverse, log_p, p, to, alive, score):
    """Compare the two tokens of every edge, in a separate loop so that the processor works on several pairs at a time."""
    for e in range(len(score)):
        if alive[e]:
            score[e] = compare(kind, x, inverse, log_p, p, to[2 * e], to[2 * e + 1])


@jit()
def _append(head, tail, after, t, h):
    """Append a half edge to a token's list."""
    if head[t] < 0:
        head[t] = h
    else:
        after[tail[t]] = h
    tail[t], after[h] = h, -1


@jit()
def _unlink(head, tail, after, t, before, h):
    """Remove a half edge from a token's list; its own successor stays readable."""
    if before < 0:
        head[t] = after[h]
    else:
        after[before] = after[h]
    if tail[t] == h:
        tail[t] = before


@jit()
def _best(head, tail, after, to, score, alive, t):
    """Return the best score of a token with those after it and the first partner that has it; unlink dead edges."""
    best, partner = np.float32(-np.inf), -1
    h, before = head[t], -1
    while h >= 0:
        if alive[h >> 1]:
            other, s = to[h], score[h >> 1]
            if other > t and (s > best or (s == best and other < partner)):
                best, partner = s, other
            before = h
        else:
            _unlink(head, tail, after, t, before, h)
        h = after[h]
    return best, partner
