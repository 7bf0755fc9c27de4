"""Random merging of adjacent tokens: the ablation of section 4.5 and Figure 4."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dhtm.reducer import Attention, Reducer, after_merges, average, check_k
from dhtm.regions import Regions, contract, renumber


class RandomMerge(Reducer):
    """DHTM with the arg-max replaced by a uniform draw among the adjacent pairs, at every merge.

    The draws of an image depend on the seed and on its id alone (``image_ids``, else its position in the batch), not on
    the batch that it is in.

    Args:
        k: merges in each layer.
        layers: which layers, from 1, increasing; or "all".
        connectivity: 8 or 4.
        seed: any integer.

    Raises:
        ValueError: an option is not of its kind, k is negative, or layers are not increasing.
    """

    def __init__(self, k: int, layers: Sequence[int] | str = (4, 7, 11), connectivity: int = 8, seed: int = 0):
        super().__init__(layers)
        check_k(k)
        if connectivity not in (8, 4):
            raise ValueError(f"connectivity={connectivity!r}: choose one of 8, 4")
        if not isinstance(seed, int):
            raise ValueError(f"seed={seed!r}: it must be an integer")
        self.k, self.connectivity, self.seed = k, connectivity, seed

    def tokens_after(self, n_tokens: int, layer: int, grid: tuple[int, int]) -> int:
        return after_merges(n_tokens, self.k, layer)

    def forward(self, tokens: Tensor, regions: Regions, attention: Attention) -> tuple[Tensor, Regions]:
        batch, n, _ = tokens.shape
        ids = self.image_ids
        ids = torch.arange(batch, device=tokens.device) if ids is None else ids.to(tokens.device)
        low, high = regions.adjacent_tokens(self.connectivity).unbind(-1)
        owner = torch.arange(n, device=tokens.device).repeat(batch, 1)
        weights = torch.ones(batch, n, device=tokens.device)
        for step in range(self.k):
            # n - step counts down over all layers, so no two draws of an image share their key. Where two tokens touch in
            # several places the pair is listed as often, but always with the same lot: the draw is uniform over pairs.
            lots = _lots(self.seed, ids[:, None], n - step, low * n + high)
            drawn = torch.where(low == high, -1, lots).argmax(dim=1, keepdim=True)
            i, j = low.gather(1, drawn), high.gather(1, drawn)
            joined = (owner == i) | (owner == j)
            owner = torch.where(joined, i, owner)
            weights = torch.where(joined, weights / 2, weights)
            low, high = contract(low, high, i, j)
        token_map = renumber(owner)
        return average(tokens, token_map, weights, n - self.k), regions.merged(token_map, n - self.k)

    def extra_repr(self) -> str:
        return f"k={self.k}, layers={self.layers}, connectivity={self.connectivity}, seed={self.seed}"


def _lots(*keys) -> Tensor:
    """Random int64 in [0, 2⁶²), a hash of the keys: the same on every device and in every process."""
    state = torch.zeros((), dtype=torch.int64)
    for key in keys:
        # The finaliser of SplitMix64 (Steele et al. 2014) in wrapping int64 arithmetic, logical shifts by masking.
        state = state + key + -7046029254386353131
        state = (state ^ ((state >> 30) & (2**34 - 1))) * -4658895280553007687
        state = (state ^ ((state >> 27) & (2**37 - 1))) * -7723592293110705685
        state = state ^ ((state >> 31) & (2**33 - 1))
    return state & (2**62 - 1)
