"""PatchMerger (Renggli et al. 2022, "Learning to Merge Tokens in Vision Transformers")."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dhtm.reducer import LearnedReducer


class PatchMerger(LearnedReducer):
    """New tokens are averages of all tokens, weighted by a softmax of their products with learned queries.

    X' = LayerNorm(X), out = softmax(Q X'ᵀ) X', with the softmax over tokens. Q starts from N(0, 1), so that each new token
    starts near one of the old ones. The original has a single such module, in the middle of the network:
    ``layers=(L // 2 + 1,)`` of L layers, which is ``layers=(7,)`` of twelve, and ``keep_rate=0.041`` for its 8 tokens of
    196.

    Args:
        keep_rate: κ, in (0, 1]; see :class:`dhtm.reducer.KeepRateReducer`.
        layers: the layers to reduce before, from 1, increasing; or "all".
        scale: divide the products by √D; the paper does not.

    Raises:
        ValueError: the keep rate is outside (0, 1], or layers are not increasing.
    """

    def __init__(self, keep_rate: float, layers: Sequence[int] | str = (4, 7, 10), scale: bool = False):
        super().__init__(keep_rate, layers)
        self.scale = scale

    def make_stage(self, channels: int, n_clusters: int) -> nn.Module:
        return _Stage(channels, n_clusters, channels**-0.5 if self.scale else 1.0)


class _Stage(nn.Module):
    def __init__(self, channels: int, n_clusters: int, scale: float):
        super().__init__()
        self.scale = scale
        self.norm = nn.LayerNorm(channels)
        self.queries = nn.Parameter(torch.randn(n_clusters, channels))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.norm(tokens)
        return (self.scale * self.queries @ tokens.transpose(1, 2)).softmax(dim=-1), tokens
