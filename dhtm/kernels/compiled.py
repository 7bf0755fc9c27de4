"""What the compiled loops of the backend ``numba`` share: compilation, threads, and the arithmetic of merging."""

import ctypes
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numba import bool_, float32, float64, from_dtype, int64, njit, types, void
from torch import Tensor

_LOWEST = np.finfo(np.float32).min
# Sums may be reordered, which is what makes them fast: they run in float64 and only their float32 rounding counts.
SUMS = {"reassoc", "contract"}


def jit(*signatures, **options) -> Callable[[Callable], Callable]:
    """Compile a function with Numba, and cache the machine code beside this file or in the user's cache if possible."""

    def decorate(function):
        try:
            return njit(*signatures, cache=True, nogil=True, error_model="numpy", **options)(function)
        except RuntimeError:  # neither folder can be written
            return njit(*signatures, nogil=True, error_model="numpy", **options)(function)

    return decorate


def in_parallel(images: Callable, batch: int, *arguments) -> None:
    """Run compiled code on the images of a batch, on as many threads as PyTorch uses.

    Args:
        images: called with (first, last, *arguments), merges in the images first, …, last - 1.
        batch: the number of images.
    """
    n_threads = min(batch, torch.get_num_threads())
    # Parts are small because a thread may be slowed down. Compiled code releases the interpreter's lock.
    ends = np.linspace(0, batch, min(batch, 4 * n_threads) + 1).astype(int).tolist()
    parts, errors = iter(list(itertools.pairwise(ends))), []

    def work(_: int | None = None) -> None:
        try:
            for part in parts:  # a list's iterator gives each part to one thread
                images(*part, *arguments)
        except BaseException as error:  # also from a signal; it would be lost at the end of this function
            errors.append(error)

    if n_threads <= 1:
        work()
    elif os.getpid() == _PROCESS and (run := _openmp()):  # a forked process has no such threads, and cannot start any
        run(_REGION(work), None, n_threads, 0)
    else:
        for job in [_pool(n_threads, os.getpid()).submit(work) for _ in range(n_threads)]:
            job.result()
    for error in errors:
        raise error


_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PROCESS = os.getpid()


@cache
def _openmp() -> Callable | None:
    """Return what runs a function on PyTorch's own threads, if these are GNU OpenMP's.

    These spin for milliseconds after every operator of PyTorch, so threads of our own would compete with them for cores.
    """
    try:
        run = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD).GOMP_parallel
    except (AttributeError, OSError):
        return None
    run.argtypes = [_REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return run


@cache
def _pool(n_threads: int, process: int) -> ThreadPoolExecutor:
    """Return threads of this process: a forked process does not inherit those of its parent."""
    return ThreadPoolExecutor(n_threads, "dhtm")


def array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as a NumPy array, read-only because that of an expanded tensor is."""
    view = tensor.numpy()
    view.flags.writeable = False
    return view


def view(kind: types.Type, dimensions: int) -> types.Array:
    """Return Numba's type of a read-only array of any strides."""
    return types.Array(kind, dimensions, "A", readonly=True)


@cache
def compile_merging(function: Callable, dtype: np.dtype, *pairs: types.Type) -> Callable:
    """Compile a function that merges images of float32 or float64 tokens of any strides, when first called.

    Args:
        function: takes first, last, k, arguments of the types ``pairs``, and what :func:`dhtm.kernels.cpu.merge` lists.
    """
    real = from_dtype(dtype)
    signature = void(
        int64, int64, int64, *pairs, view(real, 3), view(real, 3), bool_, view(int64, 2), view(float64, 2), int64, bool_,
        float32, real[:, :, ::1], int64[:, ::1], float32[:, ::1],
    )  # fmt: skip
    return jit(signature)(function)


@jit()
def load(source, target):
    """Copy one image's tokens [N, D], of any strides."""
    for t in range(target.shape[0]):
        for d in range(target.shape[1]):
            target[t, d] = source[t, d]


@jit()
def average(x, i, j, n_i, n_j):
    """Replace row i by the weighted average of rows i and j, rounded once."""
    for d in range(x.shape[1]):
        x[i, d] = (np.float64(x[i, d]) * n_i + np.float64(x[j, d]) * n_j) / (n_i + n_j)


@jit()
def round_score(s):
    """Round a similarity to float32, NaN to the lowest number, infinities to finite ones and -0.0 to 0.0."""
    single = np.float32(s) + np.float32(0)
    return min(max(single, _LOWEST), -_LOWEST) if single == single else _LOWEST


# A call that passes many arrays costs more than a short sum. So `describe` and `compare` are inlined in their callers, and the
# sums, whose terms may be reordered, are functions of few arguments.


@jit(fastmath=SUMS)
def _product(x, a, b):
    total = 0.0
    for d in range(x.shape[1]):
        total += np.float64(x[a, d]) * np.float64(x[b, d])
    return total


@jit(fastmath=SUMS)
def _distance(kind, x, a, b):
    """Sum the squares of two tokens' differences, or their absolute values."""
    total = 0.0
    for d in range(x.shape[1]):
        difference = np.float64(x[a, d]) - np.float64(x[b, d])
        total += difference * difference if kind == 1 else abs(difference)
    return total


@jit(fastmath=SUMS)
def _divergence(log_p, p, a, b):
    """Sum Jensen's symmetric form: KL(p‖q) + KL(q‖p) = Σ (p - q)(log p - log q)."""
    total = 0.0
    for d in range(p.shape[1]):
        total += (p[a, d] - p[b, d]) * (log_p[a, d] - log_p[b, d])
    return total


@jit(fastmath=SUMS)
def _softmax(x, log_p, p, t):
    top, total = -np.inf, 0.0
    for d in range(x.shape[1]):
        top = max(top, np.float64(x[t, d]))
    for d in range(x.shape[1]):
        total += np.exp(np.float64(x[t, d]) - top)
    for d in range(x.shape[1]):
        log_p[t, d] = np.float64(x[t, d]) - top - np.log(total)
        p[t, d] = np.exp(log_p[t, d])


@jit(inline="always")
def describe(kind, x, inverse, log_p, p, t):
    """Store what a similarity needs of a token beside its features: the inverse of its norm, or its softmax and log-softmax."""
    if kind == 0:
        squares = _product(x, t, t)
        inverse[t] = 0.0 if squares == 0 else 1 / np.sqrt(squares)
    elif kind == 3:
        _softmax(x, log_p, p, t)


@jit(inline="always")
def compare(kind, x, inverse, log_p, p, a, b):
    """Compute the similarity of two tokens: a float64 sum rounded to float32, NaN as the lowest and infinities as finite."""
    if kind == 0:
        s = _product(x, a, b) * (inverse[a] * inverse[b])
    elif kind == 3:
        s = -0.5 * _divergence(log_p, p, a, b)
    else:
        s = -_distance(kind, x, a, b)
        s = -np.sqrt(-s) if kind == 1 else s
    return round_score(s)


@jit()
def discount(s, kind, mass, a, b):
    """Multiply the distance of two tokens by m₁m₂ / (m₁ + m₂), and round it; no masses change nothing."""
    if len(mass) == 0:
        return s
    distance = np.float64(s) - (1 if kind == 0 else 0)
    return round_score(distance * (mass[a] * mass[b] / (mass[a] + mass[b])))


@jit()
def join(i, j, member, last_member, gone):
    """Append the list of the tokens that went into j to that of i; a list starts with the token itself."""
    gone[j] = True
    member[last_member[i]] = j
    last_member[i] = last_member[j]


@jit(inline="always")
def fuse(i, j, kind, two, by_size, x, y, inverse, log_p, p, n_patches, mass, member, last_member, gone, weights):
    """Merge token j into token i; without ``by_size`` halve the weights of all tokens that went into them."""
    n_i, n_j = (n_patches[i], n_patches[j]) if by_size else (1, 1)
    average(x, i, j, n_i, n_j)
    if two:
        average(y, i, j, n_i, n_j)
    describe(kind, x, inverse, log_p, p, i)
    n_patches[i] += n_patches[j]
    if len(mass) > 0:
        mass[i] += mass[j]
    join(i, j, member, last_member, gone)
    m = -1 if by_size else i
    while m >= 0:
        weights[m] /= 2
        m = member[m]


@jit()
def number(member, gone, token_map):
    """Number the remaining tokens in their order, and store for each token the number of the one that it went into."""
    place = 0
    for t in range(len(gone)):
        if not gone[t]:
            m = t
            while m >= 0:
                token_map[m] = place
                m = member[m]
            place += 1


@jit()
def finish(y, by_size, sizes, n_patches, member, gone, token_map, merged, weights):
    """Store the remaining tokens in their places, the token map and, with ``by_size``, the shares of the patches."""
    number(member, gone, token_map)
    for t in range(len(gone)):
        if not gone[t] and token_map[t] < merged.shape[0]:
            for d in range(merged.shape[1]):
                merged[token_map[t], d] = y[t, d]
        m = t if by_size and not gone[t] and n_patches[t] > 0 else -1
        while m >= 0:
            weights[m] = np.float32(sizes[m]) / np.float32(n_patches[t])
            m = member[m]
