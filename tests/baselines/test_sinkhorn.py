"""The Sinkhorn tokenizer: its transport and its tokens against the formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime

from baselines import Sinkhorn
from baselines.sinkhorn import transport
from dhtm import Regions
from dhtm.reducer import Attention


def scaled(scores, iterations):
    """Sinkhorn and Knopp: divide the rows by their sums, then the columns by theirs, over and over."""
    plan = np.exp(scores)
    for _ in range(iterations):
        plan /= plan.sum(1, keepdims=True) * len(plan)
        plan /= plan.sum(0, keepdims=True) * plan.shape[1]
    return plan


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 6),
    n=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.3, 1, 5]),
    iterations=st.integers(1, 6),
)
def test_iterations_scale_rows_then_columns(m, n, seed, scale, iterations):
    scores = torch.from_numpy(np.random.default_rng(seed).normal(0, scale, (2, m, n)))
    plan = transport(scores, iterations)
    torch.testing.assert_close(plan.sum(1), torch.full_like(plan[:, 0], 1 / plan.shape[2]))
    for i in range(2):
        np.testing.assert_allclose(plan[i], scaled(scores[i].numpy(), iterations), rtol=1e-9)


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
    reducer.double()
    tokens = torch.randn(2, 12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centres = reducer.stages["2"].centres
    units = centres.detach() / centres.detach().norm(dim=1, keepdim=True)
    arguments = tokens, Regions.identity(2, (3, 4)), Attention(layer=2)
    before, evaluated = centres.detach().clone(), reducer.eval()(*arguments)[0]
    assert torch.equal(centres, before)
    new = reducer.train()(*arguments)[0]
    torch.testing.assert_close(new, evaluated)
    new.pow(3).sum().backward()
    torch.testing.assert_close(centres.detach(), units)

    values = (tokens / tokens.norm(dim=2, keepdim=True)).numpy()

    def loss(centres):
        plans = [scaled(centres.reshape(4, 5) @ image.T, 3) * 12 for image in values]
        return sum(((plan @ image) ** 3).sum() for plan, image in zip(plans, values, strict=True))

    expected = approx_fprime(units.numpy().ravel(), loss)
    np.testing.assert_allclose(centres.grad.numpy().ravel(), expected, rtol=1e-4, atol=1e-6)
    assert (centres.grad * units).sum(1).abs().min() > 1e-3, "normalisation would have removed this part"
