"""The page: what was run, tables, figures, charts, and the run behind every number."""

import base64
import functools
import html
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import torch
import vl_convert
from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer

from dhtm.harness.config import evaluation_of_run
from dhtm.harness.core.errors import UserError
from dhtm.harness.core.files import write_atomically
from dhtm.harness.data.scenes import Digits
from dhtm.harness.data.splits import Split, open_split
from dhtm.harness.models.weights import load_model
from dhtm.harness.runs.directory import finished_runs, predictions
from dhtm.harness.sweeps.status import states
from dhtm.report.page.charts import METRICS, chart, chart_data
from dhtm.report.page.where import (
    agreement_between,
    by_class,
    by_regions,
    flips,
    methods_at_one_cost,
    most_changed,
    notable_images,
    object_regions,
)
from dhtm.report.regions import draw_side_by_side
from dhtm.report.registry import title_of
from dhtm.report.runs import Pair, pairs
from dhtm.report.tables import Table

TITLES = {
    "table1": "Table 1: DHTM over k, and the FLOPs that the paper prints",
    "table2": "Table 2: the methods at equal FLOPs, with paired tests",
    "ablation": "Ablation: which DHTM is best?",
    "thresholds": "Thresholds: as many merges as an image needs, against as many in every image",
    "dense": "Dense prediction: mIoU at equal FLOPs",
}
FIGURES = {
    "figure1": "Figure 1: top-1 and KL from the unmerged model over the reduction of FLOPs, for every method",
    "figure4": "Figure 4: DHTM against random merging",
    "dense": "Dense prediction: mIoU of a linear probe over the reduction of FLOPs",
}
N_PICTURES = 3
MAX_METHODS = 6  # side by side


def write_page(
    runs: pd.DataFrame, tables: dict[str, Table], figures: dict[str, Path], results_dir: Path, file: Path
) -> None:
    """Write the report as one HTML file that loads nothing else.

    Args:
        runs: from :func:`dhtm.report.runs.load_runs`.
        tables, figures: by name; figures as PNG files.
        results_dir: where the run directories are.
    """
    measured = finished_runs(results_dir)
    speed = measured.set_index("run_id").images_per_s if "images_per_s" in measured else pd.Series(dtype=float)
    data = chart_data(runs, speed)
    charts = {
        f"chart{number}": chart(
            data, metric, f"{metric} of every run over its cost; the table of all runs has the numbers"
        )
        for number, metric in enumerate(METRICS, 1)
        if (data[METRICS[metric][0]].gt(0) & data.images_per_s.notna()).any()
    }
    shown = {name: [(caption, _html(frame)) for caption, frame in table.parts] for name, table in tables.items()}
    folder = Path(__file__).parent
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("page.html.j2")
    page = template.render(
        what=_html(_what_was_run(runs, measured)),
        tables=[(TITLES[name], name, parts, tables[name].notes) for name, parts in shown.items()],
        figures=[(FIGURES[name], _embed(path.read_bytes())) for name, path in figures.items()],
        premise=_premise(file.parent / "premise"),
        charts=list(charts),
        specifications=json.dumps(charts).replace("</", "<\\/"),
        script=_vega() if charts else "",
        where=[found for pair in pairs(runs) if (found := _where(runs, pair, results_dir))],
        problems=_problems(results_dir),
        runs=_html(_all_runs(runs, speed)),
        results_dir=results_dir,
    )
    write_atomically(file, lambda path: path.write_text(page, encoding="utf-8"))


def _what_was_run(runs: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """Return one row per backbone and data set: how many runs and images, when, and on what."""
    versions = measured.set_index("run_id").versions if "versions" in measured else pd.Series(dtype=object)
    rows = []
    for backbone, data in pairs(runs):
        found = runs[(runs.backbone == backbone) & (runs.data == data)]
        used = versions.get(found.sort_values("finished").run_id.iloc[-1], {})
        rows.append(
            {
                "backbone and data": title_of(backbone, data), "runs": len(found), "images": f"{found.n_images.max():,}",
                "splits": ", ".join(sorted(found.split.unique())), "dtype": ", ".join(sorted(found["dtype"].unique())),
                "device": ", ".join(sorted(found.device.unique())), "first": found.finished.min(), "last": found.finished.max(),
                "versions": ", ".join(f"{name} {number}" for name, number in used.items()),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _where(runs: pd.DataFrame, pair: Pair, results_dir: Path) -> dict[str, Any] | None:
    """Return what to show of a backbone on a data set: tables by caption, and pictures; None if there is nothing."""
    target, frame = methods_at_one_cost(runs, pair)
    if target is None or not all((results_dir / run_id / "predictions.parquet").exists() for run_id in frame.run_id):
        return None
    merged = frame[frame.method != "unmerged"]
    found = {run.label: predictions(results_dir / run.run_id) for run in frame.itertuples()}
    parts = {}
    if frame.top1.notna().all():
        parts["Top-1 by class, % with 95% intervals"] = by_class(found)
    notable = {}
    if merged.kl.notna().all():
        of_merged = {name: found[name] for name in merged.label}
        parts["The images whose outputs change most"] = most_changed(of_merged)
        if frame.top1.notna().all():
            parts["Flips: won if only the merged model is right, lost if only the unmerged model is"] = flips(of_merged)
            first = merged.label.iloc[0]
            notable = {image: f"with {words} under {first}" for image, words in notable_images(found[first]).items()}
    parts["Agreement of the best classes beyond chance (Cohen's kappa)"] = agreement_between(found)
    pictures, reason = [], ""
    try:
        models, split, data = _load(merged, results_dir)
        pictures = _pictures(merged.label, models, split, notable)
        if isinstance(data, Digits) and frame.top1.notna().all():
            kept = {
                label: object_regions(model, split, data) for label, model in zip(merged.label, models, strict=True)
            }
            parts["Top-1 by the number of tokens that the digit is in, % (images)"] = by_regions(found, kept)
    except UserError as error:
        reason = str(error)
    tables = [(caption, _html(table)) for caption, table in parts.items()]
    title = f"{title_of(*pair)}, {target}% fewer FLOPs"
    return {"title": title, "tables": tables, "pictures": pictures, "reason": reason}


def _load(merged: pd.DataFrame, results_dir: Path) -> tuple[list[VisionTransformer], Split, Any]:
    """Return the patched model of each run, the split that all ran on, and its data set."""
    runs = [evaluation_of_run(results_dir / run_id, ["device=cpu"]) for run_id in merged.run_id]
    models = [load_model(run.backbone, run.method, run.checkpoints_dir, seed=run.seed)[0] for run in runs]
    data = runs[0].data
    return models, open_split(data, data.split, resolve_data_config(model=models[0]), models[0].num_classes), data


@torch.inference_mode()
def _pictures(
    labels: pd.Series, models: list[VisionTransformer], split: Split, notable: dict[int, str]
) -> list[tuple[str, str]]:
    """Draw a few images, and the notable ones, with their regions under each method; return pictures and captions."""
    labels, models = labels.head(MAX_METHODS), models[:MAX_METHODS]
    step = max(1, len(split.dataset) // N_PICTURES)
    pictures = []
    evenly = dict.fromkeys(range(0, step * N_PICTURES, step)[: len(split.dataset)], "")
    for index, words in (evenly | notable).items():
        picture, counts = draw_side_by_side(models, split, index)
        names = [f"{label} ({n} tokens)" for label, n in zip(labels, counts, strict=True)]
        title = f"Image {index}, {words}" if words else f"Image {index}"
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
        pictures.append((_embed(buffer.getvalue()), f"{title}, and its regions under {', '.join(names)}"))
    return pictures


def _premise(folder: Path) -> tuple[str, list[str]] | None:
    """Return the figure and the sentences of scripts/premise.py; None if the folder has none."""
    if not (folder / "premise.png").exists() or not (folder / "premise.md").exists():
        return None
    lines = (folder / "premise.md").read_text(encoding="utf-8").splitlines()
    return _embed((folder / "premise.png").read_bytes()), [line[2:] for line in lines if line.startswith("- ")]


def _problems(results_dir: Path) -> str:
    """Return a table of the runs of sweeps that have no result, with the reason; "" if there are none."""
    rows = []
    for file in sorted(results_dir.glob("sweeps/*/sweep.json")):
        sweep = json.loads(file.read_text())["runs"]
        common = set.intersection(*map(set, sweep)) if len(sweep) > 1 else set()
        for overrides, run in zip(sweep, states(file.parent), strict=True):
            if run["state"] != "done":
                wanted = " ".join(override for override in overrides if override not in common)
                rows.append({"asked for": wanted, "state": run["state"], "reason": run.get("reason", "")})
    return _html(pd.DataFrame(rows).drop_duplicates()) if rows else ""


def _all_runs(runs: pd.DataFrame, speed: pd.Series) -> pd.DataFrame:
    kept = ["run_id", "backbone", "data", "split", "method", "layers", "options", "knob", "value", "trained", "targets"]
    kept += ["n_images", "top1", "ci_low", "ci_high", "kl", "agreement", "flops_g", "flops_reduction_pct"]
    frame = runs[kept].assign(images_per_s=runs.run_id.map(speed))
    digits = dict.fromkeys(("top1", "ci_low", "ci_high", "agreement", "flops_reduction_pct", "images_per_s"), "{:.2f}")
    digits |= {"kl": "{:.2g}", "flops_g": "{:.4f}", "value": "{:g}"}
    for column, form in digits.items():
        frame[column] = ["" if pd.isna(value) else form.format(value) for value in frame[column].astype(float)]
    return frame.fillna("")


@functools.cache
def _vega() -> str:
    """Return Vega and Vega-Lite as one script."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _html(frame: pd.DataFrame) -> str:
    """Return a frame as a table; its column "run" links to the column "run_id" of the table of all runs."""
    shown = frame.astype(object).where(frame.notna(), "").map(lambda value: html.escape(str(value)))
    for column, form in (("run", '<a href="#{0}">{0:.6}</a>'), ("run_id", '<span id="{0}">{0}</span>')):
        if column in shown:
            shown[column] = [form.format(run_id) if run_id else "" for run_id in shown[column]]
    return shown.rename(columns=html.escape).to_html(index=False, border=0, escape=False)


def _embed(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
