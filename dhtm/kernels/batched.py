"""Backend ``torch``: the merges of a whole batch at once, in plain PyTorch, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dhtm.regions import Regions, contract, renumber

# Similarities below this are not told apart, so that NaN and -inf stay mergeable: only what is not an adjacent pair is -inf.
_LOWEST = torch.finfo(torch.float32).min
KINDS = {"cosine": 0, "euclidean": 1, "manhattan": 2, "kl": 3}  # what compiled code calls the similarities
_CHUNK = 64  # edges of an image whose ends are held at once, in float64, while the first similarities are computed


def merge(
    tokens: Tensor, features: Tensor | None, regions: Regions, k: int, connectivity: int, similarity: str, linkage: str
) -> tuple[Tensor, Tensor, Tensor]:
    """k merges in each image of a batch; arguments and results as of every backend, see :mod:`dhtm.kernels`.

    The edges of the region adjacency graph are the pairs of adjacent patches, each end named by the token that the
    patch is in. A merge renames one end; an edge with both ends in one token is dead.

    Raises:
        ValueError: an image runs out of adjacent tokens before k merges are made.
    """
    batch, n, channels = tokens.shape
    wide = torch.promote_types(tokens.dtype, torch.float32)
    # One tensor holds what similarity is measured on and, where that is something else, the tokens behind it.
    carried = tokens.to(wide) if features is None else torch.cat([features.to(wide), tokens.to(wide)], dim=-1)
    carried = carried.clone()
    measured = channels if features is None else features.shape[-1]
    described = _describe(carried[..., :measured], similarity)

    low, high = regions.adjacent_tokens(connectivity).unbind(-1)
    scores = _edge_scores(described, low, high, similarity)
    scores.masked_fill_(low == high, -torch.inf)
    sizes = regions.sizes.clone()
    owner = torch.arange(n, device=tokens.device).repeat(batch, 1)
    weights = torch.ones(batch, n, dtype=torch.float32, device=tokens.device)
    image = torch.arange(batch, device=tokens.device)
    stuck = torch.zeros(batch, 1, dtype=torch.bool, device=tokens.device)

    for _ in range(k):
        # The best score; among equals the lexicographically smallest pair.
        best = scores.amax(dim=1, keepdim=True)
        pair = torch.where(scores == best, low * n + high, n * n).amin(dim=1, keepdim=True)
        stuck = stuck | best.isneginf()
        i, j = pair // n, pair % n
        at_i, at_j = (image, i[:, 0]), (image, j[:, 0])

        n_i, n_j = (1, 1) if linkage == "mean" else (sizes[at_i][:, None], sizes[at_j][:, None])
        # Products of float32 and small integers are exact in float64: every backend rounds alike, fused or not.
        new = ((carried[at_i].double() * n_i + carried[at_j].double() * n_j) / (n_i + n_j)).to(wide)
        carried[at_i] = new
        sizes[at_i] += sizes[at_j]
        joined = (owner == i) | (owner == j)
        owner = torch.where(joined, i, owner)
        if linkage == "mean":
            weights = torch.where(joined, weights / 2, weights)

        low, high = contract(low, high, i, j)
        described[at_i] = _describe(new[:, :measured], similarity)
        to_new = _scores_to(described[at_i], described, similarity)
        touched = (low == i) | (high == i)
        scores = torch.where(touched, to_new.gather(1, torch.where(touched, low + high - i, low)), scores)
        scores.masked_fill_(low == high, -torch.inf)

    if not torch.onnx.is_in_onnx_export() and stuck.any():
        raise_runs_out(k, int(stuck[:, 0].nonzero()[0]))
    token_map = renumber(owner)
    slots = torch.empty(batch, n - k, dtype=torch.int64, device=tokens.device).scatter_(1, token_map, owner)
    merged = carried[..., -channels:].gather(1, slots[..., None].expand(-1, -1, channels))
    if linkage == "size":
        weights = torch.where(
            regions.sizes > 0, regions.sizes / sizes.gather(1, owner), 1
        )  # a token without a patch is alone
    return merged.to(tokens.dtype), token_map, weights.to(torch.float32)


def draw(regions: Regions, image_ids: Tensor, k: int, connectivity: int, seed: int) -> tuple[Tensor, Tensor]:
    """k merges at random in each image of a batch; arguments and results as of every backend, see :mod:`dhtm.kernels`.

    Every adjacent pair of tokens draws a lot at every merge, and the highest wins. Where two tokens touch in several places
    their pair is listed as often, but always with the same lot: the draw is uniform over pairs.

    Raises:
        ValueError: an image runs out of adjacent tokens before k merges are made.
    """
    batch, n = regions.sizes.shape
    low, high = regions.adjacent_tokens(connectivity).unbind(-1)
    owner = torch.arange(n, device=low.device).repeat(batch, 1)
    weights = torch.ones(batch, n, dtype=torch.float32, device=low.device)
    stuck = torch.zeros(batch, 1, dtype=torch.bool, device=low.device)
    # n - step counts down over all layers, so no two draws of an image share their key.
    steps = torch.arange(n, n - k, -1, device=low.device)
    state = _hashed(_hashed(_hashed(torch.zeros_like(low[:1, :1]), seed), image_ids[:, None]), steps)
    for step in range(k):
        lots = _hashed(state[:, step : step + 1], low * n + high) & (2**62 - 1)
        best, drawn = torch.where(low == high, -1, lots).max(dim=1, keepdim=True)
        stuck = stuck | (best < 0)
        i, j = low.gather(1, drawn), high.gather(1, drawn)
        joined = (owner == i) | (owner == j)
        owner = torch.where(joined, i, owner)
        weights = torch.where(joined, weights / 2, weights)
        low, high = contract(low, high, i, j)
    if stuck.any():
        raise_runs_out(k, int(stuck[:, 0].nonzero()[0]))
    return renumber(owner), weights


def _hashed(state: Tensor, key: Tensor | int) -> Tensor:
    """One more key into a hash: SplitMix64's finaliser (Steele et al. 2014) in wrapping int64, logical shifts by masking."""
    state = state + key + -7046029254386353131
    state = (state ^ ((state >> 30) & (2**34 - 1))) * -4658895280553007687
    state = (state ^ ((state >> 27) & (2**37 - 1))) * -7723592293110705685
    return state ^ ((state >> 31) & (2**33 - 1))


def raise_runs_out(k: int, image: int) -> None:
    """For regions of which some touch no other: soft methods leave tokens that no patch is in."""
    raise ValueError(f"k={k} merges, but image {image} of the batch runs out of adjacent tokens before that")


def _describe(features: Tensor, similarity: str) -> Tensor:
    """What two tokens are compared by: unit vectors, log-probabilities, or the features themselves; float64."""
    features = features.double()
    if similarity == "cosine":
        return F.normalize(features, dim=-1, eps=torch.finfo(torch.float64).tiny)
    return features.log_softmax(dim=-1) if similarity == "kl" else features


def _score(a: Tensor, b: Tensor, similarity: str) -> Tensor:
    """Similarity of described tokens [..., D] and [..., D], which broadcast: float32 [...].

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
    """Similarity of one described token per image, [B, D], to all of them, [B, N, D]: float32 [B, N]."""
    if similarity == "cosine":  # the same sum as in _score, without a temporary of B·N·D
        return _mergeable((described @ new[..., None]).squeeze(-1))
    return _score(new[:, None], described, similarity)


def _mergeable(score: Tensor) -> Tensor:
    return torch.nan_to_num(score.float(), nan=_LOWEST, posinf=-_LOWEST, neginf=_LOWEST)


def _edge_scores(described: Tensor, low: Tensor, high: Tensor, similarity: str) -> Tensor:
    """Similarity across every edge: float32 [B, E]; a few edges at a time, so that memory stays bounded."""

    def ends(tokens):
        return described.gather(1, tokens[..., None].expand(-1, -1, described.shape[2]))

    chunks = [slice(first, first + _CHUNK) for first in range(0, max(1, low.shape[1]), _CHUNK)]
    return torch.cat([_score(ends(low[:, part]), ends(high[:, part]), similarity) for part in chunks], dim=1)
