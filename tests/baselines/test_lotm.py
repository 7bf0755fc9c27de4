"""LoTM against a plain greedy loop over the pairs of neighbours in each row."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines import LoTM
from dhtm import Regions
from dhtm.reducer import Attention


def cosine(a, b):
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / norms if norms else 0.0


def merge_greedily(rows, k):
    """Merge k pairs in rows of (token, patches), most similar first, each token at most once per pass; return the rows."""
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


@st.composite
def cases(draw):
    grid = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    n_pairs, ks = grid[0] * (grid[1] - 1), []
    for _ in range(draw(st.integers(1, 3))):
        ks.append(draw(st.integers(0, n_pairs)))
        n_pairs -= ks[-1]
    return grid, ks


@settings(max_examples=100, deadline=None)
@given(case=cases(), channels=st.integers(2, 5), ties=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_successive_layers_match_the_plain_loop(case, channels, ties, seed):
    ((height, width), ks), rng = case, torch.Generator().manual_seed(seed)
    n = height * width
    tokens = torch.randn(2, n, channels, dtype=torch.float64, generator=rng)
    if ties:  # with one channel, every cosine is a product of signs, also after averaging
        tokens = torch.tensor([-5.0, -1, 1, 2, 4])[torch.randint(5, (2, n, 1), generator=rng)]
    images = [
        [[(image[y * width + x].numpy(), [y * width + x]) for x in range(width)] for y in range(height)]
        for image in tokens
    ]
    regions = Regions.identity(2, (height, width))
    for k in ks:
        tokens, regions = LoTM(k)(tokens, regions, Attention())
        for i, rows in enumerate(images):
            expected = [token for row in merge_greedily(rows, k) for token in row]
            torch.testing.assert_close(tokens[i], torch.tensor(np.stack([token for token, _ in expected])))
            place = {patch: new for new, (_, patches) in enumerate(expected) for patch in patches}
            assert regions.assignment[i].tolist() == [place[patch] for patch in range(n)]
            assert regions.sizes[i].tolist() == [len(patches) for _, patches in expected]
