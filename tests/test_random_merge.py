"""Random merging: its draws are uniform, and depend on the seed and the image alone."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from baselines import RandomMerge
from dhtm import Regions
from dhtm.reducer import Attention


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


def test_gradients_flow():
    tokens = torch.randn(1, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: merge(1, 3, tokens=x)[0], (tokens,))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": -1}, "k=-1"), ({"k": 2, "connectivity": 5}, "connectivity=5"), ({"k": 2, "seed": "x"}, "seed='x'")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RandomMerge(**options)
