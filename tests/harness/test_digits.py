"""Tests of the scenes of the embedded task."""

import numpy as np

from dhtm.harness.data.scenes import N_TEST_SCENES, Digits, scans, scenes


def test_scans_of_the_splits_are_disjoint():
    (train, _), (test, _) = scans("train"), scans("test")
    assert len(train) + len(test) == 1797
    assert not {scan.tobytes() for scan in train} & {scan.tobytes() for scan in test}


def test_scene_depends_only_on_seed_and_index():
    images, labels, centres = scenes("test", range(40), seed=3)
    image, label, centre = scenes("test", [17], seed=3)
    assert (image[0] == images[17]).all() and label[0] == labels[17] and (centre[0] == centres[17]).all()
    others, *_ = scenes("test", range(40), seed=4)
    assert (others != images).any(axis=(1, 2)).all()


def test_test_split_is_balanced_and_grouped_by_scan():
    split = Digits().open("test", np.asarray)
    assert len(split.dataset) == N_TEST_SCENES >= 1000
    labels = np.array([label for _, label in split.dataset])
    assert np.bincount(labels, minlength=10).min() > 150
    limited = Digits(limit=10).open("test", np.asarray)
    assert len(limited.dataset) == len(limited.groups) == 10
    assert (limited.dataset.images == split.dataset.images[:10]).all()
    assert Digits(seed=1, limit=10).open("test", np.asarray).fingerprint != limited.fingerprint
    assert split.dataset[0][0].shape == (56, 56)
    assert (np.bincount(split.groups) == 4).all(), "every scan is in four scenes"
    assert all(len(set(labels[split.groups == scan])) == 1 for scan in range(500))


def test_patch_classes_match_the_pixels():
    """Patches of the digit are brighter than those of the ground, and lie around the digit's centre."""
    digits = Digits()
    images, _, centres = scenes("test", range(40))
    classes = digits.patch_classes("test", range(40), (14, 14)).reshape(40, 14, 14)
    assert set(np.unique(classes)) == {0, 1, 2}
    means = images.reshape(40, 14, 4, 14, 4).mean(axis=(2, 4))
    assert means[classes == 1].mean() > means[classes == 0].mean() + 50
    rows, columns = np.mgrid[:14, :14] * 4 + 2
    for image in range(40):
        digit = classes[image] == 1
        np.testing.assert_allclose([columns[digit].mean(), rows[digit].mean()], centres[image], atol=6)
    assert (digits.patch_classes("test", [7], (14, 14))[0] == classes[7].ravel()).all()
