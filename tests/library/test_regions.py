"""Pictures of regions."""

import dataclasses

import numpy as np
import pytest
import torch

from dhtm.harness.data.splits import UnreadableError, digits
from dhtm.harness.models.backbones import bare_backbone
from dhtm.harness.models.methods import patched
from dhtm.regions import Regions
from dhtm.report.regions import BORDER, GAP, draw_regions, sample_regions


def test_regions_are_drawn_in_their_mean_colours_with_borders_between():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[:, :4] = (10, 20, 30)
    image[::2, 4:] = (100, 0, 200)
    regions = Regions(torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1]]), torch.tensor([[4, 0], [2, 2]]), (2, 2))
    drawn = draw_regions(image, regions, index=1)
    assert (drawn[:, :4] == (10, 20, 30)).all()
    assert (drawn[:, 4] == BORDER).all()
    assert (drawn[:, 5:] == (50, 0, 100)).all()
    assert not (draw_regions(image, regions, index=0) == BORDER).all(axis=-1).any(), "one region has no borders"


@pytest.fixture
def split():
    def to_tensor(image):
        return torch.from_numpy(np.array(image))[None].float() / 255 * 2 - 1

    return digits("test", 0, 8, to_tensor)


def model_with(composed, *overrides):
    config = composed(*overrides)
    return patched(bare_backbone("deit_micro", 10), config.backbone, config.method)


@pytest.mark.parametrize("method", ["dhtm", "dhtm_all", "tome", "k_medoids", "sit", "random"])
def test_any_method_that_merges_has_pictures(composed, split, method):
    pictures = sample_regions(model_with(composed, f"method={method}"), split)
    assert len(pictures) == 6
    image, caption = pictures[0]
    n_parts = 1 + caption.count("after layer")
    assert 2 <= n_parts <= 4
    assert image.size == (n_parts * 224 + (n_parts - 1) * GAP, 224)
    assert caption.startswith(f"image 0: {split.dataset[0][1]}, read as ")


def test_a_method_that_merges_nothing_has_none(composed, split):
    assert sample_regions(model_with(composed, "method=unmerged"), split) == []


def test_images_that_cannot_be_read_are_passed_over(composed, split):
    class Damaged:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise UnreadableError(index, "photo.jpg", "truncated")
            return split.dataset[index]

    pictures = sample_regions(model_with(composed), dataclasses.replace(split, dataset=Damaged()))
    assert [caption[:7] for _, caption in pictures] == ["image 0", "image 2"]


def test_the_original_is_the_image_as_it_was(composed, split):
    image = np.asarray(sample_regions(model_with(composed), split)[0][0])
    seen = (split.dataset[0][0][0] + 1) * 127.5
    assert np.abs(image[::4, :224:4, 0] - seen.numpy()).max() < 1
