"""Reports from run directories, and Table 1 with the published numbers beside ours."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import timm
from conftest import ROOT
from made_up import KS, stub_gflops, write_run

import dhtm
from dhtm.harness.core.errors import UserError
from dhtm.report.report import report
from dhtm.report.runs import load_runs, read_published
from dhtm.report.table1 import NOTES, gflops, table1


@pytest.fixture(autouse=True)
def stubbed_gflops(monkeypatch):
    stub_gflops(monkeypatch)


def test_gflops_of_table_1_are_those_of_a_patched_model():
    model = dhtm.patch(timm.create_model("deit_tiny_patch16_224"), dhtm.DHTM(k=48, layers=(4, 7, 10)))
    expected = dhtm.count_flops(model).total / 1e9
    assert gflops("deit_tiny", (48,))[4, 7, 10] == [expected] == [pytest.approx(0.81, rel=0.01)]


def test_note_on_the_layers_of_the_published_flops_is_true():
    rows = pd.read_csv(ROOT / "results/embedded/tables/table1.csv").query("k > 0").set_index(["backbone", "k"])
    nearer = rows.flops_difference_pct_4_7_10.abs() < rows.flops_difference_pct_4_7_11.abs()
    assert nearer["deit_tiny"].all() and not nearer["deit_base"].any()
    (k,) = nearer.index[~nearer & (nearer.index.get_level_values(0) == "deit_small")].get_level_values("k")
    assert f"closer to layers 4, 7 and 10 for DeiT-Tiny, and for DeiT-Small except at k = {k}." in " ".join(NOTES)


def test_table_1_shows_our_runs_beside_the_published_numbers(tmp_path):
    """Rows not evaluated on ImageNet have dashes in our columns, never the paper's numbers."""
    numbers = {"top1": 79.40, "top1_ci95": [79.05, 79.75], "n_images": 50_000}
    write_run(tmp_path, 1000, k=40, backbone="deit_small", data="imagenet", **numbers)
    for number, k in enumerate(KS):
        write_run(tmp_path, number, k=k)
    table = table1(load_runs(tmp_path))
    deit = table.data[table.data.data == "imagenet"].set_index(["backbone", "k"])
    row = deit.loc["deit_small", 40]
    assert (row.published_top1, row.top1_difference) == (79.46, pytest.approx(-0.06))
    assert len(deit) == 21 and deit.top1.count() == deit.top1_difference.count() == 1
    micro = table.data[table.data.backbone == "deit_micro"]
    assert micro.k.tolist() == KS and (micro.top1 == 90).all()
    text = table.markdown()
    assert "DeiT-Small on ImageNet-1K, 50,000 images" in text
    assert "79.40 [79.05, 79.75]" in text and "−0.06" in text
    assert "|  40 |               71.66 |              – |          – |               0.88 |" in text
    assert "90.00 [89.00, 91.00]" in text


def test_report_without_runs_shows_the_published_numbers(tmp_path):
    (tmp_path / "runs").mkdir()
    output = tmp_path / "out"
    report(tmp_path / "runs", output)
    assert len(pd.read_csv(output / "tables/table1.csv")) == 21
    assert pd.read_csv(output / "tables/table2.csv").top1.isna().all()
    assert r"\toprule" in (output / "tables/table1.tex").read_text()
    for name in ("figure1", "figure4"):
        assert (output / f"figures/{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (output / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<h2>What is missing</h2>" in (output / "report.html").read_text()


def test_missing_unwritable_or_damaged_files_raise(tmp_path):
    with pytest.raises(UserError, match=r"results_dir=.*none: no such directory; evaluate something first"):
        report(tmp_path / "none", tmp_path)
    with pytest.raises(UserError, match=r"output_dir=/proc/nowhere: cannot write there"):
        report(tmp_path, Path("/proc/nowhere"))
    (tmp_path / "0123").mkdir()
    (tmp_path / "0123" / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"0123/metrics.json: damaged"):
        report(tmp_path, tmp_path / "out")


def test_copied_runs_raise(tmp_path):
    write_run(tmp_path, 1)
    shutil.copytree(tmp_path / f"{1:016x}", tmp_path / "backup")
    with pytest.raises(UserError, match=r"/backup: it holds the run 0{15}1; name it so, or move it out of "):
        report(tmp_path, tmp_path / "out")


def test_published_numbers():
    table = read_published("table1").set_index(["backbone", "k"])
    assert len(table) == 21
    assert table.loc[("deit_tiny", 0), "top1"] == 72.20
    assert table.loc[("deit_base", 40), "flops_g"] == 13.97
    assert len(read_published("table2")) == 30 and len(read_published("claims")) == 25
    for file in (ROOT / "results" / "paper").glob("*.csv"):
        assert pd.read_csv(file).place.notna().all()
