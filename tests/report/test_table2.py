"""Table 2 from run directories, and the arithmetic of the paper's claims."""

import numpy as np
import pandas as pd
import pytest
from made_up import write_solved_run
from scipy.stats import binomtest

from dhtm.harness.core.errors import UserError
from dhtm.report.runs import load_runs, read_published
from dhtm.report.statistics import holm
from dhtm.report.table2 import ADDED, table2

RIGHT = np.ones(1200, dtype=bool)


def wrong(first, end):
    """Return ``correct`` of 1,200 images: False from ``first`` to before ``end``, else True."""
    return (np.arange(1200) < first) | (np.arange(1200) >= end)


def make_table(folder, *runs):
    """Write runs, each given by a method, ``correct`` and changes of its metrics, and make Table 2 of them."""
    for method, correct, changes in runs:
        write_solved_run(folder, len(list(folder.iterdir())), method, correct=correct, **changes)
    return table2(load_runs(folder), folder)


def rows_of(table, backbone="deit_micro"):
    return table.data[table.data.backbone == backbone].set_index("method")


def cells_of(table, start):
    (frame,) = [frame for caption, frame in table.parts if caption.startswith(start)]
    return frame.set_index("method")


def test_without_runs_our_columns_have_dashes(tmp_path):
    table = make_table(tmp_path)
    assert len(table.parts) == 4
    assert table.data[["top1", "flops_g", "difference", "p"]].isna().all(axis=None)
    cells = cells_of(table, "DeiT-Small")
    printed = read_published("table2").query("backbone == 'deit_small'").set_index("method")
    assert cells.loc[printed.index, "top-1 % published"].tolist() == [f"{top1:.2f}" for top1 in printed.top1]
    assert (cells[["top-1 % ours", "GFLOPs", "reduction %", "DHTM − this, points", "p"]] == "–").all(axis=None)
    assert (cells.loc[list(ADDED), "top-1 % published"] == "–").all()
    assert [name for name in cells.index if name in printed.index] == printed.index.tolist(), "the paper's order"
    table.save(tmp_path / "table2")
    latex = (tmp_path / "table2.tex").read_text()
    assert "_" not in latex.replace(r"\_", "") and "%" not in latex.replace(r"\%", "")


def test_methods_are_compared_image_by_image(tmp_path):
    tiny = {"backbone": "deit_tiny", "data": "imagenet"}
    table = make_table(
        tmp_path,
        ("dhtm", wrong(0, 100), {}),
        ("lotm", wrong(70, 200), {}),
        ("unmerged", wrong(0, 96), {}),
        ("k_medoids", wrong(0, 180), {"trained": True}),
        ("k_medoids", wrong(0, 400), {}),
        ("dhtm", RIGHT, {"layers": [4, 7, 10]}),
        ("own", RIGHT, {"layers": [4]}),
        ("own", RIGHT, {"layers": [7]}),
        ("dhtm", wrong(0, 250), tiny),
        ("tome", wrong(0, 300), tiny),
    )
    rows = rows_of(table)
    lotm = rows.loc["LoTM"]
    assert (lotm.reference_only, lotm.other_only) == (100, 70)
    assert lotm.difference == pytest.approx(100 * 30 / 1200) and lotm.p == pytest.approx(binomtest(100, 170).pvalue)
    assert rows.difference.isna()[["DHTM", "ToMe OTS", "DPC-KNN"]].all()
    assert rows.top1[["K-Medoids", "K-Medoids OTS"]].tolist() == pytest.approx([85, 200 / 3])
    others = {"DHTM, layers 4,7,10", "own, layers 4", "own, layers 7"}
    assert set(rows.index[rows.group == "others, w/o train"]) == others
    cells = cells_of(table, "deit_micro (embedded) on digits, 1,200 images, 30% fewer FLOPs")
    assert cells.loc["LoTM", "DHTM − this, points"].startswith("+2.50 [")
    assert cells.loc["unmerged", "DHTM − this, points"].startswith("−0.33 [")
    assert cells.loc["K-Medoids", "p"] == "<0.0001*"
    assert cells.loc["DHTM", "reduction %"] == "30.2"
    assert "top-1 % published" not in cells
    beside = cells_of(table, "DeiT-Tiny on ImageNet-1K, 1,200 images").loc["ToMe OTS"]
    assert beside["top-1 % published"] == "70.94" and beside["top-1 % ours"].startswith("75.00")


def test_correction_counts_all_tests_of_the_table(tmp_path):
    wrongs = {"dhtm": 0, "tome": 7, "lotm": 8, "unmerged": 3}
    backbones = ("deit_micro", "deit_tiny")
    table = make_table(tmp_path, *[(m, wrong(0, n), {"backbone": b}) for b in backbones for m, n in wrongs.items()])
    assert table.data.p.count() == 6
    assert table.data.p_holm.tolist() == pytest.approx(holm(table.data.p).tolist(), nan_ok=True)
    cells = cells_of(table, "deit_micro")
    assert cells.loc["LoTM", "p"] == "0.0078*"
    assert cells.loc["ToMe OTS", "p"] == "0.0156", "0.0625 after the correction"


def test_untrained_runs_are_marked_and_shown_only_without_trained_ones(tmp_path):
    untrained = {"untrained": True, "weights_sha256": "8" * 64}
    runs = [("dhtm", RIGHT, {}), ("sit", wrong(0, 900), untrained), ("sinkhorn", wrong(0, 900), untrained)]
    runs += [("dpc_knn", wrong(0, 300), {}), ("dpc_knn", wrong(0, 900), untrained | {"knobs": {"weighted": True}})]
    cells = cells_of(make_table(tmp_path, *runs, ("sinkhorn", wrong(0, 100), {"trained": True})), "deit_micro")
    assert cells.loc[["SiT (untrained)", "DPC-KNN (untrained)"], "top-1 % ours"].str.startswith("25.00").all()
    assert cells.loc["Sinkhorn", "top-1 % ours"].startswith("91.67")
    assert cells.loc["DPC-KNN OTS", "top-1 % ours"].startswith("75.00"), "no weights to train"


def test_missing_predictions_raise(tmp_path):
    with pytest.raises(UserError, match=r"0001/predictions.parquet: missing or damaged"):
        make_table(tmp_path, ("dhtm", RIGHT, {}), ("tome", None, {"n_images": 1200}))


def test_the_papers_claims(tmp_path):
    table = make_table(tmp_path)
    claims = table.data.dropna(subset="claim").set_index(["backbone", "method"])
    assert len(claims) == 25
    for (backbone, method), row in claims.drop(("deit_small", "random")).iterrows():
        top1 = read_published("table2").set_index(["backbone", "method"]).top1[backbone]
        assert row.published_difference == pytest.approx(top1["DHTM"] - top1[method])
        p, q = top1["DHTM"] / 100, top1[method] / 100
        assert row.independent_disagreement_pct == pytest.approx(100 * (p * (1 - q) + q * (1 - p)))
    assert claims.loc[("deit_small", "random"), "published_difference"] == 3.14
    wrong_claims = claims.index[~claims.as_claimed.astype(bool)].tolist()
    assert wrong_claims == [("deit_small", "SiT"), ("deit_base", "SiT"), ("deit_base", "K-Medoids")]
    only_if = claims.beyond_chance.str.extract(r"at most ([\d.]+)% of the images")[0].dropna().astype(float).to_dict()
    assert only_if.keys() == {
        ("deit_tiny", "ToMe w/train"), ("deit_small", "ToMe OTS"), ("deit_small", "LoTM"), ("deit_small", "ToMe w/train"),
        ("deit_base", "ToMe OTS"), ("deit_base", "ToMe w/train"),
    }  # fmt: skip
    others = claims.beyond_chance.drop(list(only_if))
    assert (others == "beyond chance however often the two disagree").all()
    shares = claims.independent_disagreement_pct
    assert f"{shares.min():.0f} to {shares.max():.0f}% if they erred independently" in table.markdown()


def test_changes_of_the_outputs_have_their_own_part(tmp_path):
    """This part has KL, agreement and flips of methods off the shelf, with paired tests of the KL against DHTM."""
    kl = np.random.default_rng(0).exponential(0.01, 1200)
    table = make_table(
        tmp_path,
        ("unmerged", RIGHT, {"kl": 0 * kl}),
        ("dhtm", RIGHT, {"kl": kl}),
        ("lotm", wrong(0, 30), {"kl": kl + 0.004}),
        ("tome", RIGHT, {"kl": np.roll(kl, 1)}),
        ("dpc_knn", RIGHT, {"trained": True}),
    )
    (frame,) = [frame for caption, frame in table.parts if caption.endswith("against the unmerged model's outputs")]
    cells = frame.set_index("method")
    assert list(cells.index) == ["ToMe OTS", "LoTM", "DHTM"], "neither unmerged nor trained runs"
    assert cells.loc["LoTM", "flips won / lost"] == "0 / 30"
    assert cells.loc["LoTM", "agreement % [95% interval]"].startswith("97.50 [")
    assert cells.loc["LoTM", "DHTM − this, nats"].startswith("−0.0040 [")
    assert cells.loc["LoTM", "p"] == "<0.0001*" and float(cells.loc["ToMe OTS", "p"]) > 0.9
    rows = rows_of(table)
    assert rows.kl["DHTM"] == pytest.approx(kl.mean()) and pd.isna(rows.kl["DPC-KNN"])
    assert rows.kl_p.dropna().index.tolist() == ["ToMe OTS", "LoTM"], "the unmerged model's KL is 0"
    assert rows.kl["unmerged"] == 0 and rows.p["unmerged"] == 1


def test_other_reductions_have_parts_if_they_have_runs(tmp_path):
    table = make_table(tmp_path, *[(method, RIGHT, {"target": 40.0}) for method in ("dhtm", "tome")])
    cells = cells_of(table, "deit_micro (embedded) on digits, 1,200 images, 40% fewer FLOPs")
    assert cells.index.tolist() == ["ToMe OTS", "DHTM"]
