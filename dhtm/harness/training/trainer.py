"""Training a backbone with a method's reduction on, as for the "w/ train" rows of Table 2."""

import contextlib
import logging
import random
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from omegaconf import DictConfig, OmegaConf
from timm.data import Mixup, resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, Dataset, DistributedSampler
from tqdm import tqdm

from dhtm.harness.core.devices import DTYPES, Ranks, pick_batch_size, pick_dtype
from dhtm.harness.core.errors import UserError, one_line, path_given, require_number
from dhtm.harness.data.loading import load_data
from dhtm.harness.data.splits import Batch, Split, load
from dhtm.harness.models.backbones import check_known
from dhtm.harness.models.cost import solve
from dhtm.harness.models.methods import patched, place, pretrained, save_weights
from dhtm.harness.runs.predict import predict
from dhtm.harness.runs.store import require_writable, write_atomically
from dhtm.harness.tracking import training_log
from dhtm.vit import image_ids

log = logging.getLogger(__name__)

# What may differ between the command that began a training and the one that goes on with it.
_FREE = ("accumulate", "device", "num_workers", "output", "checkpoints_dir", "tracker", "force")


def train(config: DictConfig) -> dict:
    """Train a backbone with a method on, or go on where the same command was stopped.

    Every epoch ends with ``last.safetensors`` and ``best.safetensors`` (weights; the best by top-1 on the validation
    split), ``history.csv`` and ``last.pt`` (all that going on needs), each written atomically, the last of them last.

    Returns:
        The last row of the history: epoch, lr, loss, top1 (percent), images_per_s.

    Raises:
        UserError: the config asks for something that cannot be had, or the loss is not finite.
    """
    config = config.copy()
    _check(config)
    ranks = Ranks(config.device)
    config.method, _ = solve(config.backbone, config.method, config.target)
    name = f"{config.backbone.name} with {place(config.backbone, config.method).name}"
    output = _output(config)
    micro_batch = _micro_batch(config, ranks.world)
    model = _model(config).to(ranks.device)
    preprocessing = resolve_data_config(model=model)
    training = load_data(
        config.data, config.data.train_split, preprocessing, model.num_classes, **_augmentation(config)
    )
    validation = load_data(config.data, config.data.split, preprocessing, model.num_classes)
    _check_splits(config, training, validation)
    n_updates = len(training.dataset) // config.batch_size
    if n_updates == 0:
        raise UserError(f"batch_size={config.batch_size}: the training split has only {len(training.dataset)} images")

    optimiser = _optimiser(config, model)
    schedule, _ = create_scheduler_v2(
        optimiser, "cosine", config.epochs, warmup_epochs=config.warmup_epochs, warmup_lr=config.warmup_lr,
        min_lr=config.min_lr, step_on_epochs=False, updates_per_epoch=n_updates,
    )  # fmt: skip
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.amp == "float16")
    parts = {"model": model, "optimiser": optimiser, "schedule": schedule, "scaler": scaler}
    _seed(config.seed + ranks.rank)
    history, log_id = _resume(output / "last.pt", config, parts, ranks) or ([], secrets.token_hex(4))
    found = ranks.gather(len(history))
    if len(set(found)) > 1:
        raise UserError(
            f"{output}: the processes would go on after epochs {found}; set output=DIR on a disk that all machines share"
        )
    if len(history) >= config.epochs:
        log.info("%s: trained before, %s", name, output)
        return history[-1]
    if history:
        log.info("%s: going on after epoch %d of %d", name, len(history), config.epochs)

    parallel = DistributedDataParallel(model) if ranks.world > 1 else model
    with training_log(config, name, log_id, ranks.first) as tell:
        for epoch in range(len(history) + 1, config.epochs + 1):
            loader = _loader(config, training.dataset, epoch, micro_batch, ranks)
            start = time.perf_counter()
            try:
                loss = _one_epoch(
                    config, parallel, loader, parts, (epoch - 1) * n_updates, n_updates, f"{name}, {epoch}", ranks
                )
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"device={ranks.device}: out of memory with {micro_batch} images at once; the checkpoint of the last whole "
                    f"epoch is kept; take each update in more parts, accumulate={2 * config.accumulate}, say"
                ) from error
            seconds = time.perf_counter() - start
            row = {
                "epoch": epoch,
                "lr": optimiser.param_groups[0]["lr"],
                "loss": loss,
                "top1": _top1(config, model, validation, epoch, micro_batch, ranks),
                "images_per_s": n_updates * config.batch_size / seconds,
            }
            history.append(row)
            log.log(
                logging.INFO if ranks.first else logging.DEBUG,
                "%s, epoch %d of %d: loss %.4f, top-1 %.2f%%, %.0f images/s",
                name, epoch, config.epochs, loss, row["top1"], row["images_per_s"],
            )  # fmt: skip
            random_states = ranks.gather(_random_state(ranks.device))
            if ranks.first:
                _keep(config, parts, history, log_id, random_states, output)
                tell(row)
            ranks.wait()
    return history[-1]


def _top1(
    config: DictConfig, model: VisionTransformer, validation: Split, epoch: int, micro_batch: int, ranks: Ranks
) -> float:
    """Percent of the validation split that the runner's evaluation finds right, each rank taking its share."""
    predictions = predict(
        model, validation, range(ranks.rank, len(validation.dataset), ranks.world),
        min(micro_batch, pick_batch_size(ranks.device)), ranks.device, torch.float32,
        "validation" if ranks.first else None, config.num_workers,
    )  # fmt: skip
    counts = [[len(part), int(part.correct.sum()), int(part.nonfinite.sum())] for part in predictions]
    everyones = [count for counts in ranks.gather(counts) for count in counts]
    n_images, n_correct, n_nonfinite = (sum(column) for column in zip(*everyones, strict=True))
    if n_nonfinite:
        raise UserError(
            f"after epoch {epoch} the logits of {n_nonfinite} images are not finite: stopped, the checkpoint of the epoch "
            f"before is kept; try a smaller base_lr={config.base_lr}, with force=true"
        )
    return 100 * n_correct / n_images


def _one_epoch(config, model, loader, parts, updates_before, n_updates, name, ranks) -> float:
    """One pass over the training split; returns the mean loss, over all ranks."""
    model.train()
    mixup = _mixup(config, parts["model"].num_classes)
    losses = []
    with tqdm(total=n_updates, desc=name, unit=" updates", disable=None if ranks.first else True) as bar:
        for step, batch in enumerate(loader):
            if batch.failed:
                raise batch.failed[0]
            update, accumulated = divmod(step, config.accumulate)
            if update == n_updates:  # the rest of the split is less than a batch
                break
            complete = accumulated + 1 == config.accumulate
            ids, images, labels, _ = batch
            images, labels = images.to(ranks.device, non_blocking=True), labels.to(ranks.device, non_blocking=True)
            images, targets = (images, labels) if mixup is None else mixup(images, labels)
            smoothing = config.label_smoothing if mixup is None else 0.0  # the mixed targets are smoothed already
            alone = contextlib.nullcontext() if complete or ranks.world == 1 else model.no_sync()
            with alone, image_ids(parts["model"], ids):
                with torch.autocast(ranks.device.type, DTYPES.get(config.amp), enabled=config.amp is not None):
                    loss = cross_entropy(model(images).float(), targets, label_smoothing=smoothing)
                parts["scaler"].scale(loss / config.accumulate).backward()
            losses.append(loss.item())
            if not np.isfinite(losses[-1]):
                raise UserError(
                    f"the loss is {losses[-1]} in update {updates_before + update + 1}: stopped, the checkpoint of the last "
                    f"whole epoch is kept; try a smaller base_lr={config.base_lr}, or amp=bfloat16 instead of float16, "
                    "with force=true"
                )
            if complete:
                _update(config, parts, updates_before + update)
                bar.update()
                bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
    return float(np.mean(ranks.gather(float(np.mean(losses)))))


def _update(config: DictConfig, parts: dict[str, Any], number: int) -> None:
    parts["schedule"].step_update(number)
    parts["scaler"].unscale_(parts["optimiser"])
    if config.clip_grad is not None:
        nn.utils.clip_grad_norm_(parts["model"].parameters(), config.clip_grad)
    parts["scaler"].step(parts["optimiser"])
    parts["scaler"].update()
    parts["optimiser"].zero_grad()


def _output(config: DictConfig) -> Path:
    if config.output is None:
        folder = path_given(config.checkpoints_dir, "checkpoints_dir") / place(config.backbone, config.method)
    else:
        folder = path_given(config.output, "output")
    require_writable(folder, f"output={config.output or folder}")
    return folder


def _check(config: DictConfig) -> None:
    """Everything that can be said about a config before anything is loaded."""
    for key in ("batch_size", "accumulate", "epochs"):
        require_number(config, key, 1, integer=True)
    for key in ("warmup_epochs", "seed"):
        require_number(config, key, integer=True)
    require_number(config, "num_workers", integer=True, optional=True)
    require_number(config, "clip_grad", optional=True)
    for key in ("base_lr", "warmup_lr", "min_lr", "weight_decay", "mixup", "cutmix"):
        require_number(config, key)
    for key in ("drop_path", "label_smoothing", "random_erasing"):
        require_number(config, key, below=1)
    if config.warmup_epochs > config.epochs:
        raise UserError(f"warmup_epochs={config.warmup_epochs}: more than epochs={config.epochs}; set fewer")
    if config.amp not in (None, "bfloat16", "float16"):
        raise UserError(f"amp={config.amp}: choose one of bfloat16, float16, or null")
    pick_dtype(config.save_dtype, "save_dtype")
    if config.init not in ("pretrained", "scratch"):
        raise UserError(f"init={config.init}: choose one of pretrained, scratch")


def _check_splits(config: DictConfig, training: Split, validation: Split) -> None:
    """Other images, of the same classes in the same order."""
    data = f"data={config.data.name}: data.train_split={config.data.train_split} and data.split={config.data.split}"
    if training.fingerprint == validation.fingerprint:
        raise UserError(f"{data} are the same images; give a data.root that holds a folder for each")
    if getattr(training.dataset, "streamed", False):
        raise UserError(
            f"{data}: training draws images in any order, which cannot be streamed; set data.streaming=false"
        )
    if None in (training.classes, validation.classes) and training.classes != validation.classes:
        raise UserError(f"{data}: the classes of one have names, those of the other numbers; make them the same")
    if training.classes != validation.classes:
        one, other = next(
            pair for pair in zip(training.classes, validation.classes, strict=False) if pair[0] != pair[1]
        )
        raise UserError(
            f"{data} have different classes, {one} and {other} under one number; make their folders the same"
        )


def _optimiser(config: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    lr = config.base_lr * config.batch_size / 1024
    try:
        return create_optimizer_v2(model, opt=config.optimiser, lr=lr, weight_decay=config.weight_decay)
    except Exception as error:  # an unknown name, or one that needs a package which is not there
        raise UserError(f"optimiser={config.optimiser}: timm makes no such optimiser ({one_line(error)})") from error


def _micro_batch(config: DictConfig, world: int) -> int:
    """Images that one rank takes at once."""
    micro_batch, rest = divmod(config.batch_size, world * config.accumulate)
    if rest or not micro_batch or (micro_batch % 2 and _mixes(config)):
        raise UserError(
            f"batch_size={config.batch_size}: it must be a multiple of accumulate={config.accumulate} times {world} ranks"
            + (", an even one for mixup" if _mixes(config) else "")
        )
    return micro_batch


def _model(config: DictConfig) -> VisionTransformer:
    options = {"num_classes": config.backbone.num_classes, "drop_path_rate": config.drop_path}
    check_known(config.backbone.architecture)
    trained = pretrained(config.backbone) if config.init == "pretrained" else None
    torch.manual_seed(config.seed)
    model = timm.create_model(config.backbone.architecture, pretrained=False, **options)
    if trained is not None:
        model.load_state_dict(trained.state_dict())
    return patched(model, config.backbone, config.method)


def _augmentation(config: DictConfig) -> dict[str, Any]:
    if not config.augment:
        return {}
    return {
        "is_training": True, "auto_augment": config.auto_augment, "re_prob": config.random_erasing, "re_mode": "pixel",
        "color_jitter": None,
    }  # fmt: skip


def _mixes(config: DictConfig) -> bool:
    return config.augment and (config.mixup > 0 or config.cutmix > 0)


def _mixup(config: DictConfig, n_classes: int) -> Mixup | None:
    if not _mixes(config):
        return None
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=n_classes)


def _loader(config: DictConfig, dataset: Dataset, epoch: int, micro_batch: int, ranks: Ranks) -> Iterator[Batch]:
    dataset.epoch = epoch
    sampler = DistributedSampler(dataset, ranks.world, ranks.rank, seed=config.seed, drop_last=True)
    sampler.set_epoch(epoch)
    batches = list(BatchSampler(sampler, micro_batch, drop_last=True))
    return load(dataset, batches, config.num_workers, pin_memory=ranks.device.type == "cuda")


def _keep(config: DictConfig, parts: dict, history: list[dict], log_id: str, random_states: list, output: Path) -> None:
    """Write what an epoch leaves behind."""
    dtype, epoch = DTYPES[config.save_dtype], len(history)
    save_weights(parts["model"], config, dtype, epoch, output / "last.safetensors")
    if history[-1]["top1"] >= max(row["top1"] for row in history):
        save_weights(parts["model"], config, dtype, epoch, output / "best.safetensors")
    write_atomically(output / "history.csv", lambda file: pd.DataFrame(history).to_csv(file, index=False))
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"history": history, "log_id": log_id, "random": random_states, "config": _determinants(config)}
    write_atomically(output / "last.pt", lambda file: torch.save(state, file))


def _resume(file: Path, config: DictConfig, parts: dict, ranks: Ranks) -> tuple[list[dict], str] | None:
    """Take everything up as a checkpoint left it.

    Returns:
        The history, and the name under which a tracker knows the training; None where it is to begin.
    """
    if config.force or not file.exists():
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        before, history, log_id, random_states = (state[key] for key in ("config", "history", "log_id", "random"))
    except Exception as error:  # the file may hold anything, and its readers raise as much
        raise UserError(f"{file}: damaged ({one_line(error)}); remove it, or begin again with force=true") from error
    for key, value in _determinants(config).items():
        if before.get(key) != value:
            raise UserError(
                f"{file}: begun with {key}={before.get(key)}, not {key}={value}; set another output=DIR, or force=true to "
                "begin again"
            )
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        _set_random_state(random_states[ranks.rank % len(random_states)], ranks.device)
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"{file}: does not fit this version of the code ({one_line(error)}); begin again with force=true"
        ) from error
    return history, log_id


def _determinants(config: DictConfig) -> dict[str, str]:
    """Everything in the config that a training's result depends on, as strings by dotted key."""
    flat, rest = {}, [("", OmegaConf.to_container(config, resolve=True))]
    while rest:
        prefix, value = rest.pop()
        if isinstance(value, dict):
            rest += [(f"{prefix}.{key}" if prefix else key, item) for key, item in value.items()]
        elif prefix.split(".")[0] not in _FREE:
            flat[prefix] = str(value)
    return flat


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _random_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator that augmentation, mixup and dropout draw from."""
    name, keys, *position = np.random.get_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {
        "python": random.getstate(), "numpy": [name, keys.tolist(), *position], "torch": torch.get_rng_state(), "cuda": cuda,
    }  # fmt: skip


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
