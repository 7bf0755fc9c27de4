"""LoTM: merging of horizontally adjacent pairs (Haroun et al. 2024, "Leveraging local similarity for token merging")."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dhtm.reducer import Attention, Reducer, average, check_k, rows
from dhtm.regions import Regions, renumber


class LoTM(Reducer):
    """Merge the k most similar (cosine) pairs of neighbours in a row of the grid, in each layer.

    A candidate is a token and the next one to its right in the same row; a token of several patches is at the position of
    its leftmost patch. Candidates are taken from the most to the least similar, among equals from the top and the left. A
    candidate that shares a token with a pair already taken is skipped. If pairs run out before k, another pass over the
    result takes the rest. The paper leaves the order open; this is our choice.

    Args:
        k: merges in each layer.
        layers: the layers that merge, from 1, increasing; or "all".

    Raises:
        ValueError: k is negative, or layers are not increasing.
    """

    def __init__(self, k: int, layers: Sequence[int] | str = (4, 7, 11)):
        super().__init__(layers)
        check_k(k)
        self.k = k

    def tokens_after(self, n_tokens: int, layer: int, grid: tuple[int, int]) -> int:
        if self.k > n_tokens - grid[0]:
            raise ValueError(
                f"k={self.k} merges in layer {layer}, but only N={n_tokens} tokens are left there in {grid[0]} rows, "
                f"each of which keeps one: k must be at most {max(0, n_tokens - grid[0])}"
            )
        return n_tokens - self.k

    def forward(self, tokens: Tensor, regions: Regions, attention: Attention) -> tuple[Tensor, Regions]:
        if self.k == 0:
            return tokens, regions
        batch, n, _ = tokens.shape
        height, width = regions.grid
        patches = torch.arange(height * width, device=tokens.device).expand(batch, -1)
        leftmost = torch.full_like(regions.sizes, height * width).scatter_reduce(1, regions.assignment, patches, "amin")
        row = leftmost // width
        owner = torch.arange(n, device=tokens.device).repeat(batch, 1)
        weights = torch.ones(batch, n, device=tokens.device)
        remaining = torch.full((batch, 1), self.k, device=tokens.device)
        current = tokens
        for step in range(_passes(n - height, self.k)):
            if step > 0:
                current = average(tokens, owner, weights, n)
            taken, right = _pass(current, owner, row, remaining, width)
            everyone = torch.arange(n + 1, device=tokens.device).repeat(batch, 1)
            owner = everyone.scatter(1, torch.where(taken, right, n), everyone[:, :n])[:, :n].gather(1, owner)
            weights = torch.where(taken.gather(1, owner), weights / 2, weights)
            remaining = remaining - taken.sum(dim=1, keepdim=True)
            if tokens.device.type == "cpu" and not remaining.any():  # would need a synchronisation on a GPU
                break
        token_map = renumber(owner)
        return average(tokens, token_map, weights, n - self.k), regions.merge(token_map, n - self.k)

    def extra_repr(self) -> str:
        return f"k={self.k}, layers={self.layers}"


def _passes(n_candidates: int, k: int) -> int:
    """Return the number of passes that always find k pairs: each takes at least a third of the candidates."""
    passes, found = 0, 0
    while found < k:
        taken = -(-n_candidates // 3)
        n_candidates, found, passes = n_candidates - taken, found + taken, passes + 1
    return passes


def _pass(tokens: Tensor, owner: Tensor, row: Tensor, remaining: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Make one pass through the candidates.

    Args:
        tokens: [B, N, D]; tokens that were merged into others are still in their places, but ignored.
        owner: int64 [B, N], the index of the token that each one was merged into.
        row: int64 [B, N], the row of the grid that each token is in.
        remaining: int64 [B, 1], the number of pairs to take.
        width: columns of the grid.

    Returns:
        taken: bool [B, N], whether the pair of this token and the next one is taken.
        right: int64 [B, N], the next token, or N if there is none.
    """
    batch, n, _ = tokens.shape
    places = torch.arange(n, device=tokens.device).expand(batch, n)
    alive = owner == places
    nothing = torch.full((batch, 1), n, device=tokens.device)
    from_right = torch.where(alive, places, n).flip(1).cummin(dim=1).values.flip(1)
    right = torch.cat([from_right[:, 1:], nothing], dim=1)
    from_left = torch.where(alive, places, -1).cummax(dim=1).values
    left = torch.cat([nothing, torch.where(from_left < 0, n, from_left)[:, :-1]], dim=1)
    candidates = alive & (F.pad(row, (0, 1), value=-1).gather(1, right) == row)

    tokens = F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1)
    beside = rows(tokens, right.clamp(max=n - 1))
    scores = torch.where(candidates, (tokens * beside).sum(-1), -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    priority = torch.empty_like(order).scatter(1, order, places)

    # A pair that comes before its left and right neighbours is always taken, and these neighbours are skipped. As many
    # such rounds as half a row has tokens settle all pairs.
    taken = torch.zeros_like(alive)
    for _ in range(width // 2 + 1):
        open_ = F.pad(torch.where(candidates, priority, n), (0, 1), value=n)
        first = candidates & (priority < open_.gather(1, left)) & (priority < open_.gather(1, right))
        taken = taken | first
        touched = F.pad(first, (0, 1))
        candidates = candidates & ~(first | touched.gather(1, left) | touched.gather(1, right))
    last = torch.where(taken, priority, n).sort(dim=1).values.gather(1, (remaining - 1).clamp(min=0))
    return taken & (priority <= last) & (remaining > 0), right
