"""The project's dashboard on W&B, of what dhtm.harness.tracking logs."""

import pandas as pd
import wandb
import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as workspaces
from omegaconf import DictConfig
from wandb_workspaces.reports.v2.interface import PanelTypes

from dhtm.harness.core.errors import UserError, one_line
from dhtm.harness.runs.store import finished_runs
from dhtm.harness.tracking import is_logged_in
from dhtm.report.style import UNMERGED, colour_of

MAX_RUNS = 500  # that a panel shows; W&B's default is 10


def save_dashboard(tracker: DictConfig, name: str, results_dir: str) -> str:
    """Save the dashboard as a view of the project's workspace; return its address.

    Args:
        tracker: of the config group, for the project and who owns it.
        name: of the view.
        results_dir: where the runs are that were logged.

    Raises:
        UserError: there is no login, or W&B does not do it.
    """
    runs = finished_runs(results_dir)
    try:
        if not is_logged_in():
            raise UserError("no login to W&B: `wandb login` once, or set WANDB_API_KEY")
        entity = tracker.entity or wandb.Api().default_entity
        return dashboard(entity, tracker.project, name, runs).save().url
    except UserError:
        raise
    except Exception as error:  # W&B's own kinds have nothing in common
        raise UserError(f"tracker.project={tracker.project}: W&B saved no dashboard ({one_line(error)})") from error


def dashboard(entity: str, project: str, name: str, runs: pd.DataFrame) -> workspaces.Workspace:
    """The dashboard; runs of a method have the method's colour in the figures.

    Args:
        entity, project: whose it is.
        name: of the view.
        runs: of :func:`dhtm.harness.runs.store.finished_runs`, which may be none.
    """
    flops, top1 = panels.SummaryMetric("flops_g"), panels.SummaryMetric("top1")
    throughput = {"metrics": ["images_per_s"], "max_runs_to_show": MAX_RUNS, "max_bars_to_show": MAX_RUNS}
    colours = {
        run.run_id: workspaces.RunSettings(color=UNMERGED if run.method == "unmerged" else colour_of(run.method))
        for run in runs.itertuples()
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            _section("Accuracy against FLOPs", panels.ScatterPlot(title="top-1 (%) against GFLOPs", x=flops, y=top1)),
            _section("Throughput", panels.BarPlot(title="images/s", **throughput)),
            _section(
                "Tokens by layer",
                panels.LinePlot(title="tokens by layer", x="layer", y=["tokens"], max_runs_to_show=MAX_RUNS),
            ),
            _section("Table 2", panels.WeavePanelSummaryTable(table_name="table2")),
            _section("Regions", panels.MediaBrowser(title="merged regions", media_keys=["regions"])),
        ],
        settings=workspaces.WorkspaceSettings(max_runs=MAX_RUNS),
        runset_settings=workspaces.RunsetSettings(run_settings=colours),
    )


def _section(name: str, panel: PanelTypes) -> workspaces.Section:
    layout = workspaces.SectionLayoutSettings(columns=1, rows=1)
    return workspaces.Section(name=name, panels=[panel], is_open=True, layout_settings=layout)
