"""PatchMerger against its formula."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from baselines import PatchMerger
from dhtm import Regions
from dhtm.reducer import Attention


@pytest.mark.parametrize("scale", [False, True])
def test_new_tokens_are_the_formula(scale):
    rng = np.random.default_rng(0)
    tokens = rng.normal(2, 3, size=(2, 12, 6))
    reducer = PatchMerger(0.34, layers=(2,), scale=scale)
    reducer.attach(6, 1, (3, 4), (2,))
    stage = reducer.stages["2"]
    for parameter in reducer.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        new, regions = reducer(torch.tensor(tokens).float(), Regions.identity(2, (3, 4)), Attention(layer=2))
    gain, shift, queries = (
        parameter.detach().double().numpy() for parameter in (stage.norm.weight, stage.norm.bias, stage.queries)
    )
    assert queries.shape == (4, 6)
    x = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-5) * gain + shift
    products = np.einsum("md,bnd->bmn", queries, x) / (np.sqrt(6) if scale else 1)
    weights = softmax(products, axis=2)
    np.testing.assert_allclose(new, np.einsum("bmn,bnd->bmd", weights, x), rtol=1e-4, atol=1e-5)
    assert regions.assignment.tolist() == weights.argmax(1).tolist()
