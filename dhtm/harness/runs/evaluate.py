"""One run: one backbone with one method on one data set."""

import contextlib
import dataclasses
import datetime
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer

from dhtm.flops import count_flops_of_images
from dhtm.harness.core.devices import DTYPES, pick_batch_size
from dhtm.harness.core.errors import UserError
from dhtm.harness.core.ranks import Ranks
from dhtm.harness.data.cache import decode_once
from dhtm.harness.data.scenes import Digits
from dhtm.harness.data.splits import Split, UnreadableError, open_split
from dhtm.harness.models.backbones import Backbone, weights_sha256
from dhtm.harness.models.cost import baseline_flops, flops
from dhtm.harness.models.methods import UNMERGED, Method
from dhtm.harness.models.weights import load_model
from dhtm.harness.runs.dense import N_PROBE, observe_patches, segmentation
from dhtm.harness.runs.directory import FAILED, RunDirectory, outputs
from dhtm.harness.runs.faithfulness import Observe, compare_with, keep
from dhtm.harness.runs.metrics import accuracy, faithfulness, real_accuracy
from dhtm.harness.runs.predict import predict, store_predictions
from dhtm.harness.runs.provenance import VERSION, code_version, git_commit, run_id, versions
from dhtm.harness.tracking import Tracker, WandbEvaluation
from dhtm.vit import tokens_by_layer

log = logging.getLogger(__name__)

Draw = Callable[[VisionTransformer, Split], list]


@dataclass(frozen=True)
class Evaluation:
    """The settings of a run, which ``configs/evaluate.yaml`` explains.

    Attributes:
        backbone, method, data: what is evaluated, with the method's knob solved.
        results_dir: where run directories go.
        target_pct: the FLOPs reduction in percent that the knob was solved for; None if the knob was given.
        thresholds_from: the split, number and SHA-256 of the images on which thresholds were found; None for other methods.
    """

    backbone: Backbone
    method: Method
    data: Any
    results_dir: Path = Path("results/runs")
    target_pct: float | None = None
    thresholds_from: dict[str, Any] | None = None
    experiment: str | None = None
    checkpoints_dir: Path = Path("checkpoints")
    allow_untrained: bool = False
    batch_size: PositiveInt | None = None
    num_workers: NonNegativeInt | None = None
    device: str = "auto"
    dtype: Literal[tuple(DTYPES)] = "float32"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    dense: bool = False
    force: bool = False
    store_every_s: NonNegativeFloat = 30
    cache_dir: Path | None = Path("results/cache")
    tracker: Tracker | None = None

    def __post_init__(self):
        if self.dense and not isinstance(self.data, Digits):
            raise UserError(f"dense=true: only data=digits knows the class of every patch, not data={self.data.name}")

    def settings(self) -> dict:
        """Return the settings as plain values in the form of Hydra's config."""
        values = dataclasses.asdict(self)
        method = values.pop("method")
        values["method"] = {
            **{key: method[key] for key in ("name", "knob", "checkpoint")},
            "_target_": method["target"],
        }
        values["method"] |= method["options"]
        values["data"]["_target_"] = f"{type(self.data).__module__}.{type(self.data).__qualname__}"
        return json.loads(json.dumps(values, default=str))


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A run with everything it needs loaded."""

    evaluation: Evaluation
    title: str
    directory: RunDirectory
    model: VisionTransformer
    trained: bool
    preprocessing: dict
    split: Split
    determinants: dict

    def track(self, done: pd.DataFrame, ranks: Ranks) -> WandbEvaluation:
        """Log the run to the tracker, if there is one; ``done`` are the predictions of earlier processes."""
        run_id, n_images = self.directory.path.name, len(self.split.dataset)
        return WandbEvaluation(self.evaluation, self.title, run_id, n_images, done, ranks)


def evaluate(
    evaluation: Evaluation,
    draw: Draw | None = None,
    on_start: Callable[[Path, int], None] = lambda folder, n_images: None,
) -> dict:
    """Carry out a run or resume it; if it is finished, only return its metrics.

    Unless its weights were trained with the method, the run is compared with the unmerged model's run. If that is not
    finished, it is carried out first.

    Under torchrun the processes share the images.

    Args:
        draw: makes pictures of what the model does to a split, each with a caption, for a tracker.
        on_start: is called with the run's directory and its number of images.

    Returns:
        The run's metrics, as in its metrics.json.

    Raises:
        UserError: something that the settings name is not available.
    """
    ranks = Ranks(evaluation.device)
    prepared = _prepare(evaluation)
    directory, split = prepared.directory, prepared.split
    pictures = (lambda: draw(prepared.model, split)) if draw else list
    on_start(directory.path, len(split.dataset))
    with directory.alone() if ranks.first else contextlib.nullcontext():
        if ranks.first and evaluation.force:
            directory.forget()
        metrics = ranks.gather(directory.metrics() if ranks.first else None)[0]
        if metrics is not None:
            return _reuse_finished(prepared, metrics, pictures, ranks)
        observe = _observer(prepared, ranks)
        if evaluation.dense:
            observe = observe_patches(prepared.model, evaluation.backbone, evaluation.data, observe)
        done = ranks.gather(directory.predictions_so_far() if ranks.first else None)[0]
        with prepared.track(done, ranks) as tracked:
            failed, measured = _predict_missing(prepared, done, observe, ranks, tracked.progress)
            if ranks.first:
                directory.list_failed(failed)
            _require_readable(prepared, failed)
            if ranks.first:
                predictions = _all_predictions(prepared, failed)
                metrics = _metrics(prepared, predictions, len(failed), measured)
                metrics = directory.save(evaluation.settings(), predictions.drop(columns="nonfinite"), metrics)
                _report(prepared, metrics)
                tracked.result(metrics, directory.path, pictures)
    return ranks.gather(metrics)[0]


def _prepare(evaluation: Evaluation) -> _Prepared:
    backbone, method, data = evaluation.backbone, evaluation.method, evaluation.data
    model, trained_weights = load_model(
        backbone, method, evaluation.checkpoints_dir, evaluation.allow_untrained, evaluation.seed
    )
    preprocessing = resolve_data_config(model=model)
    split = open_split(data, data.split, preprocessing, model.num_classes)
    determinants = {
        "backbone": [backbone.name, backbone.architecture],
        "weights": weights_sha256(model),
        **_determinants_of(method),
        "data": split.fingerprint,
        "n_images": len(split.dataset),
        "preprocessing": {key: str(value) for key, value in preprocessing.items()},
        "dtype": evaluation.dtype,
        "among": split.among,
        "real_labels": split.real_labels is not None,
        **({"dense": N_PROBE} if evaluation.dense else {}),
    }
    directory = RunDirectory(evaluation.results_dir, run_id(**determinants))
    options = [method.name, method.unusual_options(), "trained" if trained_weights else ""]
    title = f"{backbone.name} · {' '.join(filter(None, options))} · {data.name}"
    trained = trained_weights is not None
    return _Prepared(evaluation, title, directory, model, trained, preprocessing, split, determinants)


def _determinants_of(method: Method) -> dict:
    # All backends make the same merges.
    options = {key: value for key, value in method.options.items() if key != "backend"}
    return {
        "method": {"name": method.name, "target": method.target, **options},
        "code": code_version(method.reducer()),
    }


def _observer(prepared: _Prepared, ranks: Ranks) -> Observe | None:
    """Return the observer of the run's outputs; None for weights trained with the method, which have no unmerged reference.

    The unmerged model's outputs are kept, and all other runs of the same dtype are compared with them. The unmerged model in
    another dtype is compared with itself in float32.
    """
    evaluation, is_unmerged = prepared.evaluation, prepared.evaluation.method == UNMERGED
    if prepared.trained:
        return None
    if is_unmerged and evaluation.dtype == "float32":
        return keep
    dtype = "float32" if is_unmerged else evaluation.dtype
    determinants = prepared.determinants | _determinants_of(UNMERGED) | {"dtype": dtype}
    folder = evaluation.results_dir / run_id(**determinants)
    if not ranks.gather((folder / "metrics.json").exists())[0]:
        log.info("%s: evaluating the unmerged model first, for comparison", prepared.title)
        unmerged = {"method": UNMERGED, "dtype": dtype, "target_pct": None, "force": False, "tracker": None}
        folder = evaluation.results_dir / evaluate(dataclasses.replace(evaluation, **unmerged))["run_id"]
    return compare_with(outputs(folder), keeps=is_unmerged)


def _reuse_finished(prepared: _Prepared, metrics: dict, pictures: Callable[[], list], ranks: Ranks) -> dict:
    evaluation, directory = prepared.evaluation, prepared.directory
    if metrics["n_failed"] and evaluation.data.on_error != "skip":
        raise UserError(
            f"{directory.path}: finished with data.on_error=skip, without the {metrics['n_failed']} images listed in its "
            f"{FAILED}; fix them, or set data.on_error=skip"
        )
    if ranks.first:
        log.info("%s: already finished, %s", prepared.title, directory.path)
        metrics = directory.add_target(metrics, evaluation.target_pct)
        with prepared.track(pd.DataFrame(), ranks) as tracked:
            tracked.result(metrics, directory.path, pictures)
    return metrics


def _predict_missing(
    prepared: _Prepared,
    done: pd.DataFrame,
    observe: Observe | None,
    ranks: Ranks,
    progress: Callable[[pd.DataFrame], None],
) -> tuple[list[UnreadableError], dict]:
    """Predict the images not stored yet, shared among ranks; return the errors of unreadable images, and measurements."""
    evaluation, n_images = prepared.evaluation, len(prepared.split.dataset)
    if ranks.first and len(done):
        log.info("%s: resuming after %d of %d images", prepared.title, len(done), n_images)
    missing = sorted(set(range(n_images)) - set(done["index"]))
    split = prepared.split
    if evaluation.cache_dir is not None and missing:
        data = evaluation.data
        split = decode_once(data, split, prepared.preprocessing, evaluation.cache_dir, evaluation.num_workers)
    failed = {}

    def on_unreadable(unreadable: UnreadableError) -> None:
        if unreadable.index not in failed:
            log.warning("%s: %s", prepared.title, unreadable)
        failed[unreadable.index] = unreadable

    start = time.perf_counter()

    def predict_these(indices: Sequence[int], batch_size: int) -> Iterator[pd.DataFrame]:
        return predict(
            prepared.model, split, indices, batch_size, ranks.device, DTYPES[evaluation.dtype],
            prepared.title if ranks.first else None, evaluation.num_workers, on_unreadable, observe,
        )  # fmt: skip

    batch_size = store_predictions(
        predict_these, missing[ranks.rank :: ranks.world], evaluation.batch_size or pick_batch_size(ranks.device),
        prepared.directory, evaluation.store_every_s, progress,
    )  # fmt: skip
    everyone = ranks.gather((batch_size, failed))
    seconds = time.perf_counter() - start
    failed = {index: unreadable for _, failed in everyone for index, unreadable in failed.items()}
    n_predicted = len(missing) - len(failed)
    return [failed[index] for index in sorted(failed)], {
        "images_per_s": n_predicted / seconds if n_predicted else None,
        "batch_size": min(size for size, _ in everyone),
        "world_size": ranks.world,
        "device": ranks.device.type,
        "wall_s": seconds,
    }


def _require_readable(prepared: _Prepared, failed: list[UnreadableError]) -> None:
    """Raise a UserError if no image can be read, or if some cannot and unreadable images are not skipped."""
    if len(failed) == len(prepared.split.dataset):
        raise UserError(f"{prepared.title}: none of its {len(failed)} images can be read; {failed[0]}")
    if failed and prepared.evaluation.data.on_error != "skip":
        more = f" and {len(failed) - 1} more, listed in {prepared.directory.path / FAILED}" if len(failed) > 1 else ""
        raise UserError(
            f"{prepared.title}: {failed[0]}{more}; the predictions for all others are stored; skip these images by "
            "data.on_error=skip, or fix them and start a new run"
        )


def _all_predictions(prepared: _Prepared, failed: list[UnreadableError]) -> pd.DataFrame:
    predictions = prepared.directory.predictions_so_far().sort_values("index", ignore_index=True)
    everything = sorted([*predictions["index"], *(unreadable.index for unreadable in failed)])
    if everything != list(range(len(prepared.split.dataset))):
        raise UserError(
            f"{prepared.directory.path}: predictions of other processes are missing; results_dir must be on a disk that all "
            "machines share"
        )
    return predictions


def _metrics(prepared: _Prepared, predictions: pd.DataFrame, n_failed: int, measured: dict) -> dict:
    evaluation, model, split = prepared.evaluation, prepared.model, prepared.split
    reducer, backbone = model.reducer, evaluation.backbone
    return {
        "run_id": prepared.directory.path.name,
        "experiment": evaluation.experiment,
        "backbone": backbone.name,
        "method": evaluation.method.name,
        "trained": prepared.trained,
        "untrained": not prepared.trained and any(True for _ in reducer.parameters()),
        "knob": evaluation.method.knob,
        "knobs": evaluation.method.knobs,
        "thresholds_from": evaluation.thresholds_from,
        "targets_reduction_pct": [] if evaluation.target_pct is None else [evaluation.target_pct],
        "layers": reducer.layers if reducer.layers == "all" else list(reducer.layers),
        "data": evaluation.data.name,
        "split": evaluation.data.split,
        "n_failed": n_failed,
        **accuracy(predictions),
        **faithfulness(predictions),
        **(real_accuracy(predictions, split.real_labels) if split.real_labels is not None else {}),
        **(segmentation(predictions) if evaluation.dense else {}),
        **_cost(prepared, predictions),
        "params_m": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        **measured,
        "dtype": evaluation.dtype,
        "tf32": False,  # see dhtm.harness.core.devices.exact
        "seed": evaluation.seed,
        "weights_sha256": prepared.determinants["weights"],
        "data_fingerprint": split.fingerprint,
        "code_version": prepared.determinants["code"],
        "library_version": VERSION,
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def _cost(prepared: _Prepared, predictions: pd.DataFrame) -> dict:
    """Return FLOPs and tokens by layer; if images differ, the means over images and the FLOPs' quartiles."""
    backbone, model = prepared.evaluation.backbone, prepared.model
    plain = baseline_flops(backbone)
    if "tokens" in predictions:
        tokens = np.stack(predictions.tokens)
        total, merging = (one.numpy() for one in count_flops_of_images(model, torch.from_numpy(tokens)))
        by_layer = tokens.mean(axis=0).round(2).tolist()
        quartiles = (np.percentile(total, [0, 25, 50, 75, 100]) / 1e9).tolist()
        total, merging = total.mean(), merging.mean()
    else:
        count = flops(backbone, prepared.evaluation.method)
        total, merging, by_layer, quartiles = count.total, count.merging, tokens_by_layer(model), None
    return {
        "flops_g": total / 1e9,
        "flops_baseline_g": plain / 1e9,
        "flops_reduction_pct": 100 * (1 - total / plain),
        "flops_g_quartiles": quartiles,
        "merge_flops_g": merging / 1e9,
        "tokens_by_layer": by_layer,
    }


def _report(prepared: _Prepared, metrics: dict) -> None:
    if metrics["n_nonfinite"]:
        log.warning(
            "%s: %d images have logits that are not finite, the first is image %d",
            prepared.title, metrics["n_nonfinite"], metrics["first_nonfinite"],
        )  # fmt: skip
    results = []
    if metrics["top1"] is not None:
        results.append("top-1 {:.2f}% [{:.2f}, {:.2f}]".format(metrics["top1"], *metrics["top1_ci95"]))
    is_reference = prepared.evaluation.method == UNMERGED and metrics["dtype"] == "float32"
    if metrics["kl"] is not None and not is_reference:
        results.append(f"KL {metrics['kl']:.2g} nats, agreement {metrics['agreement']:.2f}%")
    if "miou" in metrics:
        results.append("mIoU {:.2f}% [{:.2f}, {:.2f}]".format(metrics["miou"], *metrics["miou_ci95"]))
    results.append(f"{metrics['flops_g']:.4f} GFLOPs ({metrics['flops_reduction_pct']:.1f}% fewer)")
    if metrics["images_per_s"] is not None:
        results.append(f"{metrics['images_per_s']:.0f} images/s")
    log.info("%s: %s, %s", prepared.title, ", ".join(results), prepared.directory.path)
