"""Thresholds for each layer, found on images without labels."""

import bisect

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dhtm.merge import DHTM, hierarchical_merge
from dhtm.reducer import Attention
from dhtm.regions import Regions
from dhtm.vit import patch, tokens_of_images, unpatch

_STEPS = 10_000  # thresholds are found to four places
NEVER = 2.0  # which no cosine reaches


@torch.no_grad()
def find_thresholds(
    model: VisionTransformer, reducer: DHTM, images: Tensor, share: float = 1.0
) -> tuple[list[float], Tensor]:
    """Find thresholds with which each layer makes, on average over images, as many merges as with a reducer that counts them.

    An image of large similar areas then merges more, and one of many details less, for the same mean.

    Args:
        model: not patched, in evaluation mode.
        reducer: with k or total, and similarity "cosine".
        images: [B, C, H, W], normalised and on the model's device. They go through the model as one batch; a few hundred
            are enough.
        share: of the reducer's merges that are wanted.

    Returns:
        The thresholds of the layers that reduce, for :class:`dhtm.DHTM` with the same options; 2, which no cosine reaches,
        for a layer that is to make no merge. And the patch tokens of each image after each layer, int64 [B, depth].

    Raises:
        ValueError: the reducer has a threshold itself, another similarity, or masses.
    """
    if reducer.adaptive or reducer.options["similarity"] != "cosine" or reducer.mass is not None:
        raise ValueError(
            f"{reducer}: thresholds are found for a reducer with k or total, similarity='cosine' and mass=None"
        )
    search = _Search(reducer, share)
    patch(model, search)
    try:
        model(images)
        return search.threshold, tokens_of_images(model)
    finally:
        unpatch(model)


class _Search(DHTM):
    """Finds the threshold of each layer when its tokens arrive, and applies it, so that later layers see the result."""

    def __init__(self, counted: DHTM, share: float):
        same = {"features": counted.features, "proportional_attention": counted.proportional_attention}
        super().__init__(threshold=NEVER, layers=counted.layers, **same, **counted.options)
        self.counted, self.share = counted, share

    def attach(self, channels: int, n_prefix: int, grid: tuple[int, int], layers: tuple[int, ...]) -> None:
        self.threshold = [NEVER] * len(layers)
        self.counted.attach(channels, n_prefix, grid, layers)
        super().attach(channels, n_prefix, grid, layers)

    def forward(self, tokens: Tensor, regions: Regions, attention: Attention) -> tuple[Tensor, Regions]:
        wanted = self.share * self.counted.merges_in(attention.layer)

        def merges(step: int) -> float:
            options = {"features": self.features_of(attention), "threshold": step / _STEPS, **self.options}
            after = hierarchical_merge(tokens, tokens.shape[1] - 1, regions, **options)[1]
            return (regions.n_tokens_of_images - after.n_tokens_of_images).float().mean().item()

        if wanted > 0:
            width = 1  # first from the top in growing strides, because low thresholds take long
            while width < 2 * _STEPS and merges(_STEPS - width) <= wanted:
                width *= 2
            steps = range(max(_STEPS - width, -_STEPS), _STEPS + 1 - width // 2)
            found = steps[min(bisect.bisect_left(steps, -wanted, key=lambda step: -merges(step)), len(steps) - 1)]
            self.threshold[self.schedule.index(attention.layer)] = found / _STEPS
        return super().forward(tokens, regions, attention)
