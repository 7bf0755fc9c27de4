"""The table and figure of dense prediction, and the mIoU behind them."""

import numpy as np
import pytest
from made_up import write_solved_run
from sklearn.metrics import jaccard_score

from dhtm.harness.runs.dense import miou_interval
from dhtm.report.dense import dense_figure, dense_table
from dhtm.report.runs import load_runs


def confusions(seed, accuracy, n_images=60, n_patches=50):
    """Return known and found classes of patches, and what they are counted as."""
    rng = np.random.default_rng(seed)
    known = rng.integers(0, 3, (n_images, n_patches))
    found = np.where(rng.random(known.shape) < accuracy, known, rng.integers(0, 3, known.shape))
    counts = [np.bincount(3 * a + b, minlength=9) for a, b in zip(known, found, strict=True)]
    return known, found, np.stack(counts)


def test_miou_is_scikit_learns_and_its_interval_holds_the_truth():
    known, found, counts = confusions(0, 0.7, n_images=400)
    by_class, low, high = miou_interval(counts, np.arange(400))
    np.testing.assert_allclose(by_class, 100 * jaccard_score(known.ravel(), found.ravel(), average=None))
    assert low < by_class.mean() < high and high - low < 2
    _, wide_low, wide_high = miou_interval(np.repeat(counts[:100], 4, axis=0), np.arange(400) // 4)
    assert wide_high - wide_low > 1.6 * (high - low), "four images of a group count as one"
    difference, low, high = miou_interval(counts, np.arange(400), counts)
    assert not difference.any() and low == high == 0


def test_methods_are_compared_with_dhtm(tmp_path):
    assert dense_table(load_runs(tmp_path), tmp_path) is dense_figure(load_runs(tmp_path)) is None
    for number, (method, accuracy) in enumerate({"unmerged": 0.9, "dhtm": 0.8, "tome": 0.6}.items()):
        correct = np.ones(60, dtype=bool)
        write_solved_run(tmp_path, number, method, correct=correct, kl=0.1, confusion=confusions(number, accuracy)[2])
    table = dense_table(load_runs(tmp_path), tmp_path)
    rows = table.data.set_index("method")
    assert rows.index.tolist() == ["unmerged", "dhtm", "tome"]
    assert rows.difference["tome"] == pytest.approx(rows.miou["dhtm"] - rows.miou["tome"])
    assert rows.difference_low["tome"] > 0 > rows.difference_high["unmerged"] and np.isnan(rows.difference["dhtm"])
    assert "30% fewer FLOPs" in table.markdown()
    assert dense_figure(load_runs(tmp_path)).axes[0].get_ylabel().startswith("mIoU")
