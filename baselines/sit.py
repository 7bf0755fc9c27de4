"""SiT (Zong et al. 2022, "Self-slimmed Vision Transformer"): the token slimming module."""

import torch
from torch import Tensor, nn

from dhtm.reducer import LearnedReducer


class SiT(LearnedReducer):
    """New tokens are averages of all tokens, weighted by a small MLP of each token.

    weights = softmax(s · Linear(GELU(Linear(LayerNorm(X)))), over tokens) with D/2 hidden units, M outputs and a learned
    scalar s that starts at 1; out = weightsᵀ X. The weights of the linear maps start from a truncated normal distribution
    of standard deviation 0.02, their biases at 0.

    Args:
        keep_rate: κ, in (0, 1]; see :class:`dhtm.reducer.KeepRateReducer`.
        layers: the layers to reduce before, from 1, increasing; or "all".

    Raises:
        ValueError: the keep rate is outside (0, 1], or layers are not increasing.
    """

    def make_stage(self, channels: int, n_clusters: int) -> nn.Module:
        return _Stage(channels, n_clusters)


class _Stage(nn.Module):
    def __init__(self, channels: int, n_clusters: int):
        super().__init__()
        hidden = channels // 2
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, n_clusters)
        )
        for linear in (self.mlp[1], self.mlp[3]):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.scale = nn.Parameter(torch.ones(1, 1, 1))  # timm's optimisers exempt vectors and scalars from weight decay

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return (self.scale * self.mlp(tokens)).softmax(dim=1).transpose(1, 2), tokens
