"""Tests of whether a difference in top-1 between two models is beyond chance, paired image by image."""

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
        difference: top-1 of the first minus top-1 of the second, in points.
        low, high: paired bootstrap 95% interval of the difference, in points.
        p: two-sided, of the exact sign-flip permutation test.
        first_only, second_only: images on which only the first, only the second is right.
    """

    difference: float
    low: float
    high: float
    p: float
    first_only: int
    second_only: int


def compare(first: pd.DataFrame, second: pd.DataFrame) -> Comparison:
    """Compare the predictions of two runs image by image.

    Where the predictions have a ``group``, whole groups are resampled and have their signs flipped, because images of one
    group are not independent. Without groups the test is the exact McNemar test.

    Args:
        first, second: predictions with ``label`` and ``correct``, indexed by image.

    Raises:
        ValueError: they are not of the same images.
    """
    first, second = first.sort_index(), second.sort_index()
    if not first.label.equals(second.label):
        raise ValueError("predictions of different images cannot be compared")
    values = first.correct.to_numpy(dtype=int) - second.correct.to_numpy(dtype=int)
    groups = first.group.to_numpy() if "group" in first else None
    low, high = bootstrap_interval(values, groups)
    return Comparison(
        difference=100 * float(values.mean()),
        low=100 * low,
        high=100 * high,
        p=sign_flip_p(values, groups),
        first_only=int((values > 0).sum()),
        second_only=int((values < 0).sum()),
    )


def mcnemar(first_only: int, second_only: int) -> float:
    """Return the two-sided p of the exact McNemar test: a fair coin is tossed for each image on which two models disagree.

    Args:
        first_only, second_only: images on which only the first, only the second is right.
    """
    disagree = first_only + second_only
    return float(binomtest(first_only, disagree).pvalue) if disagree else 1.0


def holm(p: pd.Series) -> pd.Series:
    """Correct p values for their number (Holm 1979). NaN stays NaN and is not counted."""
    ordered = p.dropna().sort_values()
    corrected = (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1)
    return corrected.reindex(p.index)
