"""One run: one backbone with one method on one data set."""

import contextlib
import dataclasses
import datetime
import logging
import time
from collections.abc import Callable

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer

from dhtm.harness.core.devices import Ranks, pick_batch_size, pick_dtype
from dhtm.harness.core.errors import UserError, require_number, require_text
from dhtm.harness.data.loading import described, from_cache, load_data, on_error
from dhtm.harness.data.splits import Split, UnreadableError
from dhtm.harness.models.backbones import weights_sha256
from dhtm.harness.models.cost import baseline_flops, flops, solve
from dhtm.harness.models.methods import knobs, load_model, unusual
from dhtm.harness.runs.predict import predict_and_keep, stop
from dhtm.harness.runs.store import FAILED, RunDirectory, code_version, git_commit, library_version, run_id, versions
from dhtm.harness.sweeps.callback import note
from dhtm.harness.tracking import evaluation_log, log_finished_run
from dhtm.vit import tokens_by_layer

log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Task:
    """A run before it is carried out: the config with its knob solved, and what was made from it."""

    config: DictConfig
    target: float | None
    name: str
    run: RunDirectory
    model: VisionTransformer
    trained: bool
    preprocessing: dict
    split: Split
    dtype: torch.dtype
    determinants: dict


def evaluate(config: DictConfig, draw: Callable[[VisionTransformer, Split], list] = lambda model, split: []) -> dict:
    """Carry out the run that a config describes, go on where it was stopped, or find it done.

    Under torchrun all its processes carry it out together, each image in one of them.

    Args:
        config: of the run.
        draw: pictures of what the model makes of a split, each with a caption; for a tracker.

    Returns:
        The run's metrics, as in its metrics.json.

    Raises:
        UserError: the config asks for something that cannot be had.
    """
    ranks = Ranks(config.device)
    task = _prepare(config)
    run = task.run
    note(path=str(run.path.absolute()), n_images=len(task.split.dataset))
    with run.alone() if ranks.first else contextlib.nullcontext():
        if ranks.first and config.force:
            run.forget()
        before = ranks.gather(run.metrics() if ranks.first else None)[0]
        if before is not None:
            if before["n_failed"] and on_error(config.data) != "skip":
                raise UserError(
                    f"{run.path}: done before with data.on_error=skip, without the {before['n_failed']} images that {FAILED} "
                    "there lists; mend them, or set data.on_error=skip"
                )
            if ranks.first:
                log.info("%s: done before, %s", task.name, run.path)
                before = run.add_target(before, task.target)
                log_finished_run(task.config, before, run.path, lambda: draw(task.model, task.split))
            return before
        cost = _cost(task)
        done = ranks.gather(run.predictions_so_far() if ranks.first else None)[0]
        n_images = len(task.split.dataset)
        with evaluation_log(task.config, run.path.name, task.trained, n_images, done, ranks) as tracked:
            predictions, failed, how = _predictions(task, done, ranks, tracked.progress)
            _report_failed(task, failed, ranks)
            metrics = None
            if ranks.first:
                metrics = _metrics(task, predictions, len(failed), cost | how)
                metrics = run.save(task.config, predictions.drop(columns="nonfinite"), metrics)
                _tell(task, metrics)
                tracked.result(metrics, run.path, lambda: draw(task.model, task.split))
    return ranks.gather(metrics)[0]


def _prepare(config: DictConfig) -> _Task:
    require_text(config, "backbone.name", "backbone.architecture", "method.name", "data.name", "data.split")
    require_number(config, "batch_size", 1, integer=True, optional=True)
    require_number(config, "num_workers", integer=True, optional=True)
    require_number(config, "seed", below=2**63, integer=True)
    require_number(config, "store_every_s")
    on_error(config.data)  # which must be one that there is
    dtype = pick_dtype(config.dtype, "dtype")
    config = config.copy()
    config.method, target = solve(config.backbone, config.method, config.target)
    model, trained_weights = load_model(config, config.method)
    preprocessing = resolve_data_config(model=model)
    split = load_data(config.data, config.data.split, preprocessing, model.num_classes)
    method = OmegaConf.to_container(config.method, resolve=True)
    for key in ("backend", "knob", "weights"):  # all backends make the same merges; weights count by what they are
        method.pop(key, None)
    determinants = {
        "backbone": [config.backbone.name, config.backbone.architecture],
        "weights": weights_sha256(model),
        "method": method,
        "code": code_version(model.reducer),
        "data": split.fingerprint,
        "n_images": len(split.dataset),
        "preprocessing": {key: str(value) for key, value in preprocessing.items()},
        "dtype": config.dtype,
    }
    if split.among is not None:
        determinants["among"] = split.among
    if split.real_labels is not None:
        determinants["real_labels"] = True
    options = " ".join(filter(None, (config.method.name, unusual(config.method), "trained" if trained_weights else "")))
    name = f"{config.backbone.name} · {options} · {config.data.name}"
    run = RunDirectory(config.results_dir, run_id(**determinants))
    if not split.in_memory:
        log.info("%s: images as %s has them: %s", name, config.backbone.name, described(preprocessing))
    trained = trained_weights is not None
    return _Task(config, target, name, run, model, trained, preprocessing, split, dtype, determinants)


def _predictions(
    task: _Task, done: pd.DataFrame, ranks: Ranks, progress: Callable[[pd.DataFrame], None]
) -> tuple[pd.DataFrame, list[UnreadableError], dict]:
    """Predictions for all images, in order, each from one rank or from before; those without; and how they were made."""
    config, n_images = task.config, len(task.split.dataset)
    if ranks.first and len(done):
        log.info("%s: going on after %d of %d images", task.name, len(done), n_images)
    todo = sorted(set(range(n_images)) - set(done["index"]))
    split = from_cache(task.split, config, task.preprocessing)
    failed = {}

    def on_unreadable(unreadable: UnreadableError) -> None:
        if unreadable.index not in failed:
            log.warning("%s: %s", task.name, unreadable)
        failed[unreadable.index] = unreadable

    start = time.perf_counter()
    found, batch_size = predict_and_keep(
        task.run, config.store_every_s, progress, task.model, split, todo[ranks.rank :: ranks.world],
        config.batch_size or pick_batch_size(ranks.device), ranks.device, task.dtype,
        task.name if ranks.first else None, config.num_workers,
        stop if on_error(config.data) == "fail_fast" else on_unreadable,
    )  # fmt: skip
    everyones = ranks.gather((found, batch_size, failed))
    seconds = time.perf_counter() - start
    parts = [part for found, *_ in everyones for part in found]
    failed = {index: unreadable for *_, failed in everyones for index, unreadable in failed.items()}
    if not parts and not len(done):
        raise UserError(f"{task.name}: none of its {n_images} images can be read; {failed[0]}")
    predictions = pd.concat([*filter(len, [done]), *parts], ignore_index=True).sort_values("index", ignore_index=True)
    if sorted([*predictions["index"], *failed]) != list(range(n_images)):
        raise RuntimeError(f"{task.run.path}: images were lost or counted twice; this is a mistake of the program")
    return predictions, [failed[index] for index in sorted(failed)], {
        "images_per_s": (len(todo) - len(failed)) / seconds if len(todo) > len(failed) else None,
        "batch_size": min(size for _, size, _ in everyones),
        "world_size": ranks.world,
        "device": ranks.device.type,
        "wall_s": seconds,
    }  # fmt: skip


def _report_failed(task: _Task, failed: list[UnreadableError], ranks: Ranks) -> None:
    """List the images that cannot be read, which ends the run unless they are to be skipped."""
    if ranks.first:
        task.run.list_failed(failed)
    if failed and on_error(task.config.data) != "skip":
        more = f" and {len(failed) - 1} more, listed in {task.run.path / FAILED}" if len(failed) > 1 else ""
        raise UserError(
            f"{task.name}: {failed[0]}{more}; the predictions for all others are stored: leave these out by "
            "data.on_error=skip, or mend them, which makes it another run"
        )


def _metrics(task: _Task, predictions: pd.DataFrame, n_failed: int, measured: dict) -> dict:
    config, reducer = task.config, task.model.reducer
    return {
        "run_id": task.run.path.name,
        "experiment": config.experiment,
        "backbone": config.backbone.name,
        "method": config.method.name,
        "trained": task.trained,
        "untrained": not task.trained and any(True for _ in reducer.parameters()),
        "knob": config.method.knob,
        "knobs": knobs(config.method),
        "targets_reduction_pct": [] if task.target is None else [task.target],
        "layers": reducer.layers if reducer.layers == "all" else list(reducer.layers),
        "data": config.data.name,
        "split": config.data.split,
        "n_failed": n_failed,
        **_accuracy(predictions),
        **_real_accuracy(predictions, task.split.real_labels),
        **measured,
        "dtype": config.dtype,
        "tf32": False,  # dhtm.harness.core.devices.exact
        "seed": config.seed,
        "weights_sha256": task.determinants["weights"],
        "data_fingerprint": task.split.fingerprint,
        "code_version": task.determinants["code"],
        "library_version": library_version(),
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def _tell(task: _Task, metrics: dict) -> None:
    if metrics["n_nonfinite"]:
        log.warning(
            "%s: %d images have logits that are not finite, the first is image %d",
            task.name, metrics["n_nonfinite"], metrics["first_nonfinite"],
        )  # fmt: skip
    speed = "" if metrics["images_per_s"] is None else f", {metrics['images_per_s']:.0f} images/s"
    log.info(
        "%s: top-1 %.2f%% [%.2f, %.2f], %.4f GFLOPs (%.1f%% fewer)%s, %s",
        task.name, metrics["top1"], *metrics["top1_ci95"], metrics["flops_g"], metrics["flops_reduction_pct"], speed,
        task.run.path,
    )  # fmt: skip


def _accuracy(predictions: pd.DataFrame) -> dict:
    """Top-1 with its 95% Wilson interval and top-5, in percent."""
    from scipy.stats import binomtest  # here, because it takes a second, which a start need not wait for

    n_images, n_correct = len(predictions), int(predictions.correct.sum())
    interval = binomtest(n_correct, n_images).proportion_ci(0.95, method="wilson")
    broken = predictions["index"][predictions.nonfinite]
    in_top5 = [label in top5 for label, top5 in zip(predictions.label, predictions.top5, strict=True)]
    return {
        "n_images": n_images,
        "n_nonfinite": len(broken),
        "first_nonfinite": int(broken.min()) if len(broken) else None,
        "top1": 100 * n_correct / n_images,
        "top1_ci95": [100 * interval.low, 100 * interval.high],
        "top5": 100 * sum(in_top5) / n_images,
    }


def _real_accuracy(predictions: pd.DataFrame, labels: list[list[int]] | None) -> dict:
    """Top-1 by the reassessed labels, in percent: any of them is right, and images without one do not count."""
    if labels is None:
        return {}
    right = [
        top5[0] in labels[index]
        for index, top5 in zip(predictions["index"], predictions.top5, strict=True)
        if labels[index]
    ]
    return {"n_images_real": len(right), "top1_real": 100 * sum(right) / len(right) if right else None}


def _cost(task: _Task) -> dict:
    """FLOPs of the patched model and of the plain one, its parameters, and the tokens that leave each layer."""
    backbone = task.config.backbone
    count, plain = flops(backbone, task.config.method), baseline_flops(backbone.architecture, backbone.num_classes)
    return {
        "flops_g": count.total / 1e9,
        "flops_baseline_g": plain / 1e9,
        "flops_reduction_pct": 100 * (1 - count.total / plain),
        "merge_flops_g": count.merging / 1e9,
        "params_m": sum(parameter.numel() for parameter in task.model.parameters()) / 1e6,
        "tokens_by_layer": tokens_by_layer(task.model),
    }
