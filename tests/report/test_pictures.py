"""Pictures of regions, strips and animations of images, and the errors if they cannot be made."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import dhtm
from dhtm.harness import config as door
from dhtm.harness.core.errors import UserError
from dhtm.harness.data.scenes import Digits
from dhtm.harness.data.splits import UnreadableError
from dhtm.harness.models.backbones import Backbone
from dhtm.harness.models.methods import Method
from dhtm.report import draw_regions, draw_strips
from dhtm.report.regions import BORDER, GAP, sample_regions
from dhtm.report.visualize import draw_merges, visualize

DHTM = Method("dhtm", "dhtm.DHTM", "k", options={"k": 3, "layers": [2, 5]})
SOFT = Method("patch_merger", "baselines.PatchMerger", "keep_rate", options={"keep_rate": 0.7, "layers": [4, 7, 10]})
ALL_LAYERS = Method("dhtm_all", "dhtm.DHTM", "k", options={"k": 10, "layers": "all"})


@pytest.fixture
def split():
    return Digits(limit=8).open("test", lambda image: torch.from_numpy(np.array(image))[None].float() / 255 * 2 - 1)


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def model_with(method):
    return method.put_into(Backbone("deit_micro", "deit_micro", num_classes=10).bare(), "deit_micro")


def test_regions_have_their_mean_colour_and_borders():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[:, :4] = (10, 20, 30)
    image[::2, 4:] = (100, 0, 200)
    regions = dhtm.Regions(torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1]]), torch.tensor([[4, 0], [2, 2]]), (2, 2))
    drawn = draw_regions(image, regions, index=1)
    assert (drawn[:, :4] == (10, 20, 30)).all()
    assert (drawn[:, 4] == BORDER).all()
    assert (drawn[:, 5:] == (50, 0, 100)).all()
    assert not (draw_regions(image, regions, index=0) == BORDER).all(axis=-1).any(), "a single region has no borders"


def test_borders_of_large_images_are_wider():
    image = np.full((448, 448, 3), 7, dtype=np.uint8)
    regions = dhtm.Regions(torch.tensor([[0, 1, 0, 1]]), torch.tensor([[2, 2]]), (2, 2))
    border = (draw_regions(image, regions) == BORDER).all(axis=-1)
    assert border[:, 224:226].all() and border.sum() == 448 * 2


@pytest.mark.parametrize(("method", "layers"), [(DHTM, [2, 5]), (ALL_LAYERS, [1, 7, 12]), (SOFT, [4, 7, 10])])
def test_samples_show_at_most_three_layers(split, method, layers):
    pictures = sample_regions(model_with(method), split)
    assert len(pictures) == 6
    image, caption = pictures[0]
    assert re.findall(r"\d+ after layer (\d+)", caption) == list(map(str, layers))
    assert image.size == (224 + len(layers) * (GAP + 224), 224)
    assert caption.startswith(f"image 0: {split.dataset[0][1]}, read as ")
    pixels = (split.dataset[0][0][0] + 1) * 127.5
    assert np.abs(np.asarray(image)[::4, :224:4, 0] - pixels.numpy()).max() < 1, "the first part is the image itself"


def test_method_that_merges_nothing_has_no_samples(split):
    assert sample_regions(model_with(Method("unmerged", "dhtm.DHTM", options={"k": 0})), split) == []


def test_unreadable_images_are_skipped(split):
    class Damaged:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise UnreadableError(index, "photo.jpg", "truncated")
            return split.dataset[index]

    pictures = sample_regions(model_with(DHTM), dataclasses.replace(split, dataset=Damaged()))
    assert [caption[:7] for _, caption in pictures] == ["image 0", "image 2"]


def test_samples_are_normalised_by_the_split(split):
    """Images of the cache are uint8, and the split normalises each batch of them."""
    raw = dataclasses.replace(
        split, dataset=[((i + 1) / 2, label) for i, label in map(split.dataset.__getitem__, (0, 1))]
    )
    pictures = sample_regions(model_with(DHTM), dataclasses.replace(raw, normalise=lambda images: images * 2 - 1))
    assert len(pictures) == 2
    for (image, caption), (expected, text) in zip(pictures, sample_regions(model_with(DHTM), split), strict=False):
        assert caption == text and (np.asarray(image) == np.asarray(expected)).all()


def test_strip_shows_the_image_and_the_regions_after_each_layer(image):
    model = model_with(DHTM)
    title = "A title as long as the longest of methods"
    figure = draw_strips([(title, model), ("soft", model_with(SOFT))], image)
    cells = [ax for ax in figure.axes if ax.images]
    labels = [(ax.get_title(), ax.get_xlabel()) for ax in cells]
    assert labels[:3] == [(title, "196 patches"), ("layer 2", "193 tokens"), ("layer 5", "190 tokens")]
    assert labels[3] == ("soft", "196 patches, each in its arg-max token")
    assert labels[4:] == [("layer 4", "137 tokens"), ("layer 7", "96 tokens"), ("layer 10", "67 tokens")]
    pixels, *maps = (np.asarray(ax.images[0].get_array()) for ax in cells[:3])
    for layer, drawn in zip((2, 5), maps, strict=True):
        assert (drawn == draw_regions(pixels, dhtm.regions(model, layer))).all()
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for ax in cells for text in (ax.title, ax.xaxis.label)]
    boxes += [ax.get_window_extent() for ax in cells]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_strip_has_the_aspect_ratio_of_the_models_input(image):
    model = timm.create_model("deit_tiny_patch16_224", depth=2, img_size=(64, 128), num_classes=2).double()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 128)}
    figure = draw_strips([("wide", dhtm.patch(model, dhtm.DHTM(k=5, layers=(2,), backend="torch")))], image)
    assert [ax.get_xlabel() for ax in figure.axes] == ["32 patches", "27 tokens"]
    assert [ax.images[0].get_array().shape for ax in figure.axes] == [(256, 512, 3)] * 2


@pytest.fixture
def run_visualize(composed):
    """Run scripts/visualize.py in this process, by overrides; by default no knob is solved for a target."""
    unsolved = "target.reduction_pct=null"
    return lambda *more: door.call(visualize, composed(unsolved, *more, config_name="visualize"))


def test_each_method_has_its_own_row(run_visualize, image, tmp_path):
    image.save(tmp_path / "image.png")
    run_visualize(f"image={tmp_path}/image.png", "methods=[dhtm,lotm]", f"output={tmp_path}/regions.png")
    with Image.open(tmp_path / "regions.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] > pixels.shape[0] > 800, "two rows, each of the image and three layers"
    half = len(pixels) // 2
    for row in (pixels[:half], pixels[half:]):
        assert (row == BORDER).all(axis=-1).sum() > 200


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_animation_has_one_frame_per_merge(run_visualize, tmp_path, ending):
    output = tmp_path / f"merges.{ending}"
    run_visualize("animate=true", "target.reduction_pct=5", f"output={output}")
    with Image.open(output) as animation:
        assert animation.n_frames > 12 and animation.n_frames % 3 == 1, "the image and k merges in each of three layers"


def test_frames_show_the_regions_of_increasing_k(image):
    four_connected = Method("dhtm", "dhtm.DHTM", "k", options={"k": 3, "layers": [2, 5], "connectivity": 4})
    model = model_with(four_connected)
    frames = draw_merges(four_connected, model, image)
    assert len(frames) == 1 + 2 * 3
    assert model.reducer.k == 3, "k is restored"
    n_borders = [(np.asarray(frame) == BORDER).all(axis=-1).sum() for frame in frames[1:]]
    assert all(a > b for a, b in itertools.pairwise(n_borders)), "each merge across a side removes a border"
    strip = draw_strips([("", model)], image)  # its forward pass makes all merges
    pixels = np.asarray(strip.axes[0].images[0].get_array())
    for layer, frame in ((2, frames[3]), (5, frames[6])):
        assert (np.asarray(frame) == draw_regions(pixels, dhtm.regions(model, layer))).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["image=/nowhere.jpg"], "image=/nowhere.jpg: cannot be read ("),
        ([f"image={__file__}"], f"image={__file__}: cannot be read ("),
        (["animate=true", "output=x.gif", "methods=[tome]"], "method=tome: it does not merge pair by pair"),
        (["animate=true", "target.reduction_pct=5", "output=x.jpg"], "output=x.jpg: cannot be written ("),
        (["output=regions.xyz"], "output=regions.xyz: cannot be written ("),
    ],
)
def test_user_errors_name_the_setting(run_visualize, overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run_visualize(*overrides)
