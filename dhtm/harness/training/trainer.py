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
from timm.utils import distribute_bn, random_seed
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DistributedSampler
from tqdm import tqdm

from dhtm.harness.core.devices import DTYPES, pick_batch_size
from dhtm.harness.core.errors import UserError, explain
from dhtm.harness.core.files import lock, require_writable, write_atomically
from dhtm.harness.core.ranks import Ranks
from dhtm.harness.data.splits import Batch, Split, load, open_split
from dhtm.harness.models.backbones import Backbone
from dhtm.harness.models.methods import Method
from dhtm.harness.models.weights import save_weights
from dhtm.harness.runs.predict import predict
from dhtm.harness.tracking import Tracker, WandbRun
from dhtm.vit import image_ids

log = logging.getLogger(__name__)

# Settings that may differ between the command that started a training and the one that resumes it.
_FREE = ("accumulate", "device", "num_workers", "output", "checkpoints_dir", "tracker", "force")
_FREE_OF_DATA = ("root", "labels", "on_error")  # the images themselves are compared by their fingerprint

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
        if self.method.checkpoint not in (None, "trained"):
            raise UserError(
                f"method.checkpoint={self.method.checkpoint}: training starts from weights of the backbone; give a file of "
                "those, backbone.checkpoint=FILE"
            )

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
        values = self.settings()
        values["data"] = {key: value for key, value in values["data"].items() if key not in _FREE_OF_DATA}
        return {key: json.dumps(value) for key, value in values.items() if key not in _FREE}


def train(training: Training) -> dict:
    """Train a backbone with a method, or resume where the same training was stopped.

    Every epoch ends by writing, each atomically, ``last.safetensors`` and ``best.safetensors`` (weights; the best by top-1
    on the validation split), ``history.csv`` and, last, ``last.pt`` (everything needed to resume).

    Returns:
        The last row of the history: epoch, lr, loss, top1 (percent), images_per_s.

    Raises:
        UserError: something that the settings name is not available, or the loss is not finite.
    """
    trainer = _Trainer(training)
    ranks, folder = trainer.ranks, trainer.folder
    message = f"waiting for another process to finish the training in {folder}"
    with lock(folder / ".lock", message) if ranks.first else contextlib.nullcontext():
        ranks.gather(None)  # the others read the checkpoint once the first has the lock
        trainer.resume()
        return _train(trainer)


def _train(trainer: "_Trainer") -> dict:
    """Train from the epoch after the last; return the last row of the history."""
    training, ranks, history = trainer.training, trainer.ranks, trainer.history
    if len(history) >= training.epochs:
        log.info("%s: already trained, %s", trainer.name, trainer.folder)
        return history[-1]
    if history:
        log.info("%s: resuming after epoch %d of %d", trainer.name, len(history), training.epochs)
    tracker = training.tracker if ranks.first else None
    options = {"id": trainer.log_id, "name": trainer.name, "job_type": "training"}
    with WandbRun(tracker, training.settings(), **options) as run:
        for epoch in range(len(history) + 1, training.epochs + 1):
            # The generators depend on the epoch alone, so a resumed training draws the same numbers.
            random_seed((100_000 * training.seed + epoch * ranks.world) % 2**31, ranks.rank)  # NumPy's take 32 bits
            start = time.perf_counter()
            loss = trainer.train_epoch(epoch)
            images_per_s = trainer.n_updates * training.batch_size / (time.perf_counter() - start)
            lr = trainer.optimiser.param_groups[0]["lr"]
            row = {"epoch": epoch, "lr": lr, "loss": loss, "top1": trainer.top1(), "images_per_s": images_per_s}
            history.append(row)
            if ranks.first:
                log.info(
                    "%s, epoch %d of %d: loss %.4f, top-1 %.2f%%, %.0f images/s",
                    trainer.name, epoch, training.epochs, loss, row["top1"], row["images_per_s"],
                )  # fmt: skip
                trainer.save()
                run.do(lambda run, row=row: run.log(row))
            ranks.gather(None)  # the others wait until it is saved
    return history[-1]


class _Trainer:
    """A training with everything it needs loaded."""

    def __init__(self, training: Training):
        self.training, self.ranks, self.folder = training, Ranks(training.device), training.folder()
        self.name = f"{training.backbone.name} with {training.method.place}"
        require_writable(self.folder, f"output={self.folder}")
        n_parts = self.ranks.world * training.accumulate
        self.micro_batch, rest = divmod(training.batch_size, n_parts)  # what one rank takes at once
        if rest or not self.micro_batch or (self.micro_batch % 2 and training.mixes):
            raise UserError(
                f"batch_size={training.batch_size}: it must be a multiple of accumulate={training.accumulate} times "
                f"{self.ranks.world} ranks" + (", an even one for mixup" if training.mixes else "")
            )
        self.model = _model(training).to(self.ranks.device)
        self.images, self.validation = _open_splits(training, self.model)
        self.n_updates = len(self.images.dataset) // training.batch_size
        if self.n_updates == 0:
            raise UserError(
                f"batch_size={training.batch_size}: the training split has only {len(self.images.dataset)} images"
            )
        lr = training.base_lr * training.batch_size / 1024
        with explain(f"optimiser={training.optimiser}: timm makes no such optimiser"):
            self.optimiser = create_optimizer_v2(
                self.model, opt=training.optimiser, lr=lr, weight_decay=training.weight_decay
            )
        self.schedule, _ = create_scheduler_v2(
            self.optimiser, "cosine", training.epochs, warmup_epochs=training.warmup_epochs, warmup_lr=training.warmup_lr,
            min_lr=training.min_lr, step_on_epochs=False, updates_per_epoch=self.n_updates,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.ranks.device.type, enabled=training.amp == "float16")
        self.mixup = _mixup(training, self.model.num_classes)
        self.parallel = DistributedDataParallel(self.model) if self.ranks.world > 1 else self.model
        self.history, self.log_id = [], secrets.token_hex(4)  # one row per epoch; the training's id in a tracker

    def _parts(self) -> dict[str, Any]:
        """Return everything that has a state."""
        return {name: getattr(self, name) for name in ("model", "optimiser", "schedule", "scaler")}

    def _determinants(self) -> dict[str, str]:
        return self.training.determinants() | {"images": self.images.fingerprint}

    def resume(self) -> None:
        """Restore everything from a checkpoint, if there is one.

        Raises:
            UserError: the checkpoint is damaged, or from a training with other settings.
        """
        file = self.folder / "last.pt"
        if file.exists() and not self.training.force:
            with explain(f"{file}: damaged", remedy="; remove it, or start again with force=true"):
                state = torch.load(file, map_location="cpu", weights_only=True)
                for key, value in self._determinants().items():
                    if state["config"].get(key) != value:
                        raise UserError(
                            f"{file}: started with {key}={state['config'].get(key)}, not {key}={value}; set another "
                            "output=DIR, or force=true to start again"
                        )
                for name, part in self._parts().items():
                    part.load_state_dict(state[name])
                self.history, self.log_id = state["history"], state["log_id"]
        found = self.ranks.gather(len(self.history))
        if len(set(found)) > 1:
            raise UserError(
                f"{self.folder}: the processes would resume after epochs {found}; set output=DIR on a disk that all machines "
                "share"
            )

    def train_epoch(self, epoch: int) -> float:
        """Make one pass over the training split; return the mean loss over all ranks."""
        training, device, losses = self.training, self.ranks.device, []
        self.parallel.train()
        smoothing = training.label_smoothing if self.mixup is None else 0.0  # mixup smooths its targets itself
        disable = None if self.ranks.first else True
        with tqdm(total=self.n_updates, desc=f"{self.name}, {epoch}", unit=" updates", disable=disable) as bar:
            for step, batch in enumerate(self._load(epoch)):
                if batch.failed:
                    raise batch.failed[0]
                update, accumulated = divmod(step, training.accumulate)
                if update == self.n_updates:  # the rest of the split is less than a batch
                    break
                complete = accumulated + 1 == training.accumulate
                ids, images, targets, _ = batch
                images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
                if self.mixup is not None:
                    images, targets = self.mixup(images, targets)
                full = explain("out of memory", torch.OutOfMemoryError, f"; try accumulate={2 * training.accumulate}")
                alone = contextlib.nullcontext() if complete or self.ranks.world == 1 else self.parallel.no_sync()
                with alone, full, image_ids(self.model, ids):
                    with torch.autocast(device.type, DTYPES.get(training.amp), enabled=training.amp is not None):
                        loss = cross_entropy(self.parallel(images).float(), targets, label_smoothing=smoothing)
                    self.scaler.scale(loss / training.accumulate).backward()
                losses.append(loss.item())
                number = (epoch - 1) * self.n_updates + update
                if not np.isfinite(losses[-1]):
                    raise UserError(
                        f"the loss is {losses[-1]} in update {number + 1}: stopped, the checkpoint of the last whole epoch is "
                        f"kept; try a smaller base_lr={training.base_lr}, or amp=bfloat16 instead of float16, with force=true"
                    )
                if complete:
                    self._update(number)
                    bar.update()
                    bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
        if self.ranks.world > 1:  # each has running statistics of its own, and the first's are saved
            distribute_bn(self.model, self.ranks.world)
        return float(np.mean(self.ranks.gather(float(np.mean(losses)))))

    def _load(self, epoch: int) -> Iterator[Batch]:
        dataset = self.images.dataset_in(epoch)
        sampler = DistributedSampler(
            dataset, self.ranks.world, self.ranks.rank, seed=100_000 * self.training.seed, drop_last=True
        )
        sampler.set_epoch(epoch)
        batches = list(BatchSampler(sampler, self.micro_batch, drop_last=True))
        return load(dataset, batches, self.training.num_workers, pin_memory=self.ranks.device.type == "cuda")

    def _update(self, number: int) -> None:
        self.schedule.step_update(number)
        self.scaler.unscale_(self.optimiser)
        if self.training.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip_grad)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad()

    def top1(self) -> float:
        """Return top-1 on the validation split in percent, predicted as in evaluations; the ranks share the images."""
        ranks, n_images = self.ranks, len(self.validation.dataset)
        predictions = predict(
            self.model, self.validation, range(ranks.rank, n_images, ranks.world),
            min(self.micro_batch, pick_batch_size(ranks.device)), ranks.device, torch.float32,
            "validation" if ranks.first else None, self.training.num_workers,
        )  # fmt: skip
        return 100 * sum(ranks.gather(sum(int(part.correct.sum()) for part in predictions))) / n_images

    def save(self) -> None:
        """Write the weights of the last and of the best epoch, the history and the checkpoint."""
        training, history = self.training, self.history
        remedy = "; the last whole epoch is kept, and the same command resumes from there once this is fixed"
        with explain(f"output={self.folder}: cannot be written", (OSError, RuntimeError), remedy):
            how = {"epoch": len(history), "epochs": training.epochs, "init": training.init, "data": training.data.name}
            is_best = history[-1]["top1"] >= max(row["top1"] for row in history)
            for name in ("last", "best") if is_best else ("last",):
                file = self.folder / f"{name}.safetensors"
                save_weights(self.model, training.backbone, training.method, DTYPES[training.save_dtype], how, file)
            write_atomically(self.folder / "history.csv", lambda file: pd.DataFrame(history).to_csv(file, index=False))
            state = {name: part.state_dict() for name, part in self._parts().items()}
            state |= {"history": history, "log_id": self.log_id, "config": self._determinants()}
            write_atomically(self.folder / "last.pt", lambda file: torch.save(state, file))


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
