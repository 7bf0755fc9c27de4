"""Table 2: DHTM against other methods at equal FLOPs, with paired tests; and the paper's claims about it."""

from pathlib import Path

import pandas as pd

from dhtm.harness.runs.directory import predictions
from dhtm.report.claims import N_IMAGENET, claim_cells, paper_claims
from dhtm.report.registry import METHODS, SERIES, entry_of
from dhtm.report.runs import FAITHFULNESS, Pair, at_target, by_target, of_series, pairs, read_published
from dhtm.report.statistics import compare, holm
from dhtm.report.tables import FAITHFUL, Column, Table, caption_of, cells, difference

TARGET = 30  # percent fewer FLOPs, as in the paper
MORE_TARGETS = (40, 50, 60)
# Rows that the paper's table does not have.
ADDED = ("Token mergence", "PiToMe w/train", "ATC w/train", "DPC-KNN OTS", "K-Medoids OTS", "PiToMe", "ATC")
_COLUMNS = [
    "backbone", "data", "target", "group", "method", "reference", "published_top1", "published_flops_g", "run_id", "knob",
    "value", "trained", "untrained", "n_images", "top1", "ci_low", "ci_high", *FAITHFULNESS, "flops_g", "flops_g_q1",
    "flops_g_q3", "flops_g_max", "flops_reduction_pct", "difference", "difference_low", "difference_high",
    "reference_only", "other_only", "p", "kl_difference", "kl_difference_low", "kl_difference_high", "kl_p",
]  # fmt: skip
_NUMBERS = [column for column in _COLUMNS[6:] if column not in ("run_id", "knob", "trained", "untrained")]
_PUBLISHED = ["top-1 % published", "GFLOPs published"]

NOTES = [
    "FLOPs are multiply-adds counted by fvcore, including attention products and merging. Methods are compared at equal "
    "counted FLOPs, not at equal knobs: the knob of each (k, r, ratio or keep rate) is solved for the target, and the table "
    "prints the reduction that was reached. Top-1 has a 95% interval.",
    "DHTM − this is top-1 of DHTM, or of DHTM+ where DHTM cannot save so much, minus top-1 of the row, with a paired bootstrap "
    "95% interval (10,000 resamples). p is two-sided, of the exact sign-flip permutation test over scans; without groups it is "
    "the exact McNemar test. Both need the predictions of two runs on the same images, so nothing is compared with a published "
    "number.",
    "Each scan of the embedded scenes is in four images, so their intervals and tests resample or flip whole scans. On other "
    "data images are independent, and the interval of top-1 is Wilson's.",
    "KL is the Kullback-Leibler divergence, in nats, of the unmerged model's class probabilities from the merged model's; "
    "agreement is the share of images with the same best class. Both are means over images with 95% intervals: the "
    "bootstrap's, for agreement on independent images Wilson's. A flip is won if only the merged model is right, lost if only "
    "the unmerged one is. KL says how much the outputs change and not whether for the better, so a smaller KL is not a better "
    "accuracy. Weights that were trained with a method are compared with nothing.",
    "DHTM − this, nats, is the difference of the mean KL. Its p is of the sign-flip permutation test with 10,000 random draws, "
    "which is about the mean; Wilcoxon's test would be about ranks, in which the images that change most hardly count.",
    "p values are not corrected for their number; * marks those that stay below 0.05 after Holm's correction for all tests "
    "of their kind (top-1, KL) in this table. A test is about these weights on images of this kind, not about what another "
    "training would give.",
    "(untrained): the method's own parameters were never trained, so the row shows that it runs and not what it can do.",
    "w/ train rows are of weights that were trained with the method. Those of deit_micro on the embedded data and of deit_mini "
    "on Imagenette were fine-tuned from the unmerged weights, for 6 and for 3 epochs, which rows w/o train did not have. The "
    "published ones had 30 epochs from DeiT (Haurum et al. 2023) or, for ToMe, 300 from scratch.",
    "Token mergence (Bian et al. 2023) is not in the paper's table; its abstract reports 33% fewer FLOPs and 0.1 points less "
    "on DeiT-Small. K-Medoids and DPC-KNN off the shelf (OTS), PiToMe (Tran et al. 2024) and ATC (Haurum et al. 2024) "
    "are our additions too, and so is DHTM+ (see docs/methods.md).",
    "DHTM+ threshold merges while tokens are similar enough, so that every image has its own FLOPs: the table prints "
    "their mean, quartiles and maximum. The thresholds were found for the target on images that are not tested on.",
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
    first = [(backbone, "imagenet", TARGET) for backbone in read_published("table2").backbone.unique()]
    solved = by_target(runs)
    others = [(*pair, target) for target in (TARGET, *MORE_TARGETS) for pair in pairs(solved[solved.target == target])]
    sets = dict.fromkeys([*first, *others])
    data = pd.concat([_results(runs, results_dir, (b, d), target) for b, d, target in sets], ignore_index=True)
    data["p_holm"], data["kl_p_holm"] = holm(data.p), holm(data.kl_p)
    parts = []
    for (backbone, name, target), frame in data.groupby(["backbone", "data", "target"], sort=False):
        caption = caption_of(backbone, name, frame.n_images, f"{target}% fewer FLOPs")
        reference = frame.reference.iloc[0] or "DHTM"
        published = [] if frame.published_top1.isna().all() else _PUBLISHED
        points = difference(f"{reference} − this, points")
        parts.append((caption, _part(frame, *published, "top-1 % ours", "GFLOPs", "reduction %", *points)))
        merged = frame[frame.kl.notna() & (frame.method != "unmerged")]
        if len(merged):
            nats = difference(f"{reference} − this, nats", "kl_")
            shown = _part(merged, *FAITHFUL, "flips won / lost", "reduction %", *nats)
            parts.append((f"{caption}, against the unmerged model's outputs", shown))
    claims = paper_claims()
    about = f"The paper's claims for DHTM, and what {N_IMAGENET:,} images can say about them"
    parts.append((about, claim_cells(claims)))
    inside = claims.table == "table2"  # one more claim is about Figure 4
    added = claims[inside].drop(columns=["published_top1", "table"]).assign(target=TARGET)
    data = data.merge(added, "left", ["backbone", "data", "target", "method"])
    return Table(pd.concat([data, claims[~inside].drop(columns="table")], ignore_index=True), parts, NOTES)


def _results(runs: pd.DataFrame, results_dir: Path, pair: Pair, target: int) -> pd.DataFrame:
    """Return one row of numbers for each of the paper's rows, the added ones, and other runs at the target.

    At targets other than the paper's, rows without a run are dropped.
    """
    backbone, data = pair
    paper = read_published("table2").assign(data="imagenet", target=TARGET)
    paper = paper.query("backbone == @backbone and data == @data and target == @target").set_index("method")
    ours = at_target(runs, backbone, data, target)
    reference = next((name for name in ("DHTM", "DHTM+") if _run(ours, name) is not None), None)
    first = None if reference is None else predictions(results_dir / _run(ours, reference).run_id)
    rows = []
    for name, group, run in _rows(ours, backbone):
        if run is None and target != TARGET:
            continue
        row = {} if run is None else run.to_dict()
        row |= {"group": group, "method": name}
        row |= {"published_top1": paper.top1.get(name), "published_flops_g": paper.flops_g.get(name)}
        if run is not None and reference is not None and name != reference:
            second = predictions(results_dir / run.run_id)
            if name == "unmerged":  # its KL from itself is 0 but for rounding, and no KL is less: nothing to test
                second = second.drop(columns="kl", errors="ignore")
            row |= compare(first, second)
        rows.append(row)
    results = pd.DataFrame(rows).rename(columns={"first_only": "reference_only", "second_only": "other_only"})
    results = results.assign(backbone=backbone, data=data, target=target, reference=reference)
    return results.reindex(columns=_COLUMNS).astype(dict.fromkeys(_NUMBERS, float))


def _rows(ours: pd.DataFrame, backbone: str) -> list[tuple[str, str, pd.Series | None]]:
    """Return name, group and run of each row of a part: first the paper's groups, then other runs at the target."""
    methods = read_published("table2").groupby("backbone", sort=False).method.agg(list)
    names = methods.get(backbone, methods.iloc[0])
    first = names.index("ToMe OTS")
    rows = []
    for name in [*names[:first], *ADDED, *names[first:], "DHTM+", "DHTM+ threshold"]:
        group = "w/ train" if SERIES[name].trained else "w/o train"
        rows.append((name, "" if name == "unmerged" else group, _run(ours, name)))
    shown = {run.run_id for _, _, run in rows if run is not None}
    rest, others = ours[(ours.method != "unmerged") & ~ours.run_id.isin(shown)], []
    needs_layers = rest.method.isin(METHODS) | rest.duplicated("method", keep=False)
    for index, run in rest.iterrows():
        name = f"{entry_of(run.method).label}, layers {run.layers}" if needs_layers[index] else run.method
        others.append((name, "others, w/ train" if run.trained else "others, w/o train", run))
    return rows + sorted(others, key=lambda row: row[1])


def _run(ours: pd.DataFrame, name: str) -> pd.Series | None:
    """Return our run for a row; an untrained one if the row's own parameters should be trained and no trained run exists."""
    found = of_series(ours, SERIES[name], untrained=True)
    return None if found.empty else found.sort_values("trained").iloc[-1]


def _part(frame: pd.DataFrame, *columns: Column) -> pd.DataFrame:
    """Return the training, once per group, the method and the given columns of each row."""
    training = frame.group.where(frame.group != frame.group.shift(), "")
    method = frame.method + frame.untrained.eq(True).map({True: " (untrained)", False: ""})
    shown = cells(frame, *columns, "run").set_axis(frame.index)
    return pd.concat([training.rename("training"), method.rename("method"), shown], axis=1)
