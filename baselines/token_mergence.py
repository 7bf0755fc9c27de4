"""Token mergence (Bian et al. 2023, "Multi-Scale And Token Mergence")."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dhtm.reducer import (
    Attention,
    KeepRateReducer,
    average,
    highest,
    products,
    raise_other_shape,
    rows,
    unit,
    zero_linear,
)
from dhtm.regions import Regions


class TokenMergence(KeepRateReducer):
    """Merge every token into its most similar (cosine) crucial token, weighted by importance.

    Importance is the attention that CLS paid a token in the layer before; the M most important tokens are crucial, and
    keep their order. Before the first reduction coarser views enrich the tokens: these are average-pooled over 2×2 and 4×4
    patches, passed through a learned linear map each, which starts at zero, upsampled again and added. The abstract of the
    paper leaves the details open; they are our choice.

    Args:
        keep_rate: κ, in (0, 1]; see :class:`dhtm.reducer.KeepRateReducer`.
        layers: the layers to reduce before, from 2, increasing.
        scales: the sides of the cells of the coarser views, in patches.

    Raises:
        ValueError: the keep rate is outside (0, 1], a scale is not above 1, or layers are not increasing.
    """

    needs = frozenset({"cls"})

    def __init__(self, keep_rate: float, layers: Sequence[int] | str = (4, 7, 10), scales: Sequence[int] = (2, 4)):
        super().__init__(keep_rate, layers)
        if not all(isinstance(scale, int) and scale > 1 for scale in scales):
            raise ValueError(f"scales={list(scales)}: give integers above 1")
        self.scales = tuple(scales)
        self.views = nn.ModuleDict()

    def attach(self, channels: int, n_prefix: int, grid: tuple[int, int], layers: tuple[int, ...]) -> None:
        super().attach(channels, n_prefix, grid, layers)
        if any(linear.in_features != channels for linear in self.views.values()):
            raise_other_shape(self)
        if not self.views:
            self.views.update({str(scale): zero_linear(channels, channels) for scale in self.scales})

    def forward(self, tokens: Tensor, regions: Regions, attention: Attention) -> tuple[Tensor, Regions]:
        m = self.tokens_after(tokens.shape[1], attention.layer, regions.grid)
        if attention.layer == self.schedule[0]:
            tokens = self.enrich(tokens, regions.grid)
        with torch.no_grad():  # which token goes where has no gradient
            crucial = highest(attention.cls, m).sort(dim=1).values
            units = unit(tokens.float())
            ranks = torch.arange(m, device=tokens.device).expand(tokens.shape[0], m)
            cluster = products(rows(units, crucial), units).argmax(dim=1).scatter(1, crucial, ranks)
            importance = attention.cls.clamp(min=torch.finfo(torch.float32).tiny)
            totals = torch.zeros_like(importance[:, :m]).scatter_add(1, cluster, importance)
            shares = importance / totals.gather(1, cluster)
        return average(tokens, cluster, shares, m), regions.merge(cluster, m)

    def enrich(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Add the coarser views to tokens [B, P, D], one per patch; cells at the right and lower edge may be cut off."""
        height, width = grid
        image = tokens.transpose(1, 2).unflatten(2, grid)
        for scale, linear in self.views.items():
            cells = F.avg_pool2d(image, int(scale), ceil_mode=True, count_include_pad=False)
            view = linear(cells.movedim(1, -1))
            view = view.repeat_interleave(int(scale), 1).repeat_interleave(int(scale), 2)[:, :height, :width]
            tokens = tokens + view.flatten(1, 2)
        return tokens
