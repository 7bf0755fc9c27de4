"""The project's dashboard on W&B, made from what dhtm.harness.tracking logs."""

from pathlib import Path

import wandb
import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as workspaces

from dhtm.harness.core.errors import UserError, explain
from dhtm.harness.runs.directory import finished_runs
from dhtm.harness.tracking import Tracker, is_logged_in
from dhtm.report.registry import entry_of

MAX_RUNS = 500  # in a panel; W&B's default is 10


def save_dashboard(tracker: Tracker, name: str, results_dir: Path) -> str:
    """Save the dashboard as a view of the project's workspace, each run in its method's colour; return its address.

    Raises:
        UserError: there is no login, or W&B does not save it.
    """
    runs = finished_runs(results_dir)
    if not is_logged_in():
        raise UserError("no login to W&B: run `wandb login` once, or set WANDB_API_KEY")
    flops, top1, kl = (panels.SummaryMetric(name) for name in ("flops_g", "top1", "kl"))
    bars = {"max_runs_to_show": MAX_RUNS, "max_bars_to_show": MAX_RUNS}
    lines = {"x": "layer", "y": ["tokens"], "max_runs_to_show": MAX_RUNS}
    sections = {
        "Accuracy against FLOPs": panels.ScatterPlot(title="top-1 (%) against GFLOPs", x=flops, y=top1),
        "KL against FLOPs": panels.ScatterPlot(title="KL (nats) against GFLOPs", x=flops, y=kl, log_y=True),
        "Throughput": panels.BarPlot(title="images/s", metrics=["images_per_s"], **bars),
        "Tokens by layer": panels.LinePlot(title="tokens by layer", **lines),
        "Table 2": panels.WeavePanelSummaryTable(table_name="table2"),
        "Regions": panels.MediaBrowser(title="merged regions", media_keys=["regions"]),
    }
    whole = workspaces.SectionLayoutSettings(columns=1, rows=1)
    colours = {run.run_id: workspaces.RunSettings(color=entry_of(run.method).colour) for run in runs.itertuples()}
    sections = [
        workspaces.Section(name=title, panels=[panel], is_open=True, layout_settings=whole)
        for title, panel in sections.items()
    ]
    with explain(f"tracker.project={tracker.project}: W&B saved no dashboard"):
        view = workspaces.Workspace(
            entity=tracker.entity or wandb.Api().default_entity,
            project=tracker.project,
            name=name,
            sections=sections,
            settings=workspaces.WorkspaceSettings(max_runs=MAX_RUNS),
            runset_settings=workspaces.RunsetSettings(run_settings=colours),
        )
        return view.save().url
