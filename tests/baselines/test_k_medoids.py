"""K-Medoids against loops over the tokens of one image."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import probabilities
from test_vit import build, images_for, logits

import dhtm
from baselines import KMedoids
from dhtm import Regions
from dhtm.reducer import Attention


def k_medoids(tokens, weights, m, rounds, cost_is):
    """The medoids of a list of tokens in order, and the place among them of the one that each token joins."""

    def join():
        return [min(range(m), key=lambda place: math.dist(tokens[medoids[place]], token)) for token in tokens]

    def cost(token, members):
        if cost_is == "own":
            return weights[token] * sum(math.dist(tokens[token], other) for other in tokens)
        return sum(weights[other] * math.dist(tokens[token], tokens[other]) for other in members)

    medoids = sorted(sorted(range(len(tokens)), key=lambda i: -weights[i])[:m])  # both sorts are stable
    for _ in range(rounds):
        joined, better = join(), []
        for place, medoid in enumerate(medoids):
            members = [i for i in range(len(tokens)) if joined[i] == place]
            better.append(min(members, key=lambda i: cost(i, members)) if members else medoid)
        medoids = sorted(better)
    return medoids, join()


def check(tokens, weights, m, rounds, kind, cost):
    """[B, N, D] tokens in a row of patches are reduced as one image after the other is by loops."""
    batch, n, channels = tokens.shape
    reducer = KMedoids(m / n, layers=(2,), rounds=rounds, weights=kind, cost=cost)
    reducer.attach(channels, 1, (1, n), (2,))
    kept, regions = reducer(tokens, Regions.identity(batch, (1, n)), Attention(2, **{kind: weights}))
    assert regions.n_tokens == m
    for i in range(batch):
        medoids, joined = k_medoids(tokens[i].tolist(), weights[i].tolist(), m, rounds, cost)
        assert torch.equal(kept[i], tokens[i, medoids])
        assert regions.assignment[i].tolist() == joined
        assert regions.sizes[i].tolist() == [joined.count(place) for place in range(m)]


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 24),
    share=st.floats(0, 1),
    channels=st.integers(1, 5),
    rounds=st.integers(0, 4),
    kind=st.sampled_from(["cls", "received"]),
    cost=st.sampled_from(["members", "own"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_tokens(n, share, channels, rounds, kind, cost, seed):
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, n, channels, dtype=torch.float64, generator=rng)
    weights = torch.randn(2, n, generator=rng).softmax(dim=1)
    check(tokens, weights, max(1, round(share * n)), rounds, kind, cost)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), m=st.integers(1, 16), rounds=st.integers(0, 3), cost=st.sampled_from(["members", "own"]))
def test_duplicates_and_ties_go_to_the_lower_index(data, m, rounds, cost):
    """Sixteen whole numbers: their mean, their distances and sums of these in sixteenths have no rounding errors."""
    numbers = st.lists(st.integers(-3, 3), min_size=16, max_size=16)
    sixteenths = st.lists(st.integers(0, 3), min_size=16, max_size=16)
    tokens = torch.tensor([data.draw(numbers), data.draw(numbers)], dtype=torch.float32)[..., None]
    weights = torch.tensor([data.draw(sixteenths), data.draw(sixteenths)]) / 16
    check(tokens, weights, m, rounds, "cls", cost)


def test_the_medoid_is_the_member_nearest_to_what_counts():
    """0, 1 and 9 in one cluster: 9 counts as much as both others and more, so it is the medoid."""
    tokens = torch.tensor([[0.0, 1.0, 9.0]])[..., None]
    reducer = KMedoids(0.34, layers=(2,))
    reducer.attach(1, 1, (1, 3), (2,))
    for weights, medoid in (([0.4, 0.3, 0.3], 1.0), ([0.2, 0.2, 0.6], 9.0)):
        kept, _ = reducer(tokens, Regions.identity(1, (1, 3)), Attention(2, cls=torch.tensor([weights])))
        assert kept.item() == medoid


@pytest.mark.parametrize("name", ["deit_tiny_distilled", "q/k norm, average pooling"])
def test_the_attention_received_is_that_from_all_tokens(name):
    """Prefix tokens pay attention too. Read from the layer before, against attention written out."""
    model, inputs, seen = build(name), [], []
    model.blocks[1].attn.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    dhtm.patch(model, KMedoids(0.3, layers=(3,), weights="received"))
    model.reducer.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    logits(model, images_for(model))
    with torch.inference_mode():
        shares, _ = probabilities(model.blocks[1].attn, inputs[0])
    torch.testing.assert_close(seen[0].received, shares.mean(dim=(1, 2))[:, model.num_prefix_tokens :])
    assert seen[0].cls is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": -1}, "rounds=-1"),
        ({"rounds": 1.5}, "rounds=1.5"),
        ({"weights": "all"}, "weights='all': choose one of 'cls', 'received'"),
        ({"cost": "all"}, "cost='all': choose one of 'members', 'own'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        KMedoids(0.5, **options)
