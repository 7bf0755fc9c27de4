"""DHTM against an independent implementation with networkx, and every backend against the reference."""

import math

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

import dhtm
from dhtm import Regions, hierarchical_merge, kernels
from dhtm.reducer import Attention

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
DEVICE_OF = dict.fromkeys(kernels.BACKENDS, "cpu") | {"triton": DEVICES[-1]}
CPU_BACKENDS = [name for name in kernels.BACKENDS if name != "triton"]  # test_triton.py tests the others
THRESHOLDS = {  # apart from 0, which is exact, none is a similarity of small integers, so that rounding does not matter
    "cosine": (0.877, 0.491, 0.013, -2.0),
    "euclidean": (0.0, -1.491),
    "manhattan": (-2.013, -9.013),
    "kl": (-0.113, -1.013),
}


def nx_similarity(a, b, name):
    a, b = a.astype(np.float64), b.astype(np.float64)
    if name == "cosine":
        norms = np.sqrt((a**2).sum()) * np.sqrt((b**2).sum())
        value = (a * b).sum() / norms if norms else 0.0
    elif name == "kl":
        log_p, log_q = log_softmax(a), log_softmax(b)
        value = -0.5 * ((np.exp(log_p) * (log_p - log_q)).sum() + (np.exp(log_q) * (log_q - log_p)).sum())
    else:
        value = -np.linalg.norm(a - b, ord={"euclidean": 2, "manhattan": 1}[name])
    return np.float32(value)


def nx_merge(tokens, grid, k, connectivity, similarity, linkage, masses, threshold):
    """Contract the most similar edge of a networkx graph k times, or until its similarity is below a threshold."""
    # The strong product of two paths is a grid with diagonals.
    graph = nx.strong_product(*map(nx.path_graph, grid)) if connectivity == 8 else nx.grid_2d_graph(*grid)
    if connectivity == "all":
        graph = nx.complete_graph(graph.nodes)
    order = sorted(graph)  # row by row; merged nodes take the lower place
    value = {node: tokens[i] for i, node in enumerate(order)}
    patches = {node: [i] for i, node in enumerate(order)}
    for _ in range(k):
        place = {node: i for i, node in enumerate(order)}
        edges = [tuple(sorted(edge, key=place.get)) for edge in graph.edges]

        def score(edge):
            undiscounted = nx_similarity(value[edge[0]], value[edge[1]], similarity)
            if masses is None:
                return undiscounted
            a, b = (masses[patches[node]].astype(np.float64).sum() for node in edge)
            return np.float32((np.float64(undiscounted) - (similarity == "cosine")) * (a * b / (a + b)))

        u, v = min(edges, key=lambda e: (-score(e), place[e[0]], place[e[1]]))
        if threshold is not None and score((u, v)) < threshold:
            break
        weights = (1, 1) if linkage == "mean" else (len(patches[u]), len(patches[v]))
        mean = np.average(np.stack([value[u], value[v]]).astype(np.float64), axis=0, weights=weights)
        value[u], patches[u] = mean.astype(np.float32), patches[u] + patches[v]
        graph = nx.contracted_nodes(graph, u, v, self_loops=False)
        order.remove(v)
    assignment = np.empty(len(tokens), dtype=np.int64)
    for token, node in enumerate(order):
        assignment[patches[node]] = token
    return np.stack([value[node] for node in order]), assignment


@st.composite
def merge_cases(draw):
    """Draw a batch of tokens, continuous or with many exact ties; their grid; a number of merges; and options."""
    grid = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)).filter(lambda g: g[0] * g[1] > 1))
    n = grid[0] * grid[1]
    batch, channels = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        tokens = rng.normal(size=(batch, n, channels))
    else:
        tokens = rng.integers(0, 3, size=(batch, n, channels))
    options = {
        "connectivity": draw(st.sampled_from((4, 8, "all"))),
        "similarity": draw(st.sampled_from(tuple(THRESHOLDS))),
        "linkage": draw(st.sampled_from(("mean", "size"))),
        "masses": None,
        "threshold": None,
    }
    if draw(st.booleans()):
        options["masses"] = torch.tensor(rng.integers(1, 4, size=(batch, n)) / 2).float()
    elif draw(st.booleans()):
        options["threshold"] = draw(st.sampled_from(THRESHOLDS[options["similarity"]]))
    return torch.tensor(tokens, dtype=torch.float32), grid, draw(st.integers(0, n - 1)), options


@settings(max_examples=150, deadline=None)
@given(merge_cases())
def test_reference_equals_the_contraction_of_a_graph(case):
    tokens, grid, k, options = case
    merged, regions = hierarchical_merge(tokens, k, grid=grid, backend="reference", **options)
    for image in range(len(tokens)):
        masses = None if options["masses"] is None else options["masses"][image].numpy()
        value, assignment = nx_merge(tokens[image].numpy(), grid, k, **options | {"masses": masses})
        assert regions.assignment[image].tolist() == assignment.tolist()
        assert regions.sizes[image].tolist() == np.bincount(assignment, minlength=merged.shape[1]).tolist()
        np.testing.assert_allclose(merged[image, : len(value)].numpy(), value, rtol=1e-6, atol=1e-6)
        assert merged.shape[1] == (len(value) if options["threshold"] is None else tokens.shape[1])
        assert not merged[image, len(value) :].any()


def check_backend(case, backend, device="cpu"):
    """Check that a backend equals the reference bit for bit in two layers, the second with features of merged tokens."""
    tokens, grid, k, options = case
    original = tokens.clone()
    features = torch.randint(3, (*tokens.shape[:2], 3), generator=torch.Generator().manual_seed(0)).float()
    results = []
    for name, target in (("reference", "cpu"), (backend, device)):
        masses = None if options["masses"] is None else options["masses"].to(target)
        first, regions = hierarchical_merge(
            tokens.to(target), k // 2, grid=grid, **options | {"backend": name, "masses": masses}
        )
        second = {"backend": name, "features": features[:, : first.shape[1]].to(target)}
        second |= {"masses": None if masses is None else regions.sizes.double()}
        results.append([(first, regions), hierarchical_merge(first, (k + 1) // 2, regions, **options | second)])
    for (expected, expected_regions), (merged, regions) in zip(*results, strict=True):
        assert torch.equal(regions.assignment.cpu(), expected_regions.assignment)
        assert torch.equal(regions.sizes.cpu(), expected_regions.sizes)
        assert torch.equal(merged.cpu(), expected)
    assert torch.equal(tokens, original), "inputs are not changed"


@settings(max_examples=300, deadline=None)
@given(merge_cases(), st.sampled_from([name for name in CPU_BACKENDS if name != "reference"]))
def test_every_backend_makes_the_reference_merges(case, backend):
    for device in ("cpu",) if backend == "numba" else DEVICES:
        check_backend(case, backend, device)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("connectivity", [8, "all"])
def test_threshold_below_all_similarities_merges_down_to_one_token(backend, connectivity):
    tokens, options = torch.arange(18.0).sin().view(2, 3, 3), {"connectivity": connectivity, "backend": backend}
    expected, expected_regions = hierarchical_merge(tokens, 2, grid=(1, 3), **options)
    for threshold in (-1e300, float("-inf")):
        merged, regions = hierarchical_merge(tokens, 2, grid=(1, 3), threshold=threshold, **options)
        again, regions = hierarchical_merge(merged, 2, regions, threshold=threshold, **options)
        assert torch.equal(again, merged) and torch.equal(merged[:, :1], expected) and not merged[:, 1:].any()
        assert torch.equal(regions.assignment, expected_regions.assignment)
    with pytest.raises(ValueError, match="threshold=nan: it must be a number"):
        hierarchical_merge(tokens, 2, grid=(1, 3), threshold=float("nan"), **options)


def test_all_pairs_need_no_grid():
    """Without a grid, the patches are one row; a given grid, and that of given regions, is kept."""
    tokens = torch.eye(9)
    tokens[8] = tokens[0]
    merged, regions = hierarchical_merge(tokens[None], 1, connectivity="all")
    assert regions.grid == (1, 9) and regions.assignment.tolist() == [[*range(8), 0]]
    _, regions = hierarchical_merge(tokens[None], 1, grid=(3, 3), connectivity="all")
    assert regions.grid == (3, 3)
    _, regions = hierarchical_merge(merged, 1, regions, connectivity="all")
    assert regions.assignment.tolist() == [[0, 0, *range(1, 7), 0]] and regions.grid == (3, 3)


def test_merges_and_gradients_do_not_depend_on_the_batch():
    tokens = torch.randn(64, 196, 96, generator=torch.Generator().manual_seed(0), requires_grad=True)
    merged, regions = hierarchical_merge(tokens, 56, grid=(14, 14))
    (gradient,) = torch.autograd.grad(merged.square().sum(), tokens)
    for i in range(0, 64, 7):
        alone, alone_regions = hierarchical_merge(tokens[i : i + 1], 56, grid=(14, 14))
        assert torch.equal(alone[0], merged[i]) and torch.equal(alone_regions.assignment[0], regions.assignment[i])
        assert torch.equal(torch.autograd.grad(alone.square().sum(), tokens)[0][i], gradient[i])


def smooth(batch, grid, channels, seed):
    """Return tokens [B, N, D] whose neighbours are similar, as in a network."""
    generator = torch.Generator().manual_seed(seed)
    field = torch.randn(batch, channels, 4, 4, generator=generator)
    field = torch.nn.functional.interpolate(field, size=grid, mode="bicubic").flatten(2).transpose(1, 2)
    return field + 0.1 * torch.randn(field.shape, generator=generator)


@pytest.mark.parametrize(
    ("backend", "grid", "channels", "k", "options"),
    [
        *(("reference", (14, 14), 64, 150, {"similarity": similarity}) for similarity in THRESHOLDS),
        *(
            ("reference", (7, 7), 64, 10, {"similarity": similarity, "connectivity": "all"})
            for similarity in THRESHOLDS
        ),
        ("torch", (32, 32), 384, 300, {}),  # the reference is too slow for many tokens or channels
        ("torch", (7, 9), 1536, 60, {"linkage": "size"}),
        ("torch", (24, 24), 192, 570, {"linkage": "size"}),
        ("torch", (14, 14), 384, 190, {"connectivity": "all"}),
        ("torch", (16, 32), 64, 100, {"connectivity": "all", "linkage": "size"}),
    ],
)
def test_backends_agree_at_the_sizes_of_networks(backend, grid, channels, k, options):
    tokens = smooth(2, grid, channels, seed=6)
    backends = dict.fromkeys((backend, "torch", "numba"))
    first, *others = (hierarchical_merge(tokens, k, grid=grid, backend=name, **options) for name in backends)
    for merged, regions in others:
        assert torch.equal(merged, first[0]) and torch.equal(regions.assignment, first[1].assignment)


@pytest.mark.parametrize("connectivity", [8, "all"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_token_without_patches_is_not_merged(backend, connectivity):
    """One of three tokens has no patch, as regions of other methods may have, so that it is adjacent to no other."""
    regions = Regions(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[2, 2, 0]]), (2, 2))
    tokens = torch.ones(1, 3, 2, requires_grad=True)
    options = {"connectivity": connectivity, "backend": backend}
    merged, new = hierarchical_merge(tokens, 1, regions, linkage="size", **options)
    merged.sum().backward()
    assert tokens.grad.tolist() == [[[0.5, 0.5], [0.5, 0.5], [1, 1]]]
    assert new.sizes.tolist() == [[4, 0]]
    _, new = hierarchical_merge(tokens, 2, regions, threshold=0.5, **options)
    assert new.sizes.tolist() == [[4, 0, 0]]
    others = Regions(torch.tensor([[1, 1, 2, 2]]), torch.tensor([[0, 2, 2]]), (2, 2))
    tokens = torch.tensor([[[math.inf], [1], [3]]])
    merged, _ = hierarchical_merge(tokens, 2, others, linkage="size", threshold=0.5, **options)
    assert merged.tolist() == [[[math.inf], [2], [0]]]
    with pytest.raises(ValueError, match="k=2 merges, but image 0 of the batch runs out of adjacent tokens"):
        hierarchical_merge(torch.ones(1, 3, 2), 2, regions, **options)


@pytest.mark.parametrize("linkage", ["mean", "size"])
@pytest.mark.parametrize("backend", DEVICE_OF)
def test_gradients_are_those_of_the_averages(linkage, backend):
    tokens = torch.randn(2, 12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def merge(x):
        return hierarchical_merge(x, 5, grid=(3, 4), linkage=linkage, backend=backend)[0]

    # Triton's interpreter is slow, so the fast mode checks one random direction there.
    options = {"fast_mode": backend == "triton"}
    assert torch.autograd.gradcheck(merge, (tokens.to(DEVICE_OF[backend]).requires_grad_(),), **options)


@pytest.mark.parametrize("similarity", THRESHOLDS)
@pytest.mark.parametrize("backend", DEVICE_OF)
def test_nan_and_inf_are_merged_last(backend, similarity):
    tokens = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(4)).to(DEVICE_OF[backend])
    tokens[0, 5], tokens[0, 10] = torch.nan, torch.inf
    merged, regions = hierarchical_merge(tokens, 6, grid=(4, 4), similarity=similarity, backend=backend)
    expected, reference = hierarchical_merge(tokens.cpu(), 6, grid=(4, 4), similarity=similarity, backend="reference")
    assert torch.equal(regions.assignment.cpu(), reference.assignment)
    torch.testing.assert_close(merged.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert regions.sizes[0, regions.assignment[0, [5, 10]]].tolist() == [1, 1]
    assert merged.isfinite().all(-1).sum() == 8


@pytest.mark.parametrize("backend", DEVICE_OF)
def test_zero_and_minus_zero_are_equally_similar(backend):
    tokens = torch.tensor([[[1.0, 0.0], [-1e-30, 1e30], [-1.0, 0.0]]], device=DEVICE_OF[backend])
    assert hierarchical_merge(tokens, 1, grid=(1, 3), backend=backend)[1].assignment.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 9}, "k=9 merges of N=9 tokens"),
        ({"k": -1}, "k=-1"),
        ({"grid": None}, "either regions or grid"),
        ({"grid": (2, 4)}, "regions describe"),
        ({"connectivity": 6}, "connectivity=6: choose one of 8, 4"),
        ({"similarity": "dot"}, "similarity='dot': choose one of 'cosine'"),
        ({"linkage": "ward"}, "linkage='ward'"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"tokens": torch.ones(9, 2)}, r"\[B, N, D\]"),
        ({"tokens": torch.ones(1, 9, 2, dtype=torch.int64)}, "floats"),
        ({"features": torch.ones(1, 8, 2)}, "features"),
        ({"masses": torch.ones(1, 8)}, "masses"),
        (
            {"grid": None, "regions": Regions(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 9), (3, 3))},
            r"regions.assignment must be int64 \[B, P\] = \[1, 9\], not torch.int64 \[1, 4\]",
        ),
        (
            {"grid": None, "regions": Regions(torch.zeros(1, 9), torch.ones(1, 9), (3, 3))},
            r"not torch.float32 \[1, 9\]",
        ),
        (
            {"grid": None, "regions": Regions(torch.arange(1, 10)[None], torch.ones(1, 9, dtype=torch.int64), (3, 3))},
            "regions.assignment has tokens from 1 to 9, but N=9",
        ),
    ],
)
def test_error_names_the_wrong_argument(change, message):
    arguments = {"tokens": torch.ones(1, 9, 2), "k": 2, "grid": (3, 3)} | change
    with pytest.raises(ValueError, match=message):
        hierarchical_merge(**arguments)


@settings(deadline=None)
@given(st.integers(0, 150), st.integers(1, 12), st.sampled_from((-1, -0.5, 0, 0.3, 1)))
def test_total_is_shared_between_the_layers(total, n_layers, inflect):
    reducer = dhtm.DHTM(total=total, layers=tuple(range(1, n_layers + 1)), inflect=inflect)
    merges = [reducer.merges_in(layer) for layer in reducer.schedule]
    assert sum(merges) == total and min(merges) >= 0
    if n_layers > 1:  # linear in the layer, with a mean of total / n_layers
        ends = np.array([1 - inflect, 1 + inflect]) * total / n_layers
        np.testing.assert_allclose(merges, np.linspace(*ends, n_layers), atol=1)


def test_attention_mass_protects_tokens_that_receive_attention():
    """Two pairs are equally similar, and the one that receives less attention merges."""
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-1.0, 0.1]]])
    for received, expected in (([0.4, 0.4, 0.1, 0.1], [0, 1, 2, 2]), ([0.1, 0.1, 0.4, 0.4], [0, 0, 1, 2])):
        reducer = dhtm.DHTM(1, layers=(1,), mass="attention")
        attention = Attention(layer=1, received=torch.tensor([received]))
        _, regions = reducer(tokens, Regions.identity(1, (1, 4)), attention)
        assert regions.assignment.tolist() == [expected]
