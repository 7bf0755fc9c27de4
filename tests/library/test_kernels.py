"""The kernels: memory layouts, threads, dtypes, the choice of a backend, and the operators."""

import functools
import multiprocessing
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from test_merge import CPU_BACKENDS, DEVICE_OF, smooth

from dhtm import Regions, hierarchical_merge, kernels
from dhtm.kernels import compiled, merge_flops
from dhtm.regions import grid_pairs


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat([x, x], dim=1)[:, 12:],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
        lambda x: x[:1].expand(3, -1, -1),
        lambda x: x.half(),
        lambda x: x.bfloat16(),
        lambda x: x.double(),
        lambda x: x[:0],
    ],
)
def test_tokens_may_have_any_strides_and_dtype(view, backend):
    tokens = view(torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(7)).to(DEVICE_OF[backend]))
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).contiguous()
    expected, regions = hierarchical_merge(wide, 5, grid=(3, 4), backend="torch")
    merged, merged_regions = hierarchical_merge(tokens, 5, grid=(3, 4), backend=backend)
    assert merged.dtype == tokens.dtype and torch.equal(merged, expected.to(tokens.dtype))
    assert torch.equal(regions.assignment, merged_regions.assignment)
    assert torch.equal(regions.sizes, merged_regions.sizes) and regions.sizes.shape == (len(tokens), 7)


def test_numba_gives_the_same_with_any_number_of_threads_and_in_a_forked_process():
    merge = functools.partial(hierarchical_merge, smooth(9, (6, 6), 16, seed=8), 12, grid=(6, 6), backend="numba")
    threads = torch.get_num_threads()
    try:
        results = []
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            results.append(merge()[0])
        with multiprocessing.get_context("fork").Pool(1) as forked:
            results.append(forked.apply(merge)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("process", [os.getpid(), 0], ids=["PyTorch's threads", "a thread pool"])
def test_error_in_a_thread_is_raised(process, monkeypatch):
    monkeypatch.setattr(compiled, "_PROCESS", process)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    def interrupt(first, last):
        if last == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled.in_parallel(interrupt, 100)


def test_numba_works_without_a_folder_for_machine_code(tmp_path):
    # A single function, which compiles quickly.
    code = "from dhtm.kernels.compiled import round_score; assert round_score(0.5) == 0.5"
    no_folder = {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator", "NUMBA_CACHE_DIR": "/proc/nowhere"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | no_folder, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_auto_is_the_fastest_available_backend(monkeypatch):
    works = {}
    monkeypatch.setattr(kernels, "_triton_works", lambda device: works.get("triton", True))
    assert kernels.pick("auto", torch.device("cpu")) == "numba"
    assert kernels.pick("auto", torch.device("meta")) == "torch"
    assert kernels.pick("auto", torch.device("cuda")) == "triton"
    works["triton"] = False
    assert kernels.pick("auto", torch.device("cuda")) == "torch"
    works["triton"] = True
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend, device in (("numba", "cuda"), ("triton", "cpu")):
        with pytest.raises(
            ValueError, match=f"backend='{backend}' does not support tokens on {device}: choose backend='auto'"
        ):
            kernels.pick(backend, torch.device(device))
    for backend, device in (("numba", "cpu"), ("triton", "cuda")):
        monkeypatch.setattr(kernels, f"HAS_{backend.upper()}", False)
        assert kernels.pick("auto", torch.device(device)) == "torch"
        with pytest.raises(ValueError, match=f"the package {backend} is not installed; install it, or choose"):
            kernels.pick(backend, torch.device(device))


def test_triton_that_cannot_compile_warns_once(monkeypatch):
    def fail_to_compile(*arguments):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr("dhtm.kernels.gpu.merge", fail_to_compile)
    kernels._triton_compiles.cache_clear()
    message = re.escape(
        "backend='auto': Triton does not work on cpu (Failed to find C compiler.); using the slower 'torch'"
    )
    with pytest.warns(UserWarning, match=message):
        assert not kernels._triton_compiles(torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels._triton_compiles(torch.device("cpu"))
    kernels._triton_compiles.cache_clear()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_operators_pass_opcheck(backend):
    tokens, regions, ops = torch.randn(3, 16, 5), Regions.identity(3, (4, 4)), torch.ops.dhtm
    for connectivity, features, masses, threshold in (
        (8, None, None, None),
        (kernels.ALL_PAIRS, tokens[..., :2], torch.rand(3, 16), None),
        (4, tokens[..., :2], None, 0.1),
    ):
        inputs = tokens.clone().requires_grad_(), features, masses, regions.assignment, regions.sizes
        options = 5, 4, 4, connectivity, "cosine", "mean", threshold, backend
        torch.library.opcheck(ops.hierarchical_merge, (*inputs, *options))
    if backend != "reference":
        torch.library.opcheck(ops.agglomerate, (tokens, 5, "average", backend))
        inputs = regions.assignment, regions.sizes, torch.arange(3), 5, 4, 4, 8, 0, backend
        torch.library.opcheck(ops.random_merge, inputs)


def test_counted_similarities_are_close_to_those_that_merges_need():
    """merge_flops counts by a convention; merges need every adjacent pair once, then each new token with its neighbours."""
    tokens, regions = smooth(1, (14, 14), 16, seed=5), Regions.identity(1, (14, 14))
    needed = len({tuple(pair) for pair in regions.adjacent_tokens()[0].tolist()})
    for _ in range(40):
        before = regions.sizes
        tokens, regions = hierarchical_merge(tokens, 1, regions)
        new = (regions.sizes != before[:, :-1])[0].nonzero()[0].item()  # in the place of the lower of the two
        pairs = {tuple(pair) for pair in regions.adjacent_tokens()[0].tolist()}
        needed += sum(new in pair and pair[0] != pair[1] for pair in pairs)
    counted = merge_flops(196, 40, 16, len(grid_pairs((14, 14), 8)), 196, 8) / 16
    assert 0.8 < counted / needed < 1.25
