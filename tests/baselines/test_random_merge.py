"""Random merging: its draws are uniform, and depend on the seed and the image alone."""

import numpy as np
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

HERE = [name for name in kernels.DRAWS if name != "triton"]  # which tests/test_triton.py is about


def lot(*keys):
    """SplitMix64 as Steele et al. (2014) print it, on integers that wrap at 2⁶⁴, one key after the other."""
    state = 0
    for key in keys:
        state = (state + key + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state % 2**62


def drawn(grid, k, connectivity, seed, image_id):
    """Which patches are together after k merges of one image, as sets of patches, in the order of the tokens."""
    adjacent = {tuple(pair) for pair in grid_pairs(grid, connectivity).tolist()}
    n = grid[0] * grid[1]
    regions = [{patch} for patch in range(n)]
    names = list(range(n))
    for step in range(k):
        pairs = get_neighbors(regions, adjacent)
        i, j = max(pairs, key=lambda pair: lot(seed, image_id, n - step, names[pair[0]] * n + names[pair[1]]))
        regions[i] |= regions[j]
        del regions[j], names[j]
    return regions


@st.composite
def draws(draw):
    """A grid, merges, connectivity, seed and the ids of some images."""
    grid = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)).filter(lambda g: g[0] * g[1] > 1))
    ids = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3))
    seed = draw(st.one_of(st.integers(0, 9), st.integers(-(2**70), 2**70)))
    return grid, draw(st.integers(0, grid[0] * grid[1] - 1)), draw(st.sampled_from((4, 8))), seed, ids


def check_draws(case, backend, device="cpu"):
    """A backend draws as stated above, averages as the torch backend does, and continues from the regions it made."""
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
        assert torch.equal(merged, expected) and torch.equal(regions.assignment, expected_regions.assignment)
    for assignment, image_id in zip(results[1][0][1].assignment.tolist(), ids, strict=True):
        expected = drawn(grid, k, connectivity, seed, image_id)
        assert [
            {patch for patch, token in enumerate(assignment) if token == t} for t in range(len(expected))
        ] == expected


@settings(max_examples=60, deadline=None)
@given(draws(), st.sampled_from(HERE))
def test_every_backend_draws_the_same(case, backend):
    check_draws(case, backend)


def merge(n_images, k, ids=None, seed=0, grid=(2, 3), tokens=None):
    reducer = RandomMerge(k=k, seed=seed)
    reducer.image_ids = ids
    n = grid[0] * grid[1]
    tokens = torch.randn(n_images, n, 4) if tokens is None else tokens
    return reducer(tokens, Regions.identity(n_images, grid), Attention())


def test_every_adjacent_pair_is_as_likely():
    _, regions = merge(11_000, 1)
    joined, counts = regions.assignment.unique(dim=0, return_counts=True)
    assert len(joined) == 11  # the pairs of a 2×3 grid with diagonals
    assert chisquare(counts.numpy()).pvalue > 1e-4


def test_pairs_of_large_regions_are_not_likelier_for_touching_more_often():
    """After a merge of the middle column's two patches, that token touches each other one once or twice."""
    middle = torch.tensor([[0, 1, 2, 3, 1, 4]])  # patches 1 and 4 are one token
    regions = Regions(middle.expand(8_000, 6), torch.tensor([[1, 2, 1, 1, 1]]).expand(8_000, 5), (2, 3))
    _, merged = RandomMerge(k=1)(torch.randn(8_000, 5, 2), regions, Attention())
    joined, counts = merged.assignment.unique(dim=0, return_counts=True)
    assert len(joined) == 6  # 0-1, 0-3, 1-2, 1-3, 1-4, 2-4
    assert chisquare(counts.numpy()).pvalue > 1e-4


def test_draws_depend_on_seed_and_id_alone():
    ids = torch.tensor([5, 900, 31])
    _, together = merge(3, 4, ids)
    _, other_order = merge(3, 4, ids.flip(0))
    _, alone = merge(1, 4, ids[1:2])
    assert torch.equal(together.assignment.flip(0), other_order.assignment)
    assert torch.equal(together.assignment[1:2], alone.assignment)
    _, by_position = merge(3, 4)
    _, numbered = merge(3, 4, torch.arange(3))
    assert torch.equal(by_position.assignment, numbered.assignment)
    drawn = [merge(200, 4, torch.arange(200), seed)[1].assignment for seed in (0, 1)]
    assert (drawn[0] != drawn[1]).any(dim=1).float().mean() > 0.5


def test_tokens_are_averaged_pair_by_pair():
    """As DHTM would: replay the merges of one image from the regions after each count of merges."""
    tokens = torch.randn(1, 12, 3, generator=torch.Generator().manual_seed(0))
    values = {frozenset([patch]): tokens[0, patch] for patch in range(12)}
    for k in range(1, 8):
        merged, regions = merge(1, k, grid=(3, 4), tokens=tokens)
        after = [frozenset(np.flatnonzero(regions.assignment[0] == token).tolist()) for token in range(12 - k)]
        (new,) = set(after) - set(values)
        parts = [region for region in values if region < new]
        assert len(parts) == 2
        values[new] = (values.pop(parts[0]) + values.pop(parts[1])) / 2
        torch.testing.assert_close(merged[0], torch.stack([values[region] for region in after]))


@pytest.mark.parametrize("backend", HERE)
def test_operator_checks(backend):
    regions = Regions.identity(3, (4, 4))
    arguments = (regions.assignment, regions.sizes, torch.arange(3), 5, 4, 4, 8, 0, backend)
    torch.library.opcheck(torch.ops.dhtm.random_merge, arguments)


def test_ids_of_another_batch_are_refused():
    with pytest.raises(ValueError, match=r"image_ids must be int64 \[B\] = \[3\], not torch.int64 \[2\]"):
        merge(3, 2, torch.arange(2))


@pytest.mark.parametrize("backend", HERE)
def test_tokens_that_touch_none_cannot_be_merged(backend):
    regions = Regions(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[2, 2, 0]]), (2, 2))
    with pytest.raises(ValueError, match="k=2 merges, but image 0 of the batch runs out of adjacent tokens"):
        RandomMerge(2, backend=backend)(torch.ones(1, 3, 2), regions, Attention())


def test_gradients_flow():
    tokens = torch.randn(1, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: merge(1, 3, tokens=x)[0], (tokens,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": -1}, "k=-1"),
        ({"k": 2, "connectivity": 5}, "connectivity=5"),
        ({"k": 2, "seed": "x"}, "seed='x'"),
        ({"k": 2, "backend": "reference"}, "backend='reference': choose one of auto, torch, numba, triton"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RandomMerge(**options)
