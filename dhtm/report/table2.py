"""Table 2: DHTM against other methods at 30% fewer FLOPs, with paired tests; and the paper's claims about it."""

from pathlib import Path

import pandas as pd

from dhtm.harness.runs.directory import predictions
from dhtm.report.claims import N_IMAGENET, claim_cells, paper_claims
from dhtm.report.registry import METHODS, SERIES, entry_of
from dhtm.report.runs import Pair, at_target, of_series, pairs, published, solved_for
from dhtm.report.statistics import LEVEL, compare, holm
from dhtm.report.tables import Table, caption_of, number, with_interval

TARGET = 30  # percent
ADDED = ("Token mergence", "DPC-KNN OTS", "K-Medoids OTS")  # rows that the paper's table does not have
_OURS = [
    "run_id", "knob", "value", "trained", "untrained", "n_images", "top1", "ci_low", "ci_high", "flops_g",
    "flops_reduction_pct",
]  # fmt: skip
_COLUMNS = [
    "backbone", "data", "group", "method", "published_top1", "published_flops_g", *_OURS, "difference", "difference_low",
    "difference_high", "dhtm_only", "other_only", "p",
]  # fmt: skip
_NUMBERS = [column for column in _COLUMNS[4:] if column not in ("run_id", "knob", "trained", "untrained")]

NOTES = [
    "FLOPs are multiply-adds counted by fvcore, including attention products and merging. Methods are compared at equal "
    "counted FLOPs, not at equal knobs: the knob of each (k, r or keep rate) is solved for 30% fewer, and the table prints "
    "the reduction that was reached. Top-1 has a 95% interval.",
    "DHTM − this is top-1 of DHTM minus top-1 of the row, with a paired bootstrap 95% interval (10,000 resamples). p is "
    "two-sided, of the exact sign-flip permutation test over scans; without groups this is the exact McNemar test. Both "
    "need the predictions of two runs on the same images, so nothing is compared with a published number.",
    "Each scan of the embedded scenes is in four images, so their intervals and tests resample or flip whole scans. On other "
    "data images are independent, and the interval of top-1 is Wilson's.",
    "p values are not corrected for their number; * marks those that stay below 0.05 after Holm's correction for all tests "
    "of this table. A test is about these weights on images of this kind, not about what another training would give.",
    "(untrained): the method's own parameters were never trained, so the row shows that it runs and not what it can do.",
    "w/ train rows are of weights that were trained with the method. On embedded data all of them, including ToMe w/train, "
    "were fine-tuned briefly from deit_micro. The published ones had 30 epochs from DeiT (Haurum et al. 2023) or, for ToMe, "
    "300 from scratch.",
    "Token mergence (Bian et al. 2023) is not in the paper's table; its abstract reports 33% fewer FLOPs and 0.1 points less "
    "on DeiT-Small. K-Medoids and DPC-KNN off the shelf (OTS) are our additions too.",
    "The paper's DHTM row on DeiT-Base is Table 1's of k = 48 (12.34 G), although the text says k = 40 (13.97 G there).",
    "On DeiT-Base the text claims more than 4.5 points over SiT, where Table 2 has 4.05, and more than 1 over K-Medoids, "
    "where it has 0.70. On DeiT-Small the text claims 2 or more over SiT, where Table 2 has 1.94.",
    "The claims' last column: the paper gives no predictions, so it is unknown on how many images two models disagree (one "
    "is right, the other wrong), and p is unknown with it. Beyond chance means p below 0.05 in the exact McNemar test of the "
    "printed difference on ImageNet's 50,000 validation images; a difference printed to 0.01 points is known to 5 images. "
    "Two models of these accuracies would disagree on 31 to 49% if they erred independently. For our own runs the CSV "
    "counts the images on which only DHTM is right and those on which only the other is right.",
]


def table2(runs: pd.DataFrame, results_dir: Path) -> Table:
    """Make Table 2 from the finished runs, whose predictions are in results_dir; a dash where there is no run."""
    first = [(backbone, "imagenet") for backbone in published("table2").backbone.unique()]
    sets = dict.fromkeys([*first, *pairs(solved_for(runs, TARGET))])
    data = pd.concat([_results(runs, results_dir, pair) for pair in sets], ignore_index=True)
    data["p_holm"] = holm(data.p)
    shown = [_shown(*pair, frame) for pair, frame in data.groupby(["backbone", "data"], sort=False)]
    claims = paper_claims()
    shown.append(
        (f"The paper's claims for DHTM, and what {N_IMAGENET:,} images can say about them", claim_cells(claims))
    )
    inside = claims.table == "table2"  # one more claim is about Figure 4
    data = data.merge(claims[inside].drop(columns=["published_top1", "table"]), "left", ["backbone", "data", "method"])
    return Table(pd.concat([data, claims[~inside].drop(columns="table")], ignore_index=True), shown, NOTES)


def _results(runs: pd.DataFrame, results_dir: Path, pair: Pair) -> pd.DataFrame:
    """Return one row of numbers for each of the paper's rows, the added ones, and other runs at the target."""
    backbone, data = pair
    paper = (
        published("table2").assign(data="imagenet").query("backbone == @backbone and data == @data").set_index("method")
    )
    ours = at_target(runs, backbone, data, TARGET)
    dhtm = _run(ours, "DHTM")
    rows = []
    for name, group, run in _rows(ours, backbone):
        row = {"backbone": backbone, "data": data, "group": group, "method": name}
        row |= {"published_top1": paper.top1.get(name), "published_flops_g": paper.flops_g.get(name)}
        if run is not None:
            row |= run[_OURS].to_dict()
        if run is not None and dhtm is not None and name != "DHTM":
            found = compare(predictions(results_dir / dhtm.run_id), predictions(results_dir / run.run_id))
            row |= {"difference": found.difference, "difference_low": found.low, "difference_high": found.high}
            row |= {"dhtm_only": found.first_only, "other_only": found.second_only, "p": found.p}
        rows.append(row)
    return pd.DataFrame(rows, columns=_COLUMNS).astype(dict.fromkeys(_NUMBERS, float))


def _rows(ours: pd.DataFrame, backbone: str) -> list[tuple[str, str, pd.Series | None]]:
    """Return name, group and run of each row of a part: first the paper's groups, then other runs at the target."""
    methods = published("table2").groupby("backbone", sort=False).method.agg(list)
    names = methods.get(backbone, methods.iloc[0])
    first = names.index("ToMe OTS")
    rows = []
    for name in [*names[:first], *ADDED, *names[first:]]:
        group = "w/ train" if SERIES[name].trained else "w/o train"
        rows.append((name, "" if name == "unmerged" else group, _run(ours, name)))
    shown = {run.run_id for _, _, run in rows if run is not None}
    others = []
    for _, run in ours[(ours.method != "unmerged") & ~ours.run_id.isin(shown)].iterrows():
        known = f"{entry_of(run.method).label}, layers {run.layers}"
        name = known if run.method in METHODS else run.method
        others.append((name, "others, w/ train" if run.trained else "others, w/o train", run))
    return rows + sorted(others, key=lambda row: row[1])


def _run(ours: pd.DataFrame, name: str) -> pd.Series | None:
    """Return our run for a row. If its own parameters should be trained and no such run exists, an untrained one will do."""
    found = of_series(ours, SERIES[name], untrained=True)
    return None if found.empty else found.sort_values("trained").iloc[-1]


def _shown(backbone: str, data: str, frame: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """Return caption and cells of one backbone on one data set."""
    rows, group = [], None
    for row in frame.itertuples():
        name = row.method + (" (untrained)" if pd.notna(row.untrained) and row.untrained else "")
        cells = {"training": row.group if row.group != group else "", "method": name}
        group = row.group
        if frame.published_top1.notna().any():
            cells["top-1 % published"] = number(row.published_top1, 2)
            cells["GFLOPs published"] = number(row.published_flops_g, 2)
        cells["top-1 % ours"] = with_interval(row.top1, row.ci_low, row.ci_high)
        cells["GFLOPs"] = number(row.flops_g, 4 if row.flops_g < 1 else 3)
        cells["reduction %"] = number(row.flops_reduction_pct, 1)
        interval = (row.difference, row.difference_low, row.difference_high)
        cells["DHTM − this, points"] = with_interval(*interval, signed=True)
        p = "<0.0001" if row.p < 0.0001 else number(row.p, 4)
        cells["p"] = p + ("*" if row.p_holm < LEVEL else "")
        rows.append(cells)
    return caption_of(backbone, data, frame.n_images, f"{TARGET}% fewer FLOPs"), pd.DataFrame(rows)
