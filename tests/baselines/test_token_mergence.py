"""Token mergence against loops over the tokens of one image, its coarser views against numpy's averages."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines import TokenMergence
from dhtm import Regions
from dhtm.reducer import Attention


def mergence(tokens, importance, m):
    """One image's merged tokens [N, D] → [M, D], and the place among them of each token."""
    n = len(tokens)
    crucial = sorted(sorted(range(n), key=lambda i: -importance[i])[:m])
    units = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    place = []
    for i in range(n):
        place.append(
            crucial.index(i) if i in crucial else max(range(m), key=lambda rank: units[crucial[rank]] @ units[i])
        )
    members = [[i for i in range(n) if place[i] == rank] for rank in range(m)]
    return np.stack([np.average(tokens[group], axis=0, weights=importance[group]) for group in members]), place


def views(tokens, grid, linears):
    """Tokens [P, D] with coarser views added: the mean of each cell, through (scale, W, b)."""
    height, width = grid
    image = tokens.reshape(height, width, -1)
    enriched = image.copy()
    for scale, weight, bias in linears:
        for row in range(height):
            for column in range(width):
                top, left = row - row % scale, column - column % scale
                cell = image[top : top + scale, left : left + scale]  # cut off at the edge of the grid
                enriched[row, column] += cell.mean(axis=(0, 1)) @ weight.T + bias
    return enriched.reshape(len(tokens), -1)


def made(m, channels, grid, **options):
    reducer = TokenMergence(m / (grid[0] * grid[1]), layers=(2, 4), **options)
    reducer.attach(channels, 1, grid, (2, 4))
    return reducer


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 24), share=st.floats(0, 1), channels=st.integers(2, 6), seed=st.integers(0, 2**32 - 1))
def test_any_tokens(n, share, channels, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(2, n, channels)).astype(np.float32)
    importance = rng.dirichlet(np.ones(n), 2).astype(np.float32)
    m = max(1, round(share * n))
    regions = Regions.identity(2, (1, n))
    with torch.no_grad():
        new, regions = made(m, channels, (1, n))(
            torch.from_numpy(tokens), regions, Attention(2, cls=torch.from_numpy(importance))
        )
    for i in range(2):
        expected, place = mergence(tokens[i].astype(np.float64), importance[i].astype(np.float64), m)
        np.testing.assert_allclose(new[i], expected, rtol=1e-4, atol=1e-5)
        assert regions.assignment[i].tolist() == place
        assert regions.sizes[i].tolist() == [place.count(rank) for rank in range(m)]


def test_equal_importance_and_similarity_go_to_the_lower_index():
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0], [2.0, 0.0]]])
    for importance, assignment in (
        ([1, 1, 1, 1, 1], [0, 1, 2, 0, 0]),
        ([1, 2, 2, 1, 2], [1, 0, 1, 1, 2]),
        ([1, 2, 2, 3, 1], [1, 0, 1, 2, 1]),
    ):
        attention = Attention(2, cls=torch.tensor([importance]) / 16)
        _, regions = made(3, 2, (1, 5))(tokens, Regions.identity(1, (1, 5)), attention)
        assert regions.assignment.tolist() == [assignment]


def test_tokens_that_nothing_attends_to_are_averaged_all_the_same():
    attention = Attention(2, cls=torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    tokens = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]]])
    new, _ = made(2, 2, (1, 4))(tokens, Regions.identity(1, (1, 4)), attention)
    torch.testing.assert_close(new, torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]))


@pytest.mark.parametrize(
    ("grid", "scales"), [((14, 14), (2, 4)), ((4, 8), (2, 4)), ((14, 21), (2, 4)), ((5, 3), (3,)), ((3, 2), (4, 2))]
)
def test_coarser_views_enrich_the_tokens_before_the_first_reduction_only(grid, scales):
    n = grid[0] * grid[1]
    rng = np.random.default_rng(0)
    tokens, importance = rng.normal(1, 1, size=(2, n, 3)), rng.dirichlet(np.ones(n), 2)
    reducer = made(n // 2, 3, grid, scales=scales)
    for parameter in reducer.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    linears = [
        (int(scale), linear.weight.detach().double().numpy(), linear.bias.detach().double().numpy())
        for scale, linear in reducer.views.items()
    ]
    assert [scale for scale, _, _ in linears] == list(scales)
    for layer, enriched in ((2, [views(image, grid, linears) for image in tokens]), (4, tokens)):
        attention = Attention(layer, cls=torch.tensor(importance).float())
        with torch.no_grad():
            new, regions = reducer(torch.tensor(tokens).float(), Regions.identity(2, grid), attention)
        for i in range(2):
            expected, place = mergence(enriched[i], importance[i], new.shape[1])
            np.testing.assert_allclose(new[i], expected, rtol=1e-3, atol=1e-4)
            assert regions.assignment[i].tolist() == place


def test_off_the_shelf_the_coarser_views_add_nothing():
    tokens, cls = torch.randn(2, 20, 4), torch.rand(2, 20).softmax(1)
    plain, with_views = (
        made(6, 4, (4, 5), **options)(tokens, Regions.identity(2, (4, 5)), Attention(2, cls=cls))[0]
        for options in ({"scales": ()}, {})
    )
    assert torch.equal(plain, with_views)


def test_bad_options():
    with pytest.raises(ValueError, match=r"scales=\[2, 1\]"):
        TokenMergence(0.5, scales=(2, 1))
