"""DPC-KNN against plain loops over the tokens of one image."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines import DPCKNN
from dhtm import Regions
from dhtm.reducer import Attention


def density_peaks(tokens, m, neighbours):
    """Return the centres among a list of tokens, in order, and the centre that each token joins."""
    n = len(tokens)
    distance = [[math.dist(a, b) / math.sqrt(len(a)) for b in tokens] for a in tokens]
    density = []
    for i in range(n):
        nearest = sorted(distance[i])[:neighbours]  # the first is the token itself
        density.append(math.exp(-sum(d**2 for d in nearest) / len(nearest)))
    score = []
    for i in range(n):
        denser = [j for j in range(n) if (density[j], -j) > (density[i], -i)]
        score.append(density[i] * (min(distance[i][j] for j in denser) if denser else max(map(max, distance))))
    centres = sorted(sorted(range(n), key=lambda i: -score[i])[:m])
    return centres, [i if i in centres else min(centres, key=lambda c: distance[i][c]) for i in range(n)]


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 24),
    share=st.floats(0, 1),
    channels=st.integers(1, 5),
    neighbours=st.integers(1, 7),
    kind=st.sampled_from(["even", "weighted", "ties"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_layer_matches_plain_loops(n, share, channels, neighbours, kind, seed):
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, n, channels, dtype=torch.float64, generator=rng)
    if kind == "ties":  # sixteen integers, whose mean and distances have no rounding errors
        tokens, n, channels = torch.randint(-2, 3, (2, 16, 1), generator=rng).double(), 16, 1
    m = max(1, round(share * n))
    reducer = DPCKNN(m / n, layers=(2,), neighbours=neighbours, weighted=kind == "weighted")
    reducer.attach(channels, 1, (1, n), (2,))
    weights = torch.ones(2, n)
    if kind == "weighted":
        (linear,) = reducer.double().scores.values()
        torch.nn.init.normal_(linear.weight, generator=rng)
        weights = linear(tokens)[..., 0].detach().exp()
    with torch.no_grad():
        new, regions = reducer(tokens, Regions.identity(2, (1, n)), Attention(2))
    for i in range(2):
        centres, joined = density_peaks(tokens[i].tolist(), m, neighbours)
        assert regions.assignment[i].tolist() == [centres.index(centre) for centre in joined]
        assert regions.sizes[i].tolist() == [joined.count(centre) for centre in centres]
        for rank, centre in enumerate(centres):
            members = [j for j in range(n) if joined[j] == centre]
            expected = np.average(tokens[i, members].numpy(), axis=0, weights=weights[i, members].numpy())
            np.testing.assert_allclose(new[i, rank].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_large_scores_do_not_overflow():
    reducer = DPCKNN(0.3, layers=(2,), weighted=True)
    reducer.attach(1, 1, (1, 4), (2,))
    torch.nn.init.constant_(reducer.scores["2"].weight, 100.0)
    new, _ = reducer(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]), Regions.identity(1, (1, 4)), Attention(2))
    torch.testing.assert_close(new, torch.tensor([[[4.0]]]))
