"""Which setting of a method's knob saves most within a bound on what merging changes, on images without labels."""

import dataclasses
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated

import pandas as pd
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from dhtm.harness.benchmark import Benchmark, time_methods
from dhtm.harness.core.devices import pick_batch_size, pick_device
from dhtm.harness.core.errors import UnavailableError, UserError
from dhtm.harness.models.cost import Target, solve
from dhtm.harness.models.methods import Method
from dhtm.harness.runs.evaluate import Evaluation, evaluate

log = logging.getLogger(__name__)

STEP = 10  # percent of the FLOPs, between the settings of the trade-off
FINEST = 0.5  # the choice is found to within this many percent


@dataclass(frozen=True)
class Choice:
    """A choice as it is to be made; ``configs/choose.yaml`` explains the settings.

    Attributes:
        evaluation: of the first method; the others differ in the method alone.
    """

    evaluation: Evaluation
    methods: Annotated[list[Method], Field(min_length=1)]
    max_kl: PositiveFloat | None = None
    min_agreement: Annotated[float, Field(ge=0, le=100)] | None = None
    max_latency_ms: NonNegativeFloat | None = None
    choose_on: str = "choose"
    report_on: str = "report"
    rounds: PositiveInt = 10
    output_dir: Path = Path("results/choose")

    def __post_init__(self):
        given = [bound for bound in (self.max_kl, self.min_agreement, self.max_latency_ms) if bound is not None]
        if len(given) != 1:
            raise UserError(f"{len(given)} bounds: give one of max_kl=, min_agreement= and max_latency_ms=")

    def run(self, method: Method, split: str) -> Evaluation:
        """Return the run of a method, its knob solved, on a split."""
        data = dataclasses.replace(self.evaluation.data, split=split)
        return dataclasses.replace(self.evaluation, method=method, data=data)

    def benchmark(self, methods: dict[str, Method]) -> Benchmark:
        """Return the measurement of the speed of methods, by their names in it."""
        run = self.evaluation
        batch_size = run.batch_size or pick_batch_size(pick_device(run.device))
        return Benchmark(
            run.backbone, methods, rounds=self.rounds, batch_size=batch_size, dtype=run.dtype, device=run.device
        )


def choose(choice: Choice) -> tuple[pd.DataFrame, dict[str, Method]]:
    """Choose the setting of every method.

    KL and agreement are taken to grow and fall with the FLOPs saved, latency to fall.

    Returns:
        One row for each setting that was tried on ``choose_on``, and one per method for the chosen setting on ``report_on``:
        method, knob, value, split, chosen, flops_g, flops_reduction_pct, kl, agreement (and their intervals, as kl_low and
        so on), n_images; for the chosen ones also speedup (with quartiles, over the unmerged model, in a batch),
        images_per_s and latency_ms. And the chosen methods, by name.

    Raises:
        UserError: no setting of any method meets the bound.
    """
    tried, chosen = [], {}
    for method in choice.methods:
        rows, found = _choose(choice, method)
        tried += rows
        if found is not None:
            chosen[method.name] = found
    if not chosen:
        raise UserError("no setting of any method meets the bound; what was reached is logged above")
    frame = pd.DataFrame(tried).drop_duplicates(["method", "value"], ignore_index=True)
    frame["chosen"] = [row.method in chosen and chosen[row.method].setting == row.value for row in frame.itertuples()]
    reported = pd.DataFrame([_row(choice, method, choice.report_on) for method in chosen.values()])
    speed = time_methods(choice.benchmark(chosen)).set_index("method")
    columns = ["speedup", "speedup_q1", "speedup_q3", "images_per_s", "latency_ms"]
    reported = reported.join(speed[columns], on="method").assign(chosen=True)
    return pd.concat([frame, reported], ignore_index=True), chosen


def _choose(choice: Choice, method: Method) -> tuple[list[dict], Method | None]:
    """Return a row for each setting that was tried, and the method at the setting that is best; None if none will do."""
    rows, by_latency = [], choice.max_latency_ms is not None

    def at(reduction_pct: float) -> Method:
        return solve(choice.evaluation.backbone, method, Target(reduction_pct=reduction_pct))[0]

    def merges_too_much(reduction_pct: float) -> bool:
        row = _row(choice, at(reduction_pct), choice.choose_on)
        rows.append(row)
        if by_latency:
            timed = time_methods(choice.benchmark({method.name: at(reduction_pct)}))
            row["latency_ms"] = float(timed.latency_ms.iloc[-1])
            return row["latency_ms"] <= choice.max_latency_ms
        if choice.max_kl is not None:
            return row["kl_high"] > choice.max_kl
        return row["agreement_low"] < choice.min_agreement

    reachable = _reachable(at)
    below, above = boundary(merges_too_much, reachable)
    found = above if by_latency else below
    if found is None:
        last = rows[-1] if by_latency else rows[0]
        log.info(
            "%s: no setting meets the bound; at %.1f%% fewer FLOPs KL is %.2g [%.2g, %.2g] nats, agreement %.2f%%",
            method.name, last["flops_reduction_pct"], last["kl"], last["kl_low"], last["kl_high"], last["agreement"],
        )  # fmt: skip
    return rows, None if found is None else at(found)


def _reachable(at: Callable[[float], Method]) -> list[float]:
    """Return the reductions of the trade-off that a method reaches, in percent."""
    reached = []
    for reduction_pct in range(STEP, 100, STEP):
        try:
            at(reduction_pct)
        except UnavailableError:
            if not reached:  # the message names the range
                raise
            break
        reached.append(float(reduction_pct))
    return reached


def boundary(
    holds: Callable[[float], bool], points: list[float], finest: float = FINEST
) -> tuple[float | None, float | None]:
    """Find where a condition begins to hold, which stays true once it is.

    Args:
        holds: the condition; called for every point, and then between two of them.
        points: increasing.
        finest: the distance between the two results.

    Returns:
        The last number found where it does not hold and the first where it does, None where there is no such number.
    """
    held = [holds(point) for point in points]
    first = held.index(True) if True in held else len(points)
    below, above = points[first - 1] if first else None, points[first] if first < len(points) else None
    low = points[0] - STEP if below is None else below
    while above is not None and above - low > finest:
        middle = (low + above) / 2
        if holds(middle):
            above = middle
        else:
            below = low = middle
    return below, above


def _row(choice: Choice, method: Method, split: str) -> dict:
    metrics = evaluate(choice.run(method, split))
    if metrics["kl"] is None:
        raise UserError(
            f"method={method.name}: its weights were trained with it, so there is no unmerged model to compare with"
        )
    ends = dict(zip(("kl_low", "kl_high"), metrics["kl_ci95"], strict=True))
    ends |= dict(zip(("agreement_low", "agreement_high"), metrics["agreement_ci95"], strict=True))
    names = ("flops_g", "flops_reduction_pct", "kl", "agreement", "n_images")
    about = {"method": method.name, "knob": method.knob, "value": method.setting, "split": split}
    return about | {name: metrics[name] for name in names} | ends


def python_line(method: Method) -> str:
    """Return the line of Python that puts a method into a model, with the options that are not the class's defaults.

    >>> python_line(Method("dhtm", "dhtm.DHTM", "k", options={"k": 37}))
    'dhtm.patch(model, dhtm.DHTM(k=37))'
    """
    parameters = inspect.signature(resolve_name(method.target)).parameters
    given = {
        name: tuple(method.options[name]) if isinstance(method.options[name], list) else method.options[name]
        for name in parameters
        if name in method.options
    }
    shown = [f"{name}={value!r}" for name, value in given.items() if value != parameters[name].default]
    return f"dhtm.patch(model, {method.target}({', '.join(shown)}))"
