"""Faithfulness: how far the outputs of a merged model are from those of the unmerged model, image by image.

No labels are needed. The unmerged model's outputs are part of its own run directory, where every other run finds them.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dhtm.harness.runs.directory import outputs

# Takes the indices [B], log-probabilities [B, C] and best classes [B] of a batch, returns columns for the predictions.
Observe = Callable[[np.ndarray, Tensor, np.ndarray], dict[str, Any]]


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) in nats of each row of log-probabilities [B, C], at least 0 whatever rounding does: [B]."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).clamp_min(0)


def keep(ids: np.ndarray, log_probabilities: Tensor, best: np.ndarray) -> dict[str, Any]:
    """Return the columns of the float32 unmerged model, which is compared with nothing.

    The log-probabilities of more than 500 outputs are kept in half precision, 100 MB for ImageNet. This changes the KL of an
    image by about one percent and hardly the mean.
    """
    rows = log_probabilities.cpu().numpy().astype(np.float32 if log_probabilities.shape[1] <= 500 else np.float16)
    return {"kl": 0.0, "unmerged_class": best, "log_probabilities": list(rows)}


@dataclasses.dataclass(frozen=True)
class UnmergedOutputs:
    """What the unmerged model says about the images of a split.

    Attributes:
        index: the images, [n].
        log_probabilities: float32 or float16 [n, C], over the outputs that count.
        best: the class of the greatest, int64 [n].
    """

    index: pd.Index
    log_probabilities: np.ndarray
    best: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> "UnmergedOutputs":
        """Read them from the directory of an unmerged run.

        Raises:
            UserError: they are missing or damaged.
        """
        stored = outputs(folder)
        return cls(pd.Index(stored["index"]), np.stack(stored.log_probabilities), stored.class_1.to_numpy())

    def compare(self, ids: np.ndarray, log_probabilities: Tensor, best: np.ndarray) -> dict[str, Any]:
        """Return KL(unmerged ‖ merged) in nats and the unmerged model's best class for each image of a batch."""
        rows = self.index.get_indexer(ids)
        # Their probabilities sum to 1 after rounding to half precision too.
        unmerged = torch.from_numpy(self.log_probabilities[rows]).float().log_softmax(dim=1)
        return {"kl": kl_divergence(unmerged, log_probabilities.cpu()).numpy(), "unmerged_class": self.best[rows]}

    def compare_and_keep(self, ids: np.ndarray, log_probabilities: Tensor, best: np.ndarray) -> dict[str, Any]:
        """Do both: for the unmerged model in another dtype, which is compared with float32."""
        return keep(ids, log_probabilities, best) | self.compare(ids, log_probabilities, best)
