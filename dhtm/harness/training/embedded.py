"""Training the embedded model from scratch: a small ViT that learns to read digits in cluttered scenes.

A ViT of this size learns next to nothing from hard scenes in its first thousand steps, and sees 196 tokens at a
hundred images a second on two cores. So the scenes start plain and become hard, and in the first stage the model is shown
only the window of tokens around the digit, which costs a third.
"""

import copy
import dataclasses
import logging
import time

import numpy as np
import pandas as pd
import timm
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.layers import build_sincos2d_pos_embed
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dhtm.harness.core.devices import pick_device
from dhtm.harness.core.errors import UserError, path_given
from dhtm.harness.data.scenes import CANVAS, scenes
from dhtm.harness.data.splits import digits
from dhtm.harness.models import backbones  # noqa: F401  timm knows deit_micro by it
from dhtm.harness.runs.predict import predict
from dhtm.harness.runs.store import require_writable, write_atomically

log = logging.getLogger(__name__)


def train_micro(config: DictConfig) -> float:
    """Train a backbone on the digits from scratch and write its weights, in half precision, to ``config.output``.

    Returns:
        Top-1 accuracy in percent on the test scenes, of the weights as they were written.

    Raises:
        UserError: the config asks for something that cannot be had, or the loss is not finite.
    """
    if config.data.name != "digits":
        raise UserError(f"data={config.data.name}: training draws its own scenes, which only data=digits has")
    device = pick_device(config.device)
    output = path_given(config.output, "output")
    require_writable(output.parent, f"output={output}")
    torch.manual_seed(config.seed)
    model = timm.create_model(config.backbone.architecture, num_classes=config.backbone.num_classes)
    if tuple(resolve_data_config(model=model)["input_size"]) != (1, CANVAS, CANVAS):
        raise UserError(
            f"backbone={config.backbone.name}: it does not take grey images of {CANVAS}×{CANVAS}; deit_micro does"
        )
    side = model.patch_embed.grid_size[0]
    with torch.no_grad():  # near where training takes it: a learned position embedding finds the grid slowly
        embedding = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), model.embed_dim, dtype=torch.float32)
        model.pos_embed[:, model.num_prefix_tokens :] = embedding / 2
    model.patch_drop = KeepTokens(model.num_prefix_tokens)
    model.to(device).train()
    optimiser = create_optimizer_v2(model, opt="adamw", lr=config.lr, weight_decay=config.weight_decay)
    n_steps = sum(stage.steps for stage in config.stages)
    schedule = CosineLRScheduler(
        optimiser, n_steps, lr_min=0, warmup_t=config.warmup_steps, warmup_lr_init=0, t_in_epochs=False
    )
    loss_function = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    preprocessing = resolve_data_config(model=model)
    mean, std = (torch.tensor(preprocessing[key], device=device) for key in ("mean", "std"))

    step, first_scene, start = 0, 0, time.perf_counter()
    with tqdm(total=n_steps, desc=f"training {config.backbone.name}", unit=" steps", disable=None) as bar:
        for number, stage in enumerate(config.stages, start=1):
            batches = SceneBatches(Stage(**stage), first_scene, side, config.seed)
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
                if not np.isfinite(losses[-1]):
                    raise UserError(
                        f"the loss is {losses[-1]} in step {step}: nothing is saved; try a smaller lr={config.lr}"
                    )
                step += 1
                bar.update()
                bar.set_postfix(stage=number, loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
            first_scene += len(batches) * stage.batch_size
            log.info("stage %d: loss %.3f after %.0f s", number, np.mean(losses[-100:]), time.perf_counter() - start)

    model.patch_drop = nn.Identity()
    weights = {key: value.half().cpu().contiguous() for key, value in model.state_dict().items()}
    write_atomically(output, lambda path: save_file(weights, path))
    model.load_state_dict(weights)
    split = digits("test", config.data.seed, config.data.limit, create_transform(**preprocessing))
    everything = range(len(split.dataset))
    predictions = pd.concat(predict(copy.deepcopy(model), split, everything, 64, device, torch.float32, "validation"))
    top1 = 100 * predictions.correct.mean()
    log.info("%s: top-1 %.2f%% on %d test scenes, %.0f s", output, top1, len(predictions), time.perf_counter() - start)
    return top1


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        steps: optimiser steps.
        batch_size: scenes in each.
        window: the model sees window × window patches around the digit.
        difficulty: of the scenes at the start and at the end, from 0 to 1; the end is reached after two thirds.
    """

    steps: int
    batch_size: int
    window: int
    difficulty: tuple[float, float]


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
    """In the place of timm's patch dropout: shows the blocks the prefix tokens and the given patches only."""

    kept: Tensor  # int64 [B, n]

    def __init__(self, n_prefix: int):
        super().__init__()
        self.n_prefix = n_prefix

    def forward(self, x: Tensor) -> Tensor:
        kept = self.kept[..., None].expand(-1, -1, x.shape[-1])
        return torch.cat([x[:, : self.n_prefix], x[:, self.n_prefix :].gather(1, kept)], dim=1)
