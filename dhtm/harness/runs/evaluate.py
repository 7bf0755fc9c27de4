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
from dhtm.harness.runs.metrics import Observe, accuracy, compare_with, faithfulness, keep, real_accuracy
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
        about = {key: method[key] for key in ("name", "knob", "checkpoint")}
        values["method"] = about | {"_target_": method["target"]} | method["options"]
        values["data"]["_target_"] = f"{type(self.data).__module__}.{type(self.data).__qualname__}"
        return json.loads(json.dumps(values, default=str))


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
    run = _Run(evaluation)
    pictures = (lambda: draw(run.model, run.split)) if draw else list
    on_start(run.directory.path, run.n_images)
    with run.directory.alone() if run.ranks.first else contextlib.nullcontext():
        return run.carry_out(pictures)


class _Run:
    """A run with everything it needs loaded."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation, self.ranks = evaluation, Ranks(evaluation.device)
        backbone, method, data = evaluation.backbone, evaluation.method, evaluation.data
        self.model, weights = load_model(
            backbone, method, evaluation.checkpoints_dir, evaluation.allow_untrained, evaluation.seed
        )
        self.trained = weights is not None
        self.preprocessing = resolve_data_config(model=self.model)
        self.split = open_split(data, data.split, self.preprocessing, self.model.num_classes)
        self.n_images = len(self.split.dataset)
        self.determinants = {
            "backbone": [backbone.name, backbone.architecture],
            "weights": weights_sha256(self.model),
            **_determinants_of(method),
            "data": self.split.fingerprint,
            "n_images": self.n_images,
            "preprocessing": {key: str(value) for key, value in self.preprocessing.items()},
            "dtype": evaluation.dtype,
            "among": self.split.among,
            "real_labels": self.split.real_labels is not None,
            **({"dense": N_PROBE} if evaluation.dense else {}),
        }
        self.of_unmerged = self.determinants | _determinants_of(UNMERGED)
        # Settings that are not part of the run id, such as the backend, make no other run of the unmerged model.
        self.is_unmerged = not self.trained and self.determinants == self.of_unmerged
        self.directory = RunDirectory(evaluation.results_dir, run_id(**self.determinants))
        options = [method.name, method.unusual_options(), "trained" if self.trained else ""]
        self.title = f"{backbone.name} · {' '.join(filter(None, options))} · {data.name}"

    def carry_out(self, pictures: Callable[[], list]) -> dict:
        """Return the metrics of the finished run, or predict the images that are missing and finish it."""
        evaluation, directory, ranks = self.evaluation, self.directory, self.ranks
        earlier_targets = directory.forget() if ranks.first and evaluation.force else []
        metrics = ranks.gather(directory.metrics() if ranks.first else None)[0]
        if metrics is not None:
            return self._reuse(metrics, pictures)
        observers = self._observers()
        done = ranks.gather(directory.predictions_so_far() if ranks.first else None)[0]
        with self._track(done) as tracked:
            failed, measured = self._predict_missing(done, observers, tracked.progress)
            if ranks.first:
                directory.list_failed(failed)
            self._require_readable(failed)
            if ranks.first:
                predictions = self._all_predictions(failed)
                metrics = self._metrics(predictions, len(failed), measured)
                metrics["targets_reduction_pct"] = sorted({*earlier_targets, *metrics["targets_reduction_pct"]})
                metrics = directory.save(evaluation.settings(), predictions.drop(columns="nonfinite"), metrics)
                self._report(metrics)
                tracked.result(metrics, directory.path, pictures)
        return ranks.gather(metrics)[0]

    def _track(self, done: pd.DataFrame) -> WandbEvaluation:
        """Log the run to the tracker, if there is one; ``done`` are the predictions of earlier processes."""
        return WandbEvaluation(self.evaluation, self.title, self.directory.path.name, self.n_images, done, self.ranks)

    def _reuse(self, metrics: dict, pictures: Callable[[], list]) -> dict:
        if metrics["n_failed"] and self.evaluation.data.on_error != "skip":
            raise UserError(
                f"{self.directory.path}: finished with data.on_error=skip, without the {metrics['n_failed']} images listed "
                f"in its {FAILED}; fix them, or set data.on_error=skip"
            )
        if self.ranks.first:
            log.info("%s: already finished, %s", self.title, self.directory.path)
            metrics = self.directory.add_target(metrics, self.evaluation.target_pct)
            with self._track(pd.DataFrame()) as tracked:
                tracked.result(metrics, self.directory.path, pictures)
        return metrics

    def _observers(self) -> list[Observe]:
        """Return the observers of the run's outputs; none for weights trained with the method, which have no reference.

        The unmerged model's outputs are kept, and all other runs of the same dtype are compared with them. The unmerged
        model in another dtype is compared with itself in float32.
        """
        evaluation = self.evaluation
        observers = [keep] if self.is_unmerged else []  # compare_with replaces its kl and unmerged_class
        if not self.trained and not (self.is_unmerged and evaluation.dtype == "float32"):
            dtype = "float32" if self.is_unmerged else evaluation.dtype
            folder = evaluation.results_dir / run_id(**self.of_unmerged | {"dtype": dtype})
            if not self.ranks.gather((folder / "metrics.json").exists())[0]:
                log.info("%s: evaluating the unmerged model first, for comparison", self.title)
                unmerged = {"method": UNMERGED, "dtype": dtype, "target_pct": None, "force": False, "tracker": None}
                folder = evaluation.results_dir / evaluate(dataclasses.replace(evaluation, **unmerged))["run_id"]
            observers.append(compare_with(outputs(folder)))
        if evaluation.dense:
            observers.append(observe_patches(self.model, evaluation.backbone, evaluation.data))
        return observers

    def _predict_missing(
        self, done: pd.DataFrame, observers: list[Observe], progress: Callable[[pd.DataFrame], None]
    ) -> tuple[list[UnreadableError], dict]:
        """Predict the images not stored yet, shared among ranks; return the errors of unreadable images, and measurements."""
        evaluation, ranks, split = self.evaluation, self.ranks, self.split
        if ranks.first and len(done):
            log.info("%s: resuming after %d of %d images", self.title, len(done), self.n_images)
        missing = sorted(set(range(self.n_images)) - set(done["index"]))
        if evaluation.cache_dir is not None and missing:
            data = evaluation.data
            split = decode_once(data, split, self.preprocessing, evaluation.cache_dir, evaluation.num_workers)
        failed = {}

        def on_unreadable(unreadable: UnreadableError) -> None:
            if unreadable.index not in failed:
                log.warning("%s: %s", self.title, unreadable)
            failed[unreadable.index] = unreadable

        start = time.perf_counter()

        def predict_these(indices: Sequence[int], batch_size: int) -> Iterator[pd.DataFrame]:
            return predict(
                self.model, split, indices, batch_size, ranks.device, DTYPES[evaluation.dtype],
                self.title if ranks.first else None, evaluation.num_workers, on_unreadable, observers,
            )  # fmt: skip

        batch_size = store_predictions(
            predict_these, missing[ranks.rank :: ranks.world], evaluation.batch_size or pick_batch_size(ranks.device),
            self.directory, evaluation.store_every_s, progress,
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

    def _require_readable(self, failed: list[UnreadableError]) -> None:
        """Raise a UserError if no image can be read, or if some cannot and unreadable images are not skipped."""
        if len(failed) == self.n_images:
            raise UserError(f"{self.title}: none of its {len(failed)} images can be read; {failed[0]}")
        if failed and self.evaluation.data.on_error != "skip":
            more = f" and {len(failed) - 1} more, listed in {self.directory.path / FAILED}" if len(failed) > 1 else ""
            raise UserError(
                f"{self.title}: {failed[0]}{more}; the predictions for all others are stored; skip these images by "
                "data.on_error=skip, or fix them and start a new run"
            )

    def _all_predictions(self, failed: list[UnreadableError]) -> pd.DataFrame:
        predictions = self.directory.predictions_so_far().sort_values("index", ignore_index=True)
        everything = sorted([*predictions["index"], *(unreadable.index for unreadable in failed)])
        if everything != list(range(self.n_images)):
            raise UserError(
                f"{self.directory.path}: predictions of other processes are missing; results_dir must be on a disk that all "
                "machines share"
            )
        return predictions

    def _metrics(self, predictions: pd.DataFrame, n_failed: int, measured: dict) -> dict:
        evaluation, method, reducer, split = self.evaluation, self.evaluation.method, self.model.reducer, self.split
        return {
            "run_id": self.directory.path.name,
            "experiment": evaluation.experiment,
            "backbone": evaluation.backbone.name,
            "method": method.name,
            "trained": self.trained,
            "untrained": not self.trained and any(True for _ in reducer.parameters()),
            "knob": method.knob,
            "knobs": method.knobs,
            "thresholds_from": evaluation.thresholds_from,
            "targets_reduction_pct": [] if evaluation.target_pct is None else [evaluation.target_pct],
            "layers": reducer.layers if reducer.layers == "all" else list(reducer.layers),
            "data": evaluation.data.name,
            "split": evaluation.data.split,
            "among": None if split.among is None else len(split.among),
            "n_failed": n_failed,
            **accuracy(predictions),
            **faithfulness(predictions),
            **(real_accuracy(predictions, split.real_labels) if split.real_labels is not None else {}),
            **(segmentation(predictions) if evaluation.dense else {}),
            **self._cost(predictions),
            "params_m": sum(parameter.numel() for parameter in self.model.parameters()) / 1e6,
            **measured,
            "dtype": evaluation.dtype,
            "tf32": False,  # see dhtm.harness.core.devices.exact
            "seed": evaluation.seed,
            "weights_sha256": self.determinants["weights"],
            "data_fingerprint": split.fingerprint,
            "code_version": self.determinants["code"],
            "library_version": VERSION,
            "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            "git_commit": git_commit(),
        }

    def _cost(self, predictions: pd.DataFrame) -> dict:
        """Return FLOPs and tokens by layer; if images differ, the means over images and the FLOPs' quartiles."""
        plain = baseline_flops(self.evaluation.backbone)
        if "tokens" in predictions:
            tokens = np.stack(predictions.tokens)
            total, merging = (one.numpy() for one in count_flops_of_images(self.model, torch.from_numpy(tokens)))
            by_layer = tokens.mean(axis=0).round(2).tolist()
            quartiles = (np.percentile(total, [0, 25, 50, 75, 100]) / 1e9).tolist()
            total, merging = total.mean(), merging.mean()
        else:
            count = flops(self.evaluation.backbone, self.evaluation.method)
            total, merging, by_layer, quartiles = count.total, count.merging, tokens_by_layer(self.model), None
        return {
            "flops_g": total / 1e9,
            "flops_baseline_g": plain / 1e9,
            "flops_reduction_pct": 100 * (1 - total / plain),
            "flops_g_quartiles": quartiles,
            "merge_flops_g": merging / 1e9,
            "tokens_by_layer": by_layer,
        }

    def _report(self, metrics: dict) -> None:
        if metrics["n_nonfinite"]:
            log.warning(
                "%s: %d images have logits that are not finite, the first is image %d",
                self.title, metrics["n_nonfinite"], metrics["first_nonfinite"],
            )  # fmt: skip
        results = []
        if metrics["top1"] is not None:
            results.append("top-1 {:.2f}% [{:.2f}, {:.2f}]".format(metrics["top1"], *metrics["top1_ci95"]))
        if metrics["kl"] is not None and not (self.is_unmerged and metrics["dtype"] == "float32"):
            results.append(f"KL {metrics['kl']:.2g} nats, agreement {metrics['agreement']:.2f}%")
        if "miou" in metrics:
            results.append("mIoU {:.2f}% [{:.2f}, {:.2f}]".format(metrics["miou"], *metrics["miou_ci95"]))
        results.append(f"{metrics['flops_g']:.4f} GFLOPs ({metrics['flops_reduction_pct']:.1f}% fewer)")
        if metrics["images_per_s"] is not None:
            results.append(f"{metrics['images_per_s']:.0f} images/s")
        log.info("%s: %s, %s", self.title, ", ".join(results), self.directory.path)


def _determinants_of(method: Method) -> dict:
    # All backends make the same merges.
    options = {key: value for key, value in method.options.items() if key != "backend"}
    return {
        "method": {"name": method.name, "target": method.target, **options},
        "code": code_version(method.reducer()),
    }
