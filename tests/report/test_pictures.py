"""Pictures of regions."""

import dataclasses

import numpy as np
import pytest
import torch

import dhtm
from dhtm.harness.data.scenes import Digits
from dhtm.harness.data.splits import UnreadableError
from dhtm.harness.models.backbones import Backbone
from dhtm.harness.models.methods import Method
from dhtm.report.regions import BORDER, GAP, draw_regions, sample_regions

METHODS = {
    "dhtm": Method("dhtm", "dhtm.DHTM", options={"k": 40}),
    "dhtm_all": Method("dhtm_all", "dhtm.DHTM", options={"k": 10, "layers": "all"}),
    "tome": Method("tome", "baselines.ToMe", options={"r": 8}),
    "k_medoids": Method("k_medoids", "baselines.KMedoids", options={"keep_rate": 0.7}),
    "sit": Method("sit", "baselines.SiT", options={"keep_rate": 0.7}),
    "random": Method("random", "baselines.RandomMerge", options={"k": 40}),
    "unmerged": Method("unmerged", "dhtm.DHTM", options={"k": 0}),
}


@pytest.fixture
def split():
    return Digits(limit=8).open("test", lambda image: torch.from_numpy(np.array(image))[None].float() / 255 * 2 - 1)


def model_with(method):
    return METHODS[method].put_into(Backbone("deit_micro", "deit_micro", num_classes=10).bare(), "deit_micro")


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


@pytest.mark.parametrize("method", [name for name in METHODS if name != "unmerged"])
def test_any_method_that_merges_has_pictures(split, method):
    pictures = sample_regions(model_with(method), split)
    assert len(pictures) == 6
    image, caption = pictures[0]
    n_parts = 1 + caption.count("after layer")
    assert 2 <= n_parts <= 4
    assert image.size == (n_parts * 224 + (n_parts - 1) * GAP, 224)
    assert caption.startswith(f"image 0: {split.dataset[0][1]}, read as ")
    seen = (split.dataset[0][0][0] + 1) * 127.5
    assert np.abs(np.asarray(image)[::4, :224:4, 0] - seen.numpy()).max() < 1, "the first part is the image itself"


def test_a_method_that_merges_nothing_has_none(split):
    assert sample_regions(model_with("unmerged"), split) == []


def test_images_that_cannot_be_read_are_skipped(split):
    class Damaged:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise UnreadableError(index, "photo.jpg", "truncated")
            return split.dataset[index]

    pictures = sample_regions(model_with("dhtm"), dataclasses.replace(split, dataset=Damaged()))
    assert [caption[:7] for _, caption in pictures] == ["image 0", "image 2"]


def test_what_is_left_of_the_normalisation_is_done(split):
    """As for images of the cache, which are uint8."""
    raw = dataclasses.replace(
        split, dataset=[((i + 1) / 2, label) for i, label in map(split.dataset.__getitem__, (0, 1))]
    )
    pictures = sample_regions(model_with("dhtm"), dataclasses.replace(raw, normalise=lambda images: images * 2 - 1))
    for (image, caption), (expected, text) in zip(pictures, sample_regions(model_with("dhtm"), split), strict=False):
        assert caption == text and (np.asarray(image) == np.asarray(expected)).all()
