"""SiT's token slimming against its formula."""

import numpy as np
import torch
from scipy.special import erf, softmax
from scipy.stats import kstest
from timm.optim import create_optimizer_v2

from baselines import SiT
from dhtm import Regions
from dhtm.reducer import Attention


def test_new_tokens_are_the_formula():
    rng = np.random.default_rng(0)
    tokens = rng.normal(2, 3, size=(2, 12, 6))
    reducer = SiT(0.34, layers=(2,))
    reducer.attach(6, 1, (3, 4), (2,))
    stage = reducer.stages["2"]
    for parameter in reducer.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        new, regions = reducer(torch.tensor(tokens).float(), Regions.identity(2, (3, 4)), Attention(layer=2))
    norm, first, _, second = stage.mlp
    gain, shift, w1, b1, w2, b2, scale = (
        parameter.detach().double().numpy()
        for parameter in (
            norm.weight,
            norm.bias,
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            stage.scale,
        )
    )
    assert w1.shape == (3, 6) and w2.shape == (4, 3)
    x = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-5) * gain + shift
    hidden = x @ w1.T + b1
    hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
    weights = softmax(scale * (hidden @ w2.T + b2), axis=1)
    np.testing.assert_allclose(new, np.einsum("bnm,bnd->bmd", weights, tokens), rtol=1e-4, atol=1e-5)
    assert regions.assignment.tolist() == weights.argmax(2).tolist()


def test_parameters_start_as_the_authors_start_them():
    torch.manual_seed(0)
    reducer = SiT(0.5, layers=(2,))
    reducer.attach(192, 1, (14, 14), (2,))
    stage = reducer.stages["2"]
    for linear in (stage.mlp[1], stage.mlp[3]):
        assert kstest(linear.weight.detach().numpy().ravel() / 0.02, "norm").pvalue > 0.01
        assert not linear.bias.any()
    assert stage.scale.item() == 1
    decayed = [
        group for group in create_optimizer_v2(reducer, "adamw", 1e-3, 0.05).param_groups if group["weight_decay"]
    ]
    assert any(parameter is stage.scale for group in decayed for parameter in group["params"])
