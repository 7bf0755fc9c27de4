"""Pictures of images and of the regions into which a model merged their patches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import dhtm
from dhtm.harness.data.splits import Split, batches, mask
from dhtm.regions import SoftRegions
from dhtm.vit import image_ids, patch_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BORDER = (230, 159, 0)  # the paper's orange, DHTM's colour in the figures
MIN_HEIGHT = 224  # of a picture; smaller images are enlarged by whole numbers
GAP = 8  # white pixels between the parts of a strip
MAX_STAGES = 3  # layers in a strip for a tracker
PANEL_INCHES = 2.4  # width of a part of a figure


def draw_regions(image: np.ndarray, regions: dhtm.Regions, index: int = 0) -> np.ndarray:
    """Draw every region of an image in its mean colour, with borders between regions.

    Borders are one pixel wide for every MIN_HEIGHT pixels of the image's height.

    Args:
        image: uint8 [H, W, 3].
        regions: of the batch that contains the image.
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
    border = np.zeros((height, width), dtype=bool)
    wide = max(1, height // MIN_HEIGHT)
    border[:, wide:] |= token[:, wide:] != token[:, :-wide]
    border[wide:] |= token[wide:] != token[:-wide]
    drawn[border] = BORDER
    return drawn


@torch.inference_mode()
def draw_strips(models: list[tuple[str, VisionTransformer]], image: Image.Image) -> Figure:
    """Draw an image beside its regions after each layer that merges, one row per model, with the number of tokens below.

    Args:
        models: a title and a patched model for each row.
        image: RGB, of any size; it is resized and cropped as the model's preprocessing does.
    """
    from matplotlib.figure import Figure  # here, because evaluations need only the other functions

    rows = []
    for title, model in models:
        batch = batch_of(model, image)
        model.eval()(batch.to(next(model.parameters())))
        pixels, stages = pixels_of(batch, model)[0], merging_layers(model)
        is_soft = any(isinstance(regions, SoftRegions) for _, regions in stages)
        below = f"{math.prod(patch_grid(model))} patches" + (", each in its arg-max token" if is_soft else "")
        drawn = [
            (f"layer {layer}", f"{regions.n_tokens} tokens", draw_regions(pixels, regions)) for layer, regions in stages
        ]
        rows.append([(title, below, pixels), *drawn])
    n_columns = max(map(len, rows))
    heights = [PANEL_INCHES * row[0][2].shape[0] / row[0][2].shape[1] + 0.5 for row in rows]
    figure = Figure((PANEL_INCHES * n_columns, sum(heights)), dpi=200, layout="tight")
    axes = figure.subplots(len(rows), n_columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, cells in zip(axes, rows, strict=True):
        for ax, (above, below, pixels) in zip(row, cells, strict=False):
            ax.imshow(pixels, interpolation="nearest")
            ax.set_title(above, fontsize=8)
            ax.set_xlabel(below, fontsize=8)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for ax in row[len(cells) :]:
            ax.axis("off")
    return figure


@torch.inference_mode()
def sample_regions(model: VisionTransformer, split: Split, n_images: int = 6) -> list[tuple[Image.Image, str]]:
    """Draw the first images of a split, each beside its regions after some of the merging layers, with a caption.

    Args:
        model: a patched model. There are no pictures if it merges nothing.
        split: images that cannot be read are skipped.
        n_images: the number of images to read.
    """
    weight = next(model.parameters())
    first = range(min(n_images, len(split.dataset)))
    batch = next(batches(split, first, n_images, weight.device, 0, on_unreadable=lambda error: None), None)
    if batch is None:
        return []
    ids, images, labels = batch
    with image_ids(model, ids):
        logits = model.eval()(images.to(weight.dtype)) + mask(model.num_classes, split, weight.device)
    stages = merging_layers(model)
    if not stages:
        return []
    chosen = np.linspace(len(stages) - 1, 0, min(MAX_STAGES, len(stages))).round().astype(int)
    stages = [stages[i] for i in sorted(chosen)]
    tokens = ", ".join(f"{regions.n_tokens} after layer {layer}" for layer, regions in stages)
    names = split.classes or [f"class {number}" for number in range(logits.shape[1])]
    pictures = []
    for row, pixels in enumerate(pixels_of(images.cpu(), model)):
        strip = _strip([pixels, *(draw_regions(pixels, regions, row) for _, regions in stages)])
        label = f"{names[labels[row]]}, " if labels[row] >= 0 else ""
        named = f"{label}read as {names[logits[row].argmax()]}"
        pictures.append((strip, f"image {ids[row]}: {named}; tokens: {tokens}"))
    return pictures


def draw_side_by_side(models: list[VisionTransformer], split: Split, index: int) -> tuple[Image.Image, list[int]]:
    """Draw one image of a split beside its final regions in each model; return the picture and each number of tokens.

    Raises:
        UserError: the image cannot be read.
    """
    ids, batch, _ = next(batches(split, [index], 1, torch.device("cpu"), 0))
    drawn, counts = [pixels_of(batch, models[0])[0]], []
    for model in models:
        with image_ids(model, ids):
            model.eval()(batch)
        regions = dhtm.regions(model)
        drawn.append(draw_regions(drawn[0], regions))
        counts.append(regions.n_tokens)
    return _strip(drawn), counts


def merging_layers(model: VisionTransformer) -> list[tuple[int, dhtm.Regions]]:
    """Return the numbers of the layers that merged in the last forward pass, and the regions after each."""
    merged, n_before = [], math.prod(patch_grid(model))
    for layer in range(1, len(model.blocks) + 1):
        regions = dhtm.regions(model, layer)
        if regions.n_tokens < n_before:
            merged.append((layer, regions))
        n_before = regions.n_tokens
    return merged


def batch_of(model: VisionTransformer, image: Image.Image) -> Tensor:
    """Preprocess an RGB image for a model: [1, C, H, W]."""
    preprocessing = resolve_data_config(model=model)
    is_grey = preprocessing["input_size"][0] == 1
    return create_transform(**preprocessing)(image.convert("L") if is_grey else image)[None]


def pixels_of(batch: Tensor, model: VisionTransformer) -> np.ndarray:
    """Convert normalised images [B, C, H, W] to uint8 [B, H', W', 3], enlarged by a whole number."""
    preprocessing = resolve_data_config(model=model)
    mean, std = (torch.tensor(preprocessing[key])[:, None, None] for key in ("mean", "std"))
    pixels = (255 * (batch * std + mean)).round().clamp(0, 255).to(torch.uint8)
    times = -(-MIN_HEIGHT // batch.shape[2])
    large = pixels.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)
    return large.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def _strip(parts: list[np.ndarray]) -> Image.Image:
    """Put images side by side."""
    gap = np.full((parts[0].shape[0], GAP, 3), 255, dtype=np.uint8)
    return Image.fromarray(np.hstack([part for image in parts for part in (gap, image)][1:]))
