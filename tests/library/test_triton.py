"""The CUDA kernels against the reference: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from test_atc import clusterings
from test_merge import THRESHOLDS, WHERE, check_backend, merges, smooth
from test_random_merge import check_draws, draws

from baselines import RandomMerge
from dhtm import Regions, hierarchical_merge, kernels
from dhtm.reducer import Attention

DEVICE = WHERE["triton"]


@settings(max_examples=10, deadline=None)
@given(merges())
def test_any_tokens(case):
    check_backend(case, "triton", DEVICE)


@settings(max_examples=8, deadline=None)
@given(draws())
def test_random_draws(case):
    check_draws(case, "triton", DEVICE)


@settings(max_examples=12, deadline=None)
@given(clusterings())
def test_agglomeration(case):
    features, k, linkage = case
    features = torch.from_numpy(features)
    expected = kernels.agglomerate(features, k, linkage, "torch")
    assert torch.equal(kernels.agglomerate(features.to(DEVICE), k, linkage, "triton").cpu(), expected)


@pytest.mark.parametrize("connectivity", [8, "all"])
@pytest.mark.parametrize("similarity", THRESHOLDS)
def test_more_channels_than_a_block_has(similarity, connectivity):
    options = {"similarity": similarity, "connectivity": connectivity, "masses": None, "threshold": None}
    check_backend((smooth(1, (3, 4), 192, seed=1), (3, 4), 6, options), "triton", DEVICE)


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
