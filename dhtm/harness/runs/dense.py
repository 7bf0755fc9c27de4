"""Dense prediction: a linear probe on frozen features predicts the class of every patch of a scene."""

import functools
from typing import Any

import numpy as np
import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dhtm.harness.data.scenes import PATCH_CLASSES, Digits
from dhtm.harness.data.splits import choice_images
from dhtm.harness.models.backbones import Backbone
from dhtm.harness.runs.metrics import Observe
from dhtm.vit import regions

N_PROBE = 600  # training scenes


def observe_patches(model: VisionTransformer, backbone: Backbone, data: Digits) -> Observe:
    """Return an observer that adds the column ``confusion``, which counts how the probe segments each image.

    The probe is fitted once, on the unmerged backbone's features of training scenes. Of the patched model it gets the last
    layer's normalised tokens, each copied to all its patches.
    """
    weight, bias = _probe(backbone, data)
    seen = []
    model.norm.register_forward_hook(lambda module, args, output: seen.append(output))

    def observe(ids: np.ndarray, log_probabilities: Tensor, best: np.ndarray) -> dict[str, Any]:
        features = regions(model).unmerge(seen.pop()[:, model.num_prefix_tokens :]).float().cpu()
        found = (features @ weight + bias).argmax(dim=-1).numpy()
        known = data.patch_classes(data.split, ids, model.patch_embed.grid_size)
        n = len(PATCH_CLASSES)
        counts = [np.bincount(n * a + b, minlength=n * n) for a, b in zip(known, found, strict=True)]
        return {"confusion": counts}

    return observe


@functools.lru_cache(maxsize=2)
def _probe(backbone: Backbone, data: Digits) -> tuple[Tensor, Tensor]:
    """Fit a multinomial logistic regression: its weight [D, classes] and bias [classes]."""
    from sklearn.linear_model import LogisticRegression  # here, because the import takes a second

    model = backbone.load()
    images = choice_images(data, "train", model, N_PROBE)
    indices = np.linspace(0, len(data.open("train", None).dataset) - 1, len(images), dtype=int)
    with torch.inference_mode():
        found = [model.forward_features(part)[:, model.num_prefix_tokens :].flatten(0, 1) for part in images.split(64)]
    known = data.patch_classes("train", indices, model.patch_embed.grid_size).ravel()
    fitted = LogisticRegression(max_iter=300).fit(torch.cat(found).numpy(), known)
    return torch.from_numpy(fitted.coef_.T).float(), torch.from_numpy(fitted.intercept_).float()


def segmentation(predictions: pd.DataFrame) -> dict:
    """Return ``miou`` in percent, the mean over classes of intersection over union, its 95% interval, and ``iou`` by class.

    The interval is a bootstrap over images, or over groups of them.
    """
    confusion = np.stack(predictions.confusion).astype(np.int64)
    groups = predictions.group if "group" in predictions else np.arange(len(predictions))
    by_class, low, high = miou_interval(confusion, np.asarray(groups))
    return {
        "miou": float(by_class.mean()),
        "miou_ci95": [low, high],
        "iou": dict(zip(PATCH_CLASSES, by_class.tolist(), strict=True)),
    }


def miou_interval(
    confusion: np.ndarray, groups: np.ndarray, other: np.ndarray | None = None
) -> tuple[np.ndarray, float, float]:
    """Return the IoU of each class in percent, and the 95% interval of their mean.

    Args:
        confusion: int64 [n, classes²], the number of patches of each image by true and predicted class.
        groups: [n], images with the same number are drawn together.
        other: the same of another model on the same images; all results are then differences.
    """
    n_groups = len(np.unique(groups))
    weights = np.random.default_rng(0).multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=2_000)
    found, resampled = np.zeros(len(PATCH_CLASSES)), np.zeros(len(weights))
    for sign, counts in ((1, confusion), (-1, other)):
        if counts is not None:
            sums = pd.DataFrame(counts).groupby(groups).sum().to_numpy()
            found += sign * _iou(sums.sum(axis=0))
            resampled += sign * _iou(weights @ sums).mean(axis=-1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return found, float(low), float(high)


def _iou(counts: np.ndarray) -> np.ndarray:
    """Return the IoU in percent of each class, [..., classes], from counts [..., classes²]."""
    n = len(PATCH_CLASSES)
    square = counts.reshape(*counts.shape[:-1], n, n)
    hits = np.diagonal(square, axis1=-2, axis2=-1)
    return 100 * hits / np.maximum(square.sum(axis=-1) + square.sum(axis=-2) - hits, 1)
