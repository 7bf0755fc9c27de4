"""One run: one backbone with one method on one data set."""

import contextlib
import datetime
import logging
import time
from collections.abc import Iterator

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from scipy.stats import binomtest
from timm.data import resolve_data_config
from torch import nn
from tqdm import tqdm

from dhtm.flops import count_flops
from dhtm.harness.backbones import weights_sha256
from dhtm.harness.data import Split
from dhtm.harness.equal_cost import baseline_flops, solve
from dhtm.harness.errors import UserError, one_line, require_number
from dhtm.harness.loading import batches, from_cache, load_data
from dhtm.harness.methods import knobs, load_model, unusual
from dhtm.harness.store import RunDirectory, code_version, git_commit, library_version, run_id, versions
from dhtm.vit import image_ids, tokens_by_layer

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def evaluate(config: DictConfig) -> dict:
    """Carry out the run that a config describes, or find it done.

    Returns:
        The run's metrics, as in its metrics.json.

    Raises:
        UserError: the config asks for something that cannot be had.
    """
    device = pick_device(config.device)
    require_number(config, "batch_size", 1, integer=True, optional=True)
    batch_size = config.batch_size or pick_batch_size(device)
    require_number(config, "num_workers", integer=True, optional=True)
    require_number(config, "seed", integer=True)
    dtype = pick_dtype(config.dtype, "dtype")
    config = config.copy()
    config.method, target = solve(config.backbone, config.method, config.target)
    model, trained_weights = load_model(config, config.method)
    reducer = model.reducer
    preprocessing = resolve_data_config(model=model)
    split = load_data(config.data, config.data.split, preprocessing, model.num_classes)
    weights, code = weights_sha256(model), code_version(reducer)
    method = OmegaConf.to_container(config.method, resolve=True)
    for key in ("backend", "knob", "weights"):  # all backends make the same merges; weights count by what they are
        method.pop(key, None)
    identity = run_id(
        backbone=[config.backbone.name, config.backbone.architecture],
        weights=weights,
        method=method,
        code=code,
        data=split.fingerprint,
        n_images=len(split.dataset),
        preprocessing={key: str(value) for key, value in preprocessing.items()},
        dtype=config.dtype,
    )
    run = RunDirectory(config.results_dir, identity)
    options = " ".join(filter(None, (config.method.name, unusual(config.method), "trained" if trained_weights else "")))
    name = f"{config.backbone.name} · {options} · {config.data.name}"
    if not config.force and (metrics := run.metrics()) is not None:
        log.info("%s: done before, %s", name, run.path)
        return run.add_target(metrics, target)

    split = from_cache(split, config, preprocessing)
    cost = _cost(model, baseline_flops(config.backbone.architecture, config.backbone.num_classes))
    try:
        predictions, seconds = predict(model, split, batch_size, device, dtype, name, config.num_workers)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"device={device}: out of memory with batch_size={batch_size}; set a smaller batch_size"
        ) from error
    metrics = {
        "run_id": identity,
        "experiment": config.experiment,
        "backbone": config.backbone.name,
        "method": config.method.name,
        "trained": trained_weights is not None,
        "untrained": trained_weights is None and any(True for _ in reducer.parameters()),
        "knob": config.method.knob,
        "knobs": knobs(config.method),
        "targets_reduction_pct": [] if target is None else [target],
        "layers": reducer.layers if reducer.layers == "all" else list(reducer.layers),
        "data": config.data.name,
        "split": config.data.split,
        **_accuracy(predictions),
        **cost,
        "images_per_s": len(predictions) / seconds,
        "batch_size": batch_size,
        "dtype": config.dtype,
        "device": device.type,
        "seed": config.seed,
        "wall_s": seconds,
        "weights_sha256": weights,
        "data_fingerprint": split.fingerprint,
        "code_version": code,
        "library_version": library_version(),
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    if metrics["n_nonfinite"]:
        log.warning("%s: %d images have logits that are not finite", name, metrics["n_nonfinite"])
    run.save(config, predictions.drop(columns="nonfinite"), metrics)
    log.info(
        "%s: top-1 %.2f%% [%.2f, %.2f], %.4f GFLOPs (%.1f%% fewer), %.0f images/s, %s",
        name, metrics["top1"], *metrics["top1_ci95"], metrics["flops_g"], metrics["flops_reduction_pct"],
        metrics["images_per_s"], run.path,
    )  # fmt: skip
    return metrics


def _accuracy(predictions: pd.DataFrame) -> dict:
    """Top-1 with its 95% Wilson interval and top-5, in percent."""
    n_images, n_correct = len(predictions), int(predictions.correct.sum())
    interval = binomtest(n_correct, n_images).proportion_ci(0.95, method="wilson")
    in_top5 = [label in top5 for label, top5 in zip(predictions.label, predictions.top5, strict=True)]
    return {
        "n_images": n_images,
        "n_failed": 0,
        "n_nonfinite": int(predictions.nonfinite.sum()),
        "top1": 100 * n_correct / n_images,
        "top1_ci95": [100 * interval.low, 100 * interval.high],
        "top5": 100 * sum(in_top5) / n_images,
    }


def _cost(model: nn.Module, plain: int) -> dict:
    """FLOPs of the patched model and of the plain one, its parameters, and the tokens that leave each layer."""
    flops = count_flops(model)
    return {
        "flops_g": flops.total / 1e9,
        "flops_baseline_g": plain / 1e9,
        "flops_reduction_pct": 100 * (1 - flops.total / plain),
        "merge_flops_g": flops.merging / 1e9,
        "params_m": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "tokens_by_layer": tokens_by_layer(model),
    }


@torch.inference_mode()
def predict(
    model: nn.Module,
    split: Split,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    name: str | None,
    num_workers: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> tuple[pd.DataFrame, float]:
    """The five best classes for every image of a split, or of one rank's share of it.

    Args:
        model: a patched model, which is moved to the device and dtype.
        name: what to call this on a progress bar; None for no bar.
        num_workers: processes that load images; None for one a core where images are on disk.
        share: rank and world: the images rank, rank + world, rank + 2·world, …

    Returns:
        index, label, top5 (best first), correct (is the first right) and nonfinite, a row an image in order; and the
        seconds that it took, loading included.
    """
    model.to(device=device, dtype=dtype).eval()
    indices = range(share[0], len(split.dataset), share[1])
    parts = []
    start = time.perf_counter()
    hidden = True if name is None else None
    with _whole_float32(), tqdm(total=len(indices), desc=name, unit=" images", disable=hidden) as bar:
        for ids, images, labels in batches(split, indices, batch_size, device, num_workers):
            with image_ids(model, ids):
                logits = model(images.to(dtype=dtype)).float()
            top5 = logits.topk(min(5, logits.shape[1])).indices.cpu()
            parts.append(
                pd.DataFrame(
                    {
                        "index": ids.numpy(),
                        "label": labels.numpy(),
                        "top5": list(top5.numpy()),
                        "correct": (top5[:, 0] == labels).numpy(),
                        "nonfinite": ~logits.isfinite().all(dim=1).cpu().numpy(),
                    }
                )
            )
            bar.update(len(ids))
    if not parts:  # more ranks than images
        parts = [pd.DataFrame(columns=["index", "label", "top5", "correct", "nonfinite"])]
    return pd.concat(parts, ignore_index=True), time.perf_counter() - start


@contextlib.contextmanager
def _whole_float32() -> Iterator[None]:
    """Convolutions on float32 in float32, as matrix products are: cuDNN's default would embed patches in TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def pick_device(name: str) -> torch.device:
    """The device that a config asks for; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(
            f"device={name}: not to be had here ({one_line(error)}); device=auto takes what is there"
        ) from error
    return device


def pick_dtype(name: str, key: str) -> torch.dtype:
    """The dtype that a config names under a key."""
    if name not in DTYPES:
        raise UserError(f"{key}={name}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def pick_batch_size(device: torch.device) -> int:
    """A batch size that is fast on the device; results do not depend on it."""
    return 512 if device.type == "cuda" else 64
