"""ATC against SciPy's hierarchical clustering and a plain implementation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import average, build, check_step, images_for, logits, unequal_tokens
from scipy.cluster.hierarchy import fcluster
from scipy.cluster.hierarchy import linkage as scipy_linkage
from scipy.spatial.distance import squareform

import dhtm
from baselines import ATC
from dhtm import kernels
from dhtm.reducer import Attention
from dhtm.vit import tokens_by_layer

LINKAGES = ("average", "complete", "single")
BACKENDS = [name for name in kernels.CLUSTERINGS if name != "triton"]  # test_triton.py tests the Triton kernel


def cosine_distances(features):
    """Return 1 − cos between all pairs of features [N, F], with cosines rounded to float32."""
    features = features.astype(np.float64)
    norms = np.sqrt((features**2).sum(1))
    products = features @ features.T
    cosines = np.divide(products, np.outer(norms, norms), out=np.zeros_like(products), where=np.outer(norms, norms) > 0)
    return 1 - cosines.astype(np.float32).astype(np.float64)


def greedy_clusters(features, k, linkage):
    """Merge the two nearest clusters k times, ties to the first pair; return lists of members, ordered by their lowest."""
    distances = cosine_distances(features).tolist()
    clusters = [[i] for i in range(len(features))]
    for _ in range(k):
        pairs = [(i, j) for i in range(len(clusters)) for j in range(i + 1, len(clusters))]
        i, j = min(pairs, key=lambda pair: distances[min(pair)][max(pair)])  # the first of equal pairs
        n_i, n_j = len(clusters[i]), len(clusters[j])
        for c in range(len(clusters)):
            if c not in (i, j):
                a, b = distances[min(i, c)][max(i, c)], distances[min(j, c)][max(j, c)]
                new = {"single": min(a, b), "complete": max(a, b), "average": (n_i * a + n_j * b) / (n_i + n_j)}[
                    linkage
                ]
                distances[min(i, c)][max(i, c)] = new
        clusters[i] += clusters.pop(j)
        del distances[j]
        for row in distances:
            del row[j]
    return [sorted(cluster) for cluster in clusters]


def groups_of(token_map):
    return [np.flatnonzero(token_map == cluster).tolist() for cluster in range(int(token_map.max()) + 1)]


@pytest.mark.parametrize(("n", "channels", "ks"), [(60, 8, range(60)), (196, 64, (20, 98))])
@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_clusters_are_scipys(linkage, backend, n, channels, ks):
    """Check every number of merges of 60 tokens, and two numbers for 196 tokens, as many as in a DeiT."""
    features = torch.randn(2, n, channels, generator=torch.Generator().manual_seed(0))
    trees = [scipy_linkage(squareform(cosine_distances(image), checks=False), linkage) for image in features.numpy()]
    for k in ks:
        token_map = kernels.agglomerate(features, k, linkage, backend)
        for image, tree in zip(token_map.numpy(), trees, strict=True):
            expected = fcluster(tree, n - k, "maxclust")
            assert groups_of(image) == sorted(np.flatnonzero(expected == label).tolist() for label in set(expected))


@st.composite
def clusterings(draw):
    """Draw features, with many exact ties and zero vectors or without; a number of merges; and a linkage."""
    n = draw(st.integers(1, 14))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    features = rng.integers(-1, 3, (2, n, 2)) if draw(st.booleans()) else rng.normal(size=(2, n, 3))
    return features.astype(np.float32), draw(st.integers(0, n - 1)), draw(st.sampled_from(LINKAGES))


@settings(max_examples=100, deadline=None)
@given(clusterings(), st.sampled_from(BACKENDS))
def test_ties_go_to_the_first_pair(case, backend):
    features, k, linkage = case
    token_map = kernels.agglomerate(torch.from_numpy(features), k, linkage, backend)
    for image, clusters in zip(features, token_map.numpy(), strict=True):
        assert groups_of(clusters) == greedy_clusters(image, k, linkage)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 12), share=st.floats(0.1, 1), linkage=st.sampled_from(LINKAGES), seed=st.integers(0, 2**32 - 1))
def test_layer_matches_the_plain_implementation(n, share, linkage, seed):
    tokens, regions, keys = unequal_tokens(n, seed)
    m = min(n, max(1, int((n + 6) * share)))
    atc = ATC((m + 0.5) / (n + 6), layers=(1,), linkage=linkage)
    atc.attach(5, 1, (1, n + 6), (1,))
    groups = [greedy_clusters(image.mean(0).numpy(), n - m, linkage) for image in keys]
    attention = Attention(1, keys=keys)
    check_step(atc, tokens, regions, attention, groups)
    atc.proportional_attention = False  # averages are then unweighted
    for image, new in enumerate(atc(tokens, regions, attention)[0]):
        torch.testing.assert_close(new, average(tokens[image], torch.ones(n), groups[image])[0])


@pytest.mark.parametrize(
    ("r", "inflect", "removed"),
    [(8, 0.0, [8] * 5), (8, -1.0, [16, 12, 8, 4, 0]), ([150, 1, 0, 40, 2], 0.0, [150, 1, 0, 40, 2])],
)
def test_each_layer_removes_exactly_r_tokens(r, inflect, removed):
    model = dhtm.patch(build("deit_tiny_distilled"), ATC(None, layers="all", r=r, inflect=inflect))
    remaining = [196 - sum(removed[: layer + 1]) for layer in range(5)]
    logits(model, images_for(model))
    assert tokens_by_layer(model) == [dhtm.regions(model, layer).n_tokens for layer in range(1, 6)] == remaining
