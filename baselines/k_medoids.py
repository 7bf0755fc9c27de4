"""K-Medoids token pooling (Marin et al. 2023, "Token Pooling in Vision Transformers for Image Classification")."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dhtm.reducer import Attention, KeepRateReducer, highest, rows, squared_distances
from dhtm.regions import Regions


class KMedoids(KeepRateReducer):
    """Keep the medoids of M clusters of tokens, found by weighted K-medoids.

    A token's weight is the attention that CLS paid it in the layer before. The M tokens of highest weight are the first
    medoids. In each round every token joins the nearest medoid (Euclidean), and the medoid of each cluster becomes the
    member with the least weighted distance to the others. Ties go to the lower index; the medoids keep their order.

    This is what the papers describe. The code of Haurum et al. (2023) is ``weights="received", cost="own"``.

    Args:
        keep_rate: κ, in (0, 1]; see :class:`dhtm.reducer.KeepRateReducer`.
        layers: the layers to reduce before, from 2, increasing.
        rounds: the number of rounds.
        weights: a token's weight is the attention in the layer before that it has from CLS ("cls"), or that it receives
            from all tokens ("received").
        cost: the medoid is the member with the least sum over the members of their weight times their distance
            ("members"), or of its own weight times its distances to all tokens of the image ("own").

    Raises:
        ValueError: the keep rate is outside (0, 1], rounds are negative, an option is unknown, or layers are not
            increasing.
    """

    def __init__(
        self,
        keep_rate: float,
        layers: Sequence[int] | str = (4, 7, 10),
        rounds: int = 3,
        weights: str = "cls",
        cost: str = "members",
    ):
        super().__init__(keep_rate, layers)
        if not isinstance(rounds, int) or rounds < 0:
            raise ValueError(f"rounds={rounds!r}: it must be an integer from 0")
        for name, value, allowed in (("weights", weights, ("cls", "received")), ("cost", cost, ("members", "own"))):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}")
        self.rounds, self.weights, self.cost = rounds, weights, cost
        self.needs = frozenset({weights})

    def forward(self, tokens: Tensor, regions: Regions, attention: Attention) -> tuple[Tensor, Regions]:
        n = tokens.shape[1]
        m = self.tokens_after(n, attention.layer, regions.grid)
        with torch.no_grad():  # which tokens are kept has no gradient
            distances = squared_distances(tokens).sqrt()
            weights = getattr(attention, self.weights)
            medoids = highest(weights, m).sort(dim=1).values
            for _ in range(self.rounds):
                cluster = _nearest(medoids, distances)
                if self.cost == "own":
                    costs = weights * distances.sum(-1)
                else:
                    together = cluster[:, :, None] == cluster[:, None]
                    costs = (distances * together * weights.to(distances.dtype)[:, None]).sum(-1)
                medoids = _cheapest(medoids, cluster, costs)
            cluster = _nearest(medoids, distances)
        return rows(tokens, medoids), regions.merge(cluster, m)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weights={self.weights!r}, cost={self.cost!r}"


def _nearest(medoids: Tensor, distances: Tensor) -> Tensor:
    """Return the index of each token's nearest medoid: int64 [B, N]."""
    return rows(distances, medoids).argmin(dim=1)


def _cheapest(medoids: Tensor, cluster: Tensor, costs: Tensor) -> Tensor:
    """Return the member of each cluster with the least of the costs [B, N]: int64 [B, M], increasing."""
    batch, n = cluster.shape
    least = costs.new_full(medoids.shape, torch.inf).scatter_reduce(1, cluster, costs, "amin")
    places = torch.arange(n, device=costs.device).expand(batch, n)
    best = torch.where(costs == least.gather(1, cluster), places, n)
    # A medoid that equals another one loses its members to it, and is kept.
    found = torch.full_like(medoids, n).scatter_reduce(1, cluster, best, "amin")
    return torch.where(found < n, found, medoids).sort(dim=1).values
