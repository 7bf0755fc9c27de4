"""K-Medoids against plain loops over the tokens of one image."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines import KMedoids
from dhtm import Regions
from dhtm.reducer import Attention


def k_medoids(tokens, weights, m, rounds, cost_is):
    """Return the medoids among a list of tokens, in order, and for each token the index of the medoid that it joins."""

    def join():
        return [min(range(m), key=lambda rank: math.dist(tokens[medoids[rank]], token)) for token in tokens]

    def cost(token, members):
        if cost_is == "own":
            return weights[token] * sum(math.dist(tokens[token], other) for other in tokens)
        return sum(weights[other] * math.dist(tokens[token], tokens[other]) for other in members)

    medoids = sorted(sorted(range(len(tokens)), key=lambda i: -weights[i])[:m])  # both sorts are stable
    for _ in range(rounds):
        joined, new_medoids = join(), []
        for rank, medoid in enumerate(medoids):
            members = [i for i in range(len(tokens)) if joined[i] == rank]
            new_medoids.append(min(members, key=lambda i: cost(i, members)) if members else medoid)
        medoids = sorted(new_medoids)
    return medoids, join()


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 24),
    share=st.floats(0, 1),
    channels=st.integers(1, 5),
    rounds=st.integers(0, 4),
    kind=st.sampled_from(["cls", "received"]),
    cost=st.sampled_from(["members", "own"]),
    ties=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_layer_matches_plain_loops(n, share, channels, rounds, kind, cost, ties, seed):
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, n, channels, dtype=torch.float64, generator=rng)
    weights = torch.randn(2, n, generator=rng).softmax(dim=1)
    if ties:  # sixteen integers, weights in sixteenths: mean, distances and weighted sums have no rounding errors
        tokens, n, channels = torch.randint(-3, 4, (2, 16, 1), generator=rng).float(), 16, 1
        weights = torch.randint(0, 4, (2, 16), generator=rng) / 16
    m = max(1, round(share * n))
    reducer = KMedoids(m / n, layers=(2,), rounds=rounds, weights=kind, cost=cost)
    reducer.attach(channels, 1, (1, n), (2,))
    kept, regions = reducer(tokens, Regions.identity(2, (1, n)), Attention(2, **{kind: weights}))
    for i in range(2):
        medoids, joined = k_medoids(tokens[i].tolist(), weights[i].tolist(), m, rounds, cost)
        assert torch.equal(kept[i], tokens[i, medoids])
        assert regions.assignment[i].tolist() == joined
        assert regions.sizes[i].tolist() == [joined.count(rank) for rank in range(m)]
