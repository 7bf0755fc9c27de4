"""Pictures of what methods do to one image: its regions after each merging layer, or DHTM's merges one by one."""

from pathlib import Path
from typing import Annotated

import torch
from PIL import Image
from pydantic import Field, NonNegativeInt
from timm.models.vision_transformer import VisionTransformer
from tqdm import tqdm

from dhtm.harness.core.errors import UserError, explain
from dhtm.harness.data.photographs import decode
from dhtm.harness.models.backbones import Backbone
from dhtm.harness.models.methods import Method, knob_text
from dhtm.harness.models.weights import load_model
from dhtm.report.regions import batch_of, draw_regions, draw_strips, pixels_of
from dhtm.report.registry import entry_of

FRAME_MS = 80


def visualize(
    backbone: Backbone,
    methods: Annotated[dict[str, Method], Field(min_length=1)],
    image: Path | None = None,
    animate: bool = False,
    output: Path = Path("regions.png"),
    checkpoints_dir: Path = Path("checkpoints"),
    allow_untrained: bool = False,
    seed: NonNegativeInt = 0,
) -> Path:
    """Draw and write the picture or the animation, and return its path. ``configs/visualize.yaml`` explains the settings.

    Raises:
        UserError: the image or the weights cannot be read, or nothing can be written.
    """
    picture = _read(image)
    models = [
        (method, *load_model(backbone, method, checkpoints_dir, allow_untrained, seed)) for method in methods.values()
    ]
    with explain(f"output={output}: cannot be written", (OSError, ValueError, KeyError)):  # KeyError: cannot animate
        if animate:
            frames = draw_merges(*models[0][:2], picture)
            durations = [FRAME_MS] * (len(frames) - 1) + [2000]
            frames[0].save(output, save_all=True, append_images=frames[1:], duration=durations, loop=0)
        else:
            rows = [(_title(method, weights is not None), model) for method, model, weights in models]
            draw_strips(rows, picture).savefig(output)
    return output


def draw_merges(method: Method, model: VisionTransformer, image: Image.Image) -> list[Image.Image]:
    """Draw the regions after 0, 1, 2, … merges, layer after layer.

    Raises:
        UserError: the method has no k.
    """
    if method.knob != "k":
        raise UserError(f"method={method.name}: it does not merge pair by pair; animate one with a knob k, method=dhtm")
    seen, batch = [], batch_of(model, image)
    handle = model.reducer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    with torch.inference_mode():
        model.eval()(batch)
    handle.remove()
    pixels = pixels_of(batch, model)[0]
    frames, k = [pixels], model.reducer.k
    with tqdm(total=len(seen) * k, desc="merges", disable=None) as bar, torch.inference_mode():
        for arguments in seen:
            for model.reducer.k in range(1, k + 1):
                frames.append(draw_regions(pixels, model.reducer(*arguments)[1]))
                bar.update()
    model.reducer.k = k
    return [Image.fromarray(frame) for frame in frames]


def _read(file: Path | None) -> Image.Image:
    if file is None:
        from sklearn.datasets import load_sample_image  # here, because it takes a second

        return Image.fromarray(load_sample_image("china.jpg"))
    with explain(f"image={file}: cannot be read"), file.open("rb") as opened:
        return decode(opened)


def _title(method: Method, is_trained: bool) -> str:
    knob = f", {knob_text(method.knob, method.setting)}" if method.knob else ""
    return entry_of(method.name).label + knob + (", trained" if is_trained else "")
