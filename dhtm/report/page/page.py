"""The page: what was run, tables, figures, charts, and the run behind every number."""

import base64
import functools
import html
import json
from pathlib import Path

import jinja2
import pandas as pd
import vl_convert

from dhtm.harness.core.files import write_text
from dhtm.harness.runs.directory import finished_runs
from dhtm.harness.sweeps.status import states
from dhtm.report.page.charts import METRICS, chart, chart_data
from dhtm.report.page.where import where_it_goes
from dhtm.report.registry import title_of
from dhtm.report.runs import pairs
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


def write_page(
    runs: pd.DataFrame, tables: dict[str, Table], figures: dict[str, Path], results_dir: Path, file: Path
) -> None:
    """Write the report as one HTML file that loads nothing else; figures are PNG files, by name."""
    measured = finished_runs(results_dir).reindex(columns=["run_id", "images_per_s", "versions"]).set_index("run_id")
    data = chart_data(runs, measured.images_per_s)
    charts = {f"chart{n}": made for n, metric in enumerate(METRICS, 1) if (made := chart(data, metric))}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"html": _html, "embed": _embed}
    page = environment.get_template("page.html.j2").render(
        what=_what_was_run(runs, measured.versions),
        tables=[(TITLES[name], name, table) for name, table in tables.items()],
        figures=[(FIGURES[name], path.read_bytes()) for name, path in figures.items()],
        premise=_premise(file.parent / "premise"),
        charts=list(charts),
        specifications=json.dumps(charts).replace("</", "<\\/"),
        script=_vega() if charts else "",
        where=[found for pair in pairs(runs) if (found := where_it_goes(runs, pair, results_dir))],
        problems=_problems(results_dir),
        runs=_all_runs(runs, measured.images_per_s),
        results_dir=results_dir,
    )
    write_text(file, page)


def _what_was_run(runs: pd.DataFrame, versions: pd.Series) -> pd.DataFrame:
    """Return one row per backbone and data set: how many runs and images, when, and on what."""
    rows = []
    for backbone, data in pairs(runs):
        found = runs[(runs.backbone == backbone) & (runs.data == data)]
        used = versions[found.sort_values("finished").run_id.iloc[-1]]
        rows.append(
            {
                "backbone and data": title_of(backbone, data), "runs": len(found), "images": f"{found.n_images.max():,}",
                "splits": ", ".join(sorted(found.split.unique())), "dtype": ", ".join(sorted(found["dtype"].unique())),
                "device": ", ".join(sorted(found.device.unique())), "first": found.finished.min(), "last": found.finished.max(),
                "versions": ", ".join(f"{name} {number}" for name, number in used.items()),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _premise(folder: Path) -> tuple[bytes, list[str]] | None:
    """Return the figure and the sentences of scripts/premise.py; None if the folder has none."""
    if not (folder / "premise.png").exists() or not (folder / "premise.md").exists():
        return None
    lines = (folder / "premise.md").read_text(encoding="utf-8").splitlines()
    return (folder / "premise.png").read_bytes(), [line[2:] for line in lines if line.startswith("- ")]


def _problems(results_dir: Path) -> pd.DataFrame | None:
    """Return a table of the runs of sweeps that have no result, with the reason; None if there are none."""
    rows = [
        {"asked for": run["differs"], "state": run["state"], "reason": run.get("reason", "")}
        for file in sorted(results_dir.glob("sweeps/*/sweep.json"))
        for run in states(file.parent)
        if run["state"] != "done"
    ]
    return pd.DataFrame(rows).drop_duplicates() if rows else None


def _all_runs(runs: pd.DataFrame, speed: pd.Series) -> pd.DataFrame:
    kept = ["run_id", "backbone", "data", "split", "method", "layers", "options", "knob", "value", "trained", "targets"]
    kept += ["n_images", "top1", "ci_low", "ci_high", "kl", "agreement", "flops_g", "flops_reduction_pct"]
    frame = runs[kept].assign(images_per_s=runs.run_id.map(speed))
    digits = dict.fromkeys(("top1", "ci_low", "ci_high", "agreement", "flops_reduction_pct", "images_per_s"), "{:.2f}")
    digits |= {"kl": "{:.2g}", "flops_g": "{:.4f}", "value": "{:g}"}
    for column, form in digits.items():
        frame[column] = frame[column].astype(float).map(form.format, na_action="ignore")
    return frame


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
