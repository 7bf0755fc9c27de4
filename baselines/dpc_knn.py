"""DPC-KNN clustering of tokens (Zeng et al. 2022, "Not All Tokens Are Equal")."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dhtm.reducer import (
    Attention,
    KeepRateReducer,
    average,
    highest,
    raise_other_shape,
    rows,
    squared_distances,
    zero_linear,
)
from dhtm.regions import Regions


class DPCKNN(KeepRateReducer):
    """Cluster around density peaks: a centre has a high density and is far from any token of higher density.

    Distances are Euclidean over √D. A token's density is exp(−mean squared distance to its nearest tokens), where the token
    itself is one of them, at distance 0. δ is its distance to the nearest token of higher density (for the densest, the
    largest distance in the image). The M tokens of largest density · δ are the centres, and each token joins the nearest
    one. The averages of the clusters replace the tokens, in the order of their centres. Ties go to the lower index, also
    between equal densities, where the original adds noise.

    Args:
        keep_rate: κ, in (0, 1]; see :class:`dhtm.reducer.KeepRateReducer`.
        layers: the layers to reduce before, from 1, increasing; or "all".
        neighbours: the number of nearest tokens that define the density, the token itself included.
        weighted: weight the averages by exp(Linear(x)), where the linear map is learned and starts at zero.

    Raises:
        ValueError: the keep rate is outside (0, 1], neighbours are not above 0, or layers are not increasing.
    """

    def __init__(
        self,
        keep_rate: float,
        layers: Sequence[int] | str = (4, 7, 10),
        neighbours: int = 5,
        weighted: bool = False,
    ):
        super().__init__(keep_rate, layers)
        if not isinstance(neighbours, int) or neighbours < 1:
            raise ValueError(f"neighbours={neighbours!r}: it must be an integer from 1")
        self.neighbours, self.weighted = neighbours, weighted
        self.scores = nn.ModuleDict()

    def attach(self, channels: int, n_prefix: int, grid: tuple[int, int], layers: tuple[int, ...]) -> None:
        super().attach(channels, n_prefix, grid, layers)
        fits = {str(layer): channels for layer in layers}
        if self.scores and {layer: linear.in_features for layer, linear in self.scores.items()} != fits:
            raise_other_shape(self)
        if self.weighted and not self.scores:
            self.scores.update({str(layer): zero_linear(channels, 1) for layer in layers})

    def forward(self, tokens: Tensor, regions: Regions, attention: Attention) -> tuple[Tensor, Regions]:
        m = self.tokens_after(tokens.shape[1], attention.layer, regions.grid)
        with torch.no_grad():  # the clusters have no gradient
            cluster = density_peaks(tokens, m, self.neighbours)
        if self.weighted:
            scores = self.scores[str(attention.layer)](tokens).squeeze(-1).float()
            weights = (scores - scores.amax(dim=1, keepdim=True)).exp()
        else:
            weights = torch.ones(cluster.shape, device=tokens.device)
        totals = weights.new_zeros(tokens.shape[0], m).scatter_add(1, cluster, weights)
        shares = weights / totals.gather(1, cluster)
        return average(tokens, cluster, shares, m), regions.merge(cluster, m)


def density_peaks(tokens: Tensor, m: int, neighbours: int) -> Tensor:
    """Return the cluster in [0, m) of each token [B, N, D]: int64 [B, N]."""
    n, channels = tokens.shape[1:]
    distances = (squared_distances(tokens) / channels).sqrt()
    nearest = distances.topk(min(neighbours, n), dim=-1, largest=False).values
    # Densities and their products with δ are compared by their logarithms, because they can underflow in float32.
    density = -nearest.square().mean(dim=-1)
    places = torch.arange(n, device=tokens.device)
    mine, theirs = density[:, :, None], density[:, None]
    denser = (theirs > mine) | ((theirs == mine) & (places < places[:, None]))
    delta = torch.where(denser, distances, torch.inf).amin(dim=-1)
    delta = torch.where(delta.isinf(), distances.amax(dim=(1, 2))[:, None], delta)
    centres = highest(density + delta.log(), m).sort(dim=1).values
    ranks = torch.arange(m, device=tokens.device).expand(tokens.shape[0], m)
    return rows(distances, centres).argmin(dim=1).scatter(1, centres, ranks)
