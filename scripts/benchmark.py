"""Time every method at equal FLOPs, and DHTM's merge by itself: `python scripts/benchmark.py --help`."""

import datetime
import logging

import pandas as pd
import torch
from omegaconf import DictConfig

from dhtm.harness import config as door
from dhtm.harness.benchmark import time_merge, time_methods
from dhtm.harness.core.command import start
from dhtm.harness.core.devices import pick_device
from dhtm.harness.core.files import require_writable, write_json
from dhtm.harness.models.cost import Target
from dhtm.harness.runs.provenance import environment
from dhtm.report.registry import BACKBONES
from dhtm.report.speed import scaling_figure, scaling_table, speed_figure, speed_table

log = logging.getLogger(__name__)


def main(config: DictConfig) -> None:
    """Measure, then write tables and figures."""
    benchmark = door.benchmark(config)
    folder = benchmark.output_dir
    require_writable(folder, f"output_dir={folder}")
    machine, device = environment(), pick_device(benchmark.device)
    threads = f"{machine['torch_threads']} threads of {machine['processor']}"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    label = BACKBONES.get(benchmark.backbone.name, benchmark.backbone.name)
    title = f"{label}, {_aim(benchmark.targets)}, batch {benchmark.batch_size}, {benchmark.dtype}, {where}"

    frame = time_methods(benchmark)
    table = speed_table(frame, f"{title}, {benchmark.rounds} rounds, PyTorch {torch.__version__}")
    has_runs = benchmark.runs is not None and frame.target.notna().any()
    table.save(folder / "speed", speed_figure(frame, pd.read_csv(benchmark.runs), title) if has_runs else None)
    log.info("%s", table.markdown())

    scaling = time_merge(benchmark)
    title = f"DHTM's merge by itself, {benchmark.scaling.channels} channels, {benchmark.dtype}, {where}"
    table = scaling_table(scaling, f"{title}, {benchmark.rounds} rounds")
    table.save(folder / "merge", scaling_figure(scaling, title))
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    write_json(folder / "environment.json", {"device": str(device), "date": date, **machine})
    log.info("%s\n%s", table.markdown(), folder)


def _aim(targets: list[Target]) -> str:
    if targets[0].reduction_pct is not None:
        return f"{', '.join(f'{target.reduction_pct:g}' for target in targets)}% fewer FLOPs"
    return "knobs as given" if targets[0].flops_g is None else f"{targets[0].flops_g:g} GFLOPs"


if __name__ == "__main__":
    start(main, "benchmark")
