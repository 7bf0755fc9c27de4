"""The methods with learned clusters against their formulas: PatchMerger, the Sinkhorn tokenizer and SiT."""

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime
from scipy.special import erf, softmax
from scipy.stats import kstest
from timm.optim import create_optimizer_v2

from baselines import PatchMerger, Sinkhorn, SiT
from baselines.sinkhorn import transport
from dhtm import Regions
from dhtm.reducer import Attention

TOKENS = np.random.default_rng(0).normal(2, 3, size=(2, 12, 6))
NORMALISED = (TOKENS - TOKENS.mean(-1, keepdims=True)) / np.sqrt(TOKENS.var(-1, keepdims=True) + 1e-5)  # LayerNorm
UNITS = TOKENS / np.linalg.norm(TOKENS, axis=-1, keepdims=True)


@torch.no_grad()
def reduce_tokens(reducer):
    """Set random parameters and reduce TOKENS to 4; return the parameters by name, new tokens and assignment."""
    reducer.attach(6, 1, (3, 4), (2,))
    for parameter in reducer.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    new, regions = reducer(torch.tensor(TOKENS).float(), Regions.identity(2, (3, 4)), Attention(layer=2))
    parameters = {name: value.double().numpy() for name, value in reducer.stages["2"].named_parameters()}
    return parameters, new, regions.assignment.tolist()


def check_close(new, expected):
    np.testing.assert_allclose(new, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [False, True])
def test_patch_merger_matches_its_formula(scale):
    parameters, new, assignment = reduce_tokens(PatchMerger(0.34, layers=(2,), scale=scale))
    x = NORMALISED * parameters["norm.weight"] + parameters["norm.bias"]
    assert parameters["queries"].shape == (4, 6)
    products = np.einsum("md,bnd->bmn", parameters["queries"], x) / (np.sqrt(6) if scale else 1)
    weights = softmax(products, axis=2)
    check_close(new, np.einsum("bmn,bnd->bmd", weights, x))
    assert assignment == weights.argmax(1).tolist()


def test_sit_matches_its_formula():
    parameters, new, assignment = reduce_tokens(SiT(0.34, layers=(2,)))
    w1, b1, w2, b2 = (parameters[f"mlp.{layer}.{kind}"] for layer in (1, 3) for kind in ("weight", "bias"))
    assert w1.shape == (3, 6) and w2.shape == (4, 3)
    hidden = (NORMALISED * parameters["mlp.0.weight"] + parameters["mlp.0.bias"]) @ w1.T + b1
    hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
    weights = softmax(parameters["scale"] * (hidden @ w2.T + b2), axis=1)
    check_close(new, np.einsum("bnm,bnd->bmd", weights, TOKENS))
    assert assignment == weights.argmax(2).tolist()


def test_sinkhorn_transports_normalised_tokens():
    parameters, new, assignment = reduce_tokens(Sinkhorn(0.34, layers=(2,), epsilon=0.1, iterations=5))
    assert parameters["centres"].shape == (4, 6)
    centres = parameters["centres"] / np.linalg.norm(parameters["centres"], axis=1, keepdims=True)
    weights = np.stack([sinkhorn_knopp(centres @ image.T / 0.1, 5) for image in UNITS])
    weights /= weights.sum(1, keepdims=True)  # the weights of each token sum to 1
    check_close(new, weights @ UNITS)
    assert assignment == weights.argmax(1).tolist()


def sinkhorn_knopp(scores, iterations):
    """Run the Sinkhorn-Knopp algorithm: each iteration scales the M rows to sums of 1/M, then the N columns to 1/N."""
    plan = np.exp(scores)
    for _ in range(iterations):
        plan /= plan.sum(1, keepdims=True) * len(plan)
        plan /= plan.sum(0, keepdims=True) * plan.shape[1]
    return plan


def test_large_scores_do_not_overflow():
    plan = transport(torch.tensor([[[500.0, -500.0], [-500.0, 500.0]]]), 3)
    torch.testing.assert_close(plan, torch.tensor([[[0.5, 0.0], [0.0, 0.5]]]))


def test_training_normalises_centres_outside_the_gradient():
    """The gradient, checked by finite differences, is with respect to the unit vectors, and has a part along each."""
    reducer = Sinkhorn(0.34, layers=(2,))
    reducer.attach(6, 1, (3, 4), (2,))
    centres = reducer.double().stages["2"].centres
    units = centres.detach() / centres.detach().norm(dim=1, keepdim=True)
    arguments = torch.tensor(TOKENS), Regions.identity(2, (3, 4)), Attention(layer=2)
    before, evaluated = centres.detach().clone(), reducer.eval()(*arguments)[0]
    assert torch.equal(centres, before)
    new = reducer.train()(*arguments)[0]
    torch.testing.assert_close(new, evaluated)
    new.pow(3).sum().backward()
    torch.testing.assert_close(centres.detach(), units)

    def loss(centres):
        plans = [sinkhorn_knopp(centres.reshape(4, 6) @ image.T, 3) * 12 for image in UNITS]
        return sum(((plan @ image) ** 3).sum() for plan, image in zip(plans, UNITS, strict=True))

    expected = approx_fprime(units.numpy().ravel(), loss)
    np.testing.assert_allclose(centres.grad.numpy().ravel(), expected, rtol=1e-4, atol=1e-6)
    assert (centres.grad * units).sum(1).abs().min() > 1e-3, "through the normalisation this part would be 0"


def new_stage(reducer):
    """Return the untrained stage of a reducer from 196 to 98 tokens of 192 channels."""
    reducer.attach(192, 1, (14, 14), (2,))
    return reducer.stages["2"]


@pytest.mark.parametrize(("method", "name"), [(PatchMerger, "queries"), (Sinkhorn, "centres")])
def test_queries_and_centres_start_standard_normal(method, name):
    values = getattr(new_stage(method(0.5, layers=(2,))), name).detach().numpy()
    assert values.shape == (98, 192) and kstest(values.ravel(), "norm").pvalue > 0.01


def test_sit_has_the_authors_initialisation_and_weight_decay():
    stage = new_stage(SiT(0.5, layers=(2,)))
    for linear in (stage.mlp[1], stage.mlp[3]):
        assert kstest(linear.weight.detach().numpy().ravel() / 0.02, "norm").pvalue > 0.01
        assert not linear.bias.any()
    assert stage.scale.item() == 1
    groups = create_optimizer_v2(stage, "adamw", 1e-3, 0.05).param_groups
    decayed = [parameter for group in groups if group["weight_decay"] for parameter in group["params"]]
    assert any(parameter is stage.scale for parameter in decayed)
