"""Backend ``reference``: Algorithm 1 as :mod:`dhtm.merge` states it, image by image."""

import torch

from dhtm.kernels import ALL_PAIRS
from dhtm.merge import algorithm_1
from dhtm.regions import grid_pairs


def merge(tokens, features, masses, regions, k, connectivity, similarity, linkage, threshold):
    """Make k merges in each image of a batch; arguments and results are those of every backend, see :mod:`dhtm.kernels`."""
    batch, n, channels = tokens.shape
    adjacent = None
    if connectivity != ALL_PAIRS:
        adjacent = {tuple(pair) for pair in grid_pairs(regions.grid, connectivity).tolist()}
    wide = torch.promote_types(tokens.dtype, torch.float32)
    merged = torch.zeros(batch, n - k if threshold is None else n, channels, dtype=wide)
    token_map, weights = torch.empty(batch, n, dtype=torch.int64), torch.empty(batch, n)
    for image in range(batch):
        patches = [set() for _ in range(n)]
        for patch, token in enumerate(regions.assignment[image].tolist()):
            patches[token].add(patch)
        measured = None if features is None else list(features[image].cpu().to(wide))
        new, members = algorithm_1(
            list(tokens[image].cpu().to(wide)), patches, k, adjacent, similarity, linkage, measured,
            None if masses is None else masses[image].tolist(), threshold,
        )  # fmt: skip
        merged[image, : len(new)] = torch.stack(new)
        for place, averaged in enumerate(members):
            for token, weight in averaged.items():
                token_map[image, token], weights[image, token] = place, weight
    return merged.to(tokens), token_map.to(tokens.device), weights.to(tokens.device)
