"""Random merging: its draws are uniform, and depend only on the seed and the image."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from baselines import RandomMerge
from dhtm import Regions, kernels
from dhtm.merge import get_neighbors
from dhtm.reducer import Attention
from dhtm.regions import grid_pairs

BACKENDS = [name for name in kernels.DRAWS if name != "triton"]  # test_triton.py tests the Triton kernel


def hash_keys(*keys):
    """Hash keys, one after the other, to 62 bits by SplitMix64 as printed by Steele et al. (2014)."""
    state = 0
    for key in keys:
        state = (state + key + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state % 2**62


def merge_one_by_one(tokens, grid, k, connectivity, seed, image_id):
    """Merge one image's tokens [N, D] k times; return the new tokens and the patches of each."""
    adjacent = {tuple(pair) for pair in grid_pairs(grid, connectivity).tolist()}
    n = grid[0] * grid[1]
    regions, names, values = [{patch} for patch in range(n)], list(range(n)), list(tokens)
    for step in range(k):
        pairs = get_neighbors(regions, adjacent)
        i, j = max(pairs, key=lambda pair: hash_keys(seed, image_id, n - step, names[pair[0]] * n + names[pair[1]]))
        regions[i], values[i] = regions[i] | regions[j], (values[i] + values[j]) / 2
        del regions[j], names[j], values[j]
    return torch.stack(values), regions


@st.composite
def draws(draw):
    """Draw a grid, a number of merges, a connectivity, a seed and the ids of some images."""
    grid = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)).filter(lambda g: g[0] * g[1] > 1))
    ids = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3))
    seed = draw(st.one_of(st.integers(0, 9), st.integers(-(2**70), 2**70)))
    return grid, draw(st.integers(0, grid[0] * grid[1] - 1)), draw(st.sampled_from((4, 8))), seed, ids


def check_draws(case, backend, device="cpu"):
    """Check a backend against the loop above, and against "torch" in this layer and in a second one."""
    grid, k, connectivity, seed, ids = case
    n = grid[0] * grid[1]
    tokens = torch.randn(len(ids), n, 3, generator=torch.Generator().manual_seed(0)).to(device)
    results = []
    for name in ("torch", backend):
        reducer = RandomMerge(k, connectivity=connectivity, seed=seed, backend=name)
        reducer.image_ids = torch.tensor(ids, device=device)
        first = reducer(tokens, Regions.identity(len(ids), grid, device), Attention())
        reducer.k = (n - k) // 2
        results.append([first, reducer(*first, Attention())])
    for (expected, expected_regions), (merged, regions) in zip(*results, strict=True):
        assert torch.equal(regions.assignment, expected_regions.assignment)
        torch.testing.assert_close(merged, expected)  # a GPU adds the terms of a sum in any order
    merged, regions = results[1][0]
    for image, image_id in enumerate(ids):
        values, expected = merge_one_by_one(tokens[image].cpu(), grid, k, connectivity, seed, image_id)
        torch.testing.assert_close(merged[image].cpu(), values)
        patches = regions.assignment[image].tolist()
        assert [{i for i, token in enumerate(patches) if token == t} for t in range(len(expected))] == expected


@settings(max_examples=60, deadline=None)
@given(draws(), st.sampled_from(BACKENDS))
def test_backends_draw_the_same_pairs(case, backend):
    check_draws(case, backend)


def merge(n_images, k, ids=None):
    reducer = RandomMerge(k=k)
    reducer.image_ids = ids
    return reducer(torch.randn(n_images, 6, 4), Regions.identity(n_images, (2, 3)), Attention())


def test_adjacent_pairs_are_equally_likely():
    _, regions = merge(11_000, 1)
    joined, counts = regions.assignment.unique(dim=0, return_counts=True)
    assert len(joined) == 11  # the pairs of a 2×3 grid with diagonals
    assert chisquare(counts.numpy()).pvalue > 1e-4


def test_images_without_ids_are_numbered_by_position():
    _, by_position = merge(3, 4)
    _, numbered = merge(3, 4, torch.arange(3))
    assert torch.equal(by_position.assignment, numbered.assignment)


def test_ids_of_another_batch_size_raise():
    with pytest.raises(ValueError, match=r"image_ids must be int64 \[B\] = \[3\], not torch.int64 \[2\]"):
        merge(3, 2, torch.arange(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_out_of_adjacent_tokens_raises(backend):
    regions = Regions(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[2, 2, 0]]), (2, 2))
    with pytest.raises(ValueError, match="k=2 merges, but image 0 of the batch runs out of adjacent tokens"):
        RandomMerge(2, backend=backend)(torch.ones(1, 3, 2), regions, Attention())
