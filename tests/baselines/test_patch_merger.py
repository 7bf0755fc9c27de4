"""PatchMerger against its formula."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import kstest
from test_vit import build, images_for, logits

import dhtm
from baselines import PatchMerger, Sinkhorn, SiT
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


def test_queries_start_from_the_standard_normal_distribution():
    torch.manual_seed(0)
    reducer = PatchMerger(0.5, layers=(2,))
    reducer.attach(192, 1, (14, 14), (2,))
    queries = reducer.stages["2"].queries.detach().numpy()
    assert queries.shape == (98, 192) and kstest(queries.ravel(), "norm").pvalue > 0.01


@pytest.mark.parametrize("method", [PatchMerger, Sinkhorn, SiT])
def test_the_largest_shares_are_computed_only_when_they_are_read(method, monkeypatch):
    calls, argmax = [], torch.Tensor.argmax
    monkeypatch.setattr(torch.Tensor, "argmax", lambda *args, **options: calls.append(1) or argmax(*args, **options))
    model = dhtm.patch(build("deit_tiny"), method(0.5, layers=(2, 4)))
    logits(model, images_for(model))
    assert not calls
    assert dhtm.regions(model).sizes.sum(1).tolist() == [196, 196] and calls


def test_one_module_in_the_middle_may_leave_eight_tokens_as_the_original_does():
    model = dhtm.patch(build("deit_tiny"), PatchMerger(0.041, layers=(3,)))
    logits(model, images_for(model))
    assert [dhtm.regions(model, layer).n_tokens for layer in range(1, 6)] == [196, 196, 8, 8, 8]
