"""The embedded data set: real handwritten digits in cluttered 56×56 scenes.

Every scene holds one whole digit, the object, from scikit-learn's ``load_digits`` (1,797 scans of
8×8 pixels), at a random position, scale and angle, on a smooth background with noise and a few
distractor strokes cut from other digits. With patches of 4×4 pixels the grid is 14×14 = 196 tokens,
as in DeiT at 224 pixels, so k means the same number of merges on both.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from torch.utils.data import Dataset

from dhtm.harness.data.splits import Split

CANVAS = 56
N_TEST_SCANS = 500
N_TEST_SCENES = 4 * N_TEST_SCANS  # the test split: every scan in four scenes
N_TRAIN_SCENES = 6_400  # in one epoch of training
MAX_DISTRACTORS = 6
PATCH_CLASSES = ("ground", "digit", "distractor")
_SPLITS = {"train": 0, "test": 1}
_INK = 0.2  # a patch with less mean ink is ground


@dataclass(frozen=True)
class Digits:
    """The embedded data set; ``configs/data/digits.yaml`` explains the settings."""

    choice_split: ClassVar[str] = "train"  # the split to make choices on

    name: str = "digits"
    split: Literal["test", "train"] = "test"
    train_split: Literal["test", "train"] = "train"
    seed: NonNegativeInt = 0
    limit: PositiveInt | None = None
    on_error: Literal["collect", "skip"] = "collect"

    def open(self, split: str, transform: Callable) -> Split:
        """Open the split "test" or "train"; the transform takes a grey PIL image."""
        options = {"classes": tuple("0123456789"), "channels": 1, "n_classes": 10}
        if split == "train":
            n_scenes = min(self.limit or N_TRAIN_SCENES, N_TRAIN_SCENES)
            in_epoch = functools.partial(NewScenes, n_scenes, self.seed, transform)
            return Split(in_epoch(0), fingerprint=f"digits {self.seed}", new_each_epoch=in_epoch, **options)
        images, labels, fingerprint = _test_scenes(self.seed, min(self.limit or N_TEST_SCENES, N_TEST_SCENES))
        dataset, groups = DrawnScenes(images, labels, transform), np.arange(len(images)) % N_TEST_SCANS
        return Split(dataset, fingerprint=fingerprint, in_memory=True, groups=groups, **options)

    def patch_classes(self, split: str, indices: Sequence[int], grid: tuple[int, int]) -> np.ndarray:
        """Return the class with the most ink in each patch of some scenes, as an index of PATCH_CLASSES: int64 [n, P]."""
        _, placed = _draw_all(split, indices, self.seed, 1.0)
        ink = F.adaptive_avg_pool2d(torch.from_numpy(placed), grid).flatten(2)
        digit, distractor = ink[:, 0], ink[:, 1:].amax(dim=1)
        classes = torch.where(digit >= distractor, 1, 2)
        return torch.where(torch.maximum(digit, distractor) < _INK, 0, classes).numpy()


@functools.cache
def _test_scenes(seed: int, n_images: int):
    images, labels, _ = scenes("test", range(n_images), seed)
    return images, labels, hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()


class DrawnScenes(Dataset):
    """Scenes held as one uint8 array [n, H, W]."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Callable):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


class NewScenes(Dataset):
    """The training scenes of one epoch, drawn when they are read."""

    def __init__(self, n_scenes: int, seed: int, transform: Callable, epoch: int):
        self.n_scenes, self.seed, self.transform, self.first = n_scenes, seed, transform, epoch * n_scenes

    def __len__(self):
        return self.n_scenes

    def __getitem__(self, index):
        images, labels, _ = scenes("train", [self.first + index], self.seed)
        return self.transform(Image.fromarray(images[0])), int(labels[0])


@functools.cache
def scans(split):
    """Return the scans of one split: float64 [n, 8, 8] in [0, 1] and int64 labels [n]; no scan is in both splits."""
    # Imported here because it takes a second and only the embedded data needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(
        digits.images / 16.0, digits.target, test_size=N_TEST_SCANS, stratify=digits.target, random_state=0
    )
    return parts[_SPLITS[split]], parts[2 + _SPLITS[split]]


def scenes(split, indices, seed=0, difficulty=1.0):
    """Draw the scenes with the given indices; a scene depends on (split, seed, index, difficulty) alone.

    Args:
        split: "train" (scans drawn at random) or "test" (scan = index modulo their number).
        indices: the scenes to draw, a sequence of n non-negative integers.
        seed: fixes every pixel.
        difficulty: from 0 (one large digit on a plain ground) to 1 (the real task).

    Returns:
        images: uint8 [n, 56, 56].
        labels: int64 [n], the digit in each scene.
        centres: float64 [n, 2], where the digit is, (x, y) in pixels.
    """
    (labels, centres, grounds, noise), placed = _draw_all(split, indices, seed, difficulty)
    ink = torch.from_numpy(placed).amax(dim=1)
    ground = F.interpolate(torch.from_numpy(grounds)[:, None], size=CANVAS, mode="bicubic", align_corners=True)[:, 0]
    # Ink covers the ground in proportion to its strength, then the sensor adds its noise.
    images = ground * (1 - ink) + ink + torch.from_numpy(noise)
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return images.numpy(), labels, centres[:, 0]


def _draw_all(split, indices, seed, difficulty):
    """Return labels, centres, grounds and noise of scenes, and the ink of each object on the canvas, [n, m, 56, 56]."""
    drawn = [_draw(split, index, seed, difficulty) for index in indices]
    labels, patches, centres, half_sizes, angles, grounds, noise = (np.stack(part) for part in zip(*drawn, strict=True))
    return (labels, centres, grounds, noise), _place(patches, centres, half_sizes, angles)


def _draw(split, index, seed, difficulty):
    """Make the random choices behind one scene; object 0 is the digit, the others are distractor strokes."""
    images, labels = scans(split)
    rng = np.random.default_rng([seed, _SPLITS[split], index])
    scan = index % len(images) if split == "test" else rng.integers(len(images))
    size = rng.uniform(*(np.array([26.0, 32.0]) * (1 - difficulty) + np.array([16.0, 30.0]) * difficulty))
    centre = rng.uniform(size / 2, CANVAS - size / 2, 2)
    angle = rng.uniform(-0.2, 0.2)
    strength = rng.uniform(0.7, 1.0) * difficulty + (1 - difficulty)

    patches = np.zeros((1 + MAX_DISTRACTORS, 8, 8))
    centres = np.full((1 + MAX_DISTRACTORS, 2), CANVAS / 2)
    half_sizes = np.full(1 + MAX_DISTRACTORS, size / 2)
    angles = np.zeros(1 + MAX_DISTRACTORS)
    patches[0], centres[0], angles[0] = images[scan] * strength, centre, angle
    n_distractors = rng.integers(2, MAX_DISTRACTORS + 1)
    for i in range(1, 1 + n_distractors):
        other = images[rng.integers(len(images))]
        height, width = rng.integers(3, 6, 2)
        top, left = rng.integers(0, 9 - height), rng.integers(0, 9 - width)
        patches[i, top : top + height, left : left + width] = other[top : top + height, left : left + width]
        patches[i] *= rng.uniform(0.5, 0.9) * difficulty
        # The farthest of a few places: clutter surrounds the digit more often than it hides it.
        places = rng.uniform(0, CANVAS, (4, 2))
        centres[i] = places[np.argmax(np.linalg.norm(places - centre, axis=1))]
        half_sizes[i] = rng.uniform(0.7, 1.0) * size / 2
        angles[i] = rng.uniform(-np.pi, np.pi)
    ground = rng.uniform(0, 0.4, (4, 4)) * difficulty
    noise = rng.normal(0, rng.uniform(0.02, 0.06) * difficulty, (CANVAS, CANVAS))
    return labels[scan], patches, centres, half_sizes, angles, ground, noise


def _place(patches, centres, half_sizes, angles):
    """Turn, scale and move 8×8 patches [n, m, 8, 8] onto the canvas: [n, m, 56, 56], bilinear."""
    n, m = half_sizes.shape
    # affine_grid maps the canvas, from -1 to 1, back to the patch.
    zoom = CANVAS / 2 / half_sizes
    cos, sin = np.cos(angles) * zoom, np.sin(angles) * zoom
    shift = centres / (CANVAS / 2) - 1
    x, y = shift[..., 0], shift[..., 1]
    theta = np.stack([cos, sin, -cos * x - sin * y, -sin, cos, sin * x - cos * y], -1).reshape(n * m, 2, 3)
    grid = F.affine_grid(torch.from_numpy(theta), (n * m, 1, CANVAS, CANVAS), align_corners=False)
    placed = F.grid_sample(torch.from_numpy(patches).reshape(n * m, 1, 8, 8), grid, align_corners=False)
    return placed.reshape(n, m, CANVAS, CANVAS).numpy()
