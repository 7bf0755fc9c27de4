"""The whole report: every table and figure that the finished runs allow."""

import logging
from pathlib import Path

from dhtm.harness.core.errors import UserError
from dhtm.harness.core.files import require_writable, write_text
from dhtm.harness.tracking import Tracker, log_report
from dhtm.report.ablation import ablation
from dhtm.report.dense import dense_figure, dense_table
from dhtm.report.figures import figure1, figure4
from dhtm.report.page.page import write_page
from dhtm.report.runs import load_runs
from dhtm.report.style import save_figure
from dhtm.report.table1 import table1
from dhtm.report.table2 import table2
from dhtm.report.thresholds import thresholds_table

log = logging.getLogger(__name__)


def report(results_dir: Path, output_dir: Path, tracker: Tracker | None = None) -> None:
    """Write output_dir/tables, output_dir/figures and output_dir/report.html from the runs, and log tables and figures.

    Raises:
        UserError: results_dir does not exist, a run in it is damaged, or nothing can be written to output_dir.
    """
    if not results_dir.is_dir():
        raise UserError(
            f"results_dir={results_dir}: no such directory; evaluate something first, or set results_dir=DIR"
        )
    runs = load_runs(results_dir)
    log.info("%d finished runs in %s", len(runs), results_dir)
    require_writable(output_dir / "tables", f"output_dir={output_dir}")
    every_run = runs.drop(columns=["plain", "finished", "knobs", "among"]).to_csv(index=False, float_format="%.8g")
    write_text(output_dir / "tables" / "runs.csv", every_run)
    tables = {
        "table1": table1(runs),
        "table2": table2(runs, results_dir),
        "ablation": ablation(runs, results_dir),
        "thresholds": thresholds_table(runs, results_dir),
        "dense": dense_table(runs, results_dir),
    }
    tables = {name: table for name, table in tables.items() if table is not None}
    for name, table in tables.items():
        table.save(output_dir / "tables" / name)
    figures = {"figure1": figure1(runs), "figure4": figure4(runs), "dense": dense_figure(runs)}
    figures = {name: save_figure(drawn, output_dir / "figures" / name) for name, drawn in figures.items() if drawn}
    log.info("\n%s", "\n".join(table.markdown() for table in tables.values()))
    write_page(runs, tables, figures, results_dir, output_dir / "report.html")
    log.info("tables: %s\nfigures: %s", output_dir / "tables", output_dir / "figures")
    log.info("report: %s", output_dir / "report.html")
    logged = {name: table.data for name, table in tables.items()} | {"runs": runs.drop(columns="knobs")}
    log_report(tracker, logged, figures)
