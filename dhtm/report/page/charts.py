"""Interactive charts with tooltips and filters, as Vega-Lite."""

from typing import Any

import altair as alt
import pandas as pd

from dhtm.harness.models.methods import knob_text
from dhtm.report.registry import BACKBONES, DATA, entry_of, label_of
from dhtm.report.tables import conditions

ALL = "all"
TRAINING = {True: "w/ train", False: "off the shelf"}
METRICS = {  # a run's value and the ends of its interval
    "top-1 (%)": ("top1", "ci_low", "ci_high"),
    "KL (nats)": ("kl", "kl_low", "kl_high"),
}
COSTS = {"FLOPs reduction (%)": "flops_reduction_pct", "images per second": "images_per_s"}


def chart_data(runs: pd.DataFrame, images_per_s: pd.Series) -> pd.DataFrame:
    """Return the runs that a chart can show, one row each, with names for readers; ``images_per_s`` is by run id."""
    kept = runs[runs.plain.astype(bool) & ~runs.untrained.astype(bool)]
    return pd.DataFrame(
        {
            "run": kept.run_id,
            "method": [label_of(run) for run in kept.itertuples()],
            "colour": [entry_of(method).colour for method in kept.method],
            "training": kept.trained.astype(bool).map(TRAINING),
            "backbone": [BACKBONES.get(name, name) for name in kept.backbone],
            "data": [_images(run) for run in kept.itertuples()],
            "knob": [knob_text(run.knob, run.value) for run in kept.itertuples()],
            "images_per_s": kept.run_id.map(images_per_s),
            **{column: kept[column] for column in ("flops_reduction_pct", "flops_g", "agreement")},
            **{column: kept[column] for columns in METRICS.values() for column in columns},
        }
    )


def chart(data: pd.DataFrame, metric: str) -> dict[str, Any] | None:
    """Return the Vega-Lite specification of a metric over the cost, with lists to choose what is shown; None without data."""
    value, low, high = METRICS[metric]
    data = data[data[value].notna() & data.images_per_s.notna()]
    if value == "kl":  # zero if nothing is merged, which has no logarithm
        data = data[(data.kl > 0) & (data.flops_reduction_pct > 0)]
    if data.empty:
        return None
    chosen = []
    for name in ("method", "backbone", "training", "data"):
        choices = alt.binding_select(options=[ALL, *sorted(data[name].unique())], name=f"{name} ")
        chosen.append(alt.param(name, bind=choices, value=ALL))
    cost = alt.param("cost", bind=alt.binding_select(options=list(COSTS), name="over "), value=next(iter(COSTS)))
    colours = data.groupby("method").colour.first()
    shared = alt.Chart(data.drop(columns="colour")).transform_calculate(
        x=f"cost == '{next(iter(COSTS))}' ? datum.flops_reduction_pct : datum.images_per_s"
    )
    for param in chosen:
        shared = shared.transform_filter(f"{param.name} == '{ALL}' || datum.{param.name} == {param.name}")
    scale = alt.Scale(type="log") if value == "kl" else alt.Scale(zero=False)
    legend = alt.Legend(columns=2, title=None, orient="bottom")
    encoded = shared.encode(
        x=alt.X("x:Q", title=None),
        color=alt.Color("method:N", scale=alt.Scale(domain=list(colours.index), range=list(colours)), legend=legend),
        tooltip=[
            "method", "training", "backbone", "data", "knob", "run",
            *(alt.Tooltip(f"{column}:Q", format=".4~g") for column in (value, low, high, "flops_g", *COSTS.values())),
        ],
    )  # fmt: skip
    line = encoded.mark_line(opacity=0.5).encode(
        y=alt.Y(f"{value}:Q", title=metric, scale=scale), detail=["training:N", "backbone:N", "data:N"]
    )
    bars = encoded.mark_rule(opacity=0.6).encode(y=alt.Y(f"{low}:Q", title=metric, scale=scale), y2=f"{high}:Q")
    points = encoded.mark_point(filled=True, size=50).encode(
        y=alt.Y(f"{value}:Q", scale=scale), shape=alt.Shape("training:N", legend=None)
    )
    layered = alt.layer(line, bars, points).add_params(cost, *chosen)
    title = alt.TitleParams(alt.expr(f"'{metric} over ' + cost"), anchor="start", fontSize=12)
    description = f"{metric} of every run over its cost; the table of all runs has the numbers"
    return layered.properties(width="container", height=320, title=title, description=description).to_dict() | {
        "autosize": {"type": "fit-x", "contains": "padding"},
        "usermeta": {"embedOptions": {"actions": False, "renderer": "svg"}},
    }


def _images(run: Any) -> str:
    """Name the images of a run and what else must be equal in runs that are compared."""
    return ", ".join([f"{DATA.get(run.data, run.data)} {run.split}", f"{run.n_images:,} images", *conditions(run)])
