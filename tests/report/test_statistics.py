"""Tests and intervals against enumeration, closed forms and resampling written out."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dhtm.report.statistics import bootstrap, claim, compare, holm, mcnemar


def by_enumeration(first_only, second_only):
    """Twice the share of sequences of coin tosses with at most as many of the rarer side."""
    tosses, rarer = first_only + second_only, min(first_only, second_only)
    return min(1, 2 * sum(math.comb(tosses, i) for i in range(rarer + 1)) / 2**tosses)


def predictions(correct, order=None):
    """Predictions of images 0, 1, 2, …, in rows of another order."""
    index = np.arange(len(correct))
    frame = pd.DataFrame({"label": index % 10, "correct": np.array(correct, dtype=bool)}, index=index)
    return frame if order is None else frame.loc[order]


@settings(deadline=None)
@given(st.integers(0, 80), st.integers(0, 80))
def test_mcnemar_is_the_exact_one(first_only, second_only):
    assert mcnemar(first_only, second_only) == pytest.approx(by_enumeration(first_only, second_only), rel=1e-9)
    assert mcnemar(first_only, second_only) == mcnemar(second_only, first_only)


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 0) == pytest.approx(1 / 16)
    assert mcnemar(6, 0) == pytest.approx(1 / 32)
    assert mcnemar(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 4096)


def test_images_are_paired_by_index_whatever_the_order_of_rows():
    first, second = [True] * 8 + [False] * 2, [True] * 3 + [False] * 6 + [True]
    comparison = compare(predictions(first), predictions(second, order=[7, 3, 9, 0, 5, 1, 8, 2, 6, 4]))
    assert (comparison.first_only, comparison.second_only) == (5, 1)
    assert comparison.difference == pytest.approx(40)
    assert comparison.p == pytest.approx(2 * (1 + 6) / 64)
    assert comparison.low <= comparison.difference <= comparison.high
    backwards = compare(predictions(second), predictions(first))
    assert (backwards.difference, backwards.p) == (-comparison.difference, comparison.p)


def test_different_images_are_not_compared():
    first = predictions([True, False, True])
    others = [predictions([True, False]), first.rename(index={2: 3}), first.assign(label=[0, 1, 3])]
    for other in others:
        with pytest.raises(ValueError, match="different images"):
            compare(first, other)


def test_the_bootstrap_is_that_of_the_images():
    first_only, second_only, n_images = 60, 35, 1000
    outcomes = np.repeat([1, -1, 0], [first_only, second_only, n_images - first_only - second_only])
    rng = np.random.default_rng(1)
    means = [100 * rng.choice(outcomes, n_images).mean() for _ in range(10_000)]
    low, high = bootstrap(first_only, second_only, n_images)
    assert (low, high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.11)  # steps of 0.1 points
    half_width = 1.96 * 100 * outcomes.std() / math.sqrt(n_images)
    assert (low, high) == pytest.approx((2.5 - half_width, 2.5 + half_width), abs=0.11)
    assert (low, high) == bootstrap(first_only, second_only, n_images), "the same each time"


def test_models_that_agree_have_an_interval_of_no_width():
    assert bootstrap(0, 0, 500) == (0, 0)
    assert bootstrap(500, 0, 500) == (100, 100)


def test_holm_by_hand():
    p = pd.Series([0.01, 0.04, np.nan, 0.03, 0.005])
    assert holm(p).tolist() == pytest.approx([0.03, 0.06, np.nan, 0.06, 0.02], nan_ok=True)
    assert holm(pd.Series([np.nan])).isna().all()
    assert holm(pd.Series([0.9, 0.8])).tolist() == [1, 1]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_the_stepwise_procedure_does(values):
    rejected = set()
    for step, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        if values[i] * (len(values) - step) >= 0.05:
            break
        rejected.add(i)
    corrected = holm(pd.Series(values))
    assert set(corrected.index[corrected < 0.05]) == rejected
    assert (corrected >= pd.Series(values)).all()


@settings(deadline=None)
@given(st.integers(1, 120), st.data())
def test_what_a_claim_allows_is_found_by_trying_all(n_images, data):
    right = data.draw(st.integers(0, n_images))
    other = data.draw(st.integers(0, n_images))
    net = abs(right - other)
    # Both right on `both` images: the first alone on right - both, the second alone on other - both.
    possible = [right + other - 2 * both for both in range(max(0, right + other - n_images), min(right, other) + 1)]
    below = [count for count in possible if by_enumeration((count + net) // 2, (count - net) // 2) < 0.05]
    found = claim(100 * right / n_images, 100 * other / n_images, n_images)
    assert found.most == (max(below) if below else None)
    assert found.greatest_pct == pytest.approx(100 * max(possible) / n_images)
    assert found.beyond_chance_always == (bool(below) and max(below) == max(possible))
    assert not below or below == [count for count in possible if count <= max(below)], "one limit tells them apart"


def test_independent_errors():
    found = claim(80, 75, 1000)
    assert found.independent_pct == pytest.approx(100 * (0.8 * 0.25 + 0.75 * 0.2))
    assert found.greatest_pct == 45
    assert found.beyond_chance_if_independent and not claim(80, 78, 1000).beyond_chance_if_independent


@pytest.mark.parametrize(("first", "second"), [(71.66, 71.74), (79.46, 79.18), (80.68, 81.05)])
def test_the_limit_is_near_the_normal_one(first, second):
    """p is below 0.05 where the net difference is beyond 1.96 √disagreements, less the step between counts."""
    net = round(abs(first - second) * 500)
    assert claim(first, second, 50_000).most == pytest.approx(((net - 1) / 1.96) ** 2, rel=0.01)
