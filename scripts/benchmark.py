"""Time every method at equal FLOPs, and DHTM's merge by itself: `python scripts/benchmark.py --help`."""

import datetime
import logging

import hydra
import pandas as pd
import torch
from omegaconf import DictConfig

from dhtm.harness.benchmark import benchmark, check, scaling
from dhtm.harness.core.devices import pick_device
from dhtm.harness.core.errors import command, path_given
from dhtm.harness.models.methods import SHIPPED
from dhtm.harness.runs.store import environment, require_writable, write_json
from dhtm.report.speed import scaling_figure, scaling_table, speed_figure, speed_table
from dhtm.report.style import BACKBONES, save_figure

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../configs", config_name="benchmark")
@command(goes_on=False)
def main(config: DictConfig) -> None:
    """Measure, then write tables and figures."""
    check(config)
    folder = path_given(config.output_dir, "output_dir")
    require_writable(folder, f"output_dir={config.output_dir}")
    machine, device = environment(), pick_device(config.device)
    threads = f"{machine['torch_threads']} threads of {machine['processor']}"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    backbone = BACKBONES.get(config.backbone.name, config.backbone.name)
    title = f"{backbone}, {_aim(config.target)}, batch {config.batch_size}, {config.dtype}, {where}"

    frame = benchmark(config)
    table = speed_table(frame, f"{title}, {config.rounds} rounds, PyTorch {torch.__version__}")
    table.save(folder / "speed")
    if config.target.reduction_pct is not None:  # else there is no top-1 at the same reduction
        runs = pd.read_csv(SHIPPED.parent / "tables" / "runs.csv")
        save_figure(speed_figure(frame, runs, config.target.reduction_pct, title), folder / "speed")
    log.info("%s", table.markdown())

    grown = scaling(config)
    title = f"DHTM's merge by itself, {config.scaling.channels} channels, {config.dtype}, {where}"
    table = scaling_table(grown, f"{title}, {config.rounds} rounds")
    table.save(folder / "merge")
    save_figure(scaling_figure(grown, title), folder / "merge")
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    write_json(folder / "environment.json", {"device": str(device), "date": date, **machine})
    log.info("%s\n%s", table.markdown(), folder)


def _aim(target: DictConfig) -> str:
    if target.reduction_pct is not None:
        return f"{target.reduction_pct:g}% fewer FLOPs"
    return "knobs as given" if target.flops_g is None else f"{target.flops_g:g} GFLOPs"


if __name__ == "__main__":
    main()
