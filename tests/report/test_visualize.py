"""scripts/visualize.py: pictures and animations of real images, and one line where one cannot be made."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

import dhtm
from dhtm.harness.models.backbones import Backbone
from dhtm.harness.models.methods import Method
from dhtm.report.regions import BORDER
from dhtm.report.visualize import draw_merges


def test_methods_are_drawn_side_by_side(script, photos, tmp_path):
    image = next((photos / "val").glob("*/*.JPEG"))
    output = tmp_path / "regions.png"
    result = script("visualize", f"image={image}", "method=dhtm,lotm", f"output={output}")
    assert result.returncode == 0, result.stderr
    with Image.open(output) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] > pixels.shape[0] > 800, "two rows of the image and three layers"
    half = len(pixels) // 2
    for row in (pixels[:half], pixels[half:]):
        assert (row == BORDER).all(axis=-1).sum() > 200


def test_every_merge_is_a_frame(script, tmp_path):
    output = tmp_path / "merges.webp"
    result = script("visualize", "animate=true", "target.reduction_pct=5", f"output={output}")
    assert result.returncode == 0, result.stderr
    with Image.open(output) as animation:
        assert animation.n_frames > 12


def test_frames_are_the_regions_of_ever_larger_k():
    method = Method("dhtm", "dhtm.DHTM", "k", options={"k": 3, "layers": [2, 5]})
    model = method.put_into(Backbone("deit_micro", "deit_micro", num_classes=10).bare(), "deit_micro")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    frames = draw_merges(method, model, image)
    assert len(frames) == 1 + 2 * 3
    assert model.reducer.k == 3, "the model is as it was"
    n_borders = [(np.asarray(frame) == BORDER).all(axis=-1).sum() for frame in frames[1:]]
    assert all(a >= b for a, b in itertools.pairwise(n_borders)) and n_borders[0] > n_borders[-1]
    with torch.inference_mode():
        model(torch.zeros(1, 1, 56, 56))
    assert dhtm.regions(model).n_tokens == 190


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["image=/nowhere.jpg"], "image=/nowhere.jpg: cannot be read ("),
        (["image=pyproject.toml"], "image=pyproject.toml: cannot be read ("),
        (["method=sinkhorn", "backbone=deit_tiny"], "method=sinkhorn: no weights trained for sinkhorn_keep_rate_"),
        (["output=regions.gif"], "output=regions.gif: it ends in .gif or .webp with animate=true"),
        (["animate=true", "output=x.gif", "method=tome"], "method=tome: it does not merge pair by pair"),
        (["output=regions.xyz"], "output=regions.xyz: cannot be written ("),
        (["method=nothing"], "Could not find 'method/nothing'"),
    ],
)
def test_mistakes_get_one_line(script, overrides, message):
    result = script("visualize", *overrides)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr
