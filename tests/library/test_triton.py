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
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dhtm.kernels import gpu, gpu_common, gpu_pairs

pointers = {"log_p": "*fp64", "inverse": "*fp64", "weights": "*fp32", "scores": "*fp32", "neighbours": "*i32", "stuck": "*i32"}
pointers |= {"assignment": "*i64", "sizes": "*i64", "ids": "*i64", "token_map": "*i64", "places": "*i32", "seed": "i64"}
pointers |= {"to_new": "*fp32", "scratch": "*i32", "mass": "*fp64"}
pointers |= dict.fromkeys(("x", "carried", "measured", "merged"), "*fp32")
blocks = {"STEPS": 4, "BLOCK_N": 256, "BLOCK_E": 1024, "BLOCK_C": 16, "BLOCK_D": 128}
on_pairs = gpu_pairs.merge_image, gpu_pairs.cluster_image
for kernel in (gpu_common.describe_all, gpu._edge_scores, gpu._merge_image, gpu._draw_image, *on_pairs):
    pointers["scores"] = "*fp64" if kernel is gpu_pairs.cluster_image else "*fp32"
    constants = {"KIND": 3, "TWO": True, "MASSIVE": True, "BY_SIZE": True, "LINKAGE": 2, **blocks}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    print(len(compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


def test_the_kernels_compile_for_a_gpu_without_one(tmp_path):
    """Down to the machine code of an H100: the interpreter takes more than the compiler does. KL has all of the code."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", AHEAD], env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, cwd=ROOT,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert all(int(size) > 1000 for size in result.stdout.split()) and len(result.stdout.split()) == 6
