"""ATC: agglomerative token clustering (Haurum et al. 2024, "Agglomerative Token Clustering")."""

from collections.abc import Sequence

import torch
from torch import Tensor

from baselines.tome import check_r, r_of
from dhtm import kernels
from dhtm.reducer import Attention, KeepRateReducer, average
from dhtm.regions import Regions


class ATC(KeepRateReducer):
    """Cluster all tokens by hierarchical clustering of their attention keys, and replace each cluster by its average.

    After attention in the i-th of the layers ⌊P·κ^i⌋ tokens are kept, or off the shelf exactly r are merged in each layer
    (the authors' code then merges r − 1 in a model with a CLS token). The distance of two tokens is 1 − cos of their keys,
    averaged over heads. Every token starts as a cluster, and the two nearest clusters merge until M are left; ties go to
    the lexicographically smallest pair. The new tokens are in the order of their lowest members. All prefix tokens are
    protected.

    Args:
        keep_rate: κ, in (0, 1]; see :class:`dhtm.reducer.KeepRateReducer`. None with r.
        layers: the layers that reduce, from 1, increasing; or "all".
        linkage: the distance of two clusters: "average" (the mean over all pairs of members), "complete" (that of their
            farthest members) or "single" (that of their nearest).
        proportional_attention: add the log of token sizes to the attention logits of later layers, and weight averages
            by patches; without it, averages are even.
        backend: "torch", "numba", "triton" or "auto", as in :func:`dhtm.hierarchical_merge`; all give the same clusters.
        r, inflect: tokens to merge in each layer instead of a keep rate, as in :class:`baselines.ToMe` but without its
            limit of half. The paper's off-the-shelf experiments do so, with ``layers="all"``.

    Raises:
        ValueError: the keep rate is outside (0, 1], keep_rate and r are both given or both None, an option is invalid, or
            layers are not increasing.
    """

    position = "after_attention"
    needs = frozenset({"keys"})

    def __init__(
        self,
        keep_rate: float | None = 0.9,
        layers: Sequence[int] | str = (4, 7, 10),
        linkage: str = "average",
        proportional_attention: bool = True,
        backend: str = "auto",
        r: int | Sequence[int] | None = None,
        inflect: float = 0.0,
    ):
        if (keep_rate is None) == (r is None):
            raise ValueError(f"keep_rate={keep_rate!r} and r={r!r}: one of them must be a number, and the other None")
        super().__init__(1 if keep_rate is None else keep_rate, layers)
        check_r(0 if r is None else r, inflect)
        for name, value, allowed in (
            ("linkage", linkage, tuple(kernels.CLUSTER_LINKAGES)),
            ("backend", backend, ("auto", *kernels.CLUSTERINGS)),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}")
        self.linkage, self.proportional_attention, self.backend = linkage, proportional_attention, backend
        self.r, self.inflect = r, inflect

    def tokens_after(self, n_tokens: int, layer: int, grid: tuple[int, int]) -> int:
        if self.r is None:
            return super().tokens_after(n_tokens, layer, grid) if self.n_clusters(layer, grid) < n_tokens else n_tokens
        r = r_of(self.r, self.inflect, layer, self.schedule)
        if r >= n_tokens:
            raise ValueError(f"r={r} in layer {layer}, but only N={n_tokens} tokens are left there: r must be below N")
        return n_tokens - r

    def forward(self, tokens: Tensor, regions: Regions, attention: Attention) -> tuple[Tensor, Regions]:
        n = tokens.shape[1]
        m = self.tokens_after(n, attention.layer, regions.grid)
        if m == n:
            return tokens, regions
        keys = attention.keys.detach().float().mean(dim=1)  # the choice of clusters has no gradient
        token_map = kernels.agglomerate(keys, n - m, self.linkage, self.backend)
        new = regions.merge(token_map, m)
        sizes = regions.sizes if self.proportional_attention else torch.ones_like(regions.sizes)
        totals = torch.zeros_like(new.sizes).scatter_add(1, token_map, sizes)
        return average(tokens, token_map, sizes / totals.gather(1, token_map), m), new

    def extra_repr(self) -> str:
        knob = f"keep_rate={self.keep_rate}" if self.r is None else f"r={self.r}, inflect={self.inflect}"
        return f"{knob}, layers={self.layers}, linkage={self.linkage!r}"
