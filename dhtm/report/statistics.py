"""Is a difference in top-1 between two models beyond chance? Tests on the same images, one by one."""

import dataclasses

import numpy as np
import pandas as pd
from scipy.stats import binomtest

LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models on the same images.

    Attributes:
        difference: top-1 of the first less that of the second, in points.
        low, high: paired bootstrap 95% interval of the difference, in points.
        p: of the exact McNemar test.
        first_only, second_only: images on which only the first, only the second is right.
    """

    difference: float
    low: float
    high: float
    p: float
    first_only: int
    second_only: int


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a published difference in top-1 can mean where only the two accuracies are known.

    Two models disagree on an image where one is right and the other wrong. The more often they disagree, the more easily a
    net difference comes about by chance. All shares are in percent of the images.

    Attributes:
        difference: top-1 of the first less that of the second, in points.
        most: the largest number of images on which the two may disagree for p < 0.05; None where no number is small enough.
        most_pct: the same as a share, NaN for None.
        independent_pct: on how many they disagree if they err independently of each other.
        greatest_pct: on how many two models of these accuracies can disagree at all.
    """

    difference: float
    most: int | None
    most_pct: float
    independent_pct: float
    greatest_pct: float

    @property
    def beyond_chance_if_independent(self) -> bool:
        return self.most is not None and self.independent_pct <= self.most_pct

    @property
    def beyond_chance_always(self) -> bool:
        return self.most is not None and self.greatest_pct <= self.most_pct


def compare(first: pd.DataFrame, second: pd.DataFrame) -> Comparison:
    """Compare the predictions of two runs, label and correct by image index, image by image.

    Raises:
        ValueError: they are not of the same images.
    """
    first, second = first.sort_index(), second.sort_index()
    if not first.label.equals(second.label):
        raise ValueError("predictions of different images cannot be compared")
    first_only = int((first.correct & ~second.correct).sum())
    second_only = int((second.correct & ~first.correct).sum())
    low, high = bootstrap(first_only, second_only, len(first))
    difference = 100 * (first_only - second_only) / len(first)
    return Comparison(difference, low, high, mcnemar(first_only, second_only), first_only, second_only)


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided p of the exact McNemar test: were a fair coin tossed for each image on which the two disagree.

    Args:
        first_only, second_only: images on which only the first, only the second is right.
    """
    disagree = first_only + second_only
    return float(binomtest(first_only, disagree).pvalue) if disagree else 1.0


def bootstrap(
    first_only: int, second_only: int, n_images: int, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of the paired difference in top-1, in points.

    An image counts +1 where only the first is right, −1 where only the second is, else 0. To draw n images with
    replacement is to draw the three counts from a multinomial distribution, which is what is done.
    """
    shares = np.array([first_only, second_only, n_images - first_only - second_only]) / n_images
    counts = np.random.default_rng(seed).multinomial(n_images, shares, size=resamples)
    low, high = np.percentile(100 * (counts[:, 0] - counts[:, 1]) / n_images, [2.5, 97.5])
    return float(low), float(high)


def holm(p: pd.Series) -> pd.Series:
    """p values corrected for their number (Holm 1979); NaN where there is none, and not counted."""
    ordered = p.dropna().sort_values()
    corrected = (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1)
    return corrected.reindex(p.index)


def claim(first: float, second: float, n_images: int) -> Claim:
    """Could a published difference be beyond chance in the exact McNemar test?

    Args:
        first, second: top-1 in percent.
        n_images: how many images they were measured on.
    """
    right, other = (round(top1 / 100 * n_images) for top1 in (first, second))
    net, both = abs(right - other), right + other
    greatest = min(both, 2 * n_images - both)
    p, q = right / n_images, other / n_images
    most = _most_disagreement(net, greatest)
    return Claim(
        difference=first - second,
        most=most,
        most_pct=float("nan") if most is None else 100 * most / n_images,
        independent_pct=100 * (p * (1 - q) + q * (1 - p)),
        greatest_pct=100 * greatest / n_images,
    )


def _most_disagreement(net: int, greatest: int) -> int | None:
    """The largest number of disagreements, net of one sign, up to the greatest, with p < 0.05: p grows with it."""
    if mcnemar(net, 0) >= LEVEL:
        return None
    low, high = 0, (greatest - net) // 2  # how often the worse model alone may be right
    while low < high:
        middle = (low + high + 1) // 2
        if mcnemar(net + middle, middle) < LEVEL:
            low = middle
        else:
            high = middle - 1
    return net + 2 * low
