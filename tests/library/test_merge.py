"""DHTM against an independent statement of it, every backend against the reference, and what must always hold."""

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
from dhtm.regions import grid_pairs

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
HERE = [name for name in kernels.BACKENDS if name != "triton"]  # which tests/test_triton.py is about
SIMILARITIES = ("cosine", "euclidean", "manhattan", "kl")


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


def nx_merge(tokens, grid, k, connectivity, similarity, linkage, masses=None):
    """Contract the best edge of a networkx graph k times; nodes are frozensets of patches, ordered by when they stood."""
    height, width = grid
    graph = nx.grid_2d_graph(height, width)
    if connectivity == "all":
        graph = nx.complete_graph(graph.nodes)
    if connectivity == 8:
        for row in range(height - 1):
            graph.add_edges_from(((row, c), (row + 1, c + 1)) for c in range(width - 1))
            graph.add_edges_from(((row, c + 1), (row + 1, c)) for c in range(width - 1))
    order = [(row, column) for row in range(height) for column in range(width)]  # the slots, merged ones keep the lower
    value = {node: tokens[i] for i, node in enumerate(order)}
    patches = {node: [i] for i, node in enumerate(order)}
    for _ in range(k):
        place = {node: i for i, node in enumerate(order)}
        edges = [tuple(sorted(edge, key=place.get)) for edge in graph.edges]

        def score(edge):
            found = nx_similarity(value[edge[0]], value[edge[1]], similarity)
            if masses is None:
                return found
            a, b = (masses[patches[node]].astype(np.float64).sum() for node in edge)
            return np.float32((np.float64(found) - (similarity == "cosine")) * (a * b / (a + b)))

        u, v = min(edges, key=lambda e: (-score(e), place[e[0]], place[e[1]]))
        weights = (1, 1) if linkage == "mean" else (len(patches[u]), len(patches[v]))
        mean = np.average(np.stack([value[u], value[v]]).astype(np.float64), axis=0, weights=weights)
        value[u], patches[u] = mean.astype(np.float32), patches[u] + patches[v]
        graph = nx.contracted_nodes(graph, u, v, self_loops=False)
        order.remove(v)
    assignment = np.empty(height * width, dtype=np.int64)
    for token, node in enumerate(order):
        assignment[patches[node]] = token
    return np.stack([value[node] for node in order]), assignment


@st.composite
def merges(draw):
    """A batch of token grids, smooth or with many exact ties, and a way to merge them."""
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
        "similarity": draw(st.sampled_from(SIMILARITIES)),
        "linkage": draw(st.sampled_from(("mean", "size"))),
        "masses": draw(st.sampled_from((None, torch.tensor(rng.integers(1, 4, size=(batch, n)) / 2).float()))),
    }
    return torch.tensor(tokens, dtype=torch.float32), grid, draw(st.integers(0, n - 1)), options


@settings(max_examples=150, deadline=None)
@given(merges())
def test_reference_is_the_contraction_of_a_graph(case):
    tokens, grid, k, options = case
    merged, regions = hierarchical_merge(tokens, k, grid=grid, backend="reference", **options)
    for image in range(len(tokens)):
        masses = None if options["masses"] is None else options["masses"][image].numpy()
        value, assignment = nx_merge(tokens[image].numpy(), grid, k, **options | {"masses": masses})
        assert regions.assignment[image].tolist() == assignment.tolist()
        np.testing.assert_allclose(merged[image].numpy(), value, rtol=1e-6, atol=1e-6)


def on(device, tensor):
    return None if tensor is None else tensor.to(device)


@settings(max_examples=300, deadline=None)
@given(merges(), st.sampled_from([name for name in HERE if name != "reference"]))
def test_every_backend_makes_the_reference_merges(case, backend):
    tokens, grid, k, options = case
    expected, expected_regions = hierarchical_merge(tokens, k, grid=grid, backend="reference", **options)
    for device in ("cpu",) if backend == "numba" else DEVICES:
        there = options | {"masses": on(device, options["masses"])}
        merged, regions = hierarchical_merge(tokens.to(device), k, grid=grid, backend=backend, **there)
        assert torch.equal(regions.assignment.cpu(), expected_regions.assignment)
        assert torch.equal(regions.sizes.cpu(), expected_regions.sizes)
        assert torch.equal(merged.cpu(), expected)


@settings(max_examples=60, deadline=None)
@given(merges(), st.integers(0, 2**32 - 1))
def test_backends_agree_on_regions_and_features_given(case, seed):
    """The second call of a network: regions of several patches, and similarity measured on something else."""
    tokens, grid, k, options = case
    tokens, regions = hierarchical_merge(tokens, k // 2, grid=grid, **options)
    features = torch.randn(*tokens.shape[:2], 3, generator=torch.Generator().manual_seed(seed))
    options |= {"masses": None if options["masses"] is None else regions.sizes.double()}
    results = [
        hierarchical_merge(tokens, (k + 1) // 2, regions, features=features, backend=backend, **options)
        for backend in HERE
    ]
    for merged, new in results[1:]:
        assert torch.equal(new.assignment, results[0][1].assignment)
        assert torch.equal(merged, results[0][0])


@settings(max_examples=150, deadline=None)
@given(merges(), st.sampled_from(HERE))
def test_invariants(case, backend):
    tokens, grid, k, options = case
    batch, n, _ = tokens.shape
    merged, regions = hierarchical_merge(tokens, k, grid=grid, backend=backend, **options)
    assert merged.shape == (batch, n - k, tokens.shape[2]) and merged.dtype == tokens.dtype
    assert regions.n_tokens == n - k and (regions.sizes.sum(1) == n).all()
    on_grid = options["connectivity"] != "all"
    adjacent = nx.Graph(grid_pairs(grid, options["connectivity"]).tolist()) if on_grid else nx.complete_graph(n)
    for image in range(batch):
        assignment = regions.assignment[image].numpy()
        firsts = [np.flatnonzero(assignment == token)[0] for token in range(n - k)]
        assert firsts == sorted(firsts), "tokens keep the order of their first patches"
        for token in range(n - k):
            patches = np.flatnonzero(assignment == token)
            assert len(patches) == regions.sizes[image, token]
            assert nx.is_connected(adjacent.subgraph(patches.tolist()))
            if options["linkage"] == "size":
                torch.testing.assert_close(merged[image, token], tokens[image, patches].mean(0), rtol=1e-5, atol=1e-5)
    order = torch.arange(batch).flip(0)
    options |= {"masses": None if options["masses"] is None else options["masses"][order]}
    permuted, permuted_regions = hierarchical_merge(tokens[order], k, grid=grid, backend=backend, **options)
    assert torch.equal(permuted, merged[order])
    assert torch.equal(permuted_regions.assignment, regions.assignment[order])


@pytest.mark.parametrize("backend", HERE)
def test_a_diagonal_alone_joins_only_with_8_connectivity(backend):
    # Equal tokens on the main diagonal of 3×3, nothing alike elsewhere.
    tokens = torch.eye(9)
    tokens[[0, 4, 8]] = torch.ones(9)
    together = {}
    for connectivity in (4, 8):
        _, regions = hierarchical_merge(tokens[None], 2, grid=(3, 3), connectivity=connectivity, backend=backend)
        together[connectivity] = regions.assignment[0, [0, 4, 8]].unique().numel() == 1
    assert together == {4: False, 8: True}


@pytest.mark.parametrize("backend", HERE)
def test_all_pairs_need_no_grid(backend):
    """The first and the last of nine tokens are alike; a given grid and the regions so far stay what they are."""
    tokens = torch.eye(9)
    tokens[8] = tokens[0]
    merged, regions = hierarchical_merge(tokens[None], 1, connectivity="all", backend=backend)
    assert regions.grid == (1, 9) and regions.assignment.tolist() == [[*range(8), 0]]
    _, regions = hierarchical_merge(tokens[None], 1, grid=(3, 3), connectivity="all", backend=backend)
    assert regions.grid == (3, 3)
    _, regions = hierarchical_merge(merged, 1, regions, connectivity="all", backend=backend)
    assert regions.assignment.tolist() == [[0, 0, *range(1, 7), 0]] and regions.grid == (3, 3)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_ties_go_to_the_first_pair(backend, similarity):
    merged, regions = hierarchical_merge(torch.ones(1, 9, 4), 3, grid=(3, 3), similarity=similarity, backend=backend)
    # All alike: token 0 swallows 1, then 2 (now at index 1), then 3 (its neighbour from patch 0).
    assert regions.assignment.tolist() == [[0, 0, 0, 0, 1, 2, 3, 4, 5]]
    assert torch.equal(merged, torch.ones(1, 6, 4))


def test_the_batch_does_not_change_the_merges():
    tokens = torch.randn(64, 196, 96, generator=torch.Generator().manual_seed(0))
    merged, regions = hierarchical_merge(tokens, 56, grid=(14, 14))
    for image in range(0, 64, 7):
        alone, its = hierarchical_merge(tokens[image : image + 1], 56, grid=(14, 14))
        assert torch.equal(alone[0], merged[image]) and torch.equal(its.assignment[0], regions.assignment[image])


def smooth(batch, grid, channels, seed):
    """Tokens whose neighbours are alike, as in a network: [B, N, D]."""
    generator = torch.Generator().manual_seed(seed)
    field = torch.randn(batch, channels, 4, 4, generator=generator)
    field = torch.nn.functional.interpolate(field, size=grid, mode="bicubic").flatten(2).transpose(1, 2)
    return field + 0.1 * torch.randn(field.shape, generator=generator)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("grid", "connectivity", "k"), [((14, 14), 8, 150), ((7, 7), "all", 10)])
def test_full_size_tokens_merge_as_in_the_reference(similarity, grid, connectivity, k):
    options = {"grid": grid, "connectivity": connectivity, "similarity": similarity}
    tokens = smooth(1, grid, 64, seed=1)
    expected, regions = hierarchical_merge(tokens, k, backend="reference", **options)
    for backend in ("torch", "numba"):
        merged, other = hierarchical_merge(tokens, k, backend=backend, **options)
        assert torch.equal(merged, expected) and torch.equal(regions.assignment, other.assignment)


@pytest.mark.parametrize("linkage", ["mean", "size"])
@pytest.mark.parametrize(
    ("grid", "channels", "k", "connectivity"),
    [
        ((1, 2), 16, 1, 8),
        ((32, 32), 384, 300, 8),
        ((7, 9), 1536, 60, 8),
        ((24, 24), 192, 570, 8),
        ((14, 14), 384, 190, "all"),
        ((16, 32), 64, 100, "all"),
    ],
)
def test_all_sizes_of_models(grid, channels, k, connectivity, linkage):
    """From two tokens to 1,024, and from few channels to many: numba as torch, because the reference is too slow."""
    tokens = smooth(2, grid, channels, seed=6)
    options = {"grid": grid, "connectivity": connectivity, "linkage": linkage}
    expected, regions = hierarchical_merge(tokens, k, backend="torch", **options)
    merged, other = hierarchical_merge(tokens, k, backend="numba", **options)
    assert torch.equal(merged, expected) and torch.equal(regions.assignment, other.assignment)


@pytest.mark.parametrize("connectivity", [8, "all"])
@pytest.mark.parametrize("backend", HERE)
def test_tokens_that_touch_none_cannot_be_merged(backend, connectivity):
    """Regions may come from any method: here all patches are in the first two tokens, and the third touches no other."""
    regions = Regions(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[2, 2, 0]]), (2, 2))
    tokens = torch.ones(1, 3, 2, requires_grad=True)
    options = {"connectivity": connectivity, "backend": backend}
    merged, new = hierarchical_merge(tokens, 1, regions, linkage="size", **options)
    merged.sum().backward()
    assert tokens.grad.tolist() == [[[0.5, 0.5], [0.5, 0.5], [1, 1]]]
    assert new.sizes.tolist() == [[4, 0]]
    with pytest.raises(ValueError, match="k=2 merges, but image 0 of the batch runs out of adjacent tokens"):
        hierarchical_merge(torch.ones(1, 3, 2), 2, regions, **options)


@pytest.mark.parametrize("linkage", ["mean", "size"])
@pytest.mark.parametrize("backend", HERE)
def test_gradients_are_those_of_the_averages(linkage, backend):
    tokens = torch.randn(2, 12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()

    def merge(x):
        return hierarchical_merge(x, 5, grid=(3, 4), linkage=linkage, backend=backend)[0]

    assert torch.autograd.gradcheck(merge, (tokens,))


def test_inputs_stay_as_they_are():
    tokens = torch.randn(2, 12, 3)
    before, regions = tokens.clone(), Regions.identity(2, (3, 4))
    hierarchical_merge(tokens, 5, regions)
    assert torch.equal(tokens, before) and torch.equal(regions.sizes, torch.ones(2, 12, dtype=torch.int64))


@pytest.mark.parametrize("backend", HERE)
def test_nan_and_inf_are_merged_last(backend):
    tokens = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(4))
    tokens[0, 5], tokens[0, 10] = torch.nan, torch.inf
    merged, regions = hierarchical_merge(tokens, 6, grid=(4, 4), backend=backend)
    assert regions.sizes[0, regions.assignment[0, [5, 10]]].tolist() == [1, 1]
    assert merged.isfinite().all(-1).sum() == 8


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
def test_bad_arguments_are_named(change, message):
    arguments = {"tokens": torch.ones(1, 9, 2), "k": 2, "grid": (3, 3)} | change
    with pytest.raises(ValueError, match=message):
        hierarchical_merge(**arguments)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 11), st.integers(0, 2**16))
def test_unmerging_gives_every_patch_its_token(k, seed):
    tokens = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(seed))
    merged, regions = hierarchical_merge(tokens, k, grid=(3, 4), backend="torch")
    full = regions.unmerge(merged)
    assert full.shape == tokens.shape
    for image, patches in enumerate(full):
        assert all(torch.equal(patches[p], merged[image, regions.assignment[image, p]]) for p in range(12))
    assert k or torch.equal(full, tokens)


@settings(deadline=None)
@given(st.integers(0, 150), st.integers(1, 12), st.sampled_from((-1, -0.5, 0, 0.3, 1)))
def test_total_is_shared_between_the_layers(total, n_layers, inflect):
    reducer = dhtm.DHTM(total=total, layers=tuple(range(1, n_layers + 1)), inflect=inflect)
    merges = [reducer.merges_in(layer) for layer in reducer.schedule]
    assert sum(merges) == total and min(merges) >= 0
    if n_layers > 1:  # a straight line, on average total / n_layers merges high
        ends = np.array([1 - inflect, 1 + inflect]) * total / n_layers
        np.testing.assert_allclose(merges, np.linspace(*ends, n_layers), atol=1)


def test_mass_spares_what_receives_attention():
    """Of two equally similar pairs the one that receives less attention merges."""
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-1.0, 0.1]]])
    for received, together in (([0.4, 0.4, 0.1, 0.1], [0, 1, 2, 2]), ([0.1, 0.1, 0.4, 0.4], [0, 0, 1, 2])):
        reducer = dhtm.DHTM(1, layers=(1,), mass="attention")
        attention = Attention(layer=1, received=torch.tensor([received]))
        _, regions = reducer(tokens, Regions.identity(1, (1, 4)), attention)
        assert regions.assignment.tolist() == [together]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "k=None, total=None"),
        ({"k": 3, "total": 3}, "give exactly one"),
        ({"total": -1}, "-1"),
        ({"total": 3, "inflect": 2}, "inflect=2"),
        ({"k": 3, "mass": "cls"}, "mass='cls': choose one of None, 'size', 'attention'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        dhtm.DHTM(**options)
