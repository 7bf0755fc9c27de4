"""The CUDA kernels against the reference: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from test_atc import clusterings
from test_merge import THRESHOLDS, check_backend, merges, smooth
from test_random_merge import check_draws, draws

from baselines import RandomMerge
from dhtm import Regions, hierarchical_merge, kernels
from dhtm.reducer import Attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(tokens, k, **options):
    """The kernels make the reference's merges, bit for bit."""
    expected, expected_regions = hierarchical_merge(tokens, k, backend="reference", **options)
    merged, regions = hierarchical_merge(tokens.to(DEVICE), k, backend="triton", **options)
    assert torch.equal(regions.assignment.cpu(), expected_regions.assignment)
    torch.testing.assert_close(merged.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=16, deadline=None)
@given(merges())
def test_any_tokens(case):
    check_backend(case, "triton", DEVICE)


@settings(max_examples=12, deadline=None)
@given(draws())
def test_random_draws(case):
    check_draws(case, "triton", DEVICE)


@settings(max_examples=20, deadline=None)
@given(clusterings())
def test_agglomeration(case):
    features, k, linkage = case
    features = torch.from_numpy(features)
    expected = kernels.agglomerate(features, k, linkage, "torch")
    assert torch.equal(kernels.agglomerate(features.to(DEVICE), k, linkage, "triton").cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_strides(dtype):
    tokens = smooth(2, (5, 5), 24, seed=0).to(dtype).repeat(1, 2, 1)[:, 25:]
    check(tokens, 8, grid=(5, 5))


@pytest.mark.parametrize(
    ("k", "options"),
    [*((10, {"grid": (14, 14), "similarity": name}) for name in THRESHOLDS), (2, {"connectivity": "all"})],
)
def test_the_tokens_of_a_network(k, options):
    check(smooth(1, (14, 14), 192, seed=1), k, **options)


@pytest.mark.parametrize("similarity", THRESHOLDS)
def test_nan_and_inf_are_merged_last(similarity):
    tokens = smooth(1, (4, 4), 4, seed=2)
    tokens[0, 5], tokens[0, 10] = torch.nan, torch.inf
    check(tokens, 6, grid=(4, 4), similarity=similarity)


def test_zero_and_minus_zero_are_equally_similar():
    tokens = torch.tensor([[[1.0, 0.0], [-1e-30, 1e30], [-1.0, 0.0]]])
    check(tokens, 1, grid=(1, 3))


@pytest.mark.parametrize("linkage", ["mean", "size"])
def test_gradients(linkage):
    tokens = smooth(2, (3, 4), 3, seed=3).to(DEVICE)
    gradients = []
    for backend in ("torch", "triton"):
        leaf = tokens.clone().requires_grad_()
        merged, _ = hierarchical_merge(leaf, 5, grid=(3, 4), linkage=linkage, backend=backend)
        (merged * torch.arange(merged.numel(), device=DEVICE).reshape(merged.shape)).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("connectivity", [8, "all"])
def test_running_out_of_neighbours_is_an_error(connectivity):
    regions = Regions(torch.tensor([[0, 0, 1, 1]], device=DEVICE), torch.tensor([[2, 2, 0]], device=DEVICE), (2, 2))
    if DEVICE == "cuda":
        pytest.skip("a failed assertion leaves the device unusable for this process")
    message = "k=2 merges, but an image runs out of adjacent tokens"
    with pytest.raises(RuntimeError, match=message):
        hierarchical_merge(torch.ones(1, 3, 2, device=DEVICE), 2, regions, None, connectivity, backend="triton")
    with pytest.raises(RuntimeError, match=message):
        RandomMerge(2, backend="triton")(torch.ones(1, 3, 2, device=DEVICE), regions, Attention())


AHEAD = """
import types
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from dhtm import Regions
from dhtm.kernels import ALL_PAIRS, gpu

absent = {"get_current_device": lambda: 0, "get_current_stream": lambda device: 0}
driver.set_active(types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), **absent))
gpu._raise_where_stuck = lambda stuck, k: None
run, compiled = JITFunction.run, {}

def compile_only(self, *arguments, **options):
    kernel = run(self, *arguments, **options | {"warmup": True})
    compiled.setdefault(self.__name__, {})[kernel.hash] = kernel

JITFunction.run = compile_only

def call(n, k):
    regions = Regions.identity(2, (14, 14)).merge(torch.arange(196).clamp(max=n - 1).expand(2, -1), n)
    tokens, masses = torch.ones(2, n, 192), torch.ones(2, n)
    gpu.merge(tokens, tokens, masses, regions, k, 8, "kl", "size", 0.5)
    gpu.merge(tokens, None, None, regions, k, ALL_PAIRS, "cosine", "mean", None)
    gpu.agglomerate(tokens, k, "average")
    gpu.draw(regions, torch.arange(2), k, 8, k)

call(196, 40)
call(176, 1)  # other numbers of tokens and merges need no other code
for name, kernels in compiled.items():
    print(name, len(kernels), *(len(kernel.asm["cubin"]) > 1000 for kernel in kernels.values()))
    if name in ("merge_image", "cluster_image"):  # products and sums are rounded one by one; KL's exp has its own code
        assert all("mul.rn.f64" in kernel.asm["ptx"] and "fma" not in kernel.asm["ptx"] for kernel in kernels.values())
"""


def test_the_kernels_compile_for_a_gpu_without_one(tmp_path):
    """Down to the machine code of an H100, as they are launched: the interpreter takes more than the compiler does.

    KL has all of the code, and the number of tokens or merges changes none of it.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", AHEAD], env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, cwd=ROOT,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    twice = "describe_all"  # for each similarity
    once = "_edge_scores", "_merge_image", "merge_image", "cluster_image", "_draw_image"
    assert sorted(result.stdout.splitlines()) == sorted([f"{twice} 2 True True", *(f"{name} 1 True" for name in once)])
