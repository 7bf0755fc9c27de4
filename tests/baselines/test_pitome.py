"""PiToMe against a plain implementation, token by token."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import check_step, unequal_tokens

from baselines import PiToMe
from dhtm import Regions
from dhtm.reducer import Attention


def pitome(keys, ratio, layer, depth, margin=0.75, alpha=1.0, schedule="deit"):
    """Return the groups of tokens with keys [N, d] in layer ``layer`` of ``depth``, each in the place of its B token."""
    n = len(keys)
    r = math.floor(n - n * ratio)
    units = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    similarity = (units @ units.T).tolist()
    m = margin * (1 - (layer - 1) / depth)

    def g(z):
        return z if z > 0 else alpha * (math.exp(z) - 1)

    energy = [sum(g(similarity[i][j] - m) for j in range(n)) / n for i in range(n)]
    order = sorted(range(n), key=lambda i: -energy[i])  # a stable sort
    ranked = (layer <= math.ceil(depth / 2)) == (schedule == "deit")
    if not ranked:
        order = order[: 2 * r]
    a, b = order[0::2], order[1::2]
    into = {i: max(b, key=lambda j: similarity[i][j]) for i in a} if b else {}
    if ranked:
        into = dict(sorted(into.items(), key=lambda pair: -similarity[pair[0]][pair[1]])[:r])
    return [[t] + [i for i in into if into[i] == t] for t in range(n) if t not in into]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 15),
    ratio=st.sampled_from([0.5, 0.6, 0.75, 0.9, 0.925, 1]),
    layer=st.integers(1, 5),
    schedule=st.sampled_from(["deit", "mae"]),
    margin=st.sampled_from([0.75, 0.9]),
    alpha=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_layer_matches_the_plain_implementation(n, ratio, layer, schedule, margin, alpha, seed):
    tokens, regions, keys = unequal_tokens(n, seed)
    keys += 0.5
    options = {"margin": margin, "alpha": alpha, "schedule": schedule}
    reducer = PiToMe(ratio, layers=(2, 3, 5, 6, 9), **options)  # layer and depth are counted within these
    attention = Attention(reducer.schedule[layer - 1], keys=keys)
    groups = [pitome(image.double().mean(0).numpy(), ratio, layer, 5, **options) for image in keys]
    check_step(reducer, tokens, regions, attention, groups)


def test_equal_energies_go_to_the_lower_index():
    """Eight equal tokens are ordered by their indices, and every A token proposes the first B token."""
    keys, tokens = torch.ones(1, 1, 8, 2), torch.arange(8.0)[None, :, None]
    _, regions = PiToMe(0.75, layers=(1, 2))(tokens, Regions.identity(1, (1, 8)), Attention(1, keys=keys))
    assert regions.assignment.tolist() == [[0, 0, 0, 1, 2, 3, 4, 5]]  # 0 and 2, the first two of A, merge into 1
    _, regions = PiToMe(0.75, layers=(1, 2))(tokens, Regions.identity(1, (1, 8)), Attention(2, keys=keys))
    assert regions.assignment.tolist() == [[0, 0, 0, 1, 2, 3, 4, 5]]
