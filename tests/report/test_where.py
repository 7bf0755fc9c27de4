"""The page's section on where the accuracy goes: the counts in its tables."""

import numpy as np
import pandas as pd
from made_up import write_solved_run
from timm.data import resolve_data_config

import dhtm
from dhtm.harness.data.scenes import Digits
from dhtm.harness.data.splits import open_split
from dhtm.harness.models.backbones import Backbone
from dhtm.report.page import where
from dhtm.report.runs import load_runs


def test_tokens_that_cover_an_object_are_counted(monkeypatch):
    monkeypatch.setattr(where, "N_SCENES", 24)
    data, model = Digits(), Backbone("deit_micro", "deit_micro", 10).bare()
    split = open_split(data, "test", resolve_data_config(model=model), 10)
    digit_patches = (data.patch_classes("test", range(24), (14, 14)) == 1).sum(axis=1)
    counts = {}
    for k in (0, 60):
        dhtm.patch(model, dhtm.DHTM(k=k))
        counts[k] = where.object_regions(model, split, data)
        dhtm.unpatch(model)
    assert counts[0].tolist() == digit_patches.tolist(), "without merging, every patch is a token"
    assert (counts[60] <= counts[0]).all() and (counts[60] >= 1).all() and counts[60].sum() < counts[0].sum()


def test_top1_by_the_number_of_tokens():
    predictions = {"DHTM": pd.DataFrame({"correct": np.arange(40) % 2 == 0})}
    table = where.by_regions(predictions, {"DHTM": pd.Series([2] * 10 + [8] * 20)})
    row = table.iloc[0]
    assert (row["1 to 3"], row["7 to 9"], row["19 or more"]) == ("50.0 (10)", "50.0 (20)", "–")
    assert row["mean tokens"] == "6.0"


def test_flips_are_counted_as_won_or_lost():
    predictions = pd.DataFrame({"class_1": [0, 1, 0, 1, 1], "unmerged_class": [0, 0, 1, 1, 0]})
    predictions = predictions.assign(label=0, kl=[0.0, 0.2, 0.3, 0.9, 0.4], correct=predictions.class_1 == 0)
    (row,) = where.flips({"DHTM": predictions}).to_dict("records")
    assert list(row.values()) == ["DHTM", "1", "2", "2", "4, 1"]
    prefix = "the greatest KL among the flips"
    assert where.notable_images(predictions) == {3: "the greatest KL", 2: f"{prefix} won", 4: f"{prefix} lost"}
    assert where.notable_images(predictions.iloc[:1]) == {0: "the greatest KL"}


def test_agreement_between_methods_is_cohens_kappa():
    predictions = {"a": pd.DataFrame({"class_1": [0, 0, 1, 1]}), "b": pd.DataFrame({"class_1": [0, 1, 1, 1]})}
    table = where.agreement_between(predictions).set_index("kappa")
    # They agree on 3/4 of the images, and by chance would agree on 1/2 · 1/4 + 1/2 · 3/4 = 1/2 of them.
    assert (table.loc["a", "a"], table.loc["b", "a"], table.loc["a", "b"]) == ("1.000", "0.500", "")


def test_labels_distinguish_the_layers_of_a_method(tmp_path):
    write_solved_run(tmp_path, 0, "unmerged")
    for number, layers in enumerate(("all", [4, 7, 11], [7]), start=1):
        write_solved_run(tmp_path, number, "dhtm", layers=layers)
    frame = where.methods_at_one_cost(load_runs(tmp_path), ("deit_micro", "digits"))
    assert sorted(frame.label) == ["DHTM", "DHTM, layers 7", "DHTM, layers all", "unmerged"]


def test_images_without_labels_have_no_class():
    predictions = pd.DataFrame({"kl": [0.5], "label": -1, "unmerged_class": 1, "class_1": 2})
    (row,) = where.most_changed({"DHTM": predictions}).to_dict("records")
    assert list(row.values()) == ["DHTM", "0", "0.5000", "–", "1", "2"]


def test_no_pictures_of_images_that_have_changed(evaluated, tmp_path):
    run_id = evaluated("target.reduction_pct=30", "data.limit=2")["run_id"]
    results = tmp_path / "runs"
    shown = where.where_it_goes(load_runs(results), ("deit_micro", "digits"), results)
    assert shown["pictures"] and not shown["reason"]
    config = results / run_id / "config.yaml"
    config.write_text(config.read_text().replace("  split: test", "  split: train"))
    shown = where.where_it_goes(load_runs(results), ("deit_micro", "digits"), results)
    assert shown["reason"] == "the images of data=digits have changed since the runs" and not shown["pictures"]
