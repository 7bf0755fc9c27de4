"""Dynamic Hierarchical Token Merging (Haroun et al., VISAPP 2025): Algorithm 1 and the reducer that runs it.

Read :func:`algorithm_1` beside section 3 of the paper: its names and line numbers are the paper's.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dhtm import kernels
from dhtm.kernels import batched
from dhtm.reducer import Attention, Reducer, after_merges, check_k
from dhtm.regions import Regions, grid_pairs

CONNECTIVITIES = (8, 4, "all")
LINKAGES = ("mean", "size")
FEATURES = ("tokens", "keys", "attention_output")
MASSES = (None, "size", "attention")


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """a·b / (‖a‖ ‖b‖); 0 where either is zero."""
    norms = a.norm() * b.norm()
    return a @ b / norms if norms > 0 else torch.zeros((), dtype=a.dtype)


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """−‖a − b‖₂."""
    return -(a - b).norm()


def manhattan(a: Tensor, b: Tensor) -> Tensor:
    """−‖a − b‖₁."""
    return -(a - b).abs().sum()


def kl(a: Tensor, b: Tensor) -> Tensor:
    """−½ [KL(p‖q) + KL(q‖p)] with p and q the softmax of the two tokens."""
    log_p, log_q = a.log_softmax(0), b.log_softmax(0)
    p_q = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    q_p = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    return -(p_q + q_p) / 2


SIMILARITIES = {"cosine": cosine, "euclidean": euclidean, "manhattan": manhattan, "kl": kl}


def algorithm_1(
    tokens: list[Tensor],
    patches: list[set[int]],
    n_merge: int,
    adjacent_patches: set[tuple[int, int]] | None,
    similarity: str,
    linkage: str,
    features: list[Tensor] | None = None,
    masses: list[float] | None = None,
    threshold: float | None = None,
) -> tuple[list[Tensor], list[dict[int, float]]]:
    """Run Algorithm 1 of the paper on the tokens of one image in one layer.

    Args:
        tokens: T, N vectors [D].
        patches: the patches that each token stands for.
        n_merge: N_merge, the number of merges.
        adjacent_patches: the grid's pairs of adjacent patches, lower first; None if all pairs are adjacent.
        similarity, linkage: as in :func:`hierarchical_merge`.
        features: N vectors to measure similarity on instead of the tokens; they are averaged with them.
        masses: N numbers by which similarities are discounted, an addition to the paper; a new token has the sum of two.
        threshold: stops before a merge of less similarity, the outlook of the paper's section 5.

    Returns:
        T', N - N_merge vectors (or more, with a threshold), and for each of them a dict from the tokens in T that it averages
        to their weights.
    """
    tokens, patches = list(tokens), list(patches)
    features = list(tokens if features is None else features)
    masses = None if masses is None else list(masses)
    members = [{i: 1.0} for i in range(len(tokens))]
    for _ in range(n_merge):  # line 6
        candidates = get_neighbors(patches, adjacent_patches)  # line 8, Eq. 7
        sigma = [get_similarity(features[i], features[j], similarity) for i, j in candidates]  # line 9, Eq. 8
        if masses is not None:
            pairs = zip(candidates, sigma, strict=True)
            sigma = [discount(score, masses[i], masses[j], similarity) for (i, j), score in pairs]
        if threshold is not None and max(sigma, default=-math.inf) < _round_score(threshold):
            break
        # Line 12, Eq. 9. Pairs are in lexicographic order and max() takes the first of equals.
        t1, t2 = candidates[max(range(len(sigma)), key=sigma.__getitem__)]
        n1, n2 = (1, 1) if linkage == "mean" else (len(patches[t1]), len(patches[t2]))
        for values in (tokens, features):  # lines 13 and 14, Eq. 10: t_m takes the place of the lower of the two
            values[t1] = avg_merge(values[t1], values[t2], n1, n2)
        patches[t1] = patches[t1] | patches[t2]
        shares = ((members[t1], n1 / (n1 + n2)), (members[t2], n2 / (n1 + n2)))
        members[t1] = {i: weight * share for part, share in shares for i, weight in part.items()}
        if masses is not None:
            masses[t1] += masses[t2]
        for values in (tokens, features, patches, members, *([] if masses is None else [masses])):
            del values[t2]
    return tokens, members


def get_neighbors(patches: list[set[int]], adjacent_patches: set[tuple[int, int]] | None) -> list[tuple[int, int]]:
    """List the pairs of tokens i < j where a patch of one touches a patch of the other, in lexicographic order."""
    if adjacent_patches is None:  # every patch touches every other
        return list(itertools.combinations([token for token, region in enumerate(patches) if region], 2))
    token_of = {patch: token for token, region in enumerate(patches) for patch in region}
    pairs = {tuple(sorted((token_of[p], token_of[q]))) for p, q in adjacent_patches}
    return sorted((i, j) for i, j in pairs if i != j)


def get_similarity(a: Tensor, b: Tensor, similarity: str) -> float:
    """Eq. 8, summed in float64 and rounded to float32: pairs that differ by less are ties. NaN counts as the lowest."""
    return _round_score(SIMILARITIES[similarity](a.double(), b.double()).item())


def discount(score: float, mass_a: float, mass_b: float, similarity: str) -> float:
    """Multiply the distance behind a similarity by m₁m₂ / (m₁ + m₂), and round it to float32.

    The distance is 1 − cosine, or minus any other similarity. For cosines this is Ward's criterion (1963) on unit vectors,
    by which a merge costs its two tokens' share in the variance within regions.
    """
    distance = score - (1 if similarity == "cosine" else 0)
    return _round_score(distance * (mass_a * mass_b / (mass_a + mass_b)))


def _round_score(score: float) -> float:
    score, lowest = torch.tensor(score, dtype=torch.float64).float().item(), torch.finfo(torch.float32).min
    return lowest if score != score else min(max(score, lowest), -lowest)


def avg_merge(a: Tensor, b: Tensor, n_a: int = 1, n_b: int = 1) -> Tensor:
    """Eq. 10: the average of two tokens, weighted by n_a and n_b, rounded once to the tokens' dtype."""
    return ((a.double() * n_a + b.double() * n_b) / (n_a + n_b)).to(a.dtype)


def hierarchical_merge(
    tokens: Tensor,
    k: int,
    regions: Regions | None = None,
    grid: tuple[int, int] | None = None,
    connectivity: int | str = 8,
    similarity: str = "cosine",
    linkage: str = "mean",
    backend: str = "auto",
    features: Tensor | None = None,
    masses: Tensor | None = None,
    threshold: float | None = None,
) -> tuple[Tensor, Regions]:
    """Merge the most similar pair of adjacent tokens, k times, in every image of a batch (Algorithm 1).

    Similarity is computed in float32 whatever the dtype of the tokens, and averages in float32 or wider. The new token
    takes the place of the lower of the two; all others keep their order. Ties go to the lexicographically smallest pair,
    so that the result depends on the image alone and is the same in every backend and at every batch size. NaN counts as
    the lowest similarity.

    The gradient with respect to the tokens is that of the averages; the choice of pairs has none.

    Args:
        tokens: [B, N, D], any float dtype.
        k: merges in each image, 0 ≤ k < N.
        regions: the patches that the tokens stand for so far.
        grid: rows and columns of patches; without regions each patch is a token.
        connectivity: 8 (diagonal neighbours too), 4, or "all": every pair of tokens is adjacent, and without regions
            no grid is needed (it is then one row).
        similarity: "cosine", "euclidean", "manhattan" or "kl"; see the functions of these names.
        linkage: "mean" (Eq. 10 as written: the plain average of the two, at every merge) or "size" (weighted by patches,
            which is Eq. 5 over the whole region).
        backend: "reference" (Algorithm 1, image by image), "torch" (whole batch, any device), "numba" (CPU), "triton"
            (CUDA), or "auto", the fastest available.
        features: [B, N, F], measured instead of the tokens and averaged with them.
        masses: [B, N], positive numbers by which :func:`discount` changes similarities; a merge adds the two of its tokens.
        threshold: the least (discounted) similarity of a merge. An image ends when its best pair is below it, or after k
            merges, so that each image has its own number of tokens.

    Returns:
        merged: [B, N - k, D], in the tokens' dtype; with a threshold [B, N, D], where zeros follow the tokens of an image.
        regions: the regions of the merged tokens, whose ``n_tokens_of_images`` counts them.

    Raises:
        ValueError: a shape or an option is wrong, or the given regions run out of adjacent tokens; the message names it.
    """
    if tokens.dim() != 3 or not tokens.is_floating_point():
        raise ValueError(f"tokens must be floats [B, N, D], not {tokens.dtype} {list(tokens.shape)}")
    batch, n, _ = tokens.shape
    if regions is None:
        if grid is None and connectivity != "all":
            raise ValueError("give either regions or grid=(rows, columns)")
        grid = (1, n) if grid is None else grid
        regions = Regions.identity(batch, grid, tokens.device)
    elif grid is not None and tuple(grid) != regions.grid:
        raise ValueError(f"grid={tuple(grid)} contradicts regions.grid={regions.grid}")
    if regions.sizes.shape != (batch, n):
        raise ValueError(f"tokens are [B, N] = {[batch, n]}, regions describe {list(regions.sizes.shape)}")
    n_patches = regions.grid[0] * regions.grid[1]
    if regions.assignment.shape != (batch, n_patches) or regions.assignment.dtype != torch.int64:
        raise ValueError(
            f"regions.assignment must be int64 [B, P] = {[batch, n_patches]}, not {regions.assignment.dtype} "
            f"{list(regions.assignment.shape)}"
        )
    if features is not None and features.shape[:2] != tokens.shape[:2]:
        raise ValueError(f"features are [B, N] = {list(features.shape[:2])}, tokens {[batch, n]}")
    if masses is not None and masses.shape != tokens.shape[:2]:
        raise ValueError(f"masses are {list(masses.shape)}, tokens [B, N] = {[batch, n]}")
    if not 0 <= k < n:
        raise ValueError(f"k={k} merges of N={n} tokens: k must be at least 0 and below N")
    _check_options(connectivity, similarity, linkage, backend)
    n_rows = n - k if threshold is None else n
    if k == 0:
        return tokens, regions
    connectivity = kernels.ALL_PAIRS if connectivity == "all" else connectivity
    if backend == "torch" and torch.onnx.is_in_onnx_export():  # ONNX lacks the operator but has what is in it
        options = k, connectivity, similarity, linkage, threshold
        merged, token_map, _ = batched.merge(tokens, features, masses, regions, *options)
    else:
        merged, token_map, _ = kernels.hierarchical_merge(
            tokens, features, masses, regions.assignment, regions.sizes, k, *regions.grid, connectivity, similarity, linkage,
            threshold, backend,
        )  # fmt: skip
    return merged, regions.merge(token_map, n_rows)


def _check_options(connectivity, similarity, linkage, backend, features="tokens", mass=None):
    options = {
        "connectivity": (connectivity, CONNECTIVITIES),
        "similarity": (similarity, tuple(SIMILARITIES)),
        "linkage": (linkage, LINKAGES),
        "backend": (backend, ("auto", *kernels.BACKENDS)),
        "features": (features, FEATURES),
        "mass": (mass, MASSES),
    }
    for name, (value, allowed) in options.items():
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}")


class DHTM(Reducer):
    """Dynamic Hierarchical Token Merging: merges of adjacent tokens after attention, in each of the given layers.

    Args:
        k: merges in each layer; None with ``total`` or ``threshold``.
        layers: the layers that merge, from 1, increasing; "all" and (4, 7, 11) are the paper's two schedules.
        connectivity, similarity, linkage, backend: see :func:`hierarchical_merge`.
        features: what similarity is measured on: "tokens" (the residual stream after attention), "keys" (all heads side
            by side), or "attention_output" (the attention branch before its residual add).
        proportional_attention: add the log of token sizes to the attention logits of later layers; the paper does not.
        mass: what discounts similarity, so that tokens of little mass merge first (see :func:`discount`): "size", the
            patches of a token; "attention", what it receives in this layer; None, nothing, as in the paper.
        total: merges over all layers, instead of k.
        inflect: how ``total`` is shared: from -1 (merges fall linearly to 0 over the layers) through 0 (even) to 1.
        threshold: the least similarity of a merge, instead of k, for all layers or one for each: every image makes as many
            merges as it has similar tokens (the outlook of the paper's section 5).
        max_merges: the most merges in a layer with ``threshold``; None for no limit.

    Raises:
        ValueError: an option is unknown or negative, or not exactly one of k, total and threshold is given.
    """

    def __init__(
        self,
        k: int | None = None,
        layers: Sequence[int] | str = (4, 7, 11),
        connectivity: int | str = 8,
        similarity: str = "cosine",
        linkage: str = "mean",
        features: str = "tokens",
        proportional_attention: bool = False,
        backend: str = "auto",
        mass: str | None = None,
        total: int | None = None,
        inflect: float = 0.0,
        threshold: float | Sequence[float] | None = None,
        max_merges: int | None = None,
    ):
        super().__init__(layers)
        given = [knob for knob in (k, total, threshold) if knob is not None]
        if len(given) != 1:
            raise ValueError(f"k={k!r}, total={total!r}, threshold={threshold!r}: give exactly one of them")
        if threshold is None:
            check_k(given[0])
        elif mass is not None:
            raise ValueError(f"mass={mass!r} discounts distances, which then have no scale for a threshold")
        if max_merges is not None and threshold is None:
            raise ValueError(f"max_merges={max_merges!r}: it limits the merges by a threshold, and there is none")
        check_k(0 if max_merges is None else max_merges)
        if not isinstance(inflect, (int, float)) or not -1 <= inflect <= 1:
            raise ValueError(f"inflect={inflect!r}: it must be from -1 to 1")
        _check_options(connectivity, similarity, linkage, backend, features, mass)
        self.k, self.total, self.inflect = k, total, inflect
        self.threshold = list(threshold) if isinstance(threshold, Sequence) else threshold
        self.max_merges, self.adaptive = max_merges, threshold is not None
        self.options = {
            "connectivity": connectivity, "similarity": similarity, "linkage": linkage, "backend": backend,
        }  # fmt: skip
        self.features, self.mass = features, mass
        of_features = {"keys": {"keys"}, "attention_output": {"output"}}.get(features, set())
        self.needs = frozenset(of_features | ({"received"} if mass == "attention" else set()))
        self.proportional_attention = proportional_attention

    def attach(self, channels: int, n_prefix: int, grid: tuple[int, int], layers: tuple[int, ...]) -> None:
        super().attach(channels, n_prefix, grid, layers)
        thresholds = self.threshold if isinstance(self.threshold, list) else [self.threshold] * len(layers)
        numbers = all(isinstance(one, (int, float)) for one in thresholds)
        if self.adaptive and (not numbers or len(thresholds) != len(layers)):
            raise ValueError(f"threshold={self.threshold!r}: give one number, or one for each of {len(layers)} layers")

    def threshold_in(self, layer: int) -> float | None:
        """Return the threshold in a layer; None if merges are counted."""
        return self.threshold[self.schedule.index(layer)] if isinstance(self.threshold, list) else self.threshold

    def merges_in(self, layer: int) -> int | None:
        """Return the number of merges in a layer, with a threshold the most; None for no limit."""
        if self.adaptive:
            return self.max_merges
        if self.total is None:
            return self.k
        n_layers, place = len(self.schedule), self.schedule.index(layer)
        slope = self.inflect / (n_layers - 1) if n_layers > 1 else 0
        share = [1 + slope * (2 * i - n_layers + 1) for i in range(n_layers)]
        before, until = (round(self.total * sum(share[:end]) / n_layers) for end in (place, place + 1))
        return until - before

    def tokens_after(self, n_tokens: int, layer: int, grid: tuple[int, int]) -> int:
        return n_tokens if self.adaptive else after_merges(n_tokens, self.merges_in(layer), layer)

    def features_of(self, attention: Attention) -> Tensor | None:
        """Return what similarity is measured on, [B, N, F]; None for the tokens themselves."""
        if self.features == "keys":
            return attention.keys.transpose(1, 2).flatten(2)
        return attention.output if self.features == "attention_output" else None

    def merge_flops(self, n_tokens: int, n_merges: int, channels: int, grid: tuple[int, int]) -> int:
        """Count the FLOPs of merges in one layer, see :func:`dhtm.kernels.merge_flops`."""
        connectivity = self.options["connectivity"]
        if connectivity == "all":
            return kernels.merge_flops(n_tokens, n_merges, channels, 0, 0, kernels.ALL_PAIRS)
        n_pairs = len(grid_pairs(grid, connectivity))
        return kernels.merge_flops(n_tokens, n_merges, channels, n_pairs, grid[0] * grid[1], connectivity)

    def forward(self, tokens: Tensor, regions: Regions, attention: Attention) -> tuple[Tensor, Regions]:
        masses = None
        if self.mass is not None:
            masses = regions.sizes if self.mass == "size" else attention.received
            masses = masses.float().clamp_min(torch.finfo(torch.float32).tiny)
        k, threshold = self.merges_in(attention.layer), self.threshold_in(attention.layer)
        if threshold is not None:
            k = min(tokens.shape[1] if k is None else k, tokens.shape[1] - 1)
        return hierarchical_merge(
            tokens, k, regions, features=self.features_of(attention), masses=masses, threshold=threshold, **self.options
        )

    def extra_repr(self) -> str:
        if self.adaptive:
            knob = {"threshold": self.threshold, "max_merges": self.max_merges}
        else:
            knob = {"k": self.k} if self.total is None else {"total": self.total, "inflect": self.inflect}
        options = {**knob, "layers": self.layers, **self.options, "features": self.features, "mass": self.mass}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


class DHTMPlus(DHTM):
    """DHTM+: the variant of DHTM that changes a model's outputs least.

    It differs from the paper's method in three ways, which were chosen on images that are not tested on: merges in every
    layer, more in early ones; averages weighted by patches; and proportional attention.

    Args:
        total: merges over all layers; by default 100, or None with ``threshold``.
        options: any option of :class:`DHTM`.

    Raises:
        ValueError: as DHTM.
    """

    def __init__(
        self,
        total: int | None = None,
        layers: Sequence[int] | str = "all",
        connectivity: int | str = 8,
        similarity: str = "cosine",
        linkage: str = "size",
        features: str = "tokens",
        proportional_attention: bool = True,
        backend: str = "auto",
        mass: str | None = None,
        inflect: float = -1.0,
        threshold: float | Sequence[float] | None = None,
        max_merges: int | None = None,
    ):
        if total is None and threshold is None:
            total = 100
        super().__init__(
            layers=layers, connectivity=connectivity, similarity=similarity, linkage=linkage, features=features,
            proportional_attention=proportional_attention, backend=backend, mass=mass, total=total, inflect=inflect,
            threshold=threshold, max_merges=max_merges,
        )  # fmt: skip
