"""Training a backbone patched with a method, as for the "w/ train" rows of Table 2."""

import contextlib
import dataclasses
import json
import logging
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import timm
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from timm.data import Mixup, resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, Dataset, DistributedSampler
from tqdm import tqdm

from dhtm.harness.core.devices import DTYPES, pick_batch_size
from dhtm.harness.core.errors import UserError, explain
from dhtm.harness.core.files import require_writable, write_atomically
from dhtm.harness.core.ranks import Ranks
from dhtm.harness.data.splits import Batch, Split, load, open_split
from dhtm.harness.models.backbones import Backbone
from dhtm.harness.models.methods import Method
from dhtm.harness.models.weights import save_weights
from dhtm.harness.runs.predict import predict
from dhtm.harness.tracking import Tracker, WandbRun
from dhtm.harness.training.checkpoints import random_state, read_checkpoint, write_checkpoint
from dhtm.vit import image_ids

log = logging.getLogger(__name__)

# Settings that may differ between the command that started a training and the one that resumes it.
_FREE = ("accumulate", "device", "num_workers", "output", "checkpoints_dir", "tracker", "force")

Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class Training:
    """The settings of a training, which ``configs/train.yaml`` explains."""

    backbone: Backbone
    method: Method
    data: Any
    init: Literal["pretrained", "scratch"] = "pretrained"
    epochs: PositiveInt = 30
    batch_size: PositiveInt = 1024
    accumulate: PositiveInt = 1
    optimiser: str = "adamw"
    base_lr: NonNegativeFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.05
    warmup_epochs: NonNegativeInt = 20
    warmup_lr: NonNegativeFloat = 1e-6
    min_lr: NonNegativeFloat = 1e-5
    clip_grad: NonNegativeFloat | None = None
    drop_path: Share = 0.1
    label_smoothing: Share = 0.1
    augment: bool = True
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    random_erasing: Share = 0.25
    color_jitter: NonNegativeFloat | None = None
    crop_scale: tuple[float, float] = (0.08, 1.0)
    mixup: NonNegativeFloat = 0.8
    cutmix: NonNegativeFloat = 1.0
    mixup_prob: Annotated[float, Field(ge=0, le=1)] = 1.0
    amp: Literal["bfloat16", "float16"] | None = None
    save_dtype: Literal[tuple(DTYPES)] = "float32"
    seed: NonNegativeInt = 0
    device: str = "auto"
    num_workers: NonNegativeInt | None = None
    force: bool = False
    checkpoints_dir: Path = Path("checkpoints")
    output: Path | None = None
    tracker: Tracker | None = None

    def __post_init__(self):
        if self.warmup_epochs > self.epochs:
            raise UserError(f"warmup_epochs={self.warmup_epochs}: more than epochs={self.epochs}; set fewer")

    @property
    def mixes(self) -> bool:
        return self.augment and (self.mixup > 0 or self.cutmix > 0)

    def folder(self) -> Path:
        """Return the folder of the training's files. Evaluations find the weights there unless ``output`` is set."""
        return self.output or self.checkpoints_dir / self.backbone.name / self.method.place

    def settings(self) -> dict:
        """Return the settings as plain values."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    def determinants(self) -> dict[str, str]:
        """Return all settings that the result depends on."""
        return {key: json.dumps(value) for key, value in self.settings().items() if key not in _FREE}


def train(training: Training) -> dict:
    """Train a backbone with a method, or resume where the same training was stopped.

    Every epoch ends by writing, each atomically, ``last.safetensors`` and ``best.safetensors`` (weights; the best by top-1
    on the validation split), ``history.csv`` and, last, ``last.pt`` (everything needed to resume).

    Returns:
        The last row of the history: epoch, lr, loss, top1 (percent), images_per_s.

    Raises:
        UserError: something that the settings name is not available, or the loss is not finite.
    """
    ranks, folder = Ranks(training.device), training.folder()
    name = f"{training.backbone.name} with {training.method.place}"
    require_writable(folder, f"output={folder}")
    micro_batch = _micro_batch(training, ranks.world)
    model = _model(training).to(ranks.device)
    images, validation = _open_splits(training, model)
    n_updates = len(images.dataset) // training.batch_size
    if n_updates == 0:
        raise UserError(f"batch_size={training.batch_size}: the training split has only {len(images.dataset)} images")

    lr = training.base_lr * training.batch_size / 1024
    with explain(f"optimiser={training.optimiser}: timm makes no such optimiser"):
        optimiser = create_optimizer_v2(model, opt=training.optimiser, lr=lr, weight_decay=training.weight_decay)
    schedule, _ = create_scheduler_v2(
        optimiser, "cosine", training.epochs, warmup_epochs=training.warmup_epochs, warmup_lr=training.warmup_lr,
        min_lr=training.min_lr, step_on_epochs=False, updates_per_epoch=n_updates,
    )  # fmt: skip
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=training.amp == "float16")
    parts = {"model": model, "optimiser": optimiser, "schedule": schedule, "scaler": scaler}
    random_seed(training.seed, ranks.rank)
    history, log_id = [], secrets.token_hex(4)
    if (folder / "last.pt").exists() and not training.force:
        history, log_id = read_checkpoint(folder / "last.pt", parts, training.determinants(), ranks)
    found = ranks.gather(len(history))
    if len(set(found)) > 1:
        raise UserError(
            f"{folder}: the processes would resume after epochs {found}; set output=DIR on a disk that all machines share"
        )
    if len(history) >= training.epochs:
        log.info("%s: already trained, %s", name, folder)
        return history[-1]
    if history:
        log.info("%s: resuming after epoch %d of %d", name, len(history), training.epochs)

    parallel = DistributedDataParallel(model) if ranks.world > 1 else model
    tracker = training.tracker if ranks.first else None
    with WandbRun(tracker, training.settings(), id=log_id, name=name, job_type="training") as run:
        for epoch in range(len(history) + 1, training.epochs + 1):
            loader = _loader(training, images.dataset_in(epoch), epoch, micro_batch, ranks)
            start = time.perf_counter()
            loss = _one_epoch(
                training, parallel, loader, parts, (epoch - 1) * n_updates, n_updates, f"{name}, {epoch}", ranks
            )
            seconds = time.perf_counter() - start
            row = {
                "epoch": epoch,
                "lr": optimiser.param_groups[0]["lr"],
                "loss": loss,
                "top1": _top1(training, model, validation, micro_batch, ranks),
                "images_per_s": n_updates * training.batch_size / seconds,
            }
            history.append(row)
            random_states = ranks.gather(random_state(ranks.device))
            if ranks.first:
                log.info(
                    "%s, epoch %d of %d: loss %.4f, top-1 %.2f%%, %.0f images/s",
                    name, epoch, training.epochs, loss, row["top1"], row["images_per_s"],
                )  # fmt: skip
                _save_epoch(training, model, history, folder)
                write_checkpoint(folder / "last.pt", parts, history, log_id, random_states, training.determinants())
                run.do(lambda run, row=row: run.log(row))
            ranks.gather(None)  # the others wait until it is saved
    return history[-1]


def _top1(training: Training, model: VisionTransformer, validation: Split, micro_batch: int, ranks: Ranks) -> float:
    """Return top-1 on the validation split in percent, predicted as in evaluations; the ranks share the images."""
    predictions = predict(
        model, validation, range(ranks.rank, len(validation.dataset), ranks.world),
        min(micro_batch, pick_batch_size(ranks.device)), ranks.device, torch.float32,
        "validation" if ranks.first else None, training.num_workers,
    )  # fmt: skip
    n_correct = sum(ranks.gather(sum(int(part.correct.sum()) for part in predictions)))
    return 100 * n_correct / len(validation.dataset)


def _one_epoch(
    training: Training,
    model: nn.Module,
    loader: Iterator[Batch],
    parts: dict[str, Any],
    updates_before: int,
    n_updates: int,
    title: str,
    ranks: Ranks,
) -> float:
    """Make one pass over the training split; return the mean loss over all ranks."""
    model.train()
    mixup = _mixup(training, parts["model"].num_classes)
    losses = []
    with tqdm(total=n_updates, desc=title, unit=" updates", disable=None if ranks.first else True) as bar:
        for step, batch in enumerate(loader):
            if batch.failed:
                raise batch.failed[0]
            update, accumulated = divmod(step, training.accumulate)
            if update == n_updates:  # the rest of the split is less than a batch
                break
            complete = accumulated + 1 == training.accumulate
            ids, images, labels, _ = batch
            images, labels = images.to(ranks.device, non_blocking=True), labels.to(ranks.device, non_blocking=True)
            images, targets = (images, labels) if mixup is None else mixup(images, labels)
            smoothing = training.label_smoothing if mixup is None else 0.0  # mixup smooths its targets itself
            alone = contextlib.nullcontext() if complete or ranks.world == 1 else model.no_sync()
            full = explain("out of memory", torch.OutOfMemoryError, f"; try accumulate={2 * training.accumulate}")
            with alone, full, image_ids(parts["model"], ids):
                with torch.autocast(ranks.device.type, DTYPES.get(training.amp), enabled=training.amp is not None):
                    loss = cross_entropy(model(images).float(), targets, label_smoothing=smoothing)
                parts["scaler"].scale(loss / training.accumulate).backward()
            losses.append(loss.item())
            if not np.isfinite(losses[-1]):
                raise UserError(
                    f"the loss is {losses[-1]} in update {updates_before + update + 1}: stopped, the checkpoint of the last "
                    f"whole epoch is kept; try a smaller base_lr={training.base_lr}, or amp=bfloat16 instead of float16, "
                    "with force=true"
                )
            if complete:
                _update(training, parts, updates_before + update)
                bar.update()
                bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
    return float(np.mean(ranks.gather(float(np.mean(losses)))))


def _update(training: Training, parts: dict[str, Any], number: int) -> None:
    parts["schedule"].step_update(number)
    parts["scaler"].unscale_(parts["optimiser"])
    if training.clip_grad is not None:
        nn.utils.clip_grad_norm_(parts["model"].parameters(), training.clip_grad)
    parts["scaler"].step(parts["optimiser"])
    parts["scaler"].update()
    parts["optimiser"].zero_grad()


def _open_splits(training: Training, model: VisionTransformer) -> tuple[Split, Split]:
    """Open the training and the validation split, which must have different images and the same classes."""
    data, preprocessing = training.data, resolve_data_config(model=model)
    augmentation = {
        "is_training": True, "auto_augment": training.auto_augment, "re_prob": training.random_erasing, "re_mode": "pixel",
        "color_jitter": training.color_jitter, "scale": training.crop_scale,
    }  # fmt: skip
    images = open_split(
        data, data.train_split, preprocessing, model.num_classes, **(augmentation if training.augment else {})
    )
    validation = open_split(data, data.split, preprocessing, model.num_classes)
    both = f"data={data.name}: data.train_split={data.train_split} and data.split={data.split}"
    if images.fingerprint == validation.fingerprint:
        raise UserError(f"{both} are the same images; give a data.root that holds a folder for each")
    if images.classes != validation.classes:
        raise UserError(f"{both} have different classes; make their folders the same")
    return images, validation


def _micro_batch(training: Training, world: int) -> int:
    """Return how many images one rank takes at once."""
    micro_batch, rest = divmod(training.batch_size, world * training.accumulate)
    if rest or not micro_batch or (micro_batch % 2 and training.mixes):
        raise UserError(
            f"batch_size={training.batch_size}: it must be a multiple of accumulate={training.accumulate} times {world} ranks"
            + (", an even one for mixup" if training.mixes else "")
        )
    return micro_batch


def _model(training: Training) -> VisionTransformer:
    backbone = training.backbone
    trained = backbone.load() if training.init == "pretrained" else None
    torch.manual_seed(training.seed)
    options = {"num_classes": backbone.num_classes, "drop_path_rate": training.drop_path}
    model = timm.create_model(backbone.architecture, pretrained=False, **options)
    if trained is not None:
        model.load_state_dict(trained.state_dict())
    return training.method.put_into(model, backbone.name)


def _mixup(training: Training, n_classes: int) -> Mixup | None:
    if not training.mixes:
        return None
    options = {"label_smoothing": training.label_smoothing, "num_classes": n_classes}
    return Mixup(training.mixup, training.cutmix, prob=training.mixup_prob, **options)


def _loader(training: Training, dataset: Dataset, epoch: int, micro_batch: int, ranks: Ranks) -> Iterator[Batch]:
    sampler = DistributedSampler(dataset, ranks.world, ranks.rank, seed=training.seed, drop_last=True)
    sampler.set_epoch(epoch)
    batches = list(BatchSampler(sampler, micro_batch, drop_last=True))
    return load(dataset, batches, training.num_workers, pin_memory=ranks.device.type == "cuda")


def _save_epoch(training: Training, model: VisionTransformer, history: list[dict], folder: Path) -> None:
    """Write the weights of the last and of the best epoch, and the history."""
    how = {"epoch": len(history), "epochs": training.epochs, "init": training.init, "data": training.data.name}
    arguments = model, training.backbone, training.method, DTYPES[training.save_dtype], how
    save_weights(*arguments, folder / "last.safetensors")
    if history[-1]["top1"] >= max(row["top1"] for row in history):
        save_weights(*arguments, folder / "best.safetensors")
    write_atomically(folder / "history.csv", lambda file: pd.DataFrame(history).to_csv(file, index=False))
