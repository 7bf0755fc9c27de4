"""Backend ``numba``: one image after the other in compiled loops, images in parallel, at a cost that follows the merges.

The region adjacency graph is kept as a list of edges for each token, and every token knows its best partner among those
after it. A merge joins two lists, measures the new token against its neighbours, and looks again only at tokens whose
best partner it was; so a step costs the neighbours of the two merged regions, and a look at N numbers to find the best.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numba import bool_, float32, float64, int64, njit, types, void
from torch import Tensor

from dhtm.kernels.batched import KINDS, raise_runs_out
from dhtm.regions import Regions, grid_pairs

_LOWEST = np.finfo(np.float32).min
# Sums may be reordered, which is what makes them fast: they run in float64 and only their float32 rounding counts.
_SUMS = {"reassoc", "contract"}


def _compiled(*signatures, **options) -> Callable[[Callable], Callable]:
    """Numba's decorator; machine code is kept on disk where there is a place, beside this file or in the user's cache."""

    def decorate(function):
        try:
            return njit(*signatures, cache=True, nogil=True, error_model="numpy", **options)(function)
        except RuntimeError:  # no such place
            return njit(*signatures, nogil=True, error_model="numpy", **options)(function)

    return decorate


def merge(
    tokens: Tensor, features: Tensor | None, regions: Regions, k: int, connectivity: int, similarity: str, linkage: str
) -> tuple[Tensor, Tensor, Tensor]:
    """k merges in each image of a batch; arguments and results as of every backend, see :mod:`dhtm.kernels`.

    Raises:
        ValueError: an image runs out of adjacent tokens before k merges are made, or its regions name tokens that are not.
    """
    batch, n, channels = tokens.shape
    wide = torch.promote_types(tokens.dtype, torch.float32)
    carried = _array(tokens.to(wide))
    measured = carried if features is None else _array(features.to(wide))
    merged = torch.empty(batch, n - k, channels, dtype=wide)
    token_map = torch.empty(batch, n, dtype=torch.int64)
    weights = torch.empty(batch, n, dtype=torch.float32)
    arguments = (
        carried, measured, features is not None, _array(regions.sizes), KINDS[similarity], linkage == "size",
        merged.numpy(), token_map.numpy(), weights.numpy(),
    )  # fmt: skip
    _in_parallel(_merge_images_of(carried.dtype), regions, connectivity, k, *arguments)
    return merged.to(tokens.dtype), token_map, weights


def draw(regions: Regions, image_ids: Tensor, k: int, connectivity: int, seed: int) -> tuple[Tensor, Tensor]:
    """k merges at random in each image of a batch; arguments and results as of every backend, see :mod:`dhtm.kernels`.

    Raises:
        ValueError: as of :func:`merge`.
    """
    token_map = torch.empty(regions.sizes.shape, dtype=torch.int64)
    weights = torch.empty(regions.sizes.shape, dtype=torch.float32)
    ids = _array(image_ids.contiguous())
    _in_parallel(_draw_images_compiled(), regions, connectivity, k, ids, seed, token_map.numpy(), weights.numpy())
    return token_map, weights


def _in_parallel(images: Callable, regions: Regions, connectivity: int, k: int, *arguments) -> None:
    """Run compiled code on the images of a batch, on as many threads as PyTorch uses.

    Args:
        images: merges in images first, …, last - 1, and says in ``made`` how many merges it made in each.
    """
    assignment, n = _array(regions.assignment), regions.n_tokens
    batch = len(assignment)
    # Compiled code would write where nothing is its own.
    if batch and not (assignment.min() >= 0 and assignment.max() < n):
        raise ValueError(f"regions.assignment has tokens from {assignment.min()} to {assignment.max()}, but N={n}")
    made = np.empty(batch, dtype=np.int64)
    arguments = (assignment, _array(grid_pairs(regions.grid, connectivity)), k, made, *arguments)
    n_threads = min(batch, torch.get_num_threads())
    if n_threads <= 1:
        images(0, batch, *arguments)
    else:  # compiled code lets go of the interpreter's lock; parts are small, for something may slow a thread down
        ends = np.linspace(0, batch, min(batch, 4 * n_threads) + 1).astype(int).tolist()
        pool = _pool(n_threads, os.getpid())
        jobs = [pool.submit(images, *part, *arguments) for part in itertools.pairwise(ends)]
        for job in jobs:
            job.result()
    if (made < k).any():
        raise_runs_out(k, int(np.flatnonzero(made < k)[0]))


@cache
def _pool(n_threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: those of the one that it was forked from are not here."""
    return ThreadPoolExecutor(n_threads, "dhtm")


def _array(tensor: Tensor) -> np.ndarray:
    """A view that cannot be written to, which an expanded tensor's is anyway."""
    array = tensor.numpy()
    array.flags.writeable = False
    return array


def _given(kind: types.Type, dimensions: int) -> types.Array:
    return types.Array(kind, dimensions, "A", readonly=True)


_IMAGES = (
    int64,
    int64,
    _given(int64, 2),
    _given(int64, 2),
    int64,
    int64[::1],
)  # first, last, assignment, pairs, k, made


@cache
def _merge_images_of(dtype: np.dtype) -> Callable:
    """:func:`_merge_images` for float32 or float64 tokens of any strides, compiled when it is first asked for."""
    real = {"float32": float32, "float64": float64}[dtype.name]

    signature = void(
        *_IMAGES, _given(real, 3), _given(real, 3), bool_, _given(int64, 2), int64, bool_,
        real[:, :, ::1], int64[:, ::1], float32[:, ::1],
    )  # fmt: skip
    return _compiled(signature)(_merge_images)


def _merge_images(
    first, last, assignment, pairs, k, made, carried, measured, two, sizes, kind, by_size, merged, token_map, weights
):
    """Merge in images first, …, last - 1; the arrays are of the whole batch, and those of the result are filled."""
    n, channels = carried.shape[1], carried.shape[2]
    n_features, n_edges = measured.shape[2], pairs.shape[0]
    x = np.empty((n, n_features), measured.dtype)  # what similarity is measured on
    y = np.empty((n, channels), carried.dtype) if two else x  # the tokens themselves
    described = (n, n_features) if kind == 3 else (1, 1)
    log_p, p = np.empty(described, np.float64), np.empty(described, np.float64)
    inverse = np.empty(n, np.float64)
    n_patches = np.empty(n, np.int64)

    # Edge e has two halves: 2e is in the list of one of its tokens, 2e + 1 in that of the other; half h is an edge to to[h].
    to, after = np.empty(2 * n_edges, np.int64), np.empty(2 * n_edges, np.int64)
    head, tail = np.empty(n, np.int64), np.empty(n, np.int64)
    score, alive = np.empty(n_edges, np.float32), np.empty(n_edges, np.bool_)
    seen = np.empty(n, np.int64)
    best, partner = np.empty(n, np.float32), np.empty(n, np.int64)
    # The tokens that have gone into each token, itself first.
    member, last_member, gone = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.bool_)

    for image in range(first, last):
        for t in range(n):
            for d in range(n_features):
                x[t, d] = measured[image, t, d]
            if two:
                for d in range(channels):
                    y[t, d] = carried[image, t, d]
            _describe(kind, x, inverse, log_p, p, t)
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
                if alive[e] and other > t:  # what touches in several places is one edge
                    if seen[other] == t:
                        alive[e] = False
                    else:
                        seen[other] = t
                        score[e] = _similarity(kind, x, inverse, log_p, p, t, other)
                if alive[e]:
                    before = h
                else:
                    _unlink(head, tail, after, t, before, h)
                h = after[h]
            best[t], partner[t] = _best(head, tail, after, to, score, alive, t)

        made[image] = k
        for step in range(k):
            i = 0  # of equal scores the first token's, and its first partner
            for t in range(1, n):
                if best[t] > best[i]:
                    i = t
            j = partner[i]
            if j < 0:
                made[image] = step
                break
            n_i, n_j = (n_patches[i], n_patches[j]) if by_size else (1, 1)
            _average(x, i, j, n_i, n_j)
            if two:
                _average(y, i, j, n_i, n_j)
            _describe(kind, x, inverse, log_p, p, i)
            n_patches[i] += n_patches[j]
            gone[j], best[j] = True, -np.inf
            member[last_member[i]] = j
            last_member[i] = last_member[j]
            if not by_size:
                m = i
                while m >= 0:
                    weights[image, m] /= 2
                    m = member[m]

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
                    score[e] = _similarity(kind, x, inverse, log_p, p, i, other)
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

        place = 0
        for t in range(n):
            if gone[t]:
                continue
            if place < merged.shape[1]:
                for d in range(channels):
                    merged[image, place, d] = y[t, d]
            m = t
            while m >= 0:
                token_map[image, m] = place
                if by_size and n_patches[t] > 0:
                    weights[image, m] = np.float32(sizes[image, m]) / np.float32(n_patches[t])
                m = member[m]
            place += 1


@cache
def _draw_images_compiled() -> Callable:
    return _compiled(void(*_IMAGES, _given(int64, 1), int64, int64[:, ::1], float32[:, ::1]))(_draw_images)


@_compiled()
def _hashed(state, key):
    """One more key into a hash, as in :mod:`dhtm.kernels.batched`."""
    state += np.uint64(key) + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _draw_images(first, last, assignment, pairs, k, made, ids, seed, token_map, weights):
    """Merge at random in images first, …, last - 1; the arrays are of the whole batch, and those of the result are filled."""
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
        of_image = _hashed(_hashed(np.uint64(0), seed), ids[image])
        made[image] = k
        for step in range(k):
            if n_edges == 0:
                made[image] = step
                break
            state, best, drawn = _hashed(of_image, n - step), np.uint64(0), 0
            for e in range(n_edges):
                lot = _hashed(state, low[e] * n + high[e]) & np.uint64(2**62 - 1)
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
        for t in range(n):  # a token that others went into comes before them
            if owner[t] == t:
                place[t] = left
                left += 1
            token_map[image, t] = place[owner[t]]


@_compiled()
def _append(head, tail, after, t, h):
    """Put a half edge at the end of a token's list."""
    if head[t] < 0:
        head[t] = h
    else:
        after[tail[t]] = h
    tail[t], after[h] = h, -1


@_compiled()
def _unlink(head, tail, after, t, before, h):
    """Take a half edge out of a token's list; it still knows what came after it."""
    if before < 0:
        head[t] = after[h]
    else:
        after[before] = after[h]
    if tail[t] == h:
        tail[t] = before


@_compiled()
def _best(head, tail, after, to, score, alive, t):
    """The best score of a token with those after it, and with which, the first of equals; dead edges leave its list."""
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


@_compiled()
def _average(x, i, j, n_i, n_j):
    """Row i becomes the average of rows i and j, weighted; rounded once."""
    for d in range(x.shape[1]):
        x[i, d] = (np.float64(x[i, d]) * n_i + np.float64(x[j, d]) * n_j) / (n_i + n_j)


@_compiled(fastmath=_SUMS)
def _describe(kind, x, inverse, log_p, p, t):
    """What a similarity needs of a token beside its features: one over its norm, or its softmax and the log of that."""
    if kind == 0:
        squares = 0.0
        for d in range(x.shape[1]):
            squares += np.float64(x[t, d]) * np.float64(x[t, d])
        inverse[t] = 0.0 if squares == 0 else 1 / np.sqrt(squares)
    elif kind == 3:
        top, total = -np.inf, 0.0
        for d in range(x.shape[1]):
            top = max(top, np.float64(x[t, d]))
        for d in range(x.shape[1]):
            total += np.exp(np.float64(x[t, d]) - top)
        for d in range(x.shape[1]):
            log_p[t, d] = np.float64(x[t, d]) - top - np.log(total)
            p[t, d] = np.exp(log_p[t, d])


@_compiled(fastmath=_SUMS)
def _similarity(kind, x, inverse, log_p, p, a, b):
    """Of two tokens: a float64 sum, rounded to float32; NaN is lowest, and infinity finite."""
    s = 0.0
    if kind == 0:
        for d in range(x.shape[1]):
            s += np.float64(x[a, d]) * np.float64(x[b, d])
        s *= inverse[a] * inverse[b]
    elif kind == 1:
        for d in range(x.shape[1]):
            difference = np.float64(x[a, d]) - np.float64(x[b, d])
            s += difference * difference
        s = -np.sqrt(s)
    elif kind == 2:
        for d in range(x.shape[1]):
            s -= abs(np.float64(x[a, d]) - np.float64(x[b, d]))
    else:  # Jensen's symmetric form: KL(p‖q) + KL(q‖p) = Σ (p - q)(log p - log q)
        for d in range(x.shape[1]):
            s -= 0.5 * (p[a, d] - p[b, d]) * (log_p[a, d] - log_p[b, d])
    rounded = np.float32(s)
    if rounded != rounded:
        return _LOWEST
    return min(max(rounded, _LOWEST), -_LOWEST)
