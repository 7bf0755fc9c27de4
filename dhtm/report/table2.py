"""Table 2: DHTM against other methods at 30% fewer FLOPs, with tests; and what the paper claims of it."""

import pandas as pd

from dhtm.harness.core.errors import path_given
from dhtm.harness.runs.store import predictions
from dhtm.report.runs import at_target, published
from dhtm.report.statistics import LEVEL, Claim, claim, compare, holm
from dhtm.report.style import BACKBONES, DATA, METHODS
from dhtm.report.tables import Table, interval, number

TARGET = 30  # percent
N_IMAGENET = 50_000
# The paper's names: group, the harness's name, layers, and is the method trained with? Those of _ADDED are not in its table.
_ROWS = {
    "unmerged": ("", "unmerged", "all", False),
    "Sinkhorn": ("w/ train", "sinkhorn", "4,7,10", True),
    "PatchMerger": ("w/ train", "patch_merger", "4,7,10", True),
    "SiT": ("w/ train", "sit", "4,7,10", True),
    "DPC-KNN": ("w/ train", "dpc_knn", "4,7,10", True),
    "K-Medoids": ("w/ train", "k_medoids", "4,7,10", True),
    "ToMe w/train": ("w/ train", "tome", "all", True),
    "Token mergence": ("w/ train", "token_mergence", "4,7,10", True),
    "DPC-KNN OTS": ("w/o train", "dpc_knn", "4,7,10", False),
    "K-Medoids OTS": ("w/o train", "k_medoids", "4,7,10", False),
    "ToMe OTS": ("w/o train", "tome", "all", False),
    "LoTM": ("w/o train", "lotm", "4,7,11", False),
    "DHTM": ("w/o train", "dhtm", "4,7,11", False),
}
_ADDED = ["Token mergence", "DPC-KNN OTS", "K-Medoids OTS"]
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
    "FLOPs are multiply-adds counted by fvcore, attention products and merging included. Methods are compared at equal "
    "counted FLOPs, not at equal knobs: each one's knob (k, r or keep rate) is solved for 30% fewer, and what was reached "
    "is printed. Top-1 has its 95% Wilson interval.",
    "DHTM − this: top-1 of DHTM less that of the row, with a paired bootstrap 95% interval (10,000 resamples of the images); "
    "p is of the exact McNemar test, two-sided. Both need the predictions of two runs on the very same images, so nothing "
    "is compared with a published number.",
    "p values are not corrected for their number; * marks those that stay below 0.05 after Holm's correction for all tests "
    "of this table. A test speaks of these weights on images of this kind, not of what another training would give.",
    "(untrained): the method's own parameters were never trained, so the row shows that it runs and not what it can do.",
    "w/ train rows are of weights that were trained with the method. On embedded data, those, ToMe w/train too, were "
    "fine-tuned briefly from deit_micro; the published ones had 30 epochs from DeiT (Haurum et al. 2023) or, ToMe, 300 from "
    "scratch.",
    "Token mergence (Bian et al. 2023) is not in the paper's table; its abstract says 33% fewer FLOPs and 0.1 points less on "
    "DeiT-Small. K-Medoids and DPC-KNN off the shelf (OTS) are ours to add too.",
    "On digits each of the 500 test scans stands in four scenes; intervals and tests take images for independent, so there "
    "the former are a little narrow and the latter's p a little small.",
    "The paper's DHTM row on DeiT-Base is Table 1's of k = 48 (12.34 G), although the text says k = 40 (13.97 G there).",
    "On DeiT-Base the text has more than 4.5 points over SiT, Table 2 has 4.05; more than 1 over K-Medoids, Table 2 has 0.70. "
    "On DeiT-Small it has 2 or higher over SiT, Table 2 has 1.94.",
    "The claims' last column: the paper gives no predictions, so on how many images two models disagree (one right, the "
    "other wrong) is unknown, and with it p. Beyond chance is p below 0.05 in the exact McNemar test of the printed "
    "difference on ImageNet's 50,000 validation images; printed to 0.01 points, a difference is known to 5 images. Two "
    "models of these accuracies would disagree on 31 to 49% if they erred independently; of our runs the CSV "
    "counts the images on which only DHTM and only the other is right.",
]


def table2(runs: pd.DataFrame, results_dir: str) -> Table:
    """Table 2 from the finished runs, whose predictions are in results_dir; a dash where there is no run."""
    pairs = [(backbone, "imagenet") for backbone in published("table2").backbone.unique()]
    aimed = runs[runs.targets.str.split(",").map(lambda targets: str(TARGET) in targets).astype(bool)]
    for pair in aimed[["backbone", "data"]].drop_duplicates().itertuples(index=False, name=None):
        pairs += [pair] if pair not in pairs else []
    data = pd.concat([_results(runs, results_dir, *pair) for pair in pairs], ignore_index=True)
    data["p_holm"] = holm(data.p)
    parts = [_part(*pair, frame) for pair, frame in data.groupby(["backbone", "data"], sort=False)]
    claims = _claims()
    parts.append((f"The paper's claims for DHTM, and what {N_IMAGENET:,} images can say of them", _in_words(claims)))
    inside = claims.table == "table2"  # one more is on Figure 4
    data = data.merge(claims[inside].drop(columns=["published_top1", "table"]), "left", ["backbone", "data", "method"])
    return Table(pd.concat([data, claims[~inside].drop(columns="table")], ignore_index=True), parts, NOTES)


def _results(runs: pd.DataFrame, results_dir: str, backbone: str, data: str) -> pd.DataFrame:
    """One row for each of the paper's rows and the added ones, numbers only."""
    paper = published("table2")
    theirs = paper[(paper.backbone == backbone) & (data == "imagenet")].set_index("method")
    ours = at_target(runs, backbone, data, TARGET)
    dhtm = _run(ours, "DHTM")
    rows = []
    for name, group, run in _rows(ours, backbone):
        row = {"backbone": backbone, "data": data, "group": group, "method": name}
        row |= {"published_top1": theirs.top1.get(name), "published_flops_g": theirs.flops_g.get(name)}
        if run is not None:
            row |= run[_OURS].to_dict()
        if run is not None and dhtm is not None and name != "DHTM":
            both = (predictions(path_given(results_dir, "results_dir") / one) for one in (dhtm.run_id, run.run_id))
            found = compare(*both)
            row |= {"difference": found.difference, "difference_low": found.low, "difference_high": found.high}
            row |= {"dhtm_only": found.first_only, "other_only": found.second_only, "p": found.p}
        rows.append(row)
    frame = pd.DataFrame(rows, columns=_COLUMNS)
    return frame.astype(dict.fromkeys(_NUMBERS, float))


def _rows(ours: pd.DataFrame, backbone: str) -> list[tuple[str, str, pd.Series | None]]:
    """Name, group and run of each row of a part: first the paper's groups, then whatever else was run at the target."""
    methods = published("table2").groupby("backbone", sort=False).method.agg(list)
    names = methods.get(backbone, methods.iloc[0])
    first = names.index("ToMe OTS")
    rows = [(name, _ROWS[name][0], _run(ours, name)) for name in names[:first] + _ADDED + names[first:]]
    shown = {run.run_id for _, _, run in rows if run is not None}
    others = []
    for _, run in ours[(ours.method != "unmerged") & ~ours.run_id.isin(shown)].iterrows():
        known = run.method in METHODS
        name = f"{METHODS[run.method][0]}, layers {run.layers}" if known else run.method
        others.append((name, "others, w/ train" if run.trained else "others, w/o train", run))
    return rows + sorted(others, key=lambda row: row[1])


def _run(ours: pd.DataFrame, name: str) -> pd.Series | None:
    """Our run for a row: where one trained with the method is wanted and there is none, one whose parameters never were."""
    _, method, layers, trained = _ROWS[name]
    suits = (ours.trained == trained) | ours.untrained.astype(bool)
    found = ours[(ours.method == method) & (ours.layers == layers) & suits]
    return None if found.empty else found.sort_values("trained").iloc[-1]


def _part(backbone: str, data: str, frame: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """Caption and cells of one backbone on one data set."""
    rows, group = [], None
    for row in frame.itertuples():
        name = row.method + (" (untrained)" if pd.notna(row.untrained) and row.untrained else "")
        cells = {"training": row.group if row.group != group else "", "method": name}
        group = row.group
        if frame.published_top1.notna().any():
            cells["top-1 % published"] = number(row.published_top1, 2)
            cells["GFLOPs published"] = number(row.published_flops_g, 2)
        cells["top-1 % ours"] = number(row.top1, 2) + interval(row.ci_low, row.ci_high)
        cells["GFLOPs"] = number(row.flops_g, 4 if row.flops_g < 1 else 3)
        cells["reduction %"] = number(row.flops_reduction_pct, 1)
        cells["DHTM − this, points"] = number(row.difference, 2, signed=True) + _interval(row)
        cells["McNemar p"] = _p(row.p) + ("*" if row.p_holm < LEVEL else "")
        rows.append(cells)
    counts = frame.n_images.dropna()
    how_many = "" if counts.empty else f", {int(counts.max()):,} images"
    caption = f"{BACKBONES.get(backbone, backbone)} on {DATA.get(data, data)}{how_many}, {TARGET}% fewer FLOPs"
    return caption, pd.DataFrame(rows)


def _interval(row: tuple) -> str:
    low, high = (number(end, 2, signed=True) for end in (row.difference_low, row.difference_high))
    return "" if pd.isna(row.difference) else f" [{low}, {high}]"


def _p(p: float) -> str:
    return "<0.0001" if p < 0.0001 else number(p, 4)


def _claims() -> pd.DataFrame:
    """The comparisons that the paper's text makes, with the difference printed in its tables and what that can mean."""
    rows = []
    for row in published("claims").itertuples():
        top1 = published(row.table).query("backbone == @row.backbone").set_index("method").top1
        dhtm = top1["DHTM" if row.table == "table2" else "dhtm"]
        possible = claim(dhtm, top1[row.method], N_IMAGENET)
        difference = round(possible.difference, 2)
        kept = {"more than": difference > row.points, "at least": difference >= row.points}
        rows.append(
            {
                "backbone": row.backbone,
                "data": "imagenet",
                "method": row.method,
                "table": row.table,
                "published_top1": top1[row.method],
                "claim": f"{row.points:.2f}" if row.relation == "exactly" else f"{row.relation} {row.points:g}",
                "published_difference": difference,
                "as_claimed": kept.get(row.relation, difference == row.points),
                "most_disagreement_pct": possible.most_pct,
                "independent_disagreement_pct": possible.independent_pct,
                "greatest_disagreement_pct": possible.greatest_pct,
                "beyond_chance": _words(possible),
            }
        )
    return pd.DataFrame(rows)


def _words(possible: Claim) -> str:
    if possible.beyond_chance_always:
        return "beyond chance however often the two disagree"
    if possible.beyond_chance_if_independent:
        return "beyond chance even if the two erred independently"
    if possible.most is None:
        return "within chance however seldom the two disagree"
    return f"beyond chance only if the two disagree on at most {possible.most_pct:.1f}% of the images"


def _in_words(claims: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "backbone": BACKBONES[row.backbone],
            "DHTM against": METHODS[row.method][0] if row.method in METHODS else row.method,
            "points in the text": row.claim.replace("-", "−"),
            "points in the tables": number(row.published_difference, 2, signed=True),
            "as claimed": "yes" if row.as_claimed else "no",
            "on 50,000 images": row.beyond_chance,
        }
        for row in claims.itertuples()
    )
