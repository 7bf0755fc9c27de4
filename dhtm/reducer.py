"""The interface that every token reduction method implements."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dhtm.regions import Regions, SoftRegions, renumber


@dataclasses.dataclass(frozen=True)
class Attention:
    """The layer that reduces, and what the reducer needs of the last attention; None for what it does not need.

    The last attention is this layer's for a reducer after attention, and the previous layer's for one before a block. All
    tensors hold patch tokens only.

    Attributes:
        layer: the layer that reduces, from 1.
        keys: [B, heads, N, D / heads], after key normalisation if the model has one; those of the previous layer are detached.
        output: [B, N, D], the output of the attention branch before LayerScale and the residual add.
        cls: float32 [B, N], the attention that CLS pays each token, mean over heads; in a model without CLS the attention
            that the token receives, mean over heads and queries. Detached.
        received: float32 [B, N], the attention that each token receives, mean over heads and all queries, those of prefix
            tokens among them. Detached.
    """

    layer: int = 1
    keys: Tensor | None = None
    output: Tensor | None = None
    cls: Tensor | None = None
    received: Tensor | None = None


class Reducer(nn.Module):
    """A method that reduces the patch tokens in some layers of a Vision Transformer.

    It never sees prefix tokens (CLS, distillation, registers) and is independent of the model around it.

    Args:
        layers: the layers that reduce, numbered from 1, increasing; or "all".

    Attributes:
        position: "after_attention" (after its residual add, before the MLP branch) or "before_block".
        needs: which of "keys", "output", "cls" and "received" of :class:`Attention` the method reads.
        proportional_attention: add the log of each token's size to the attention logits (Bolya et al. 2023).
        adaptive: images may differ in their number of tokens. Zeros, which stand for no patch, pad those with fewer tokens.
        image_ids: int64 [B] or None, set with :func:`dhtm.vit.image_ids`.
        schedule: the numbers of the layers that reduce; for "all" they are known once a model is attached.
        n_prefix: the number of prefix tokens of the attached model.

    Raises:
        ValueError: layers are not increasing numbers from 1.
    """

    position: str = "after_attention"
    needs: frozenset[str] = frozenset()
    proportional_attention: bool = False
    adaptive: bool = False
    image_ids: Tensor | None = None
    n_prefix: int = 1

    def __init__(self, layers: Sequence[int] | str = "all"):
        super().__init__()
        if layers != "all":
            layers = tuple(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else (layers,)
            numbers = all(isinstance(layer, int) and layer >= 1 for layer in layers)
            if not layers or not numbers or any(a >= b for a, b in itertools.pairwise(layers)):
                raise ValueError(f"layers={list(layers)}: give increasing layer numbers from 1, or 'all'")
        self.layers = layers
        self.schedule: tuple[int, ...] = () if layers == "all" else layers

    def attach(self, channels: int, n_prefix: int, grid: tuple[int, int], layers: tuple[int, ...]) -> None:
        """Prepare for a model; :func:`dhtm.patch` calls this, and learned methods create their parameters here.

        Args:
            channels: D of the tokens.
            n_prefix: the number of prefix tokens, which come before the patch tokens.
            grid: rows and columns of patches at the model's own image size.
            layers: the numbers of the layers that reduce.
        """
        self.n_prefix, self.schedule = n_prefix, layers

    def tokens_after(self, n_tokens: int, layer: int, grid: tuple[int, int]) -> int:
        """Return how many of n_tokens patch tokens this layer leaves: in every image, or at most if the method is adaptive.

        Raises:
            ValueError: the reduction is impossible; the message names the layer and the numbers.
        """
        raise NotImplementedError

    def forward(self, tokens: Tensor, regions: Regions, attention: Attention) -> tuple[Tensor, Regions]:
        """Reduce the patch tokens [B, N, D]; return the new tokens and their regions."""
        raise NotImplementedError


class KeepRateReducer(Reducer):
    """A method that leaves ⌊P·κ^i⌋ tokens in the i-th of its layers, by default before the block (Haurum et al. 2023).

    Args:
        keep_rate: κ, in (0, 1].
        layers: the layers that reduce, from 1, increasing; or "all".

    Raises:
        ValueError: the keep rate is outside (0, 1], or layers are not increasing.
    """

    position = "before_block"

    def __init__(self, keep_rate: float, layers: Sequence[int] | str = (4, 7, 10)):
        super().__init__(layers)
        if not isinstance(keep_rate, (int, float)) or not 0 < keep_rate <= 1:
            raise ValueError(f"keep_rate={keep_rate!r}: it must be above 0 and at most 1")
        self.keep_rate = keep_rate

    def n_clusters(self, layer: int, grid: tuple[int, int]) -> int:
        """Return M, the number of tokens to leave in a layer."""
        stage = self.schedule.index(layer) + 1
        return math.floor(grid[0] * grid[1] * self.keep_rate**stage + 1e-9)  # 0.29 · 100 is 29, not 28

    def tokens_after(self, n_tokens: int, layer: int, grid: tuple[int, int]) -> int:
        kept = self.n_clusters(layer, grid)
        if kept < 1:
            raise ValueError(f"keep_rate={self.keep_rate} leaves no token in layer {layer}: choose a larger one")
        if kept > n_tokens:
            raise ValueError(f"{kept} clusters in layer {layer}, but only N={n_tokens} tokens are left there")
        return kept

    def extra_repr(self) -> str:
        return f"keep_rate={self.keep_rate}, layers={self.layers}"


class LearnedReducer(KeepRateReducer):
    """A keep-rate method whose new tokens are sums of all tokens, weighted by a small network in each of its layers.

    ``stages`` holds the networks by the number of their layer. The model's own grid fixes M when they are created.
    """

    def __init__(self, keep_rate: float, layers: Sequence[int] | str = (4, 7, 10)):
        super().__init__(keep_rate, layers)
        self.stages = nn.ModuleDict()

    def make_stage(self, channels: int, n_clusters: int) -> nn.Module:
        """Create the network of one layer: tokens [B, N, D] → weights [B, M, N] and values [B, N, D]."""
        raise NotImplementedError

    def attach(self, channels: int, n_prefix: int, grid: tuple[int, int], layers: tuple[int, ...]) -> None:
        super().attach(channels, n_prefix, grid, layers)
        wanted = {str(layer): (channels, super(LearnedReducer, self).n_clusters(layer, grid)) for layer in layers}
        if not self.stages:
            for layer in layers:
                self.tokens_after(grid[0] * grid[1], layer, grid)  # raises an error where M is 0
            self.stages.update({layer: self.make_stage(*shape) for layer, shape in wanted.items()})
            self.shapes = wanted
        elif self.shapes != wanted:
            raise_other_shape(self)

    def n_clusters(self, layer: int, grid: tuple[int, int]) -> int:
        return self.shapes[str(layer)][1] if self.stages else super().n_clusters(layer, grid)

    def forward(self, tokens: Tensor, regions: Regions, attention: Attention) -> tuple[Tensor, Regions]:
        weights, values = self.stages[str(attention.layer)](tokens)
        return weights @ values, SoftRegions(regions, weights)


def check_k(k: int) -> None:
    """Raise a ValueError unless k, the number of merges in a layer, is an integer ≥ 0."""
    if not isinstance(k, int) or k < 0:
        raise ValueError(f"k={k!r}: the number of merges in a layer must be an integer from 0")


def after_merges(n_tokens: int, k: int, layer: int) -> int:
    """Return the number of tokens left after k merges, or raise a ValueError that names the layer, N and k."""
    if k >= n_tokens:
        raise ValueError(
            f"k={k} merges in layer {layer}, but only N={n_tokens} tokens are left there: k must be below N"
        )
    return n_tokens - k


def average(tokens: Tensor, token_map: Tensor, weights: Tensor, n_tokens: int) -> Tensor:
    """Sum weighted tokens in float32 or wider: new[m] = Σ weights[n]·tokens[n] over all n with token_map[n] = m.

    Args:
        tokens: [B, N, D], any float dtype, which is also that of the result.
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


def merge_into(tokens: Tensor, regions: Regions, merged: Tensor, into: Tensor) -> tuple[Tensor, Regions]:
    """Merge some tokens into others by averages weighted by patches; the remaining tokens keep their order.

    Args:
        tokens: [B, N, D].
        regions: of these tokens.
        merged: int64 [B, r], the tokens that go.
        into: int64 [B, r], the tokens that they merge into, all of which stay.

    Returns:
        [B, N - r, D] in the tokens' dtype, averaged in float32 or wider, and their regions.
    """
    batch, n, _ = tokens.shape
    owner = torch.arange(n, device=tokens.device).repeat(batch, 1).scatter(1, merged, into)
    token_map = renumber(owner)
    new = regions.merge(token_map, n - merged.shape[1])
    kept = torch.empty_like(new.sizes).scatter(1, token_map, owner)
    place = token_map.gather(1, merged)

    wide = torch.promote_types(tokens.dtype, torch.float32)
    shares = regions.sizes.to(wide) / new.sizes.gather(1, token_map)
    moved = rows(tokens, merged) * shares.gather(1, merged)[..., None]
    result = (rows(tokens, kept) * shares.gather(1, kept)[..., None]).scatter_add(
        1, place[..., None].expand_as(moved), moved
    )
    return result.to(tokens.dtype), new


def raise_other_shape(reducer: Reducer) -> None:
    """Raise the error for a reducer whose parameters do not fit the model that it is attached to."""
    raise ValueError(f"this {type(reducer).__name__} has parameters for a model of another shape: create a new one")


def highest(values: Tensor, m: int) -> Tensor:
    """Return the indices of the m largest of values [B, N], int64 [B, m]: largest first, lower index first among equals."""
    # ONNX has no stable sort, but its TopK puts the lower index of equals first. Asking whether it is exported takes longer
    # than the sort, so the cheap flag comes first.
    if torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
        return values.topk(m, dim=1).indices
    return values.argsort(dim=1, descending=True, stable=True)[:, :m]


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Select the rows of x [B, N, D] with the numbers in index, int64 [B, M]: [B, M, D]."""
    if x.shape[0] == 1:  # takes half the time
        return x[0].index_select(0, index[0])[None]
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]  # copies whole rows, unlike gather


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """Create a linear map that starts at zero, so that a trained backbone starts unchanged."""
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def unit(vectors: Tensor) -> Tensor:
    """Scale vectors [..., D] to length 1, in half the time of F.normalize if there are few of them."""
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(1e-12)


def products(a: Tensor, b: Tensor) -> Tensor:
    """Multiply all a [B, N, D] by all b [B, M, D] in their own dtype, also under autocast: inner products [B, N, M]."""
    if torch.is_autocast_enabled(a.device.type):  # entering the context costs as much as a small product
        with torch.autocast(a.device.type, enabled=False):
            return a @ b.transpose(1, 2)
    return a @ b.transpose(1, 2)


def squared_distances(tokens: Tensor) -> Tensor:
    """Compute ‖a − b‖² between all tokens of an image, in float32 or wider: [B, N, D] → [B, N, N]."""
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    tokens = tokens - tokens.mean(dim=1, keepdim=True)  # reduces cancellation
    squares = tokens.square().sum(-1)
    both = products(tokens, tokens)
    # One product may differ in the last bit between (a, b) and (b, a); the sum of both orders does not.
    distances = (squares[:, :, None] + squares[:, None] - (both + both.transpose(1, 2))).clamp(min=0)
    return distances * (1 - torch.eye(tokens.shape[1], dtype=tokens.dtype, device=tokens.device))
