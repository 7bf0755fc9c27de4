"""Metrics of predictions: accuracy, faithfulness to the unmerged model, intervals, and tests that respect groups of images.

Faithfulness needs no labels. The unmerged model's outputs are in its run directory, where other runs read them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dhtm.harness.core.errors import UserError

_DRAWS = 10_000  # resamples of an interval, random flips of a test

# Takes the indices [B], log-probabilities [B, C] and best classes [B] of a batch, returns columns for the predictions.
Observe = Callable[[np.ndarray, Tensor, np.ndarray], dict[str, Any]]


def accuracy(predictions: pd.DataFrame) -> dict:
    """Return top-1 with its 95% interval and top-5, in percent; None where the images have no labels."""
    labelled = bool((predictions.label >= 0).all())
    top5 = predictions.filter(regex=r"^class_\d$").eq(predictions.label, axis=0).any(axis=1)
    broken = predictions["index"][predictions.nonfinite]
    return {
        "n_images": len(predictions),
        "n_nonfinite": len(broken),
        "first_nonfinite": int(broken.min()) if len(broken) else None,
        "top1": 100 * float(predictions.correct.mean()) if labelled else None,
        "top1_ci95": share_interval(predictions.correct, predictions.get("group")) if labelled else None,
        "top5": 100 * float(top5.mean()) if labelled else None,
    }


def faithfulness(predictions: pd.DataFrame) -> dict:
    """Return how far the outputs are from the unmerged model's; all None where they were not compared.

    ``kl`` is the mean in nats, ``agreement`` the percentage of images with the same best class, each with its 95% interval;
    ``flips_won`` and ``flips_lost`` count the images on which only the merged or only the unmerged model is right, None
    without labels. Images whose logits are not finite do not count in ``kl``.
    """
    names = ("kl", "kl_ci95", "agreement", "agreement_ci95", "flips_won", "flips_lost")
    if "kl" not in predictions:
        return dict.fromkeys(names)
    finite = predictions[np.isfinite(predictions.kl)]
    agrees = predictions.class_1 == predictions.unmerged_class
    was_correct = predictions.unmerged_class == predictions.label
    labelled = bool((predictions.label >= 0).all())
    values = (
        float(finite.kl.mean()) if len(finite) else None,
        list(bootstrap_interval(finite.kl, finite.get("group"))) if len(finite) else None,
        100 * float(agrees.mean()),
        share_interval(agrees, predictions.get("group")),
        int((predictions.correct & ~was_correct).sum()) if labelled else None,
        int((~predictions.correct & was_correct).sum()) if labelled else None,
    )
    return dict(zip(names, values, strict=True))


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) in nats of each row of log-probabilities [B, C], clamped at 0 against rounding: [B]."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).clamp_min(0)


def keep(ids: np.ndarray, log_probabilities: Tensor, best: np.ndarray) -> dict[str, Any]:
    """Return the columns of the unmerged model in float32, the reference for other runs; 200 MB for ImageNet."""
    return {"kl": 0.0, "unmerged_class": best, "log_probabilities": list(log_probabilities.cpu().numpy())}


def compare_with(stored: pd.DataFrame) -> Observe:
    """Make an observer that returns KL(unmerged ‖ merged) in nats and the unmerged model's best class for each image.

    Args:
        stored: the unmerged model's outputs, as :func:`dhtm.harness.runs.directory.outputs` reads them.
    """
    index, known = pd.Index(stored["index"]), np.stack(stored.log_probabilities)
    unmerged_best = stored.class_1.to_numpy()

    def compare(ids: np.ndarray, log_probabilities: Tensor, best: np.ndarray) -> dict[str, Any]:
        rows = index.get_indexer(ids)
        if rows.min() < 0:
            raise UserError(
                f"image {ids[rows.argmin()]}: the unmerged run skipped it as unreadable; compute that run again, "
                "method=unmerged force=true"
            )
        # Normalised again, because the sum of the rounded probabilities is not exactly 1.
        unmerged = torch.from_numpy(known[rows]).log_softmax(dim=1)
        kl = kl_divergence(unmerged, log_probabilities.cpu()).numpy()
        return {"kl": kl, "unmerged_class": unmerged_best[rows]}

    return compare


def share_interval(hits: pd.Series, groups: pd.Series | None) -> list[float]:
    """Return the 95% interval of a share in percent: Wilson's, or the bootstrap's over groups of images."""
    if groups is not None:
        low, high = bootstrap_interval(hits, groups)
    else:
        from scipy.stats import binomtest  # here, because the import takes a second

        low, high = binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95, method="wilson")
    return [100 * float(low), 100 * float(high)]


def real_accuracy(predictions: pd.DataFrame, labels: list[list[int]]) -> dict:
    """Return top-1 in percent by the reassessed labels: any label of an image is right; images without labels are skipped."""
    right = [
        best in labels[index]
        for index, best in zip(predictions["index"], predictions.class_1, strict=True)
        if labels[index]
    ]
    return {"n_images_real": len(right), "top1_real": 100 * sum(right) / len(right) if right else None}


def bootstrap_interval(values: np.ndarray, groups: np.ndarray | None = None) -> tuple[float, float]:
    """Return the 95% percentile interval of a mean.

    Args:
        values: [n], one per image.
        groups: [n], images with the same number are drawn together; None: each image by itself.
    """
    sums, sizes = _group_sums(values, groups)
    # Groups of the same sum and size are interchangeable, so a resample is a multinomial draw of how often each kind occurs.
    kinds, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    generator = np.random.default_rng(0)
    if len(kinds) <= 64:
        drawn = generator.multinomial(len(sums), counts / len(sums), size=_DRAWS)
        means = (drawn @ kinds[:, 0]) / (drawn @ kinds[:, 1])
    else:
        means = np.empty(_DRAWS)
        for i in range(_DRAWS):
            chosen = generator.integers(len(sums), size=len(sums))
            means[i] = sums[chosen].sum() / sizes[chosen].sum()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def sign_flip_p(values: np.ndarray, groups: np.ndarray | None = None) -> float:
    """Return the two-sided p of the sign-flip permutation test that a mean of differences is zero.

    Under the null hypothesis the sign of each group's sum is a fair coin. For integers the distribution is computed exactly
    by convolution; for −1, 0 and 1 without groups this is the exact McNemar test. Other values are tested by random draws.

    Args:
        values: [n], one difference per image.
        groups: [n], images with the same number flip together; None: each image by itself.
    """
    sums, _ = _group_sums(values, groups)
    observed = abs(float(sums.sum()))
    sums = np.abs(sums[sums != 0])
    if not len(sums):
        return 1.0
    if np.array_equal(sums, np.round(sums)):
        distribution = np.ones(1)  # of the signed sum, from −total to total in steps of two
        for size, n_groups in zip(*np.unique(sums.astype(int), return_counts=True), strict=True):
            step = np.zeros(2 * size + 1)
            step[0] = step[-1] = 0.5
            for _ in range(n_groups):
                distribution = np.convolve(distribution, step)
        support = np.arange(len(distribution)) - len(distribution) // 2
        return float(min(1.0, distribution[np.abs(support) >= observed].sum()))
    generator, extreme = np.random.default_rng(0), 0
    for _ in range(_DRAWS // 1_000):
        signs = generator.integers(0, 2, (1_000, len(sums)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ sums) >= observed * (1 - 1e-12)).sum())
    return (extreme + 1) / (_DRAWS + 1)


def _group_sums(values: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return each group's sum of values and number of images."""
    values = np.asarray(values, dtype=np.float64)
    if groups is None:
        return values, np.ones(len(values))
    _, places = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(places, values), np.bincount(places).astype(np.float64)
