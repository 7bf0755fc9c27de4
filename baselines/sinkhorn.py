"""Sinkhorn tokenizer (Haurum et al. 2022, "Multi-scale hybrid vision transformer and Sinkhorn tokenizer")."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dhtm.reducer import LearnedReducer


class Sinkhorn(LearnedReducer):
    """New tokens are sums of all normalised tokens, weighted by an optimal transport between tokens and learned centres.

    The weights of each token sum to 1, as in the authors' code. The centres are unit vectors: in training they are
    normalised in place before each forward pass, and the gradient does not pass through the normalisation. In evaluation
    they are normalised without changing the parameters.

    Args:
        keep_rate: κ, in (0, 1]; see :class:`dhtm.reducer.KeepRateReducer`.
        layers: the layers to reduce before, from 1, increasing; or "all".
        epsilon: ε of the entropy; scores are cosine similarities divided by ε.
        iterations: the number of iterations of Sinkhorn's algorithm.

    Raises:
        ValueError: the keep rate is outside (0, 1], epsilon is not above 0, iterations are not above 0, or layers are not
            increasing.
    """

    def __init__(
        self,
        keep_rate: float,
        layers: Sequence[int] | str = (4, 7, 10),
        epsilon: float = 1.0,
        iterations: int = 3,
    ):
        super().__init__(keep_rate, layers)
        if not isinstance(epsilon, (int, float)) or epsilon <= 0:
            raise ValueError(f"epsilon={epsilon!r}: it must be above 0")
        if not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"iterations={iterations!r}: it must be an integer from 1")
        self.epsilon, self.iterations = epsilon, iterations

    def make_stage(self, channels: int, n_clusters: int) -> nn.Module:
        return _Stage(channels, n_clusters, self.epsilon, self.iterations)


class _Stage(nn.Module):
    def __init__(self, channels: int, n_clusters: int, epsilon: float, iterations: int):
        super().__init__()
        self.epsilon, self.iterations = epsilon, iterations
        self.centres = nn.Parameter(torch.randn(n_clusters, channels))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        units = F.normalize(self.centres.detach(), dim=-1)
        if self.training:
            with torch.no_grad():
                self.centres.copy_(units)
        centres = self.centres if self.training else units
        normalised = F.normalize(tokens, dim=-1)
        scores = centres @ normalised.transpose(1, 2) / self.epsilon
        weights = transport(scores.float(), self.iterations) * tokens.shape[1]  # columns sum to 1/N in the transport
        return weights.to(tokens.dtype), normalised


def transport(scores: Tensor, iterations: int) -> Tensor:
    """Run Sinkhorn's algorithm in the log domain, towards mass 1/M in every row and 1/N in every column.

    Args:
        scores: [B, M, N], the logarithm of the transport before scaling.
        iterations: each scales the rows, then the columns. So the columns are exact, and the rows approximate.

    Returns:
        The transport, [B, M, N], whose sum is 1.
    """
    m, n = scores.shape[1:]
    columns = scores.new_zeros(scores.shape[0], 1, n)
    for _ in range(iterations):
        rows = -math.log(m) - (scores + columns).logsumexp(dim=2, keepdim=True)
        columns = -math.log(n) - (scores + rows).logsumexp(dim=1, keepdim=True)
    return (scores + rows + columns).exp()
