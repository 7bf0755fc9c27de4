"""The map from patches to tokens: the only state that merging carries from layer to layer."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# Steps (row, column) from a patch to half of its neighbours; the other half have a step to this patch.
_STEPS = {4: ((0, 1), (1, 0)), 8: ((0, 1), (1, -1), (1, 0), (1, 1))}


def grid_pairs(grid: tuple[int, int], connectivity: int, device: torch.device | None = None) -> Tensor:
    """List all pairs of adjacent patches of a grid (Figure 3 of the paper).

    Args:
        grid: rows and columns of patches, numbered row by row.
        connectivity: 4 (horizontal and vertical neighbours) or 8 (diagonals too).
        device: of the result.

    Returns:
        int64 [E, 2], each pair once, lower index first, in lexicographic order.

    Raises:
        ValueError: connectivity is neither 4 nor 8.
    """
    if connectivity not in _STEPS:
        raise ValueError(f"connectivity={connectivity!r}: it must be 4 or 8")
    return torch.tensor(_pairs(*grid, connectivity), device=device)


@functools.lru_cache(maxsize=64)
def _pairs(height: int, width: int, connectivity: int) -> np.ndarray:
    """Return an array, because a tensor cached while a model is traced could not be used afterwards."""
    pairs = [
        (row * width + column, (row + down) * width + column + right)
        for row in range(height)
        for column in range(width)
        for down, right in _STEPS[connectivity]
        if row + down < height and 0 <= column + right < width
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


@dataclasses.dataclass(frozen=True)
class Regions:
    """The map from patches to tokens for a batch of images.

    Attributes:
        assignment: int64 [B, P], the token in [0, N) that each patch is in. Methods that spread a patch over several
            tokens give the one with the largest share; see :class:`SoftRegions`.
        sizes: int64 [B, N], the number of patches in each token.
        grid: rows and columns of patches, with rows · columns = P.
    """

    assignment: Tensor
    sizes: Tensor
    grid: tuple[int, int]

    @classmethod
    def identity(cls, batch: int, grid: tuple[int, int], device: torch.device | str | None = None) -> "Regions":
        """Return the state before any merge: one patch per token."""
        n_patches = grid[0] * grid[1]
        return cls(
            assignment=torch.arange(n_patches, device=device).expand(batch, n_patches),
            sizes=torch.ones(batch, n_patches, dtype=torch.int64, device=device),
            grid=tuple(grid),
        )

    @property
    def n_tokens(self) -> int:
        """N, the same for every image of the batch."""
        return self.sizes.shape[1]

    @property
    def n_tokens_of_images(self) -> Tensor:
        """The number of tokens with a patch, int64 [B]; below N in images that a threshold merged more."""
        return (self.sizes > 0).sum(dim=1)

    def merge(self, token_map: Tensor, n_tokens: int) -> "Regions":
        """Return the regions after tokens were merged.

        Args:
            token_map: int64 [B, N], the place of each token among the new ones.
            n_tokens: the number of new tokens.
        """
        sizes = self.sizes.new_zeros(self.sizes.shape[0], n_tokens).scatter_add(1, token_map, self.sizes)
        return Regions(token_map.gather(1, self.assignment), sizes, self.grid)

    def unmerge(self, tokens: Tensor) -> Tensor:
        """Give every patch the token that it is in, for dense prediction: [B, N, D] → [B, P, D]."""
        return tokens.gather(1, self.assignment[..., None].expand(-1, -1, tokens.shape[2]))

    def adjacent_tokens(self, connectivity: int = 8) -> Tensor:
        """Return the two tokens that each pair of adjacent patches is in.

        Two tokens are adjacent when a patch of one touches a patch of the other (Eq. 7). So a pair of tokens is listed
        once for every place where they touch, and a token is listed with itself for every pair of patches inside it.

        Returns:
            int64 [B, E, 2], the lower token first; E depends on the grid alone.
        """
        pairs = grid_pairs(self.grid, connectivity, self.assignment.device)
        return self.assignment[:, pairs].sort(dim=-1).values


class LazyRegions(Regions):
    """Regions after tokens were merged, computed only when they are read.

    Args:
        before: the regions of the tokens before.
        n_tokens: the number of new tokens.
        token_map: a function that returns the place of each token among the new ones, int64 [B, N].
        sizes: int64 [B, n_tokens], if they are already known.
    """

    def __init__(self, before: Regions, n_tokens: int, token_map: Callable[[], Tensor], sizes: Tensor | None = None):
        values = (before, n_tokens, token_map, sizes, before.grid)
        for name, value in zip(("_before", "_n_tokens", "_token_map", "_sizes", "grid"), values, strict=True):
            object.__setattr__(self, name, value)  # Regions is frozen

    @property
    def n_tokens(self) -> int:
        return self._n_tokens

    @functools.cached_property
    def _computed(self) -> Regions:
        return self._before.merge(self._token_map(), self._n_tokens)

    @property
    def assignment(self) -> Tensor:
        return self._computed.assignment

    @property
    def sizes(self) -> Tensor:
        return self._computed.sizes if self._sizes is None else self._sizes


class SoftRegions(LazyRegions):
    """Regions of a method that spreads each token over all new ones: a token is assigned to the one with its largest share.

    Args:
        before: the regions of the tokens before.
        weights: [B, M, N], the weight of each of these N tokens in each of M new ones.
    """

    def __init__(self, before: Regions, weights: Tensor):
        weights = weights.detach()
        super().__init__(before, weights.shape[1], functools.partial(Tensor.argmax, weights, dim=1))


def contract(low: Tensor, high: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """Rename token j to i at both ends of every edge; an edge inside one token has low = high.

    Args:
        low, high: int64 [B, E], the ends of the edges, low ≤ high.
        i, j: int64 [B, 1], the merged pair of each image, i < j.
    """
    low, high = torch.where(low == j, i, low), torch.where(high == j, i, high)
    return torch.minimum(low, high), torch.maximum(low, high)


def renumber(owner: Tensor) -> Tensor:
    """Renumber the groups of tokens as 0, 1, … without gaps, keeping their order, int64 [B, N]."""
    used = torch.zeros_like(owner, dtype=torch.bool).scatter(1, owner, torch.ones_like(owner, dtype=torch.bool))
    return (used.cumsum(dim=1) - 1).gather(1, owner)
