"""Speed of the methods at equal FLOPs compared with the unmerged backbone, and of DHTM's merge by itself."""

import copy
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import torch
from pydantic import Field, FilePath, PositiveInt
from pydantic.dataclasses import dataclass
from scipy.cluster.hierarchy import linkage
from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from dhtm.flops import count_flops, count_flops_of_images
from dhtm.harness.core.devices import DTYPES, pick_device
from dhtm.harness.core.errors import UnavailableError
from dhtm.harness.data.scenes import scenes
from dhtm.harness.models.backbones import Backbone
from dhtm.harness.models.cost import Target, baseline_flops, solve, solve_thresholds
from dhtm.harness.models.methods import Method
from dhtm.kernels import agglomerate
from dhtm.merge import hierarchical_merge
from dhtm.vit import tokens_of_images

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scaling:
    """The settings for timing DHTM's merge by itself: one is varied, the others stay at the first value of their lists."""

    grids: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)]
    ks: Annotated[list[PositiveInt], Field(min_length=1)]
    batch_sizes: Annotated[list[PositiveInt], Field(min_length=1)]
    channels: PositiveInt = 384


@dataclass(frozen=True)
class Benchmark:
    """The settings of a benchmark, which ``configs/benchmark.yaml`` explains; methods by the names of their rows."""

    backbone: Backbone
    methods: Annotated[dict[str, Method], Field(min_length=1)]
    targets: Annotated[list[Target], Field(min_length=1)] = dataclasses.field(default_factory=lambda: [Target()])
    scaling: Scaling | None = None
    runs: FilePath | None = None
    batch_size: PositiveInt = 32
    rounds: PositiveInt = 15
    dtype: Literal[tuple(DTYPES)] = "float32"
    device: str = "auto"
    output_dir: Path = Path("results/benchmark")


def time_methods(
    benchmark: Benchmark, model: VisionTransformer | None = None, images: Tensor | None = None
) -> pd.DataFrame:
    """Time one forward pass of every method in turn, round after round.

    A round's speed-up is the backbone's time over the method's in the same round, so that other load on the machine slows
    both. Weights are random, because their values do not change the time. Images are scenes of digits and not noise,
    because the merges depend on them. Thresholds are found on other scenes. A method that cannot reach a target is skipped
    for it; if none can reach any, this is an error.

    Args:
        model: the backbone with its weights, to time instead of random ones.
        images: [B, C, H, W], to time instead of scenes.

    Returns:
        One row per method and target: target (the reduction in percent), knob, value, layers and trained (whether it has
        weights of its own); flops_g, flops_reduction_pct, and ideal_speedup by FLOPs; for a batch ms (median), images_per_s,
        speedup with its quartiles, and ideal_share_pct, the share of the ideal gain; merge_pct, the reducer's share of the
        forward; peak_memory_mb besides weights and images; for one image latency_ms and latency_speedup with its quartiles.
    """
    device, dtype, rounds = pick_device(benchmark.device), DTYPES[benchmark.dtype], benchmark.rounds
    backbone = copy.deepcopy(model or benchmark.backbone.bare()).to(device=device, dtype=dtype)
    given = _images(backbone, benchmark.batch_size + 64) if images is None else images
    given = given.to(device=device, dtype=dtype)
    images, others = given[: benchmark.batch_size], given[benchmark.batch_size :]
    plain = baseline_flops(benchmark.backbone)
    models, rows = {"unmerged": backbone}, [{"method": "unmerged", "flops_g": plain / 1e9}]
    for target, (name, given_method) in itertools.product(benchmark.targets, benchmark.methods.items()):
        try:
            if given_method.knob == "threshold" and target != Target():
                method, _ = solve_thresholds(benchmark.backbone, backbone, given_method, target, others)
            else:
                method, _ = solve(benchmark.backbone, given_method, target)
        except UnavailableError as error:
            log.info("skipped: %s", error)
            continue
        patched = models[f"{name} {len(rows)}"] = method.put_into(backbone, benchmark.backbone.name)
        layers = method.options["layers"]
        rows.append(
            {
                "method": name,
                "target": target.reduction_pct,
                "knob": method.knob,
                "value": None if isinstance(method.setting, list) else method.setting,
                "layers": layers if isinstance(layers, str) else ",".join(map(str, layers)),
                "trained": method.checkpoint is not None,
                "flops_g": _flops(patched, images) / 1e9,
            }
        )
    if len(rows) == 1:
        raise UnavailableError("methods: none reaches a target; set target.reduction_pct to less")

    batch, alone = (
        _speedups(_time_interleaved({name: partial(one, part) for name, one in models.items()}, rounds, device, what))
        for part, what in ((images, f"batch {len(images)}"), (images[:1], "one image"))
    )
    frame = pd.DataFrame(rows)  # in the order of the models, like the times
    frame["flops_reduction_pct"] = 100 * (1 - frame.flops_g / frame.flops_g[0])
    frame["ideal_speedup"] = frame.flops_g[0] / frame.flops_g
    columns = ["ms", "speedup", "speedup_q1", "speedup_q3"]
    frame[columns] = batch[columns].to_numpy()
    frame.insert(frame.columns.get_loc("ms") + 1, "images_per_s", 1000 * len(images) / frame.ms)
    frame["ideal_share_pct"] = 100 * (frame.speedup - 1) / (frame.ideal_speedup - 1).where(frame.ideal_speedup > 1)
    frame["merge_pct"] = [_merge_pct(one, images) for one in models.values()]
    frame["peak_memory_mb"] = [_peak_memory_mb(one, images) for one in models.values()]
    frame[[f"latency_{column}" for column in columns]] = alone[columns].to_numpy()
    return frame


def time_merge(benchmark: Benchmark) -> pd.DataFrame:
    """Time DHTM's merge by itself for different numbers of tokens, merges and images.

    Also time ATC's clustering of the same tokens and, on a CPU, scipy's average-linkage clustering, image by image. scipy
    makes all merges for any k. Both find clusters of any shape.

    Returns:
        One row per setting: varied ("n_tokens", "k" or "batch_size"), n_tokens, k, batch_size, channels; merge_ms with its
        quartiles, atc_ms and scipy_ms.
    """
    device, dtype, given = pick_device(benchmark.device), DTYPES[benchmark.dtype], benchmark.scaling
    first = {"grid": given.grids[0], "k": given.ks[0], "batch_size": given.batch_sizes[0]}
    settings = [("n_tokens", first | {"grid": grid}) for grid in given.grids]
    settings += [("k", first | {"k": k}) for k in given.ks]
    settings += [("batch_size", first | {"batch_size": batch_size}) for batch_size in given.batch_sizes]
    rows, measured = [], {}
    for varied, setting in settings:
        grid, k, batch_size = key = tuple(setting.values())
        if key not in measured:
            measured[key] = _merge_ms(*key, given.channels, dtype, benchmark.rounds, device)
        row = {"varied": varied, "n_tokens": grid**2, "k": k, "batch_size": batch_size, "channels": given.channels}
        rows.append(row | measured[key])
    return pd.DataFrame(rows)


def _merge_ms(
    grid: int, k: int, batch_size: int, channels: int, dtype: torch.dtype, rounds: int, device: torch.device
) -> dict[str, float]:
    tokens = _tokens(batch_size, grid, channels).to(device=device, dtype=dtype)
    steps = {"merge": lambda: hierarchical_merge(tokens, k, grid=(grid, grid))}
    steps["atc"] = lambda: agglomerate(tokens, k, "average", "auto")
    if device.type == "cpu":
        steps["scipy"] = lambda: [linkage(image.numpy(), "average", "cosine") for image in tokens.float()]
    ms = 1000 * _time_interleaved(steps, rounds, device, f"merge of {grid}×{grid}, k={k}, batch {batch_size}")
    low, high = ms["merge"].quantile([0.25, 0.75])
    medians = ms.reindex(columns=["atc", "scipy"]).median().add_suffix("_ms")
    return {"merge_ms": ms["merge"].median(), "merge_ms_q1": low, "merge_ms_q3": high, **medians}


def _images(model: nn.Module, n_images: int) -> Tensor:
    """Return scenes of digits in the model's size and channels: [B, C, H, W], normalised."""
    channels, height, width = resolve_data_config(model=model)["input_size"]
    grey = torch.from_numpy(scenes("test", range(n_images))[0])[:, None].float() / 127.5 - 1
    return interpolate(grey, size=(height, width), mode="bicubic").expand(-1, channels, -1, -1).contiguous()


def _tokens(n_images: int, grid: int, channels: int) -> Tensor:
    """Return scenes of digits as tokens [B, grid², D]: patches of 16×16 pixels after one random projection."""
    grey = torch.from_numpy(scenes("test", range(n_images))[0])[:, None].float() / 127.5 - 1
    patches = interpolate(grey, size=(16 * grid, 16 * grid), mode="bicubic").unfold(2, 16, 16).unfold(3, 16, 16)
    projection = torch.randn(256, channels, generator=torch.Generator().manual_seed(0)) / 16
    return patches.reshape(n_images, grid**2, 256) @ projection


@torch.inference_mode()
def _flops(model: VisionTransformer, images: Tensor) -> float:
    """Return a patched model's FLOPs for an image, averaged over the images if they differ."""
    if not model.reducer.adaptive:
        return count_flops(model).total
    model(images)
    return count_flops_of_images(model, tokens_of_images(model))[0].double().mean().item()


@torch.inference_mode()
def _time_interleaved(steps: dict[str, Callable], rounds: int, device: torch.device, what: str) -> pd.DataFrame:
    """Time every step in turn, after a round of warm-up. Return the seconds, one row per round and one column per step."""
    measured = []
    for _ in tqdm(range(rounds + 1), desc=what, unit=" rounds", disable=None):
        row = {}
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            _wait(device)
            row[name] = time.perf_counter() - start
        measured.append(row)
    return pd.DataFrame(measured[1:])


def _speedups(seconds: pd.DataFrame) -> pd.DataFrame:
    """Return for each method the median ms, and the speed-up over the unmerged model in the same round with its quartiles."""
    speedups = seconds.rdiv(seconds.unmerged, axis=0)
    quartiles = speedups.quantile([0.25, 0.5, 0.75]).T.set_axis(["speedup_q1", "speedup", "speedup_q3"], axis=1)
    return quartiles.assign(ms=1000 * seconds.median())


@torch.inference_mode()
def _merge_pct(model: nn.Module, images: Tensor, rounds: int = 3) -> float:
    """Return the reducer's share of a forward pass in percent, the median over rounds."""
    if not hasattr(model, "reducer"):
        return float("nan")
    began, spent, shares = [], [], []

    def before(*_):
        _wait(images.device)
        began.append(time.perf_counter())

    def after(*_):
        _wait(images.device)
        spent.append(time.perf_counter() - began.pop())

    hooks = [model.reducer.register_forward_pre_hook(before), model.reducer.register_forward_hook(after)]
    for _ in range(rounds):
        spent.clear()
        start = time.perf_counter()
        model(images)
        _wait(images.device)
        shares.append(100 * sum(spent) / (time.perf_counter() - start))
    for hook in hooks:
        hook.remove()
    return float(pd.Series(shares).median())


@torch.inference_mode()
def _peak_memory_mb(model: nn.Module, images: Tensor) -> float:
    """Return the peak memory of one forward pass, besides weights and images, in 10⁶ bytes."""
    if images.device.type == "cuda":
        _wait(images.device)
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        model(images)
        return (torch.cuda.max_memory_allocated(images.device) - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model(images)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0)) / 1e6


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
