"""Speed of the methods at equal FLOPs, against the backbone as it is, interleaved in one process."""

import copy
import logging
import time
from pathlib import Path

import pandas as pd
import torch
from omegaconf import DictConfig
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.nn.functional import interpolate
from tqdm import tqdm

from dhtm.flops import count_flops
from dhtm.harness.backbones import bare_backbone
from dhtm.harness.digits import scenes
from dhtm.harness.equal_cost import baseline_flops, solve
from dhtm.harness.errors import require_number
from dhtm.harness.evaluate import pick_device, pick_dtype
from dhtm.harness.methods import patched
from dhtm.harness.store import require_writable, write_atomically

log = logging.getLogger(__name__)


def benchmark(config: DictConfig) -> pd.DataFrame:
    """Time one forward of every method in turn, round after round, and write the figures to ``config.output``.

    A round's speed-up is the backbone's time over the method's in the same round, so that what slows the machine for a
    while slows both. Weights are random, which costs what trained ones cost; images are scenes of digits, not noise, for
    what merges first depends on them.

    Returns:
        One row a method: what it was set to, its FLOPs, the median time, and the speed-up with its quartiles.

    Raises:
        UserError: the config asks for something that cannot be had.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, "dtype")
    for key in ("batch_size", "rounds"):
        require_number(config, key, 1, integer=True)
    output = Path(config.output).expanduser()
    require_writable(output.parent, f"output={output}")
    backbone = copy.deepcopy(bare_backbone(config.backbone.architecture, config.backbone.num_classes))
    backbone = backbone.to(device=device, dtype=dtype)
    images = _images(backbone, config.batch_size).to(device=device, dtype=dtype)
    models, rows = {"unmerged": backbone}, {}
    plain = baseline_flops(config.backbone.architecture, config.backbone.num_classes)
    for name, given in config.methods.items():
        method, _ = solve(config.backbone, given, config.target)
        models[name] = patched(backbone, config.backbone, method)
        flops = count_flops(models[name]).total
        rows[name] = {"knob": method.knob, "value": method[method.knob], "flops_g": flops / 1e9}
        rows[name] |= {"flops_reduction_pct": 100 * (1 - flops / plain), "ideal_speedup": plain / flops}
    rows["unmerged"] = {"flops_g": plain / 1e9, "flops_reduction_pct": 0.0, "ideal_speedup": 1.0}

    seconds = _interleaved(models, images, config.rounds)
    speedups = pd.DataFrame({name: seconds["unmerged"] / seconds[name] for name in models})
    for name in models:
        rows[name] |= {
            "ms": 1000 * seconds[name].median(),
            "images_per_s": config.batch_size / seconds[name].median(),
            "speedup": speedups[name].median(),
            "speedup_q1": speedups[name].quantile(0.25),
            "speedup_q3": speedups[name].quantile(0.75),
        }
    frame = pd.DataFrame.from_dict(rows, orient="index").loc[list(models)].rename_axis("method").reset_index()
    frame["ideal_share_pct"] = 100 * (frame.speedup - 1) / (frame.ideal_speedup - 1).where(frame.ideal_speedup > 1)
    write_atomically(output, lambda file: frame.to_csv(file, index=False, float_format="%.6g"))
    log.info(
        "%s, batch %d, %s, %s, %d threads, %d rounds\n\n%s\n\n%s",
        config.backbone.name, config.batch_size, config.dtype, device.type, torch.get_num_threads(), config.rounds,
        frame.to_markdown(index=False, floatfmt=".3f"), output,
    )  # fmt: skip
    return frame


def _images(model: nn.Module, n_images: int) -> Tensor:
    """Scenes of digits in the model's own size and channels: [B, C, H, W], normalised."""
    channels, height, width = resolve_data_config(model=model)["input_size"]
    grey = torch.from_numpy(scenes("test", range(n_images))[0])[:, None].float() / 127.5 - 1
    return interpolate(grey, size=(height, width), mode="bicubic").expand(-1, channels, -1, -1).contiguous()


@torch.inference_mode()
def _interleaved(models: dict[str, nn.Module], images: Tensor, rounds: int) -> pd.DataFrame:
    """Seconds of one forward: a row a round, a column a model; one more round before them warms up."""
    measured = []
    for _ in tqdm(range(rounds + 1), desc="rounds", disable=None):
        row = {}
        for name, model in models.items():
            start = time.perf_counter()
            model(images)
            if images.device.type == "cuda":
                torch.cuda.synchronize(images.device)
            row[name] = time.perf_counter() - start
        measured.append(row)
    return pd.DataFrame(measured[1:])
