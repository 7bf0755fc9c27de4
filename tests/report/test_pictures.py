"""Pictures of regions, strips and animations of images, and what is said where one cannot be made."""

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
IN_ALL = Method("dhtm_all", "dhtm.DHTM", "k", options={"k": 10, "layers": "all"})


@pytest.fixture
def split():
    return Digits(limit=8).open("test", lambda image: torch.from_numpy(np.array(image))[None].float() / 255 * 2 - 1)


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def model_with(method):
    return method.put_into(Backbone("deit_micro", "deit_micro", num_classes=10).bare(), "deit_micro")


def test_regions_are_drawn_in_their_mean_colours_with_borders_between():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[:, :4] = (10, 20, 30)
    image[::2, 4:] = (100, 0, 200)
    regions = dhtm.Regions(torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1]]), torch.tensor([[4, 0], [2, 2]]), (2, 2))
    drawn = draw_regions(image, regions, index=1)
    assert (drawn[:, :4] == (10, 20, 30)).all()
    assert (drawn[:, 4] == BORDER).all()
    assert (drawn[:, 5:] == (50, 0, 100)).all()
    assert not (draw_regions(image, regions, index=0) == BORDER).all(axis=-1).any(), "one region has no borders"


def test_borders_of_large_images_are_wider():
    image = np.full((448, 448, 3), 7, dtype=np.uint8)
    regions = dhtm.Regions(torch.tensor([[0, 1, 0, 1]]), torch.tensor([[2, 2]]), (2, 2))
    border = (draw_regions(image, regions) == BORDER).all(axis=-1)
    assert border[:, 224:226].all() and border.sum() == 448 * 2


@pytest.mark.parametrize(("method", "layers"), [(DHTM, [2, 5]), (IN_ALL, [1, 7, 12]), (SOFT, [4, 7, 10])])
def test_samples_have_pictures_after_three_layers_at_most(split, method, layers):
    pictures = sample_regions(model_with(method), split)
    assert len(pictures) == 6
    image, caption = pictures[0]
    assert re.findall(r"\d+ after layer (\d+)", caption) == list(map(str, layers))
    assert image.size == (224 + len(layers) * (GAP + 224), 224)
    assert caption.startswith(f"image 0: {split.dataset[0][1]}, read as ")
    seen = (split.dataset[0][0][0] + 1) * 127.5
    assert np.abs(np.asarray(image)[::4, :224:4, 0] - seen.numpy()).max() < 1, "the first part is the image itself"


def test_a_method_that_merges_nothing_has_none(split):
    assert sample_regions(model_with(Method("unmerged", "dhtm.DHTM", options={"k": 0})), split) == []


def test_images_that_cannot_be_read_are_skipped(split):
    class Damaged:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise UnreadableError(index, "photo.jpg", "truncated")
            return split.dataset[index]

    pictures = sample_regions(model_with(DHTM), dataclasses.replace(split, dataset=Damaged()))
    assert [caption[:7] for _, caption in pictures] == ["image 0", "image 2"]


def test_what_is_left_of_the_normalisation_is_done(split):
    """As for images of the cache, which are uint8."""
    raw = dataclasses.replace(
        split, dataset=[((i + 1) / 2, label) for i, label in map(split.dataset.__getitem__, (0, 1))]
    )
    pictures = sample_regions(model_with(DHTM), dataclasses.replace(raw, normalise=lambda images: images * 2 - 1))
    for (image, caption), (expected, text) in zip(pictures, sample_regions(model_with(DHTM), split), strict=False):
        assert caption == text and (np.asarray(image) == np.asarray(expected)).all()


def test_a_strip_is_the_image_and_the_regions_after_each_layer(image):
    model = model_with(DHTM)
    title = "A title as long as the longest of methods"
    figure = draw_strips([(title, model), ("soft", model_with(SOFT))], image)
    cells = [ax for ax in figure.axes if ax.images]
    shown = [(ax.get_title(), ax.get_xlabel()) for ax in cells]
    assert shown[:3] == [(title, "196 patches"), ("layer 2", "193 tokens"), ("layer 5", "190 tokens")]
    assert shown[3] == ("soft", "196 patches, each in its arg-max token")
    assert shown[4:] == [("layer 4", "137 tokens"), ("layer 7", "96 tokens"), ("layer 10", "67 tokens")]
    pixels, *maps = (np.asarray(ax.images[0].get_array()) for ax in cells[:3])
    for layer, drawn in zip((2, 5), maps, strict=True):
        assert (drawn == draw_regions(pixels, dhtm.regions(model, layer))).all()
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for ax in cells for text in (ax.title, ax.xaxis.label)]
    boxes += [ax.get_window_extent() for ax in cells]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_a_strip_is_as_wide_as_the_model_sees_the_image(image):
    model = timm.create_model("deit_tiny_patch16_224", depth=2, img_size=(64, 128), num_classes=2).double()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 128)}
    figure = draw_strips([("wide", dhtm.patch(model, dhtm.DHTM(k=5, layers=(2,), backend="torch")))], image)
    assert [ax.get_xlabel() for ax in figure.axes] == ["32 patches", "27 tokens"]
    assert [ax.images[0].get_array().shape for ax in figure.axes] == [(256, 512, 3)] * 2


@pytest.fixture
def visualized(composed):
    """Do what scripts/visualize.py does, with the methods' own knobs."""
    own = "target.reduction_pct=null"
    return lambda *more: door.call(visualize, composed(own, *more, config_name="visualize"))


def test_methods_are_drawn_side_by_side(visualized, image, tmp_path):
    image.save(tmp_path / "image.png")
    visualized(f"image={tmp_path}/image.png", "methods=[dhtm,lotm]", f"output={tmp_path}/regions.png")
    with Image.open(tmp_path / "regions.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] > pixels.shape[0] > 800, "two rows of the image and three layers"
    half = len(pixels) // 2
    for row in (pixels[:half], pixels[half:]):
        assert (row == BORDER).all(axis=-1).sum() > 200


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_every_merge_is_a_frame(visualized, tmp_path, ending):
    output = tmp_path / f"merges.{ending}"
    visualized("animate=true", "target.reduction_pct=5", f"output={output}")
    with Image.open(output) as animation:
        assert animation.n_frames > 12 and animation.n_frames % 3 == 1, (
            "the image, and k merges in each of three layers"
        )


def test_frames_are_the_regions_of_ever_larger_k(image):
    sides = Method("dhtm", "dhtm.DHTM", "k", options={"k": 3, "layers": [2, 5], "connectivity": 4})
    model = model_with(sides)
    frames = draw_merges(sides, model, image)
    assert len(frames) == 1 + 2 * 3
    assert model.reducer.k == 3, "the model is as it was"
    n_borders = [(np.asarray(frame) == BORDER).all(axis=-1).sum() for frame in frames[1:]]
    assert all(a > b for a, b in itertools.pairwise(n_borders)), (
        "tokens that share a side lose a border, others need not"
    )
    seen = draw_strips([("", model)], image)  # a forward pass as usual, whose regions are those of the last merges
    pixels = np.asarray(seen.axes[0].images[0].get_array())
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
def test_mistakes_are_named(visualized, overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        visualized(*overrides)
