"""Tests of whether a difference between two models is beyond chance, paired image by image."""

import numpy as np
import pandas as pd

from dhtm.harness.runs.metrics import bootstrap_interval, sign_flip_p

LEVEL = 0.05


def compare(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, float]:
    """Compare two runs image by image. Images of one group are not independent: they are resampled and flipped together.

    The test of KL is about its mean, as the tables are. Wilcoxon's test would be about ranks, where the few images that
    change most count as little as those that hardly change.

    Args:
        first, second: predictions with ``label``, ``correct`` and perhaps ``group`` and ``kl``, indexed by image.

    Returns:
        Where the images have labels: the ``difference`` of top-1 in points, first minus second; ``difference_low`` and
        ``difference_high``, its paired bootstrap 95% interval; ``p``, two-sided, of the sign-flip permutation test, which is
        the exact McNemar test if there are no groups; ``first_only`` and ``second_only``, the numbers of images on which
        only the first or only the second is right. Where both runs have a KL: the first four for the KL in nats, with the
        prefix ``kl_``.

    Raises:
        ValueError: they are not of the same images.
    """
    first, second = first.sort_index(), second.sort_index()
    if not first.label.equals(second.label):
        raise ValueError("predictions of different images cannot be compared")
    groups = first.group.to_numpy() if "group" in first else None
    found = {}
    if (first.label >= 0).all():
        values = first.correct.to_numpy(float) - second.correct.to_numpy(float)
        found = _test(values, groups, scale=100)
        found |= {"first_only": int((values > 0).sum()), "second_only": int((values < 0).sum())}
    if "kl" in first and "kl" in second:
        values = first.kl.to_numpy(float) - second.kl.to_numpy(float)
        known = np.isfinite(values)  # logits that are not finite have no KL
        if known.any():
            of_kl = _test(values[known], None if groups is None else groups[known])
            found |= {f"kl_{name}": value for name, value in of_kl.items()}
    return found


def _test(values: np.ndarray, groups: np.ndarray | None, scale: int = 1) -> dict[str, float]:
    low, high = bootstrap_interval(values, groups)
    return {
        "difference": scale * float(values.mean()),
        "difference_low": scale * low,
        "difference_high": scale * high,
        "p": sign_flip_p(values, groups),
    }


def holm(p: pd.Series) -> pd.Series:
    """Correct p values for their number (Holm 1979). NaN stays NaN and is not counted."""
    ordered = p.dropna().sort_values()
    corrected = (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1)
    return corrected.reindex(p.index)
