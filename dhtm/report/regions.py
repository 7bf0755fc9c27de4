"""Pictures of images and of the regions that a model merged their patches into."""

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import dhtm
from dhtm.harness.data.splits import Split, UnreadableError
from dhtm.harness.runs.predict import mask
from dhtm.regions import Regions
from dhtm.vit import image_ids

BORDER = (230, 159, 0)  # the paper's orange, DHTM's colour in the figures
MIN_HEIGHT = 224  # of a picture; smaller images are enlarged by whole numbers
GAP = 8  # white pixels between the parts of a strip
N_STAGES = 3  # layers that a strip shows at most


def draw_regions(image: np.ndarray, regions: Regions, index: int = 0) -> np.ndarray:
    """An image with every region in its mean colour, and borders between regions.

    Args:
        image: uint8 [H, W, 3].
        regions: of the batch that the image is in.
        index: of the image in the batch.

    Returns:
        uint8 [H, W, 3].
    """
    height, width, _ = image.shape
    rows, columns = np.arange(height) * regions.grid[0] // height, np.arange(width) * regions.grid[1] // width
    assignment = regions.assignment[index].cpu().numpy().reshape(regions.grid)
    token = assignment[rows[:, None], columns]
    n_pixels = np.bincount(token.ravel(), minlength=regions.n_tokens).clip(1)
    sums = [np.bincount(token.ravel(), image[..., c].ravel(), minlength=regions.n_tokens) for c in range(3)]
    drawn = (np.stack(sums, axis=-1) / n_pixels[:, None])[token].round().astype(np.uint8)
    across, down = token[:, 1:] != token[:, :-1], token[1:] != token[:-1]
    border = np.zeros((height, width), dtype=bool)
    border[:, 1:] |= across
    border[1:] |= down
    drawn[border] = BORDER
    return drawn


@torch.inference_mode()
def sample_regions(model: VisionTransformer, split: Split, n_images: int = 6) -> list[tuple[Image.Image, str]]:
    """The first images of a split, each beside its regions after some of the layers that merge, and a caption.

    Args:
        model: a patched model; one that merges nothing has no pictures.
        split: of which images that cannot be read are passed over.
        n_images: that are looked at.
    """
    weight = next(model.parameters())
    images = _readable(split, n_images)
    if not images:
        return []
    ids, labels = torch.tensor([i for i, _, _ in images]), [label for _, _, label in images]
    batch = torch.stack([image for _, image, _ in images])
    with image_ids(model, ids):
        logits = model.eval()(batch.to(weight)) + mask(model, split, weight.device)
    stages = _stages(model)
    if not stages:
        return []
    pixels, pictures = _pixels(batch, model), []
    for row, (label, predicted) in enumerate(zip(labels, logits.argmax(dim=1).tolist(), strict=True)):
        parts = [pixels[row], *(draw_regions(pixels[row], regions, row) for _, regions in stages)]
        tokens = ", ".join(f"{regions.n_tokens} after layer {layer}" for layer, regions in stages)
        names = split.classes or [f"class {number}" for number in range(logits.shape[1])]
        named = f"{names[label]}, read as {names[predicted]}"
        pictures.append((_strip(parts), f"image {ids[row]}: {named}; tokens: {tokens}"))
    return pictures


def _readable(split: Split, n_images: int) -> list[tuple[int, Tensor, int]]:
    images = []
    for index in range(min(n_images, len(split.dataset))):
        try:
            images.append((index, *split.dataset[index]))
        except UnreadableError:  # which the evaluation has told of
            continue
    return images


def _stages(model: VisionTransformer) -> list[tuple[int, Regions]]:
    """The layers that merged, by number, the last among them, and the regions after each."""
    merged, n_before = [], model.patch_embed.num_patches
    for layer in range(1, len(model.blocks) + 1):
        regions = dhtm.regions(model, layer)
        if regions.n_tokens < n_before:
            merged.append((layer, regions))
        n_before = regions.n_tokens
    chosen = np.linspace(len(merged) - 1, 0, min(N_STAGES, len(merged))).round().astype(int)
    return [merged[i] for i in sorted(chosen)]


def _pixels(batch: Tensor, model: VisionTransformer) -> np.ndarray:
    """Normalised images [B, C, H, W] as uint8 [B, H', W', 3], enlarged by a whole number."""
    preprocessing = resolve_data_config(model=model)
    mean, std = (torch.tensor(preprocessing[key])[:, None, None] for key in ("mean", "std"))
    pixels = (255 * (batch * std + mean)).round().clamp(0, 255).to(torch.uint8)
    times = -(-MIN_HEIGHT // batch.shape[2])
    large = pixels.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)
    return large.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def _strip(parts: list[np.ndarray]) -> Image.Image:
    gap = np.full((parts[0].shape[0], GAP, 3), 255, dtype=np.uint8)
    return Image.fromarray(np.hstack([part for image in parts for part in (gap, image)][1:]))
