"""DPC-KNN against loops over the tokens of one image."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines import DPCKNN
from dhtm import Regions
from dhtm.reducer import Attention


def density_peaks(tokens, m, neighbours):
    """The centres among a list of tokens in order, and the centre that each token joins."""
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


def check(tokens, m, neighbours, linear=None):
    """[B, N, D] tokens in a row of patches are reduced as one image after the other is by loops."""
    batch, n, channels = tokens.shape
    reducer = DPCKNN(m / n, layers=(2,), neighbours=neighbours, weighted=linear is not None)
    reducer.attach(channels, 1, (1, n), (2,))
    reducer.to(tokens.dtype)
    weights = torch.ones(batch, n)
    if linear is not None:
        (parameters,) = reducer.scores.values()
        parameters.load_state_dict({"weight": linear[None, :-1], "bias": linear[-1:]})
        weights = (tokens @ linear[:-1] + linear[-1]).exp()
    new, regions = reducer(tokens, Regions.identity(batch, (1, n)), Attention(2))
    for i in range(batch):
        centres, joined = density_peaks(tokens[i].tolist(), m, neighbours)
        assert regions.assignment[i].tolist() == [centres.index(centre) for centre in joined]
        assert regions.sizes[i].tolist() == [joined.count(centre) for centre in centres]
        for rank, centre in enumerate(centres):
            members = [j for j in range(n) if joined[j] == centre]
            expected = np.average(tokens[i, members].numpy(), axis=0, weights=weights[i, members].numpy())
            np.testing.assert_allclose(new[i, rank].detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 24),
    share=st.floats(0, 1),
    channels=st.integers(1, 5),
    neighbours=st.integers(1, 7),
    weighted=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_tokens(n, share, channels, neighbours, weighted, seed):
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, n, channels, dtype=torch.float64, generator=rng)
    linear = torch.randn(channels + 1, dtype=torch.float64, generator=rng) if weighted else None
    check(tokens, max(1, round(share * n)), neighbours, linear)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), m=st.integers(1, 16), neighbours=st.sampled_from([1, 2, 4, 5]))
def test_duplicates_and_ties_go_to_the_lower_index(data, m, neighbours):
    """Sixteen whole numbers: their mean and distances have no rounding errors, so that equal ones are exactly so."""
    numbers = st.lists(st.integers(-2, 2), min_size=16, max_size=16)
    check(torch.tensor([data.draw(numbers), data.draw(numbers)], dtype=torch.float32)[..., None], m, neighbours)


def test_weights_start_even():
    tokens, regions = torch.randn(2, 12, 4), Regions.identity(2, (3, 4))
    results = []
    for weighted in (False, True):
        reducer = DPCKNN(0.5, layers=(2,), weighted=weighted)
        reducer.attach(4, 1, (3, 4), (2,))
        results.append(reducer(tokens, regions, Attention(2))[0])
    torch.testing.assert_close(results[1], results[0])
    assert [name for name, _ in reducer.named_parameters()] == ["scores.2.weight", "scores.2.bias"]


def test_large_scores_do_not_overflow():
    reducer = DPCKNN(0.3, layers=(2,), weighted=True)
    reducer.attach(1, 1, (1, 4), (2,))
    torch.nn.init.constant_(reducer.scores["2"].weight, 100.0)
    new, _ = reducer(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]), Regions.identity(1, (1, 4)), Attention(2))
    torch.testing.assert_close(new, torch.tensor([[[4.0]]]))


@pytest.mark.parametrize("neighbours", [0, 2.5])
def test_bad_options(neighbours):
    with pytest.raises(ValueError, match=f"neighbours={neighbours}"):
        DPCKNN(0.5, neighbours=neighbours)
