"""Statistical tests and intervals against enumeration, closed forms and a plain bootstrap."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import predictions_frame
from scipy.stats import binomtest

from dhtm.report.claims import claim
from dhtm.report.statistics import compare, holm


def p_of_all_flips(sums):
    """Return the share of all sign flips whose sum is at least as large in absolute value."""
    totals = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=len(sums))]
    return np.mean(np.array(totals) >= abs(sum(sums)) * (1 - 1e-9))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 30))
def test_p_is_mcnemars_without_groups_and_with_groups_of_one(first_only, second_only, both):
    n_images, disagree = first_only + second_only + both, first_only + second_only
    expected = binomtest(first_only, disagree).pvalue if disagree else 1
    for groups in (None, np.random.default_rng(0).permutation(n_images)):
        first = predictions_frame([True] * first_only + [False] * second_only + [True] * both, groups)
        second = predictions_frame([False] * first_only + [True] * (second_only + both), groups)
        result = compare(first, second.sample(frac=1, random_state=0))  # images are paired by index
        assert result["p"] == pytest.approx(expected, rel=1e-9)
        assert (result["first_only"], result["second_only"]) == (first_only, second_only)
        assert result["difference"] == pytest.approx(100 * (first_only - second_only) / n_images)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 7)), min_size=1, max_size=40))
def test_p_counts_all_sign_flips_of_groups(images):
    first, second, groups = (np.array(column) for column in zip(*images, strict=True))
    sums = [(first[groups == group].astype(int) - second[groups == group]).sum() for group in set(groups)]
    result = compare(predictions_frame(first, groups), predictions_frame(second, groups))
    assert result["p"] == pytest.approx(p_of_all_flips(sums), rel=1e-9)


@pytest.mark.parametrize("grouped", [False, True])
def test_interval_is_that_of_a_plain_bootstrap(grouped):
    rng = np.random.default_rng(1)
    n_images, n_groups = 400, 90
    groups = rng.integers(0, n_groups, n_images) if grouped else np.arange(n_images)
    easy = rng.random(n_images)[groups if grouped else slice(None)]  # images of one group resemble each other
    first, second = easy < 0.8, easy + rng.normal(0, 0.2, n_images) < 0.7
    result = compare(*(predictions_frame(correct, groups if grouped else None) for correct in (first, second)))
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    values, means = 100 * (first.astype(int) - second), []
    for _ in range(4_000):
        drawn = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        means.append(values[drawn].mean())
    assert result["difference"] == pytest.approx(values.mean())
    interval = (result["difference_low"], result["difference_high"])
    assert interval == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.4)


def test_differences_of_kl_are_tested_by_sign_flips():
    differences = np.random.default_rng(2).normal(0.4, 1, 12)
    first, second = (predictions_frame([True] * 12).assign(kl=kl) for kl in (3 + differences, np.full(12, 3.0)))
    result = compare(first, second)
    assert result["kl_p"] == pytest.approx(p_of_all_flips(differences), abs=0.02), "10,000 random flips"
    assert result["kl_difference_low"] < differences.mean() < result["kl_difference_high"]


def test_images_without_a_finite_kl_are_ignored():
    noise = np.random.default_rng(3).normal(size=12)
    first, second = (predictions_frame([True] * 12, groups=range(12)).assign(kl=kl) for kl in (3 + noise, 3.0))
    expected = compare(first[1:], second[1:])
    first.loc[0, "kl"] = np.inf
    assert compare(first, second) == expected, "all are right, so nothing else depends on the number of images"


def test_comparing_different_images_raises():
    first = predictions_frame([True, False, True])
    for other in (predictions_frame([True, False]), first.rename(index={2: 3}), first.assign(label=[0, 1, 3])):
        with pytest.raises(ValueError, match="different images"):
            compare(first, other)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_the_same_as_the_stepwise_procedure(values):
    rejected = set()
    for step, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        if values[i] * (len(values) - step) >= 0.05:
            break
        rejected.add(i)
    corrected = holm(pd.Series([*values, np.nan]))
    assert set(corrected.index[corrected < 0.05]) == rejected
    assert (corrected[:-1] >= values).all() and np.isnan(corrected.iloc[-1])


@settings(deadline=None)
@given(st.integers(1, 120), st.data())
def test_claim_is_that_of_a_search_over_all_disagreements(n_images, data):
    right, other = (data.draw(st.integers(0, n_images)) for _ in range(2))
    net = abs(right - other)
    # If both are right on `both` images, the first alone is right on right - both, the second alone on other - both.
    possible = [right + other - 2 * both for both in range(max(0, right + other - n_images), min(right, other) + 1)]
    significant = [n for n in possible if (binomtest((n + net) // 2, n).pvalue if n else 1) < 0.05]
    result = claim(100 * right / n_images, 100 * other / n_images, n_images)
    most_pct = 100 * max(significant) / n_images if significant else math.nan
    assert result["most_disagreement_pct"] == pytest.approx(most_pct, nan_ok=True)
    assert result["greatest_disagreement_pct"] == pytest.approx(100 * max(possible) / n_images)
    is_always = result["beyond_chance"] == "beyond chance however often the two disagree"
    assert is_always == (bool(significant) and max(significant) == max(possible))
    assert (result["beyond_chance"] == "within chance however seldom the two disagree") == (not significant)
