"""Token mergence against plain loops over the tokens of one image, and its coarser views against NumPy's averages."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines import TokenMergence
from dhtm import Regions
from dhtm.reducer import Attention


def mergence(tokens, importance, m):
    """Merge one image's tokens, [N, D] → [M, D]; return them and for each old token the index of its new one."""
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
    """Add a coarser view to tokens [P, D] for each (scale, weight, bias): the mean of each cell, mapped linearly."""
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


def make_reducer(m, channels, grid, **options):
    reducer = TokenMergence(m / (grid[0] * grid[1]), layers=(2, 4), **options)
    reducer.attach(channels, 1, grid, (2, 4))
    return reducer


def test_equal_importance_or_similarity_goes_to_the_lower_index():
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0], [2.0, 0.0]]])
    for importance, assignment in (
        ([1, 1, 1, 1, 1], [0, 1, 2, 0, 0]),
        ([1, 2, 2, 1, 2], [1, 0, 1, 1, 2]),
        ([1, 2, 2, 3, 1], [1, 0, 1, 2, 1]),
    ):
        attention = Attention(2, cls=torch.tensor([importance]) / 16)
        _, regions = make_reducer(3, 2, (1, 5))(tokens, Regions.identity(1, (1, 5)), attention)
        assert regions.assignment.tolist() == [assignment]


def test_tokens_without_cls_attention_are_averaged():
    attention = Attention(2, cls=torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    tokens = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]]])
    new, _ = make_reducer(2, 2, (1, 4))(tokens, Regions.identity(1, (1, 4)), attention)
    torch.testing.assert_close(new, torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]))


@settings(max_examples=50, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 9)),
    share=st.floats(0, 1),
    channels=st.integers(4, 8),
    scales=st.sampled_from([(2, 4), (3,), (4, 2), ()]),
    seed=st.integers(0, 2**32 - 1),
)
def test_layers_match_plain_loops_and_only_the_first_adds_views(grid, share, channels, scales, seed):
    n, rng = grid[0] * grid[1], np.random.default_rng(seed)
    tokens, importance = rng.normal(size=(2, n, channels)).astype(np.float32), rng.dirichlet(np.ones(n), 2)
    reducer = make_reducer(max(1, round(share * n)), channels, grid, scales=scales)
    for parameter in reducer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    linears = [
        (int(scale), linear.weight.detach().double().numpy(), linear.bias.detach().double().numpy())
        for scale, linear in reducer.views.items()
    ]
    for layer, enriched in ((2, [views(image, grid, linears) for image in tokens]), (4, tokens)):
        if layer == 4 and reducer.n_clusters(4, grid) == 0:
            continue
        attention = Attention(layer, cls=torch.tensor(importance).float())
        with torch.no_grad():
            new, regions = reducer(torch.tensor(tokens).float(), Regions.identity(2, grid), attention)
        for i in range(2):
            expected, place = mergence(enriched[i], importance[i], new.shape[1])
            np.testing.assert_allclose(new[i], expected, rtol=1e-3, atol=1e-4)
            assert regions.assignment[i].tolist() == place
