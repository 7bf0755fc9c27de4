"""Tests and intervals against enumeration, closed forms and resampling written out."""

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
from dhtm.report.statistics import compare_kl, compare_top1, holm


def by_enumeration(first_only, second_only):
    """Twice the share of sequences of coin tosses with at most as many of the rarer side."""
    tosses, rarer = first_only + second_only, min(first_only, second_only)
    return min(1, 2 * sum(math.comb(tosses, i) for i in range(rarer + 1)) / 2**tosses)


def two_models(first_only, second_only, both=0, groups=None):
    """Predictions of two models that disagree so often."""
    first = [True] * first_only + [False] * second_only + [True] * both
    second = [False] * first_only + [True] * second_only + [True] * both
    return predictions_frame(first, groups), predictions_frame(second, groups)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 30))
def test_without_groups_and_with_groups_of_one_the_test_is_mcnemars(first_only, second_only, both):
    n_images = first_only + second_only + both
    disagree = first_only + second_only
    expected = binomtest(first_only, disagree).pvalue if disagree else 1
    for groups in (None, np.random.default_rng(0).permutation(n_images)):
        found = compare_top1(*two_models(first_only, second_only, both, groups))
        assert found.p == pytest.approx(expected, rel=1e-9)
        assert (found.first_more, found.second_more) == (first_only, second_only)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 7)), min_size=1, max_size=40))
def test_with_groups_every_flip_of_their_signs_is_counted(images):
    first, second, groups = (np.array(column) for column in zip(*images, strict=True))
    sums = [(first[groups == group].astype(int) - second[groups == group]).sum() for group in set(groups)]
    flips = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=len(sums))]
    expected = np.mean(np.array(flips) >= abs(sum(sums)))
    found = compare_top1(predictions_frame(first, groups), predictions_frame(second, groups))
    assert found.p == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_interval_is_that_of_a_plain_bootstrap(grouped):
    rng = np.random.default_rng(1)
    n_images, n_groups = 400, 90
    groups = rng.integers(0, n_groups, n_images) if grouped else np.arange(n_images)
    easy = rng.random(n_images)[groups if grouped else slice(None)]  # images of one group resemble each other
    first, second = easy < 0.8, easy + rng.normal(0, 0.2, n_images) < 0.7
    found = compare_top1(*(predictions_frame(correct, groups if grouped else None) for correct in (first, second)))
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    values, means = 100 * (first.astype(int) - second), []
    for _ in range(4_000):
        drawn = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        means.append(values[drawn].mean())
    assert found.difference == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.4)
    if not grouped:
        half_width = 1.96 * values.std() / math.sqrt(n_images)
        assert (found.low, found.high) == pytest.approx(
            (values.mean() - half_width, values.mean() + half_width), abs=0.4
        )


def test_models_that_agree_have_an_interval_of_no_width():
    for n_agree, n_first in ((500, 0), (0, 500)):
        found = compare_top1(*two_models(n_first, 0, n_agree))
        assert (found.low, found.high) == (found.difference, found.difference) == (n_first / 5, n_first / 5)


def test_images_are_paired_by_index_whatever_the_order_of_rows():
    first = predictions_frame([True] * 8 + [False] * 2)
    second = predictions_frame([True] * 3 + [False] * 6 + [True])
    found = compare_top1(first, second.loc[[7, 3, 9, 0, 5, 1, 8, 2, 6, 4]])
    assert (found.first_more, found.second_more, found.difference) == (5, 1, pytest.approx(40))
    assert found.p == pytest.approx(2 * (1 + 6) / 64)
    assert found.low <= found.difference <= found.high
    backwards = compare_top1(second, first)
    assert (backwards.difference, backwards.p) == (-found.difference, found.p)
    assert compare_top1(first, second) == found, "the same each time"


def test_differences_of_kl_are_tested_by_flipping_signs():
    """Against all sign flips: of the sums of 12 images, and of 12 groups of two."""
    rng = np.random.default_rng(2)
    differences = rng.normal(0.4, 1, 12)
    flips = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=12)]
    expected = np.mean(np.array(flips) >= abs(differences.sum()) * (1 - 1e-9))
    first, second = (predictions_frame([True] * 12).assign(kl=kl) for kl in (3 + differences, np.full(12, 3.0)))
    found = compare_kl(first, second)
    assert found.p == pytest.approx(expected, abs=0.02), "10,000 random draws"
    assert found.difference == pytest.approx(differences.mean())
    assert found.low < found.difference < found.high
    doubled = [pd.concat([frame, frame], ignore_index=True).assign(group=[*range(12)] * 2) for frame in (first, second)]
    for frame in doubled:
        frame["label"] = 0
    assert compare_kl(*doubled).p == pytest.approx(expected, abs=0.02)


def test_different_images_are_not_compared():
    first = predictions_frame([True, False, True])
    others = [predictions_frame([True, False]), first.rename(index={2: 3}), first.assign(label=[0, 1, 3])]
    for other in others:
        with pytest.raises(ValueError, match="different images"):
            compare_top1(first, other)


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


def test_holm_by_hand():
    p = pd.Series([0.01, 0.04, np.nan, 0.03, 0.005])
    assert holm(p).tolist() == pytest.approx([0.03, 0.06, np.nan, 0.06, 0.02], nan_ok=True)
    assert holm(pd.Series([np.nan])).isna().all()
    assert holm(pd.Series([0.9, 0.8])).tolist() == [1, 1]


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
    most_pct = 100 * max(below) / n_images if below else math.nan
    assert found.most_disagreement_pct == pytest.approx(most_pct, nan_ok=True)
    assert found.greatest_disagreement_pct == pytest.approx(100 * max(possible) / n_images)
    always = found.beyond_chance == "beyond chance however often the two disagree"
    assert always == (bool(below) and max(below) == max(possible))
    assert not below or below == [count for count in possible if count <= max(below)], "one limit separates them"


def test_independent_errors():
    found = claim(80, 76, 1000)
    assert found.independent_disagreement_pct == pytest.approx(100 * (0.8 * 0.24 + 0.76 * 0.2))
    assert found.greatest_disagreement_pct == 44
    assert found.beyond_chance == "beyond chance even if the two err independently"
    assert claim(80, 78, 1000).beyond_chance.startswith("beyond chance only if the two disagree on at most")
    assert claim(80, 80, 1000).beyond_chance == "within chance however seldom the two disagree"
