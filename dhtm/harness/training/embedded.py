"""Training the embedded model from scratch: a small ViT that learns to read digits in cluttered scenes.

A ViT of this size learns next to nothing from hard scenes in its first thousand steps, and 196 tokens cost it a hundredth of
a second per image on two cores. So the scenes start plain and become hard, and in the first stage the model sees only the
window of tokens around the digit, which costs a third.
"""

import logging
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import timm
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from timm.data import resolve_data_config
from timm.layers import build_sincos2d_pos_embed
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dhtm.harness.core.devices import pick_device
from dhtm.harness.core.errors import UserError
from dhtm.harness.core.files import require_writable
from dhtm.harness.data.scenes import scenes
from dhtm.harness.models.backbones import Backbone
from dhtm.harness.models.weights import write_parameters

log = logging.getLogger(__name__)

Difficulty = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Stage:
    """A part of the training, which ``configs/train_micro.yaml`` explains."""

    steps: PositiveInt
    batch_size: PositiveInt
    window: PositiveInt
    difficulty: tuple[Difficulty, Difficulty]


def train_embedded(
    backbone: Backbone,
    output: Path,
    stages: Annotated[list[Stage], Field(min_length=1)],
    device: str = "auto",
    seed: NonNegativeInt = 0,
    lr: NonNegativeFloat = 1e-3,
    weight_decay: NonNegativeFloat = 0.05,
    warmup_steps: NonNegativeInt = 300,
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.05,
) -> None:
    """Train a backbone on the digits from scratch and write its weights in half precision.

    ``configs/train_micro.yaml`` explains the settings.

    Raises:
        UserError: something that the settings name is not available.
    """
    device = pick_device(device)
    if output.suffix != ".safetensors":
        raise UserError(f"output={output}: give a file that ends with .safetensors, or timm cannot read it")
    require_writable(output.parent, f"output={output}")
    torch.manual_seed(seed)
    model = timm.create_model(backbone.architecture, num_classes=backbone.num_classes)
    preprocessing = resolve_data_config(model=model)
    side = model.patch_embed.grid_size[0]
    with torch.no_grad():  # a position embedding learns the grid slowly, so it starts near it
        embedding = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), model.embed_dim, dtype=torch.float32)
        model.pos_embed[:, model.num_prefix_tokens :] = embedding / 2
    model.patch_drop = KeepTokens(model.num_prefix_tokens)
    model.to(device).train()
    optimiser = create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=weight_decay)
    n_steps = sum(stage.steps for stage in stages)
    schedule = CosineLRScheduler(
        optimiser, n_steps, lr_min=0, warmup_t=warmup_steps, warmup_lr_init=0, t_in_epochs=False
    )
    loss_function = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    mean, std = (torch.tensor(preprocessing[key], device=device) for key in ("mean", "std"))

    step, first_scene, start = 0, 0, time.perf_counter()
    with tqdm(total=n_steps, desc=f"training {backbone.name}", unit=" steps", disable=None) as bar:
        for number, stage in enumerate(stages, start=1):
            batches = SceneBatches(stage, first_scene, side, seed)
            losses = []
            for images, labels, kept in DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=8):
                schedule.step_update(step)
                model.patch_drop.kept = kept.to(device)
                logits = model((images.to(device)[:, None] / 255 - mean) / std)
                loss = loss_function(logits, labels.to(device))
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                losses.append(loss.item())
                step += 1
                bar.update()
                bar.set_postfix(stage=number, loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
            first_scene += len(batches) * stage.batch_size
            log.info("stage %d: loss %.3f after %.0f s", number, np.mean(losses[-100:]), time.perf_counter() - start)

    model.patch_drop = nn.Identity()
    write_parameters(model, torch.float16, output)
    log.info("weights: %s", output)


class SceneBatches(Dataset):
    """The batches of one stage: item i is (images uint8 [B, H, W], labels [B], patches to show [B, window²])."""

    def __init__(self, stage: Stage, first_scene: int, side: int, seed: int):
        self.stage, self.first_scene, self.side, self.seed = stage, first_scene, side, seed

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        stage, first = self.stage, self.first_scene + step * self.stage.batch_size
        low, high = stage.difficulty
        difficulty = low + (high - low) * min(1.0, 1.5 * step / stage.steps)
        images, labels, centres = scenes("train", range(first, first + stage.batch_size), self.seed, difficulty)
        # The window holds the digit, but not always in its middle.
        jitter = np.random.default_rng([self.seed, first]).uniform(-1, 1, centres.shape)
        patch = images.shape[-1] / self.side
        corners = np.round(centres / patch - stage.window / 2 + jitter).clip(0, self.side - stage.window).astype(int)
        steps = np.arange(stage.window)
        kept = (corners[:, 1, None, None] + steps[:, None]) * self.side + corners[:, 0, None, None] + steps
        return torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(kept.reshape(len(images), -1))


class KeepTokens(nn.Module):
    """Shows the blocks only the prefix tokens and the given patches; it takes the place of timm's patch dropout."""

    kept: Tensor  # int64 [B, n]

    def __init__(self, n_prefix: int):
        super().__init__()
        self.n_prefix = n_prefix

    def forward(self, x: Tensor) -> Tensor:
        kept = self.kept[..., None].expand(-1, -1, x.shape[-1])
        return torch.cat([x[:, : self.n_prefix], x[:, self.n_prefix :].gather(1, kept)], dim=1)
