"""Choose the setting of a method's knob within a bound on KL, agreement or latency, on images without labels."""

import bisect
import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import pandas as pd
from pydantic import Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dhtm.harness.benchmark import Benchmark, time_methods
from dhtm.harness.core.devices import pick_batch_size, pick_device
from dhtm.harness.core.errors import UnavailableError, UserError
from dhtm.harness.data.photographs import Images
from dhtm.harness.data.splits import choice_images
from dhtm.harness.models.cost import Target, solve, with_number
from dhtm.harness.models.methods import UNMERGED, Method, knob_text
from dhtm.harness.runs.directory import predictions
from dhtm.harness.runs.evaluate import Evaluation, evaluate
from dhtm.harness.runs.metrics import faithfulness
from dhtm.thresholds import find_thresholds

STEP = 10  # percent of the FLOPs between two settings of the trade-off
FINEST = 0.01  # percent; settings of a knob that are closer than this are not distinguished
BOUNDS = {"max_kl": "kl", "min_agreement": "agreement", "max_latency_ms": "latency_ms"}  # the columns that they bound
_PARTS = {"choose": 0, "report": 1}  # the even and the odd images

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """The settings of a choice, which ``configs/choose.yaml`` explains.

    Attributes:
        evaluation: of the unmerged model on all images; method and images are replaced for each setting.
        methods: by name; their knobs are not solved yet.
    """

    evaluation: Evaluation
    methods: Annotated[dict[str, Method], Field(min_length=1)]
    max_kl: PositiveFloat | None = None
    min_agreement: Annotated[float, Field(gt=0, le=100)] | None = None
    max_latency_ms: PositiveFloat | None = None
    rounds: PositiveInt = 5
    output_dir: Path = Path("results/choose")

    def __post_init__(self):
        given = [key for key in BOUNDS if getattr(self, key) is not None]
        if len(given) != 1:
            raise UserError(f"{len(given)} bounds: give one of max_kl=, min_agreement= and max_latency_ms=")
        for name, method in self.methods.items():
            if method.knob is None:
                raise UserError(f"method={name}: it has no knob to choose")
            if method.knob == "threshold" and self.max_latency_ms is not None:
                raise UserError(f"method={name}: its time depends on the image; give max_kl= or min_agreement=")
            if method.checkpoint is not None:
                raise UserError(
                    f"method={name}: its weights are trained with it, so there is no unmerged model to compare with; choose "
                    "among the methods that need no training"
                )

    @property
    def bound(self) -> tuple[str, float]:
        """The key of the bound and its value."""
        return next((key, getattr(self, key)) for key in BOUNDS if getattr(self, key) is not None)


def choose(choice: Choice) -> tuple[pd.DataFrame, dict[str, Method], list[str]]:
    """Choose the setting of every method.

    KL is assumed to grow with the FLOPs saved, and agreement and latency to fall.

    Returns:
        One row for each setting that was tried on the part "choose" of the images, and one for each chosen setting on the part
        "report": method, knob, value, part, chosen, flops_g, flops_reduction_pct, kl and agreement (with kl_low, kl_high and
        so on), n_images. latency_ms, the median for one image, is in the rows of "report" and, if it is bounded, in all. The
        rows of "report" also have images_per_s and the speedup over the unmerged model with its quartiles, both in batches.
        The chosen methods by name.
        A sentence for each method without a setting that meets the bound.

    Raises:
        UserError: no setting of any method meets the bound.
    """
    for part in _PARTS:  # first, to fail early if images or weights are missing
        _evaluate_setting(choice, "unmerged", UNMERGED, part)
    tried, chosen, missed = [], {}, []
    unmerged_ms = None
    if choice.max_latency_ms is not None:
        unmerged_ms = float(_measure_speed(choice, {"again": UNMERGED}, batch_size=1).latency_ms.iloc[0])
    for name, method in choice.methods.items():
        try:
            rows, found = _choose(choice, name, method, unmerged_ms)
        except UnavailableError as error:
            missed.append(str(error))
            continue
        if found is None:
            missed.append(_describe_miss(choice, rows))
        else:
            chosen[name] = found
        tried += [row | {"chosen": found is not None and row["value"] == found.setting} for row in rows]
    if not chosen:
        raise UserError("; ".join(missed))
    reported = pd.DataFrame([_evaluate_setting(choice, name, method, "report") for name, method in chosen.items()])
    speed = _measure_speed(choice, chosen).set_index("method")
    columns = ["speedup", "speedup_q1", "speedup_q3", "images_per_s", "latency_ms"]
    reported = reported.join(speed[columns], on="method").assign(chosen=True)
    return pd.concat([pd.DataFrame(tried), reported], ignore_index=True), chosen, missed


def _choose(choice: Choice, name: str, method: Method, unmerged_ms: float | None) -> tuple[list[dict], Method | None]:
    """Return a row for each tried setting of a method, and the best setting; None if none meets the bound.

    Each setting is timed in turn with the unmerged model, and its latency is computed from its speed-up over that model. So
    other load on the machine during some timings does not matter.
    """
    rows = {}
    key, limit = choice.bound
    backbone = choice.evaluation.backbone
    of_number = with_number(method) if method.knob == "threshold" else method
    if of_number is not method:
        model = copy.deepcopy(backbone.load()).to(pick_device(choice.evaluation.device))
        images = _images(choice, "choose", model)

    def at(reduction_pct: float) -> Method | None:
        try:
            found, _ = solve(backbone, of_number, Target(reduction_pct=reduction_pct))
        except UnavailableError:
            return None
        return found if of_number is method else by_threshold(found)

    @functools.cache
    def by_threshold(found: Method) -> Method:
        """Return the method with thresholds that make the same number of merges on average."""
        thresholds, _ = find_thresholds(model, found.reducer(), images)
        return dataclasses.replace(method, options={**method.options, "threshold": thresholds})

    def saves_enough(setting: Method) -> bool:
        """Return whether a setting is fast enough or, for bounds on KL and agreement, saves too much."""
        if setting not in rows:
            rows[setting] = _evaluate_setting(choice, name, setting, "choose")
            if key == "max_latency_ms":
                timed = _measure_speed(choice, {name: setting}, batch_size=1)
                rows[setting]["latency_ms"] = unmerged_ms / timed.latency_speedup.iloc[-1]
        row = rows[setting]
        if key == "max_latency_ms":
            return row["latency_ms"] <= limit
        return row["kl_high"] > limit if key == "max_kl" else row["agreement_low"] < limit

    if at(STEP) is None:
        solve(backbone, of_number, Target(reduction_pct=STEP))  # the error names the range
    before, after = boundary(saves_enough, at)
    return list(rows.values()), after if key == "max_latency_ms" else before


def boundary(holds: Callable[[T], bool], at: Callable[[float], T | None]) -> tuple[T | None, T | None]:
    """Find the two neighbouring settings between which a condition begins to hold.

    Args:
        holds: the condition: false for settings that save little, true for settings that save much. It is asked for the
            settings at all multiples of STEP, and then between two of them.
        at: returns the setting whose saving is nearest to a percentage; None if that is more than the method can save.

    Returns:
        The last setting for which it does not hold, and the first for which it does. None where there is no such setting; the
        setting that saves nothing does not count.
    """
    nothing = at(0)

    def is_beyond(percent: float) -> bool:
        setting = at(percent)
        return setting is None or (setting != nothing and holds(setting))

    first = [*map(is_beyond, range(STEP, 100, STEP)), True].index(True) * STEP
    n = max(1, round(STEP / FINEST))
    percents = [min(first + STEP * i / n, 100 - FINEST) for i in range(n + 1)]
    i = bisect.bisect_left(percents, True, lo=1, hi=n, key=is_beyond)
    before = at(percents[i - 1])
    return None if before == nothing else before, at(percents[i])


def _evaluate_setting(choice: Choice, name: str, method: Method, part: str) -> dict:
    """Return the row of a setting on one part of the images, "choose" or "report"."""
    run = dataclasses.replace(choice.evaluation, method=method)
    has_parts = isinstance(run.data, Images)
    metrics = evaluate(dataclasses.replace(run, data=dataclasses.replace(run.data, split=part)) if has_parts else run)
    if not has_parts:
        rows = predictions(run.results_dir / metrics["run_id"])
        rows = rows[rows.index % 2 == _PARTS[part]]
        metrics |= {"n_images": len(rows), **faithfulness(rows)}
    about = {"method": name, "knob": method.knob, "value": method.setting, "part": part}
    about |= {column: metrics[column] for column in ("flops_g", "flops_reduction_pct", "n_images")}
    for column in ("kl", "agreement"):
        about[column] = metrics[column]
        about[f"{column}_low"], about[f"{column}_high"] = metrics[f"{column}_ci95"]
    return about


def _measure_speed(choice: Choice, methods: dict[str, Method], batch_size: int | None = None) -> pd.DataFrame:
    """Time methods on the images of the part "report"."""
    run = choice.evaluation
    model = run.backbone.load()
    batch_size = batch_size or run.batch_size or pick_batch_size(pick_device(run.device))
    images = _images(choice, "report", model, batch_size)
    benchmark = Benchmark(
        run.backbone, methods, rounds=choice.rounds, batch_size=batch_size, dtype=run.dtype, device=run.device
    )
    return time_methods(benchmark, model, images)


def _images(choice: Choice, part: str, model: VisionTransformer, n_images: int = 256) -> Tensor:
    data = choice.evaluation.data
    if isinstance(data, Images):
        return choice_images(data, part, model, n_images)
    return choice_images(data, data.split, model, n_images, first=_PARTS[part], step=len(_PARTS))


def _describe_miss(choice: Choice, rows: list[dict]) -> str:
    """Describe how near to the bound a method came."""
    key, limit = choice.bound
    column, sign = BOUNDS[key], -1 if key == "min_agreement" else 1
    best = min(rows, key=lambda row: sign * row[column])
    interval = f" [{best[f'{column}_low']:.4g}, {best[f'{column}_high']:.4g}]" if f"{column}_low" in best else ""
    return (
        f"method={best['method']}: no setting meets {key}={limit:g}; nearest is {column}={best[column]:.4g}{interval}, at "
        f"{knob_text(best['knob'], best['value'])} ({best['flops_reduction_pct']:.1f}% fewer FLOPs, {best['n_images']} images)"
    )


def python_line(method: Method) -> str:
    """Return the line of Python that puts a method into a model, with the options that are not the class's defaults.

    >>> python_line(Method("dhtm", "dhtm.DHTM", "k", options={"k": 37}))
    'dhtm.patch(model, dhtm.DHTM(k=37))'
    """
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in method.options.items()}
    shown = [f"{name}={value!r}" for name, value in options.items() if value != method.defaults().get(name, ...)]
    return f"dhtm.patch(model, {method.target}({', '.join(shown)}))"
