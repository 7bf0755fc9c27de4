"""ToMe: bipartite soft matching (Bolya et al. 2023, "Token Merging: Your ViT But Faster")."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dhtm.reducer import Attention, Reducer, highest, products, rows, unit
from dhtm.regions import LazyRegions, Regions


class ToMe(Reducer):
    """Merge the r tokens in even positions that are most similar to one in an odd position, in each layer.

    With the prefix tokens counted in, even positions are set A and odd positions set B. Each A token proposes the B token
    whose attention key, averaged over heads, has the highest cosine similarity to its own. The r best proposals are
    merged, with averages weighted by patches. The unmerged A tokens come first, then B. Prefix tokens are not merged.

    Args:
        r: tokens to merge in each layer, or a list with one number per reducing layer; at most half of the tokens that
            are left are merged.
        layers: the layers that merge, from 1, increasing; or "all".
        inflect: from −1 (r falls linearly from 2r to 0 over the layers) through 0 (constant) to 1 (r rises to 2r).
        proportional_attention: add the log of token sizes to the attention logits of later layers; on for supervised
            models in the paper.

    Raises:
        ValueError: r is negative or a list of the wrong length, inflect is outside [−1, 1] or given with a list, or
            layers are not increasing.
    """

    needs = frozenset({"keys"})

    def __init__(
        self,
        r: int | Sequence[int],
        layers: Sequence[int] | str = "all",
        inflect: float = 0.0,
        proportional_attention: bool = True,
    ):
        super().__init__(layers)
        check_r(r, inflect)
        self.r, self.inflect, self.proportional_attention = r, inflect, proportional_attention

    def tokens_after(self, n_tokens: int, layer: int, grid: tuple[int, int]) -> int:
        return n_tokens - min(r_of(self.r, self.inflect, layer, self.schedule), n_tokens // 2)

    def forward(self, tokens: Tensor, regions: Regions, attention: Attention) -> tuple[Tensor, Regions]:
        n = tokens.shape[1]
        r = n - self.tokens_after(n, attention.layer, regions.grid)
        if r == 0:
            return tokens, regions
        first = self.n_prefix % 2  # where set A starts among the patch tokens
        keys = unit(attention.keys.detach().float().mean(dim=1))
        best, partner = products(keys[:, first::2], keys[:, 1 - first :: 2]).max(dim=-1)
        order = highest(best, best.shape[1])
        n_kept = best.shape[1] - r
        into = partner.gather(1, order[:, :r]) + n_kept

        # At batch 1 the time goes into small operations, so there are few. All tokens are listed at once: those that are
        # merged, then those that are left in their new order.
        set_a, set_b = order * 2 + first, torch.arange(1 - first, n, 2, device=tokens.device)
        listed = torch.cat([set_a[:, :r], set_a[:, r:].sort(dim=1).values, set_b.expand(tokens.shape[0], -1)], dim=1)
        sizes = regions.sizes.gather(1, listed)
        new_sizes = sizes[:, r:].scatter_add(1, into, sizes[:, :r])
        x = rows(tokens, listed).to(torch.promote_types(tokens.dtype, torch.float32))
        moved, result = x[:, :r] * sizes[:, :r, None], x[:, r:]
        # In place, because at batch 1 a temporary of this size costs more time than the arithmetic.
        result[:, n_kept:].mul_(sizes[:, r + n_kept :, None])
        result.scatter_add_(1, into[..., None].expand_as(moved), moved)
        result[:, n_kept:].div_(new_sizes[:, n_kept:, None])
        return result.to(tokens.dtype), LazyRegions(regions, n - r, partial(places, listed, into), new_sizes)

    def extra_repr(self) -> str:
        return f"r={self.r}, layers={self.layers}, inflect={self.inflect}"


def places(listed: Tensor, into: Tensor) -> Tensor:
    """Return the new place of each token, int64 [B, N].

    Args:
        listed: int64 [B, N], all tokens: the r that are merged, then the others in their new order.
        into: int64 [B, r], the new places of the tokens that they are merged into.
    """
    left = torch.arange(listed.shape[1] - into.shape[1], device=listed.device).expand(listed.shape[0], -1)
    return torch.empty_like(listed).scatter_(1, listed, torch.cat([into, left], dim=1))


def check_r(r: int | Sequence[int], inflect: float) -> None:
    """Raise a ValueError unless r and inflect are as :class:`ToMe` describes them."""
    by_layer = isinstance(r, Sequence) and not isinstance(r, str)
    if not all(isinstance(number, int) and number >= 0 for number in (r if by_layer else [r])):
        raise ValueError(f"r={r!r}: the number of tokens to merge in a layer must be an integer from 0")
    if not isinstance(inflect, (int, float)) or not -1 <= inflect <= 1:
        raise ValueError(f"inflect={inflect!r}: it must be from -1 to 1")
    if by_layer and inflect != 0:
        raise ValueError(f"inflect={inflect!r}: it must be 0 where r is a list")


def r_of(r: int | Sequence[int], inflect: float, layer: int, schedule: tuple[int, ...]) -> int:
    """Return r in a layer: from r·(1 − inflect) in the first to r·(1 + inflect) in the last, rounded down.

    Raises:
        ValueError: r is a list of another length than the schedule.
    """
    if not isinstance(r, int):
        if len(r) != len(schedule):
            raise ValueError(f"r={list(r)}: give one number for each of the {len(schedule)} layers that merge")
        return r[schedule.index(layer)]
    if len(schedule) == 1:
        return r
    low = int(r * (1 - inflect))
    step = (2 * r - 2 * low) / (len(schedule) - 1)
    return int(low + step * schedule.index(layer))
