"""Tests of whether a difference between two models is beyond chance, paired image by image."""

import dataclasses

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from dhtm.harness.runs.metrics import bootstrap_interval, sign_flip_p

LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models on the same images.

    Attributes:
        difference: mean of the first minus mean of the second: top-1 in points, or KL in nats.
        low, high: paired bootstrap 95% interval of the difference.
        p: two-sided, of the sign-flip permutation test.
        first_more, second_more: numbers of images on which only the first or only the second is right, or has the greater KL.
    """

    difference: float
    low: float
    high: float
    p: float
    first_more: int
    second_more: int


def compare_top1(first: pd.DataFrame, second: pd.DataFrame) -> Comparison:
    """Compare the top-1 of two runs image by image.

    Without groups the test is the exact McNemar test.

    Args:
        first, second: predictions with ``label``, ``correct`` and perhaps ``group``, indexed by image.

    Raises:
        ValueError: they are not of the same images.
    """
    return _compare(first, second, "correct", scale=100)


def compare_kl(first: pd.DataFrame, second: pd.DataFrame) -> Comparison:
    """Compare how far two runs are from the unmerged model, image by image.

    The test is about the mean, as the tables are. Wilcoxon's test would be about ranks, where the few images that change
    most count as little as those that hardly change.

    Args:
        first, second: predictions with ``label``, ``kl`` and perhaps ``group``, indexed by image.

    Raises:
        ValueError: they are not of the same images.
    """
    return _compare(first, second, "kl", scale=1)


def _compare(first: pd.DataFrame, second: pd.DataFrame, column: str, scale: int) -> Comparison:
    """Compare a column of two runs. Images of one group are not independent: they are resampled and flipped together."""
    first, second = first.sort_index(), second.sort_index()
    if not first.label.equals(second.label):
        raise ValueError("predictions of different images cannot be compared")
    values = first[column].to_numpy(float) - second[column].to_numpy(float)
    groups = first.group.to_numpy() if "group" in first else None
    low, high = bootstrap_interval(values, groups)
    return Comparison(
        difference=scale * float(values.mean()),
        low=scale * low,
        high=scale * high,
        p=sign_flip_p(values, groups),
        first_more=int((values > 0).sum()),
        second_more=int((values < 0).sum()),
    )


def compare(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, float]:
    """Compare two runs in top-1 and KL, where both have them, as columns of a table.

    Returns:
        difference, difference_low, difference_high, p, first_only and second_only of :func:`compare_top1`, where the images
        have labels; the first four with the prefix ``kl_`` of :func:`compare_kl`, where both runs were compared with the
        unmerged model.
    """
    columns = {}
    if (first.label >= 0).all():
        found = compare_top1(first, second)
        columns |= _columns(found) | {"first_only": found.first_more, "second_only": found.second_more}
    if "kl" in first and "kl" in second:
        columns |= {f"kl_{name}": value for name, value in _columns(compare_kl(first, second)).items()}
    return columns


def _columns(found: Comparison) -> dict[str, float]:
    ends = {"difference_low": found.low, "difference_high": found.high}
    return {"difference": found.difference, **ends, "p": found.p}


def mcnemar(first_only: int, second_only: int) -> float:
    """Return the two-sided p of the exact McNemar test: a fair coin is tossed for each image on which two models disagree.

    Args:
        first_only, second_only: numbers of images on which only the first or only the second is right.
    """
    disagree = first_only + second_only
    return float(binomtest(first_only, disagree).pvalue) if disagree else 1.0


def holm(p: pd.Series) -> pd.Series:
    """Correct p values for their number (Holm 1979). NaN stays NaN and is not counted."""
    ordered = p.dropna().sort_values()
    corrected = (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1)
    return corrected.reindex(p.index)
