"""The embedded scenes."""

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from dhtm.harness import config as door
from dhtm.harness.data.scenes import N_TEST_SCENES, Digits, scans, scenes
from dhtm.harness.runs.evaluate import evaluate


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
    split = Digits().open("test", np.asarray)
    assert len(split.dataset) == N_TEST_SCENES >= 1000
    labels = np.array([label for _, label in split.dataset])
    assert np.bincount(labels, minlength=10).min() > 150
    fewer = Digits(limit=10).open("test", np.asarray)
    assert len(fewer.dataset) == len(fewer.groups) == 10
    assert (fewer.dataset.images == split.dataset.images[:10]).all()
    assert Digits(seed=1, limit=10).open("test", np.asarray).fingerprint != fewer.fingerprint
    assert Image.fromarray(split.dataset[0][0]).size == (56, 56)
    assert (np.bincount(split.groups) == 4).all(), "every scan is in four scenes"
    assert all(len(set(labels[split.groups == scan])) == 1 for scan in range(500))


def test_every_epoch_of_training_has_new_scenes():
    split = Digits(limit=3).open("train", np.asarray)
    epochs = [split.dataset_in(epoch) for epoch in (1, 2)]
    expected = scenes("train", range(3, 9))[0]
    assert all(
        (image == expected[i]).all() for i, (image, _) in enumerate([epoch[j] for epoch in epochs for j in range(3)])
    )


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": "abc"}, {"seed": -1}, {"on_error": "fail_fast"}])
def test_settings_are_checked(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        Digits(**options)


def test_a_scene_has_an_object_a_background_and_distractors():
    """The digit stands at its centre; elsewhere there is ground, noise, and now and then ink of other digits."""
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


def test_the_training_split_can_be_evaluated(composed, tmp_path):
    folders = [f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache"]
    metrics = evaluate(door.evaluation(composed("data.split=train", "data.limit=20", *folders)))
    assert metrics["split"] == "train" and metrics["n_images"] == 20 and metrics["kl"] < 0.1


def test_patches_have_the_class_of_their_ink():
    """A scene drawn without distractors has none, and its digit's patches are the bright ones around its centre."""
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
