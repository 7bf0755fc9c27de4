"""Measure the paper's premise: do close patches share more information than distant ones?

Distances are Chebyshev distances on the grid of patches, so all neighbours, including diagonal ones, have distance 1.
"""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from dhtm.harness.core.devices import exact, pick_batch_size, pick_device
from dhtm.harness.core.errors import UserError
from dhtm.harness.data.splits import batches, open_split
from dhtm.harness.models.backbones import Backbone
from dhtm.harness.models.methods import UNMERGED, Method
from dhtm.harness.runs.metrics import bootstrap_interval, kl_divergence
from dhtm.reducer import Attention, Reducer, merge_into
from dhtm.regions import Regions, grid_pairs
from dhtm.vit import image_ids, patch, patch_grid, regions, unpatch

MODES = ("most similar", "random")  # which pair at a distance is merged


@dataclass(frozen=True)
class Premise:
    """The settings of scripts/premise.py, which ``configs/premise.yaml`` explains.

    Attributes:
        methods: off the shelf, by their names, with their knobs solved.
    """

    backbone: Backbone
    data: Any
    methods: Annotated[dict[str, Method], Field(min_length=1)]
    n_images: PositiveInt = 256
    layer: PositiveInt = 4
    distances: Annotated[list[PositiveInt], Field(min_length=1)] = dataclasses.field(
        default_factory=lambda: [1, 2, 4, 8]
    )
    batch_size: PositiveInt | None = None
    num_workers: NonNegativeInt | None = None
    device: str = "auto"
    seed: NonNegativeInt = 0
    output_dir: Path = Path("results/premise")

    def __post_init__(self):
        for name, method in self.methods.items():
            if method.checkpoint is not None:
                raise UserError(
                    f"method={name}: it needs weights trained with it; choose among the methods that need no training"
                )


class SimilarityProbe(Reducer):
    """Merges nothing; ``similarity`` holds for each layer the mean cosine similarity of tokens by distance, [B, distances]."""

    def __init__(self):
        super().__init__("all")
        self.similarity: dict[int, Tensor] = {}

    def tokens_after(self, n_tokens: int, layer: int, grid: tuple[int, int]) -> int:
        return n_tokens

    def forward(self, tokens: Tensor, regions: Regions, attention: Attention) -> tuple[Tensor, Regions]:
        unit = normalize(tokens.float(), dim=-1)
        similarity, distance = unit @ unit.transpose(1, 2), grid_distances(regions.grid).to(tokens.device)
        by_distance = [similarity[:, distance == d].mean(dim=1) for d in range(1, int(distance.max()) + 1)]
        self.similarity[attention.layer] = torch.stack(by_distance, dim=1).cpu()
        return tokens, regions


class OnePair(Reducer):
    """Merges one pair of patches at a distance into its average.

    Args:
        layer: the layer that merges, from 1.
        distance: on the grid.
        mode: "most similar", or "random", drawn from the seed and the image.
    """

    def __init__(self, layer: int, distance: int, mode: Literal[MODES], seed: int = 0):
        super().__init__((layer,))
        self.distance, self.mode, self.seed = distance, mode, seed

    def tokens_after(self, n_tokens: int, layer: int, grid: tuple[int, int]) -> int:
        return n_tokens - 1

    def forward(self, tokens: Tensor, regions: Regions, attention: Attention) -> tuple[Tensor, Regions]:
        n = tokens.shape[1]
        allowed = (grid_distances(regions.grid) == self.distance).triu()
        if self.mode == "random":
            draws = [
                np.random.default_rng([self.seed, int(i)]).random((n, n), dtype=np.float32) for i in self.image_ids
            ]
            score = torch.from_numpy(np.stack(draws)).to(tokens.device)
        else:
            unit = normalize(tokens.float(), dim=-1)
            score = unit @ unit.transpose(1, 2)
        best = score.masked_fill(~allowed.to(tokens.device), -torch.inf).flatten(1).argmax(dim=1)
        return merge_into(tokens, regions, merged=best[:, None] % n, into=best[:, None] // n)


def grid_distances(grid: tuple[int, int]) -> Tensor:
    """Return the Chebyshev distance between all patches of a grid: int64 [P, P]."""
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))
    return (places[:, None] - places[None]).abs().amax(dim=-1)


def region_statistics(found: Regions) -> dict[str, np.ndarray]:
    """Return statistics of each image's regions, [B] each.

    ``distance`` is the mean distance of two patches in one token and ``adjacent_pct`` the share of such pairs that touch, NaN
    where nothing was merged; ``largest`` is the size of the largest region, ``merged_pct`` the share of patches that are not
    alone, ``pieces`` the number of connected pieces (diagonals count) per token, 1 where all tokens are connected regions.
    """
    assignment, distance = found.assignment.cpu(), grid_distances(found.grid)
    together = (assignment[:, :, None] == assignment[:, None]) & (distance > 0)
    n_pairs = together.sum(dim=(1, 2))
    share = torch.gather(found.sizes.cpu(), 1, assignment)
    low, high = grid_pairs(found.grid, 8).T.numpy()
    pieces = []
    for image in assignment.numpy():
        inside = image[low] == image[high]
        graph = coo_array((np.ones(inside.sum()), (low[inside], high[inside])), shape=(len(image),) * 2)
        pieces.append(connected_components(graph, directed=False)[0] / len(np.unique(image)))
    return {
        "distance": ((together * distance).sum(dim=(1, 2)) / n_pairs).numpy(),
        "adjacent_pct": (100 * (together & (distance == 1)).sum(dim=(1, 2)) / n_pairs).numpy(),
        "largest": found.sizes.amax(dim=1).cpu().numpy().astype(float),
        "merged_pct": (100 * (share > 1).float().mean(dim=1)).numpy(),
        "pieces": np.array(pieces),
    }


def measure(premise: Premise) -> dict[str, pd.DataFrame]:
    """Measure all three parts.

    Returns:
        "similarity": layer, distance, mean cosine similarity of the unmerged model's tokens after attention; "regions":
        method, quantity of :func:`region_statistics`, mean; "one_merge": mode, distance, mean KL(unmerged ‖ merged) in nats
        if one such pair is merged. Each has the ends of the 95% interval over images, low and high.
    """
    device = pick_device(premise.device)
    size = premise.batch_size or pick_batch_size(device)
    model = copy.deepcopy(premise.backbone.load()).to(device)
    grid = patch_grid(model)
    if max(premise.distances) >= max(grid):
        raise UserError(
            f"distances={premise.distances}: in a grid of {grid[0]}×{grid[1]} none is above {max(grid) - 1}"
        )
    if premise.layer > len(model.blocks):
        raise UserError(f"layer={premise.layer}: {premise.backbone.name} has layers 1 to {len(model.blocks)}")
    split = open_split(premise.data, premise.data.split, resolve_data_config(model=model), model.num_classes)
    chosen = np.linspace(0, len(split.dataset) - 1, min(premise.n_images, len(split.dataset)), dtype=int)
    groups = None if split.groups is None else split.groups[chosen]

    def summary(values: np.ndarray) -> dict[str, float]:
        known = np.isfinite(values)
        low, high = bootstrap_interval(values[known], None if groups is None else groups[known])
        return {"mean": float(values[known].mean()), "low": low, "high": high}

    @torch.inference_mode()
    def forwards(reducer: Reducer, look: Callable[[VisionTransformer, Tensor], Any], title: str) -> list[Any]:
        """Return the results of ``look`` on the patched model and its outputs, one per batch."""
        patch(model, reducer)
        loaded, results = batches(split, chosen.tolist(), size, device, premise.num_workers), []
        for ids, images, _ in tqdm(loaded, title, total=-(-len(chosen) // size), leave=False, disable=None):
            with image_ids(model, ids), exact(device):
                outputs = model(images)
            results.append(look(model, outputs))
        unpatch(model)
        return results

    probe = SimilarityProbe()
    seen = forwards(probe, lambda *_: dict(probe.similarity), "similarity")
    similarity = [
        {"layer": layer, "distance": d + 1, **summary(values[:, d])}
        for layer in seen[0]
        for values in [torch.cat([batch[layer] for batch in seen]).numpy()]
        for d in range(values.shape[1])
    ]
    looks = []
    for name, method in premise.methods.items():
        parts = forwards(method.reducer(), lambda patched, _: region_statistics(regions(patched)), f"regions: {name}")
        for quantity in parts[0]:
            values = np.concatenate([part[quantity] for part in parts])
            if np.isnan(values).all():
                raise UserError(
                    f"method={name}: it merges nothing in these images; set another target, or remove it from methods"
                )
            looks.append({"method": name, "quantity": quantity, **summary(values)})

    def log_p(_, logits: Tensor) -> Tensor:
        return logits.float().log_softmax(dim=1).cpu()

    unmerged, costs = torch.cat(forwards(UNMERGED.reducer(), log_p, "unmerged")), []
    for mode in MODES:
        for d in premise.distances:
            reducer = OnePair(premise.layer, d, mode, premise.seed)
            merged = torch.cat(forwards(reducer, log_p, f"one merge: {mode}, distance {d}"))
            costs.append({"mode": mode, "distance": d, **summary(kl_divergence(unmerged, merged).numpy())})
    frames = {"similarity": similarity, "regions": looks, "one_merge": costs}
    return {name: pd.DataFrame(rows).assign(n_images=len(chosen)) for name, rows in frames.items()}
