"""Random merging of adjacent tokens: the ablation of section 4.5 and Figure 4."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dhtm import kernels
from dhtm.reducer import Attention, Reducer, after_merges, average, check_k
from dhtm.regions import Regions


class RandomMerge(Reducer):
    """DHTM with the arg-max replaced by a uniform draw among the adjacent pairs, at every merge.

    The draws of an image depend only on the seed and on its id (``image_ids``, or else its position in the batch), not on
    the batch that it is in.

    Args:
        k: merges in each layer.
        layers: the layers that merge, from 1, increasing; or "all".
        connectivity: 8 or 4.
        seed: any integer, taken modulo 2⁶⁴.
        backend: "torch", "numba", "triton" or "auto", as in :func:`dhtm.hierarchical_merge`; all draw the same pairs.

    Raises:
        ValueError: an option is invalid, k is negative, or layers are not increasing.
    """

    def __init__(
        self,
        k: int,
        layers: Sequence[int] | str = (4, 7, 11),
        connectivity: int = 8,
        seed: int = 0,
        backend: str = "auto",
    ):
        super().__init__(layers)
        check_k(k)
        if connectivity not in (8, 4):
            raise ValueError(f"connectivity={connectivity!r}: choose one of 8, 4")
        if not isinstance(seed, int):
            raise ValueError(f"seed={seed!r}: it must be an integer")
        if backend not in ("auto", *kernels.DRAWS):
            raise ValueError(f"backend={backend!r}: choose one of auto, {', '.join(kernels.DRAWS)}")
        self.k, self.connectivity, self.backend = k, connectivity, backend
        self.seed = (seed + 2**63) % 2**64 - 2**63

    def tokens_after(self, n_tokens: int, layer: int, grid: tuple[int, int]) -> int:
        return after_merges(n_tokens, self.k, layer)

    def forward(self, tokens: Tensor, regions: Regions, attention: Attention) -> tuple[Tensor, Regions]:
        batch, n, _ = tokens.shape
        ids = self.image_ids
        ids = torch.arange(batch, device=tokens.device) if ids is None else ids.to(tokens.device)
        if ids.shape != (batch,) or ids.dtype != torch.int64:
            raise ValueError(f"image_ids must be int64 [B] = [{batch}], not {ids.dtype} {list(ids.shape)}")
        token_map, weights = kernels.random_merge(
            regions.assignment, regions.sizes, ids, self.k, *regions.grid, self.connectivity, self.seed, self.backend
        )
        return average(tokens, token_map, weights, n - self.k), regions.merge(token_map, n - self.k)

    def extra_repr(self) -> str:
        return f"k={self.k}, layers={self.layers}, connectivity={self.connectivity}, seed={self.seed}"
