"""The interface that every token reduction method implements."""

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dhtm.regions import Regions


@dataclasses.dataclass(frozen=True)
class Attention:
    """What a reducer may ask of the attention just computed; patch tokens only, None where it did not ask.

    Attributes:
        keys: [B, heads, N, D / heads], after key normalisation where the model has one.
        output: [B, N, D], the output of the attention branch before LayerScale and the residual add.
    """

    keys: Tensor | None = None
    output: Tensor | None = None


class Reducer(nn.Module):
    """A method that reduces the patch tokens in some layers of a Vision Transformer.

    It never sees prefix tokens (CLS, distillation, registers) and knows nothing of the model around it.

    Args:
        layers: the layers that reduce, numbered from 1, increasing; or "all".

    Attributes:
        position: where in the layer: "after_attention" (after its residual add, before the MLP branch) or
            "before_block".
        needs: which fields of :class:`Attention` the method reads.
        proportional_attention: add the log of each token's size to the attention logits (Bolya et al. 2023).
        image_ids: int64 [B] or None, set by whoever runs the model; see :func:`dhtm.vit.image_ids`.

    Raises:
        ValueError: layers are not increasing numbers from 1.
    """

    position: str = "after_attention"
    needs: frozenset[str] = frozenset()
    proportional_attention: bool = False
    image_ids: Tensor | None = None

    def __init__(self, layers: Sequence[int] | str = "all"):
        super().__init__()
        if layers != "all":
            layers = tuple(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else (layers,)
            numbers = all(isinstance(layer, int) and layer >= 1 for layer in layers)
            if not layers or not numbers or any(a >= b for a, b in itertools.pairwise(layers)):
                raise ValueError(f"layers={list(layers)}: give increasing layer numbers from 1, or 'all'")
        self.layers = layers

    def tokens_after(self, n_tokens: int, layer: int, grid: tuple[int, int]) -> int:
        """How many of n_tokens patch tokens are left after reducing in this layer, known before any image is seen.

        Raises:
            ValueError: the reduction is impossible; the message names the layer and the numbers.
        """
        raise NotImplementedError

    def forward(self, tokens: Tensor, regions: Regions, attention: Attention) -> tuple[Tensor, Regions]:
        """Reduce [B, N, D] patch tokens; return them and the regions that they now stand for."""
        raise NotImplementedError


def check_k(k: int) -> None:
    """Raise a ValueError unless k, the merges a layer, is an integer from 0."""
    if not isinstance(k, int) or k < 0:
        raise ValueError(f"k={k!r}: the number of merges a layer must be an integer from 0")


def after_merges(n_tokens: int, k: int, layer: int) -> int:
    """Tokens left after k merges of two, or a ValueError that names the layer, N and k."""
    if k >= n_tokens:
        raise ValueError(
            f"k={k} merges in layer {layer}, but only N={n_tokens} tokens are left there: k must be below N"
        )
    return n_tokens - k


def average(tokens: Tensor, token_map: Tensor, weights: Tensor, n_tokens: int) -> Tensor:
    """Weighted sums of tokens in float32 or wider: new[m] = Σ weights[n]·tokens[n] over all n with token_map[n] = m.

    Args:
        tokens: [B, N, D], any float dtype, which is the result's dtype too.
        token_map: int64 [B, N].
        weights: [B, N]; the weights of each new token sum to 1 for an average.
        n_tokens: M, the number of new tokens.

    Returns:
        [B, M, D].
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    weighted = tokens.to(wide) * weights[..., None].to(wide)
    new = weighted.new_zeros(tokens.shape[0], n_tokens, tokens.shape[2])
    return new.scatter_add(1, token_map[..., None].expand_as(weighted), weighted).to(tokens.dtype)
