"""LoTM against the greedy walk through the pairs of each row, pair by pair."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vit import build

import dhtm
from baselines import LoTM
from dhtm import Regions
from dhtm.reducer import Attention


def cosine(a, b):
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / norms if norms else 0.0


def walk(rows, k):
    """Rows of (token, patches), reduced by k merges: most similar first, each token once a pass, as many passes as needed."""
    while k:
        pairs = [(y, x) for y, row in enumerate(rows) for x in range(len(row) - 1)]
        pairs.sort(key=lambda pair: -cosine(rows[pair[0]][pair[1]][0], rows[pair[0]][pair[1] + 1][0]))  # a stable sort
        taken = []
        for y, x in pairs:
            if len(taken) < k and (y, x - 1) not in taken and (y, x + 1) not in taken:
                taken.append((y, x))
        k -= len(taken)
        for y, x in sorted(taken, reverse=True):
            (a, patches), (b, more) = rows[y][x : x + 2]
            rows[y][x : x + 2] = [((a + b) / 2, patches + more)]
    return rows


def check(tokens, grid, ks):
    """Layer after layer, [B, P, D] tokens of a grid and their regions are those of the walk."""
    batch, n, _ = tokens.shape
    height, width = grid
    images = [
        [[(tokens[i, y * width + x].numpy(), [y * width + x]) for x in range(width)] for y in range(height)]
        for i in range(batch)
    ]
    regions = Regions.identity(batch, grid)
    for k in ks:
        tokens, regions = LoTM(k)(tokens, regions, Attention())
        n -= k
        assert tokens.shape[1] == regions.n_tokens == n
        for i, rows in enumerate(images):
            expected = [token for row in walk(rows, k) for token in row]
            torch.testing.assert_close(tokens[i], torch.tensor(np.stack([token for token, _ in expected])))
            place = {patch: new for new, (_, patches) in enumerate(expected) for patch in patches}
            assert regions.assignment[i].tolist() == [place[patch] for patch in range(height * width)]
            assert regions.sizes[i].tolist() == [len(patches) for _, patches in expected]


@st.composite
def cases(draw):
    grid = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    left, ks = grid[0] * (grid[1] - 1), []
    for _ in range(draw(st.integers(1, 3))):
        ks.append(draw(st.integers(0, left)))
        left -= ks[-1]
    return grid, ks


@settings(max_examples=60, deadline=None)
@given(case=cases(), channels=st.integers(2, 5), seed=st.integers(0, 2**32 - 1))
def test_any_tokens(case, channels, seed):
    grid, ks = case
    rng = torch.Generator().manual_seed(seed)
    check(torch.randn(3, grid[0] * grid[1], channels, dtype=torch.float64, generator=rng), grid, ks)


@settings(max_examples=60, deadline=None)
@given(case=cases(), data=st.data())
def test_ties_go_to_the_top_and_then_to_the_left(case, data):
    """Numbers as tokens of one channel: the cosine is the product of their signs, also after averaging."""
    (height, width), ks = case
    numbers = st.lists(st.sampled_from([-5, -1, 1, 2, 4]), min_size=height * width, max_size=height * width)
    check(torch.tensor([data.draw(numbers), data.draw(numbers)], dtype=torch.float32)[..., None], (height, width), ks)


def test_a_pair_that_shares_a_token_with_a_better_one_is_skipped():
    """Four tokens at 0°, 40°, 50°, 90°: the middle pair goes first, so the ends have no pair left until the next pass."""
    angles = torch.tensor([0.0, 40, 50, 90]).deg2rad()
    tokens = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    _, regions = LoTM(1)(tokens, Regions.identity(1, (1, 4)), Attention())
    assert regions.assignment.tolist() == [[0, 1, 1, 2]]
    merged, regions = LoTM(2)(tokens, Regions.identity(1, (1, 4)), Attention())
    assert regions.assignment.tolist() == [[0, 0, 0, 1]]  # equally similar: the left one
    torch.testing.assert_close(merged[0, 0], (tokens[0, 0] + (tokens[0, 1] + tokens[0, 2]) / 2) / 2)


def test_rows_never_meet():
    tokens = torch.ones(1, 6, 2)
    _, regions = LoTM(4)(tokens, Regions.identity(1, (2, 3)), Attention())
    assert regions.assignment.tolist() == [[0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("k", "layers", "message"),
    [
        (183, (2,), "k=183 merges in layer 2, but only N=196 tokens are left there in 14 rows, .*at most 182"),
        (100, (2, 4), "k=100 merges in layer 4, but only N=96 tokens are left there in 14 rows, .*at most 82"),
        (-1, (2,), "k=-1"),
    ],
)
def test_a_row_keeps_a_token(k, layers, message):
    model = build("deit_tiny")
    with pytest.raises(ValueError, match=message):
        dhtm.patch(model, LoTM(k, layers=layers))
    dhtm.patch(model, LoTM(182, layers=(2,)))
