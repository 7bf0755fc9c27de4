"""K-Medoids against loops over the tokens of one image."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines import KMedoids
from dhtm import Regions
from dhtm.reducer import Attention


def k_medoids(tokens, weights, m, rounds):
    """The medoids of a list of tokens in order, and the medoid that each token joins."""

    def join():
        return [min(sorted(medoids), key=lambda medoid: math.dist(tokens[medoid], token)) for token in tokens]

    def cost(token, members):
        return sum(weights[other] * math.dist(tokens[token], tokens[other]) for other in members)

    medoids = sorted(range(len(tokens)), key=lambda i: -weights[i])[:m]  # a stable sort
    for _ in range(rounds):
        joined, better = join(), []
        for medoid in medoids:
            members = [i for i in range(len(tokens)) if joined[i] == medoid]
            better.append(min(members, key=lambda i: cost(i, members)) if members else medoid)
        medoids = better
    return sorted(medoids), join()


def check(tokens, weights, m, rounds):
    """[B, N, D] tokens in a row of patches are reduced as one image after the other is by loops."""
    batch, n, channels = tokens.shape
    reducer = KMedoids(m / n, layers=(2,), rounds=rounds)
    reducer.attach(channels, 1, (1, n), (2,))
    kept, regions = reducer(tokens, Regions.identity(batch, (1, n)), Attention(2, cls=weights))
    assert regions.n_tokens == m
    for i in range(batch):
        medoids, joined = k_medoids(tokens[i].tolist(), weights[i].tolist(), m, rounds)
        assert torch.equal(kept[i], tokens[i, medoids])
        assert regions.assignment[i].tolist() == [medoids.index(medoid) for medoid in joined]
        assert regions.sizes[i].tolist() == [joined.count(medoid) for medoid in medoids]


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 24),
    share=st.floats(0, 1),
    channels=st.integers(1, 5),
    rounds=st.integers(0, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_tokens(n, share, channels, rounds, seed):
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, n, channels, dtype=torch.float64, generator=rng)
    weights = torch.randn(2, n, generator=rng).softmax(dim=1)
    check(tokens, weights, max(1, round(share * n)), rounds)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), m=st.integers(1, 16), rounds=st.integers(0, 3))
def test_duplicates_and_ties_go_to_the_lower_index(data, m, rounds):
    """Sixteen whole numbers: their mean, their distances and sums of these in sixteenths have no rounding errors."""
    numbers = st.lists(st.integers(-3, 3), min_size=16, max_size=16)
    sixteenths = st.lists(st.integers(0, 3), min_size=16, max_size=16)
    tokens = torch.tensor([data.draw(numbers), data.draw(numbers)], dtype=torch.float32)[..., None]
    weights = torch.tensor([data.draw(sixteenths), data.draw(sixteenths)]) / 16
    check(tokens, weights, m, rounds)


def test_the_medoid_is_the_member_nearest_to_what_counts():
    """0, 1 and 9 in one cluster: 9 counts as much as both others and more, so it is the medoid."""
    tokens = torch.tensor([[0.0, 1.0, 9.0]])[..., None]
    reducer = KMedoids(0.34, layers=(2,))
    reducer.attach(1, 1, (1, 3), (2,))
    for weights, medoid in (([0.4, 0.3, 0.3], 1.0), ([0.2, 0.2, 0.6], 9.0)):
        kept, _ = reducer(tokens, Regions.identity(1, (1, 3)), Attention(2, cls=torch.tensor([weights])))
        assert kept.item() == medoid


@pytest.mark.parametrize(("options", "message"), [({"rounds": -1}, "rounds=-1"), ({"rounds": 1.5}, "rounds=1.5")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        KMedoids(0.5, **options)
