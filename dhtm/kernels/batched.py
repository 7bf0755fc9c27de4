"""Backend ``torch``: the merges of a whole batch at once, in plain PyTorch, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dhtm.kernels import ALL_PAIRS
from dhtm.regions import Regions, contract, renumber

# The similarity of pairs with NaN or -inf, which can still be merged: -inf marks what is not an adjacent pair.
_LOWEST = torch.finfo(torch.float32).min
_CHUNK = 64  # edges of an image whose two tokens are in memory at once, in float64, for the first similarities


def merge(tokens, features, masses, regions, k, connectivity, similarity, linkage, threshold):
    """Make k merges in each image of a batch; arguments and results are those of every backend, see :mod:`dhtm.kernels`."""
    batch, n, channels = tokens.shape
    wide = torch.promote_types(tokens.dtype, torch.float32)
    # One tensor holds the features that similarity is measured on and, if these are not the tokens, the tokens after them.
    carried = tokens.to(wide) if features is None else torch.cat([features.to(wide), tokens.to(wide)], dim=-1)
    carried = carried.clone()
    measured = channels if features is None else features.shape[-1]
    described = _describe(carried[..., :measured], similarity)
    if connectivity == ALL_PAIRS:
        scores = discount(_all_scores(described, similarity), similarity, masses)
        pairs = _AllPairs(scores, regions.sizes > 0)
    else:
        pairs = _GridPairs(regions, connectivity, described, similarity, masses)

    masses = None if masses is None else masses.double()
    sizes = regions.sizes.clamp(min=1)  # where no pair is left, a token without a patch may be merged with itself
    owner = torch.arange(n, device=tokens.device).repeat(batch, 1)
    weights = torch.ones(batch, n, dtype=torch.float32, device=tokens.device)
    image = torch.arange(batch, device=tokens.device)
    going = torch.ones(batch, 1, dtype=torch.bool, device=tokens.device)  # images that have not met the threshold
    for _ in range(k):
        best, i, j = pairs.best()
        if threshold is not None:
            going = going & (best >= threshold)
            j = torch.where(going, j, i)  # a token merged with itself stays what it is
        at_i, at_j = (image, i[:, 0]), (image, j[:, 0])
        n_i, n_j = (1, 1) if linkage == "mean" else (sizes[at_i][:, None], sizes[at_j][:, None])
        # Products of float32 and small integers are exact in float64: every backend rounds alike, fused or not.
        new = ((carried[at_i].double() * n_i + carried[at_j].double() * n_j) / (n_i + n_j)).to(wide)
        carried[at_i] = new
        sizes[at_i] += torch.where(going, sizes[at_j][:, None], 0)[:, 0]
        joined = going & ((owner == i) | (owner == j))
        owner = torch.where(joined, i, owner)
        if linkage == "mean":
            weights = torch.where(joined, weights / 2, weights)
        described[at_i] = _describe(new[:, :measured], similarity)
        to_new = _scores_to(described[at_i], described, similarity)
        if masses is not None:
            masses = masses.scatter_add(1, i, masses.gather(1, j))
            to_new = _discount(to_new, similarity, masses.gather(1, i), masses)
        pairs.contract(i, j, to_new)

    token_map = renumber(owner)
    n_rows = n - k if threshold is None else n
    slots = torch.zeros(batch, n_rows, dtype=torch.int64, device=tokens.device).scatter_(1, token_map, owner)
    merged = carried[..., -channels:].gather(1, slots[..., None].expand(-1, -1, channels))
    if threshold is not None:
        used = torch.arange(n, device=tokens.device) <= token_map.amax(dim=1, keepdim=True)
        merged = merged.masked_fill(~used[..., None], 0)
    if linkage == "size":
        shares = regions.sizes / sizes.gather(1, owner)
        weights = torch.where(regions.sizes > 0, shares, 1)  # a token without a patch is never merged
    return merged.to(tokens.dtype), token_map, weights.to(torch.float32)


def agglomerate(features: Tensor, k: int, linkage: str) -> Tensor:
    """Merge clusters k times in each image; arguments and result are those of every backend, see :mod:`dhtm.kernels`."""
    batch, n, _ = features.shape
    owner = torch.arange(n, device=features.device).repeat(batch, 1)
    counts = torch.ones_like(owner)
    pairs = _AllPairs(all_similarities(features, "cosine").double() - 1, torch.ones_like(owner, dtype=torch.bool))
    for _ in range(k):
        _, i, j = pairs.best()
        to_i, to_j = pairs.scores_of(i), pairs.scores_of(j)
        if linkage == "single":
            new = torch.maximum(to_i, to_j)
        elif linkage == "complete":
            new = torch.minimum(to_i, to_j)
        else:
            n_i, n_j = counts.gather(1, i), counts.gather(1, j)
            new = (n_i * to_i + n_j * to_j) / (n_i + n_j)
        counts = counts.scatter_add(1, i, counts.gather(1, j))
        owner = torch.where(owner == j, i, owner)
        pairs.contract(i, j, new)
    return renumber(owner)


def draw(regions: Regions, image_ids: Tensor, k: int, connectivity: int, seed: int) -> tuple[Tensor, Tensor]:
    """Make k merges at random in each image; arguments and results are those of every backend, see :mod:`dhtm.kernels`.

    Every adjacent pair of tokens draws a lot at every merge, and the highest wins. A pair that touches in several places
    is listed several times, always with the same lot, so the draw is uniform over pairs.
    """
    batch, n = regions.sizes.shape
    low, high = regions.adjacent_tokens(connectivity).unbind(-1)
    owner = torch.arange(n, device=low.device).repeat(batch, 1)
    weights = torch.ones(batch, n, dtype=torch.float32, device=low.device)
    # n - step counts down over all layers, so no two draws of an image share their key.
    steps = torch.arange(n, n - k, -1, device=low.device)
    state = _hash(_hash(_hash(torch.zeros_like(low[:1, :1]), seed), image_ids[:, None]), steps)
    for step in range(k):
        lots = _hash(state[:, step : step + 1], low * n + high) & (2**62 - 1)
        drawn = torch.where(low == high, -1, lots).argmax(dim=1, keepdim=True)
        i, j = low.gather(1, drawn), high.gather(1, drawn)
        joined = (owner == i) | (owner == j)
        owner = torch.where(joined, i, owner)
        weights = torch.where(joined, weights / 2, weights)
        low, high = contract(low, high, i, j)
    return renumber(owner), weights


class _GridPairs:
    """The adjacent pairs of tokens and their scores, as edges of the region adjacency graph.

    The edges are the pairs of adjacent patches, each end named by the token that the patch is in. A merge renames one
    end; an edge with both ends in one token is dead.
    """

    def __init__(self, regions: Regions, connectivity: int, described: Tensor, similarity: str, masses: Tensor | None):
        self.n_tokens = regions.n_tokens
        self.low, self.high = regions.adjacent_tokens(connectivity).unbind(-1)
        self.scores = _edge_scores(described, self.low, self.high, similarity)
        if masses is not None:
            ends = (masses.double().gather(1, end) for end in (self.low, self.high))
            self.scores = _discount(self.scores, similarity, *ends)
        self.scores.masked_fill_(self.low == self.high, -torch.inf)

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best score, [B, 1], and the lexicographically smallest pair i < j that has it."""
        n = self.n_tokens
        best = self.scores.amax(dim=1, keepdim=True)
        pair = torch.where(self.scores == best, self.low * n + self.high, n * n).amin(dim=1, keepdim=True)
        return best, pair // n, pair % n

    def contract(self, i: Tensor, j: Tensor, to_new: Tensor) -> None:
        """Merge token j into i, [B, 1] each; to_new [B, N] are the scores of the new token with all others."""
        self.low, self.high = low, high = contract(self.low, self.high, i, j)
        touched = (low == i) | (high == i)
        self.scores = torch.where(touched, to_new.gather(1, torch.where(touched, low + high - i, low)), self.scores)
        self.scores.masked_fill_(low == high, -torch.inf)


class _AllPairs:
    """All pairs of tokens and their scores.

    Args:
        scores: [B, N, N], symmetric; only the upper triangle is read.
        alive: bool [B, N], the tokens that can be merged; changed in place.
    """

    def __init__(self, scores: Tensor, alive: Tensor):
        self.places = torch.arange(scores.shape[1], device=scores.device)
        self.image = torch.arange(scores.shape[0], device=scores.device)
        self.alive = alive
        pairs = (self.places[:, None] < self.places) & alive[:, :, None] & alive[:, None]
        self.scores = torch.where(pairs, scores, -torch.inf)

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best score, [B, 1], and the lexicographically smallest pair i < j that has it."""
        rows = self.scores.amax(dim=2)
        best = rows.amax(dim=1, keepdim=True)
        last = len(self.places) - 1
        i = torch.where(rows == best, self.places, last).amin(dim=1, keepdim=True)
        row = self.scores[self.image, i[:, 0]]
        j = torch.where(row == best, self.places, last).amin(dim=1, keepdim=True)
        return best, i, j

    def scores_of(self, token: Tensor) -> Tensor:
        """Return the scores [B, N] of one token per image, [B, 1], with all others; -inf with itself and dead tokens."""
        return torch.maximum(self.scores[self.image, token[:, 0]], self.scores[self.image, :, token[:, 0]])

    def contract(self, i: Tensor, j: Tensor, to_new: Tensor) -> None:
        """Merge token j into i, [B, 1] each; to_new [B, N] are the scores of the new token with all others."""
        at_i, at_j = i[:, 0], j[:, 0]
        self.alive[self.image, at_j] = False
        to_new = torch.where(self.alive, to_new, -torch.inf)
        self.scores[self.image, at_j] = -torch.inf
        self.scores[self.image, :, at_j] = -torch.inf
        self.scores[self.image, at_i] = torch.where(self.places > i, to_new, -torch.inf)
        self.scores[self.image, :, at_i] = torch.where(self.places < i, to_new, -torch.inf)


def _hash(state: Tensor, key: Tensor | int) -> Tensor:
    """Hash one more key: SplitMix64's finaliser (Steele et al. 2014) in wrapping int64, logical shifts by masking."""
    state = state + key + -7046029254386353131
    state = (state ^ ((state >> 30) & (2**34 - 1))) * -4658895280553007687
    state = (state ^ ((state >> 27) & (2**37 - 1))) * -7723592293110705685
    return state ^ ((state >> 31) & (2**33 - 1))


def all_similarities(features: Tensor, similarity: str) -> Tensor:
    """Return the similarities of all pairs of features [B, N, F]: float32 [B, N, N], only the upper triangle is exact."""
    return _all_scores(_describe(features, similarity), similarity)


def _describe(features: Tensor, similarity: str) -> Tensor:
    """Return what two tokens are compared by, in float64: unit vectors, log-probabilities, or the features themselves."""
    features = features.double()
    if similarity == "cosine":
        return F.normalize(features, dim=-1, eps=torch.finfo(torch.float64).tiny)
    return features.log_softmax(dim=-1) if similarity == "kl" else features


def _score(a: Tensor, b: Tensor, similarity: str) -> Tensor:
    """Compute the similarity of described tokens [..., D] and [..., D], which broadcast: float32 [...].

    Sums run in float64 and are rounded to float32 once, so that the order of summation, which differs between backends
    and batch sizes, does not decide which of two nearly equal pairs is merged.
    """
    if similarity == "cosine":
        score = (a * b).sum(-1)
    elif similarity == "euclidean":
        score = -(a - b).square().sum(-1).sqrt()
    elif similarity == "manhattan":
        score = -(a - b).abs().sum(-1)
    else:  # Jensen's symmetric form: KL(p‖q) + KL(q‖p) = Σ (p - q)(log p - log q)
        score = -0.5 * ((a.exp() - b.exp()) * (a - b)).sum(-1)
    return _mergeable(score)


def _scores_to(new: Tensor, described: Tensor, similarity: str) -> Tensor:
    """Compute the similarity of one described token per image, [B, D], to all of them, [B, N, D]: float32 [B, N]."""
    if similarity == "cosine":  # the same sum as in _score, without a temporary of B·N·D
        return _mergeable((described @ new[..., None]).squeeze(-1))
    return _score(new[:, None], described, similarity)


def _all_scores(described: Tensor, similarity: str) -> Tensor:
    """Compute the similarity of all pairs of described tokens [B, N, D]: float32 [B, N, N]."""
    if similarity == "cosine":
        return _mergeable(described @ described.transpose(1, 2))
    rows = [_scores_to(token, described, similarity) for token in described.unbind(1)]  # so that memory stays bounded
    return torch.stack(rows, dim=1)


def discount(scores: Tensor, similarity: str, masses: Tensor | None) -> Tensor:
    """Discount the scores of all pairs of tokens, [B, N, N], by their masses [B, N]; None changes nothing."""
    if masses is None:
        return scores
    masses = masses.double()
    return _discount(scores, similarity, masses[:, :, None], masses[:, None])


def _discount(score: Tensor, similarity: str, mass: Tensor, other: Tensor) -> Tensor:
    """Multiply distances by m₁m₂ / (m₁ + m₂), where masses are float64: float32, as :func:`dhtm.merge.discount`."""
    distance = score.double() - (1 if similarity == "cosine" else 0)
    return _mergeable(distance * (mass * other / (mass + other)))


def _mergeable(score: Tensor) -> Tensor:
    return torch.nan_to_num(score.float(), nan=_LOWEST, posinf=-_LOWEST, neginf=_LOWEST)


def _edge_scores(described: Tensor, low: Tensor, high: Tensor, similarity: str) -> Tensor:
    """Compute the similarity across every edge, float32 [B, E], a few edges at a time so that memory stays bounded."""

    def ends(tokens):
        return described.gather(1, tokens[..., None].expand(-1, -1, described.shape[2]))

    chunks = [slice(first, first + _CHUNK) for first in range(0, max(1, low.shape[1]), _CHUNK)]
    return torch.cat([_score(ends(low[:, part]), ends(high[:, part]), similarity) for part in chunks], dim=1)
