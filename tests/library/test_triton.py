"""The Triton kernels against other backends, on a GPU if available and otherwise in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from test_atc import clusterings
from test_merge import DEVICE_OF, THRESHOLDS, check_backend, merge_cases, smooth
from test_random_merge import check_draws, draws

from dhtm import kernels

DEVICE = DEVICE_OF["triton"]


@settings(max_examples=16, deadline=None)
@given(merge_cases())
def test_merge_equals_the_reference(case):
    check_backend(case, "triton", DEVICE)


@settings(max_examples=12, deadline=None)
@given(draws())
def test_random_merge_draws_as_defined(case):
    check_draws(case, "triton", DEVICE)


@settings(max_examples=20, deadline=None)
@given(clusterings())
def test_agglomerate_equals_the_torch_backend(case):
    features, k, linkage = case
    features = torch.from_numpy(features)
    expected = kernels.agglomerate(features, k, linkage, "torch")
    assert torch.equal(kernels.agglomerate(features.to(DEVICE), k, linkage, "triton").cpu(), expected)


@pytest.mark.parametrize(
    ("grid", "k", "similarity", "connectivity"),
    [
        ((14, 14), 10, "cosine", 8),
        *(((5, 6), 10, name, 8) for name in THRESHOLDS),  # the interpreter is slow, and blocks have 16 tokens
        ((14, 14), 2, "cosine", "all"),
        *(((3, 4), 6, name, "all") for name in THRESHOLDS),
    ],
)
def test_tokens_may_have_more_channels_than_a_block(grid, k, similarity, connectivity):
    options = {"similarity": similarity, "connectivity": connectivity, "masses": None, "threshold": None}
    check_backend((smooth(1, grid, 192, seed=1), grid, k, options), "triton", DEVICE)


COMPILE_ONLY = """
import types
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from dhtm import Regions
from dhtm.kernels import ALL_PAIRS, gpu

no_gpu = {"get_current_device": lambda: 0, "get_current_stream": lambda device: 0}
driver.set_active(types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), **no_gpu))
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
call(176, 1)  # other numbers of tokens and merges compile nothing new
for name, kernels in compiled.items():
    print(name, len(kernels), *(len(kernel.asm["cubin"]) > 1000 for kernel in kernels.values()))
    if name in ("merge_image", "cluster_image"):  # products and sums are rounded one by one; exp, for KL, is not
        assert all("mul.rn.f64" in kernel.asm["ptx"] and "fma" not in kernel.asm["ptx"] for kernel in kernels.values())
"""


def test_kernels_compile_for_an_h100_without_a_gpu(tmp_path):
    """Compile the kernels to machine code, as they are launched: the compiler accepts less than the interpreter.

    KL uses all of the code. Other numbers of tokens or merges must not compile it again.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE_ONLY], env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, cwd=ROOT,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    twice = "describe_all"  # for KL and for cosine
    once = "_edge_scores", "_merge_image", "merge_image", "cluster_image", "_draw_image"
    assert sorted(result.stdout.splitlines()) == sorted([f"{twice} 2 True True", *(f"{name} 1 True" for name in once)])
