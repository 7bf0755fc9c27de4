"""The embedded scenes."""

import numpy as np
from PIL import Image

from dhtm.harness.data.scenes import N_TEST_SCENES, scans, scenes
from dhtm.harness.data.splits import digits


def test_scans_of_the_splits_are_disjoint():
    (train, _), (test, _) = scans("train"), scans("test")
    assert len(train) + len(test) == 1797
    assert not {scan.tobytes() for scan in train} & {scan.tobytes() for scan in test}


def test_a_seed_fixes_every_pixel_whatever_the_batch():
    images, labels, centres = scenes("test", range(40), seed=3)
    assert images.shape == (40, 56, 56)
    assert images.dtype == np.uint8
    for index in (0, 17, 39):
        image, label, centre = scenes("test", [index], seed=3)
        assert (image[0] == images[index]).all()
        assert label[0] == labels[index]
        assert (centre[0] == centres[index]).all()
    others, *_ = scenes("test", range(40), seed=4)
    assert (others != images).any(axis=(1, 2)).all()


def test_the_test_split():
    split = digits("test", 0, None, np.asarray)
    assert len(split.dataset) == N_TEST_SCENES >= 1000
    labels = [label for _, label in split.dataset]
    assert np.bincount(labels, minlength=10).min() > 150
    fewer = digits("test", 0, 10, np.asarray)
    assert len(fewer.dataset) == 10 and (fewer.dataset.images == split.dataset.images[:10]).all()
    assert digits("test", 1, 10, np.asarray).fingerprint != fewer.fingerprint
    image, _ = split.dataset[0]
    assert isinstance(image, np.ndarray)
    assert Image.fromarray(image).size == (56, 56)


def test_a_scene_has_an_object_a_background_and_distractors():
    """The digit stands at its centre; elsewhere there is ground, noise, and now and then ink that is not its."""
    plain, _, centres = scenes("test", range(50), difficulty=0)
    hard, *_ = scenes("test", range(50))
    rows, columns = np.mgrid[:56, :56]
    for image, (x, y) in zip(plain, centres, strict=True):
        ink = image.astype(float)
        assert abs((ink * columns).sum() / ink.sum() - x) < 6
        assert abs((ink * rows).sum() / ink.sum() - y) < 6
        assert np.median(image) == 0
    away = np.stack([np.hypot(columns - x, rows - y) > 20 for x, y in centres])
    assert (hard[away] > 150).any(), "distractors are as bright as digits"
    assert hard[away].std() > 5 * plain[away].std() or plain[away].std() == 0
