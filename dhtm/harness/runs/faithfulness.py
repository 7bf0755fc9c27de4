"""Faithfulness: how far the outputs of a merged model are from those of the unmerged model, image by image.

No labels are needed. The unmerged model's outputs are in its run directory, where other runs read them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

# Takes the indices [B], log-probabilities [B, C] and best classes [B] of a batch, returns columns for the predictions.
Observe = Callable[[np.ndarray, Tensor, np.ndarray], dict[str, Any]]


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) in nats of each row of log-probabilities [B, C], clamped at 0 against rounding: [B]."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).clamp_min(0)


def keep(ids: np.ndarray, log_probabilities: Tensor, best: np.ndarray) -> dict[str, Any]:
    """Return the columns of the unmerged model in float32, the reference for other runs; 200 MB for ImageNet."""
    return {"kl": 0.0, "unmerged_class": best, "log_probabilities": list(log_probabilities.cpu().numpy())}


def compare_with(stored: pd.DataFrame, keeps: bool = False) -> Observe:
    """Make an observer that returns KL(unmerged ‖ merged) in nats and the unmerged model's best class for each image.

    Args:
        stored: the unmerged model's outputs, as :func:`dhtm.harness.runs.directory.outputs` reads them.
        keeps: also keep the outputs, for the unmerged model in a dtype other than float32.
    """
    index, known = pd.Index(stored["index"]), np.stack(stored.log_probabilities)
    unmerged_best = stored.class_1.to_numpy()

    def compare(ids: np.ndarray, log_probabilities: Tensor, best: np.ndarray) -> dict[str, Any]:
        rows = index.get_indexer(ids)
        # Normalised again, because the sum of the rounded probabilities is not exactly 1.
        unmerged = torch.from_numpy(known[rows]).log_softmax(dim=1)
        kl = kl_divergence(unmerged, log_probabilities.cpu()).numpy()
        kept = keep(ids, log_probabilities, best) if keeps else {}
        return kept | {"kl": kl, "unmerged_class": unmerged_best[rows]}

    return compare
