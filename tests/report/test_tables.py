"""The tables of the ablation, of thresholds and of dense prediction, and mIoU with its interval."""

import numpy as np
import pytest
from made_up import write_solved_run
from sklearn.metrics import jaccard_score

from dhtm.harness.runs.dense import miou_interval
from dhtm.report.ablation import ablation
from dhtm.report.dense import dense_figure, dense_table
from dhtm.report.runs import load_runs
from dhtm.report.thresholds import thresholds_table

DEFAULTS = {"k": 40, "mass": None, "total": None, "inflect": 0.0}
COUNTED = {"total": 72, "inflect": -1.0, "threshold": None, "max_merges": None, "linkage": "size"}
QUARTILES = [0.1, 0.11, 0.12, 0.13, 0.16]


def write(folder, number, kl, method="dhtm", target=40.0, **changes):
    """Write a run of 200 images, about 90% of them right, with a mean KL of about ``kl``."""
    rng = np.random.default_rng(number)
    write_solved_run(
        folder, number, method, target, correct=rng.random(200) < 0.9, kl=2 * kl * rng.random(200), **changes
    )


def test_ablation_compares_each_option_with_the_papers(tmp_path):
    def write_changed(number, kl, layers=(4, 7, 11), **knobs):
        for place, (dtype, among) in enumerate((("float32", None), ("bfloat16", 7))):
            options = {"knobs": DEFAULTS | knobs, "layers": list(layers), "dtype": dtype, "among": among}
            write(tmp_path, number + 10 * place, kl, knob="k", **options)

    write_changed(0, 1.0)
    write_changed(1, 0.5, linkage="size")
    write_changed(2, 1.0, connectivity=4)
    write_changed(3, 4.0, layers=(2, 4, 6))
    assert ablation(load_runs(tmp_path), tmp_path) is None, "four runs are too few for an ablation"
    write(tmp_path, 4, 0.1, "dhtm_plus", knob="total", knobs={"total": 100}, layers="all")
    table = ablation(load_runs(tmp_path), tmp_path)
    assert len(table.parts) == 1, "too few runs in bfloat16"
    rows = table.data.set_index("changed")
    assert rows.index.tolist() == rows.sort_values("kl").index.tolist()
    assert set(rows.index) == {"the paper's", "linkage=size", "connectivity=4", "layers=2,4,6", "DHTM+"}
    assert rows.kl_difference["linkage=size"] == pytest.approx(rows.kl["linkage=size"] - rows.kl["the paper's"])
    assert rows.kl_p[["linkage=size", "layers=2,4,6", "DHTM+"]].max() < 0.001 < rows.kl_p["connectivity=4"]
    assert np.isnan(rows.kl_p["the paper's"]) and (rows.kl_p_holm.dropna() >= rows.kl_p.dropna()).all()
    assert "40% fewer FLOPs" in table.markdown()
    write_changed(5, 1.0, similarity="kl")
    captions = [caption for caption, _ in ablation(load_runs(tmp_path), tmp_path).parts]
    assert len(captions) == 2 and "split test, among 7 classes, bfloat16, 40% fewer FLOPs" in captions[0]


def test_pairs_differ_only_in_the_threshold(tmp_path):
    def write_dhtm_plus(number, kl, adaptive, target=30.0, **options):
        knobs = COUNTED | ({"total": None, "threshold": [0.9] * 12} if adaptive else {}) | options
        more = {"knob": "threshold", "flops_g_quartiles": QUARTILES} if adaptive else {"knob": "total"}
        method = "dhtm_threshold" if adaptive else "dhtm_plus"
        write(tmp_path, number, kl, method, target, knobs=knobs, layers="all", **more)

    write_dhtm_plus(0, 1.0, adaptive=False)
    assert thresholds_table(load_runs(tmp_path), tmp_path) is None
    write_dhtm_plus(1, 0.2, adaptive=True)
    write_dhtm_plus(2, 0.1, adaptive=True, linkage="mean")  # no other run with this linkage
    write_dhtm_plus(3, 0.1, adaptive=True, target=40.0)  # no other run at this target
    table = thresholds_table(load_runs(tmp_path), tmp_path)
    counted, adaptive = table.data.itertuples()
    assert (counted.run_id, adaptive.run_id) == (f"{0:016x}", f"{1:016x}")
    assert adaptive.kl_difference == pytest.approx(adaptive.kl - counted.kl) and adaptive.kl_p < 0.001
    assert np.isnan(counted.kl_difference)
    text = table.markdown()
    assert "[0.1100, 0.1300], at most 0.1600" in text and "DHTM+, thresholds" in text


def confusions(seed, accuracy, n_images=60, n_patches=50):
    """Return true and predicted classes of patches, and the counts of each pair of classes in each image."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, (n_images, n_patches))
    predicted = np.where(rng.random(labels.shape) < accuracy, labels, rng.integers(0, 3, labels.shape))
    counts = [np.bincount(3 * a + b, minlength=9) for a, b in zip(labels, predicted, strict=True)]
    return labels, predicted, np.stack(counts)


def test_miou_is_scikit_learns_and_inside_its_interval():
    labels, predicted, counts = confusions(0, 0.7, n_images=400)
    by_class, low, high = miou_interval(counts, np.arange(400))
    np.testing.assert_allclose(by_class, 100 * jaccard_score(labels.ravel(), predicted.ravel(), average=None))
    assert low < by_class.mean() < high and high - low < 2
    _, wide_low, wide_high = miou_interval(np.repeat(counts[:100], 4, axis=0), np.arange(400) // 4)
    assert wide_high - wide_low > 1.6 * (high - low), "four images of a group count as one"
    difference, low, high = miou_interval(counts, np.arange(400), counts)
    assert not difference.any() and low == high == 0


def test_dense_table_compares_methods_with_dhtm(tmp_path):
    assert dense_table(load_runs(tmp_path), tmp_path) is dense_figure(load_runs(tmp_path)) is None

    def write_segmented(number, method, accuracy, n_images=60, **changes):
        counts = confusions(number, accuracy, n_images)[2]
        write_solved_run(tmp_path, number, method, correct=np.ones(n_images), kl=0.1, confusion=counts, **changes)

    for number, (method, accuracy) in enumerate({"unmerged": 0.9, "dhtm": 0.8, "tome": 0.6}.items()):
        write_segmented(number, method, accuracy)
    write_segmented(3, "dhtm", 0.95, knobs={"linkage": "size"})  # better, but the paper's options are the reference
    write_segmented(4, "dhtm", 0.8, n_images=10)
    table = dense_table(load_runs(tmp_path), tmp_path)
    rows = table.data[table.data.options == ""].set_index("method")
    assert rows.index.tolist() == ["unmerged", "dhtm", "tome"]
    assert rows.difference["tome"] == pytest.approx(rows.miou["dhtm"] - rows.miou["tome"])
    assert rows.difference_low["tome"] > 0 > rows.difference_high["unmerged"] and np.isnan(rows.difference["dhtm"])
    assert "30% fewer FLOPs" in table.markdown()
    assert dense_figure(load_runs(tmp_path)).axes[0].get_ylabel().startswith("mIoU")
