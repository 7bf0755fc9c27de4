"""The whole report: every table and figure that the finished runs allow."""

import logging

from omegaconf import DictConfig

from dhtm.harness import tracking
from dhtm.harness.core.errors import UserError, path_given
from dhtm.harness.runs.store import require_writable, write_atomically
from dhtm.report.figure1 import figure1
from dhtm.report.figure4 import figure4
from dhtm.report.runs import load_runs
from dhtm.report.style import save_figure
from dhtm.report.table1 import table1
from dhtm.report.table2 import table2

log = logging.getLogger(__name__)


def report(config: DictConfig) -> None:
    """Write output_dir/tables and output_dir/figures from the runs in results_dir.

    Raises:
        UserError: there is no results_dir, a run in it is damaged, or nothing can be written to output_dir.
    """
    tracking.check(config.tracker)
    if not path_given(config.results_dir, "results_dir").is_dir():
        raise UserError(
            f"results_dir={config.results_dir}: no such directory; evaluate something first, or results_dir=DIR"
        )
    runs = load_runs(config.results_dir)
    log.info("%d finished runs in %s", len(runs), config.results_dir)
    output = path_given(config.output_dir, "output_dir")
    require_writable(output / "tables", f"output_dir={config.output_dir}")
    every_run = runs.drop(columns=["plain", "finished"]).to_csv(index=False, float_format="%.8g")
    write_atomically(output / "tables" / "runs.csv", lambda file: file.write_text(every_run))
    tables = {"table1": table1(runs), "table2": table2(runs, config.results_dir)}
    for name, table in tables.items():
        table.save(output / "tables" / name)
    figures = {
        name: save_figure(make(runs), output / "figures" / name)
        for name, make in (("figure1", figure1), ("figure4", figure4))
    }
    log.info("\n%s", "\n".join(table.markdown() for table in tables.values()))
    log.info("tables: %s\nfigures: %s", output / "tables", output / "figures")
    tracking.log_report(config, {name: table.data for name, table in tables.items()} | {"runs": runs}, figures)
