"""The Sinkhorn tokenizer: its transport against other ways to the same plan, its tokens against the formula."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime, minimize
from scipy.special import softmax
from scipy.stats import kstest

from baselines import Sinkhorn
from baselines.sinkhorn import transport
from dhtm import Regions
from dhtm.reducer import Attention

SCORES = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**32 - 1), st.sampled_from([0.3, 1, 5]))


def scores_of(case):
    m, n, seed, scale = case
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, (2, m, n)))


def scaled(scores, iterations):
    """Sinkhorn and Knopp: divide the rows by their sums, then the columns by theirs, over and over."""
    plan = np.exp(scores)
    for _ in range(iterations):
        plan /= plan.sum(1, keepdims=True) * len(plan)
        plan /= plan.sum(0, keepdims=True) * plan.shape[1]
    return plan


@settings(max_examples=40, deadline=None)
@given(case=SCORES, iterations=st.integers(1, 6))
def test_iterations_scale_rows_then_columns(case, iterations):
    scores = scores_of(case)
    plan = transport(scores, iterations)
    torch.testing.assert_close(plan.sum(1), torch.full_like(plan[:, 0], 1 / plan.shape[2]))
    for i in range(2):
        np.testing.assert_allclose(plan[i], scaled(scores[i].numpy(), iterations), rtol=1e-9)


@settings(max_examples=20, deadline=None)
@given(case=SCORES)
def test_many_iterations_make_the_rows_equal_too(case):
    plan = transport(scores_of(case), 3000)
    torch.testing.assert_close(plan.sum(2), torch.full_like(plan[..., 0], 1 / plan.shape[1]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(4, 4), (3, 8), (7, 5)])
def test_the_plan_is_the_transport_of_highest_score_and_entropy(shape):
    """The dual problem, Σ_n log Σ_m exp(S + f) / N − Σ_m f / M, minimised by BFGS."""
    scores = np.random.default_rng(0).normal(size=shape)
    m, n = shape

    def dual(potentials):
        logits = scores + potentials[:, None]
        gradient = softmax(logits, axis=0).mean(1) - 1 / m
        return np.log(np.exp(logits).sum(0)).mean() - potentials.mean(), gradient

    best = minimize(dual, np.zeros(m), jac=True, method="BFGS", options={"gtol": 1e-10}).x
    expected = softmax(scores + best[:, None], axis=0) / n
    np.testing.assert_allclose(transport(torch.from_numpy(scores)[None], 500)[0], expected, atol=1e-7)


def test_large_scores_do_not_overflow():
    plan = transport(torch.tensor([[[500.0, -500.0], [-500.0, 500.0]]]), 3)
    torch.testing.assert_close(plan, torch.tensor([[[0.5, 0.0], [0.0, 0.5]]]))


@pytest.mark.parametrize(("epsilon", "iterations"), [(1.0, 3), (0.1, 5)])
def test_new_tokens_are_transported_normalised_tokens(epsilon, iterations):
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(2, 12, 5))
    reducer = Sinkhorn(0.34, layers=(2,), epsilon=epsilon, iterations=iterations)
    reducer.attach(5, 1, (3, 4), (2,))
    with torch.no_grad():
        new, regions = reducer(
            torch.tensor(tokens, dtype=torch.float32), Regions.identity(2, (3, 4)), Attention(layer=2)
        )
    centres = reducer.stages["2"].centres.detach().numpy()
    assert centres.shape == (4, 5)
    centres = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    for i in range(2):
        units = tokens[i] / np.linalg.norm(tokens[i], axis=1, keepdims=True)
        weights = scaled(centres @ units.T / epsilon, iterations)
        weights /= weights.sum(0)  # those of each token sum to 1
        np.testing.assert_allclose(new[i], weights @ units, rtol=1e-4, atol=1e-5)
        assert regions.assignment[i].tolist() == weights.argmax(0).tolist()


def test_in_training_centres_become_unit_vectors_and_learn_as_such():
    """The gradient is that with respect to the units, which finite differences measure: along a unit vector too."""
    reducer = Sinkhorn(0.34, layers=(2,))
    reducer.attach(5, 1, (3, 4), (2,))
    reducer.double().train()
    tokens = torch.randn(2, 12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centres = reducer.stages["2"].centres
    units = centres.detach() / centres.detach().norm(dim=1, keepdim=True)
    reducer(tokens, Regions.identity(2, (3, 4)), Attention(layer=2))[0].pow(3).sum().backward()
    torch.testing.assert_close(centres.detach(), units)

    values = (tokens / tokens.norm(dim=2, keepdim=True)).numpy()

    def loss(centres):
        plans = [scaled(centres.reshape(4, 5) @ image.T, 3) * 12 for image in values]
        return sum(((plan @ image) ** 3).sum() for plan, image in zip(plans, values, strict=True))

    expected = approx_fprime(units.numpy().ravel(), loss)
    np.testing.assert_allclose(centres.grad.numpy().ravel(), expected, rtol=1e-4, atol=1e-6)
    assert (centres.grad * units).sum(1).abs().min() > 1e-3, "normalisation would have removed this part"


def test_evaluation_leaves_the_centres_as_they_are():
    reducer = Sinkhorn(0.34, layers=(2,))
    reducer.attach(5, 1, (3, 4), (2,))
    before = reducer.stages["2"].centres.detach().clone()
    arguments = torch.randn(2, 12, 5), Regions.identity(2, (3, 4)), Attention(layer=2)
    evaluated = reducer.eval()(*arguments)[0]
    assert torch.equal(reducer.stages["2"].centres, before)
    torch.testing.assert_close(reducer.train()(*arguments)[0], evaluated)


def test_centres_start_from_the_standard_normal_distribution():
    torch.manual_seed(0)
    reducer = Sinkhorn(0.5, layers=(2,))
    reducer.attach(192, 1, (14, 14), (2,))
    assert kstest(reducer.stages["2"].centres.detach().numpy().ravel(), "norm").pvalue > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [({"epsilon": 0}, "epsilon=0"), ({"iterations": 0}, "iterations=0"), ({"iterations": 2.5}, "iterations=2.5")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Sinkhorn(0.5, **options)
