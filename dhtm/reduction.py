"""What happens to the tokens of a patched model during a forward pass: the state that its blocks share."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dhtm.reducer import Attention, Reducer
from dhtm.regions import Regions

_SIMILAR = 16  # images are computed together if their numbers of tokens, rounded up to multiples of this, agree


@dataclasses.dataclass(frozen=True)
class _UnevenBatch:
    """A batch in which images have different numbers of tokens.

    Attributes:
        used: int64, the places of the images' own tokens, prefix tokens included, in the flattened batch.
        groups: for each group, the most patch tokens of an image, and the images, int64.
    """

    used: Tensor
    groups: list[tuple[int, Tensor]]


class Reduction:
    """The state that the blocks of a patched model share: the reducer, and the regions of the last forward by layer.

    Args:
        reducer: the method.
        layers: the layers that reduce.
        n_prefix: the number of prefix tokens, which come before the patch tokens.
        rope: what rotates merged tokens in a model with rotary embeddings, see :func:`dhtm.patch`; None in others.
    """

    def __init__(self, reducer: Reducer, layers: tuple[int, ...], n_prefix: int, rope: str | None):
        self.reducer, self.layers, self.n_prefix, self.rope = reducer, layers, n_prefix, rope
        self.regions: dict[int, Regions] = {}  # after each layer that reduces; 0 is before the first block
        self.keys: dict[int, Tensor] = {}  # by the layer that reduces with them
        self.cls: dict[int, Tensor] = {}
        self.received: dict[int, Tensor] = {}
        self.biases: dict[int, Tensor | None] = {}  # of attention, after each layer that reduces
        self.read_layers: set[int] = set()  # layers whose attention is read, so that all images are computed at once
        self.batches: dict[int, _UnevenBatch | None] = {}  # after each layer that reduces by a threshold
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.thread: int | None = None  # that started the last forward pass; None if that was compiled code

    def __getstate__(self) -> dict:
        # A copy has seen no image. The last forward's tensors may be those of a trace, which cannot be copied.
        return self.__dict__ | {name: {} for name in ("regions", "keys", "cls", "received", "biases", "batches")}

    def start(self, patch_embed: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Start a forward pass, before the patch embedding: every patch is a token."""
        if getattr(patch_embed, "_is_replica", False):
            raise RuntimeError("the replicas of nn.DataParallel would share one state: use DistributedDataParallel")
        if (self.reducer.schedule, self.reducer.n_prefix) != (self.layers, self.n_prefix):
            raise RuntimeError(
                f"this {type(self.reducer).__name__} was since patched into a model with other layers or prefix tokens: give "
                "each model a reducer of its own"
            )
        self.thread = None if torch.compiler.is_compiling() else threading.get_ident()
        images = args[0]
        if images.dim() != 4:
            raise ValueError(f"a patched model takes images [B, C, H, W] of one size, not patches {list(images.shape)}")
        grid = tuple(int(n) for n in patch_embed.dynamic_feat_size(images.shape[-2:]))
        n_tokens = grid[0] * grid[1]
        for layer in self.layers:
            n_tokens = self.reducer.tokens_after(n_tokens, layer, grid)  # raises an error for small images
        for kept in (self.keys, self.cls, self.received, self.biases, self.batches):
            kept.clear()
        self.regions = {0: Regions.identity(images.shape[0], grid, images.device)}

    def _require_own_thread(self) -> None:
        if torch.compiler.is_compiling() or self.thread in (None, threading.get_ident()):
            return
        # In a backward pass, checkpointing may run a layer again in a thread of autograd.
        if torch._C._current_graph_task_id() == -1:
            raise RuntimeError("two threads use one patched model at the same time: give each a copy.deepcopy(model)")

    def regions_before(self, layer: int) -> Regions:
        return self._last(layer, self.regions)

    def _last(self, layer: int, by_layer: dict[int, Any]) -> Any:
        """Return the last value before a layer. Gradient checkpointing may run a layer again after later ones."""
        for before in range(layer - 1, -1, -1):
            if before in by_layer:
                return by_layer[before]
        return None

    def reduce(self, x: Tensor, layer: int, position: str, attended: Tensor | None = None) -> Tensor:
        """Reduce the tokens of x [B, prefix + N, D] if the reducer acts in this layer and position."""
        if layer not in self.layers or self.reducer.position != position:
            return x
        self._require_own_thread()
        regions = self.regions_before(layer)
        prefix, tokens = x[:, : self.n_prefix], x[:, self.n_prefix :]
        if tokens.shape[1] != regions.n_tokens:
            raise RuntimeError(
                f"layer {layer} got {tokens.shape[1]} patch tokens, but {regions.n_tokens} were expected: "
                "a patched model must see every patch (patch_drop_rate=0)"
            )
        output = attended[:, self.n_prefix :] if "output" in self.reducer.needs else None
        attention = Attention(layer, self.keys.get(layer), output, self.cls.get(layer), self.received.get(layer))
        reduced = self.reducer(tokens, regions, attention)
        self._require_own_thread()
        tokens, self.regions[layer] = reduced
        if position == "after_attention":  # if this layer runs again, its keys are read again
            self.keys.pop(layer, None)
        if self._is_split():
            self._split(layer)
            tokens = tokens[:, : self.regions[layer].n_tokens]
        self.biases[layer] = self._bias_after(layer)
        return torch.cat([prefix, tokens], dim=1)

    def _is_split(self) -> bool:
        """Whether images with different numbers of tokens are computed separately; compiled and traced models cannot do so."""
        if not self.reducer.adaptive or self.reducer.training:
            return False
        return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export())

    def _split(self, layer: int) -> None:
        """Cut the regions after a layer to the longest image, and group images with similar numbers of tokens."""
        regions = self.regions[layer]
        lengths = regions.n_tokens_of_images.cpu()
        longest, device = max(lengths.tolist(), default=1), regions.sizes.device
        self.regions[layer] = Regions(regions.assignment, regions.sizes[:, :longest], regions.grid)
        self.batches[layer] = None
        if (lengths < longest).any():
            used = torch.arange(self.n_prefix + longest, device="cpu") < self.n_prefix + lengths[:, None]
            rounded = (-(-lengths // _SIMILAR) * _SIMILAR).clamp(max=longest)
            groups = [(int(n), (rounded == n).nonzero()[:, 0].to(device)) for n in rounded.unique()]
            self.batches[layer] = _UnevenBatch(used.flatten().nonzero()[:, 0].to(device), groups)

    def attend(self, x: Tensor, layer: int, attention: Callable[..., Tensor], table: Tensor | None = None) -> Tensor:
        """Run a layer's attention, one group of images with similar numbers of tokens at a time.

        Args:
            x: the tokens, [B, prefix + N, D].
            layer: the layer.
            attention: a function of tokens, bias and rotary embeddings; the last two may be None.
            table: the rotary embeddings of every patch, see :meth:`rotations`; None if there are none.
        """
        self._require_own_thread()
        bias, uneven = self.attention_bias(x.dtype, layer), self._last(layer, self.batches)
        rope = None if table is None else self.rotations(table, layer)
        if uneven is None or layer in self.read_layers:
            return attention(x, bias, rope)
        result = torch.zeros_like(x)
        for n_tokens, images in uneven.groups:
            end = self.n_prefix + n_tokens
            rotated = None if rope is None else rope[images, :, :n_tokens]
            result[images, :end] = attention(x[images, :end], bias[images, ..., :end], rotated).to(x.dtype)
        return result

    def add_branch(self, x: Tensor, layer: int, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Return x + branch(x) for a branch that treats every token by itself; it skips the zeros that fill up images."""
        uneven = self._last(layer + 1, self.batches)
        if uneven is None:
            return x + branch(x)
        rows = x.flatten(0, 1)
        return rows.index_add(0, uneven.used, branch(rows[uneven.used]).to(x.dtype)).view_as(x)

    def fill_up(self, model: nn.Module, norm: nn.Module, args: tuple[Tensor, ...], x: Tensor) -> Tensor:
        """Replace the zeros that fill up images by the mean of the image's own tokens, so that pooling is not affected.

        Args:
            model: says what it pools now; ``reset_classifier`` may have changed it since it was patched.
            x: the normalised tokens, the output of ``norm``; this is its forward hook.
        """
        if model.global_pool == "token":
            return x
        first = 0 if getattr(model, "pool_include_prefix", False) else self.n_prefix
        sizes = self.regions[max(self.regions)].sizes
        used = torch.cat([sizes.new_ones(sizes.shape[0], self.n_prefix), sizes], dim=1)[:, first:, None] > 0
        mean = (x[:, first:] * used).sum(dim=1, keepdim=True) / used.sum(dim=1, keepdim=True)
        return torch.cat([x[:, :first], torch.where(used, x[:, first:], mean.to(x.dtype))], dim=1)

    def _bias_after(self, layer: int) -> Tensor | None:
        """Return the bias of proportional attention after a layer reduced, [B, 1, 1, prefix + N]; None if none is needed.

        It holds log sizes, 0 for prefix tokens. The zeros that fill up images have size 0, so that no token attends to them.
        If attention is not proportional, the bias does only this.
        """
        regions, proportional = self.regions[layer], self.reducer.proportional_attention
        if self.reducer.adaptive:
            is_needed = proportional or not self._is_split() or self.batches[layer] is not None
        else:
            is_needed = proportional and regions.n_tokens != self.regions[0].n_tokens
        if not is_needed:
            return None
        sizes = regions.sizes if proportional else regions.sizes.clamp(max=1)
        prefix = self.regions[0].sizes[:, : self.n_prefix]  # ones
        return torch.cat([prefix, sizes], dim=1).log()[:, None, None]

    def attention_bias(self, dtype: torch.dtype, layer: int) -> Tensor | None:
        """Return the bias of a layer's attention, see :meth:`_bias_after`; None before the first reduction."""
        bias = self._last(self._before_attention(layer), self.biases)
        return None if bias is None else bias.to(dtype)

    def rotations(self, table: Tensor, layer: int) -> Tensor:
        """Return the rotary embeddings of the tokens in a layer's attention: the mean over the patches of each token.

        Args:
            table: sines, then cosines, of every patch and frequency: [P, 2·F], or [heads, P, 2·F].

        Returns:
            [B, 1 or heads, N, 2·F]; the table itself before the first reduction.
        """
        regions = self.regions_before(self._before_attention(layer))
        if regions.n_tokens == self.regions[0].n_tokens and not self.reducer.adaptive:
            return table
        batch, sizes = regions.sizes.shape[0], regions.sizes[:, None, :, None]
        of_patches = (table if table.dim() == 3 else table[None]).expand(batch, -1, -1, -1)
        index = regions.assignment[:, None, :, None].expand_as(of_patches)
        sums = of_patches.new_zeros(batch, of_patches.shape[1], regions.n_tokens, of_patches.shape[3])
        sines, cosines = (sums.scatter_add(2, index, of_patches) / sizes.clamp(min=1)).chunk(2, dim=-1)
        cosines = torch.where(sizes > 0, cosines, 1)  # a token without a patch is not rotated
        if self.rope == "unit":
            # Where opposite rotations cancel there is no direction to scale to; what rounding leaves of them stays below 1.
            length = (sines.square() + cosines.square()).sqrt().clamp_min(1e-6)
            sines, cosines = sines / length, cosines / length
        return torch.cat([sines, cosines], dim=-1)

    def _before_attention(self, layer: int) -> int:
        """Return the layer whose :meth:`regions_before` are those of a layer's attention."""
        return layer + 1 if self.reducer.position == "before_block" else layer


class AttentionReader:
    """Reads queries and keys by forward hooks on their norms, which every attention has (as identities in most models).

    Args:
        reduction: stores what is read.
        source: the layer whose attention is read.
        layer: the layer that reduces with it.
        scale: of the attention logits.
        has_cls: whether the first token is a CLS token.
    """

    def __init__(self, reduction: Reduction, source: int, layer: int, scale: float, has_cls: bool):
        self.reduction, self.source, self.layer, self.scale, self.has_cls = reduction, source, layer, scale, has_cls

    def read_queries(self, module: nn.Module, args: tuple[Tensor, ...], queries: Tensor) -> None:
        of_cls = self.has_cls and "received" not in self.reduction.reducer.needs
        self.queries = queries[:, :, :1] if of_cls else queries

    def read_keys(self, module: nn.Module, args: tuple[Tensor, ...], keys: Tensor) -> None:
        reduction, needs = self.reduction, self.reduction.reducer.needs
        if "keys" in needs:
            keys_of_patches = keys[:, :, reduction.n_prefix :]
            # Keys of another layer are kept, so they must not keep the graph of that layer alive.
            reduction.keys[self.layer] = keys_of_patches if self.source == self.layer else keys_of_patches.detach()
        if needs & {"cls", "received"}:
            # Kept for the whole forward pass, because gradient checkpointing may rerun the layer that reduces before
            # this one. So it has no gradient.
            with torch.no_grad(), torch.autocast(keys.device.type, enabled=False):
                logits = (self.queries.float() * self.scale) @ keys.float().transpose(-2, -1)
                bias = reduction.attention_bias(logits.dtype, self.source)
                shares = (logits if bias is None else logits + bias).softmax(dim=-1)[..., reduction.n_prefix :]
                if "cls" in needs:
                    reduction.cls[self.layer] = (shares[:, :, :1] if self.has_cls else shares).mean(dim=(1, 2))
                if "received" in needs:
                    reduction.received[self.layer] = shares.mean(dim=(1, 2))
            del self.queries
