"""The premise of the paper as a table and a figure, from what :mod:`dhtm.harness.locality` measures."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dhtm.harness.locality import MODES, Premise
from dhtm.report.registry import entry_of
from dhtm.report.style import plt
from dhtm.report.tables import Table, number, with_interval


def premise_table(frames: dict[str, pd.DataFrame], premise: Premise) -> Table:
    """Make the table of the numbers from :func:`dhtm.harness.locality.measure`."""
    where = f"{premise.backbone.name} on {premise.data.name}, {frames['similarity'].n_images.iloc[0]:,} images"
    similarity = _cells(frames["similarity"], "layer", "distance", lambda row: number(row["mean"], 3))
    similarity = similarity.filter(["layer", *map(str, (1, 2, 3, 4, 6, 8, 10, 13))])
    decimals = {"distance": 2, "adjacent_pct": 1, "largest": 1, "merged_pct": 1, "pieces": 2}
    looks = _cells(
        frames["regions"], "method", "quantity",
        lambda row: with_interval(row["mean"], row.low, row.high, decimals[row.quantity]),
    )  # fmt: skip
    names = {
        "distance": "distance of two patches in a token", "adjacent_pct": "of them adjacent %",
        "largest": "largest region", "merged_pct": "patches merged %", "pieces": "pieces per token",
    }  # fmt: skip
    looks = looks[["method", *names]].rename(columns=names)
    looks["method"] = [entry_of(method).label for method in looks.method]
    cost = _cells(
        frames["one_merge"], "mode", "distance",
        lambda row: f"{row['mean']:.1e} [{row.low:.1e}, {row.high:.1e}]",
    )  # fmt: skip
    data = pd.concat([frame.assign(part=part) for part, frame in frames.items()], ignore_index=True)
    parts = [
        (
            f"{where}: cosine similarity of two tokens of the unmerged model after attention, by distance on the grid",
            similarity,
        ),
        (f"{where}: what the methods merge at equal FLOPs", looks),
        (f"{where}: KL in nats of one merge in layer {premise.layer}, by distance of the pair", cost),
    ]
    return Table(data, parts, [*sentences(frames), "Intervals are bootstrap 95% intervals over images."])


def _cells(frame: pd.DataFrame, rows: str, columns: str, show: Callable[[pd.Series], str]) -> pd.DataFrame:
    shown = frame.assign(cell=frame.apply(show, axis=1))
    wide = shown.pivot_table(index=rows, columns=columns, values="cell", aggfunc="first", sort=False)
    return wide.rename(columns=str).reset_index().astype(str)


def sentences(frames: dict[str, pd.DataFrame]) -> list[str]:
    """Describe in words what the numbers show."""
    similarity, cost = frames["similarity"], frames["one_merge"]
    by_layer = similarity.pivot(index="layer", columns="distance", values="mean")
    near, far = by_layer.iloc[:, 0], by_layer.iloc[:, -1]
    found = [
        f"Neighbours are more similar than the most distant patches in {(near > far).sum()} of {len(by_layer)} layers: the "
        f"mean cosine falls from {near.iloc[0]:.2f} to {far.iloc[0]:.2f} in the first, from {near.iloc[-1]:.2f} to "
        f"{far.iloc[-1]:.2f} in the last."
    ]
    words = {"most similar": "the most similar", "random": "a random"}
    for mode, costs in cost.groupby("mode", sort=False):
        near, far = costs.sort_values("distance").iloc[[0, -1]].itertuples()
        is_more, is_less = far.low > near.high, far.high < near.low
        relation = "more than" if is_more else "less than" if is_less else "not distinguishable from"
        found.append(
            f"Merging {words[mode]} pair at distance {far.distance} gives a KL of {far.mean:.1e} nats, {relation} the "
            f"{near.mean:.1e} nats of neighbours."
        )
    return found


def premise_figure(frames: dict[str, pd.DataFrame], premise: Premise) -> Figure:
    """Draw similarity over distance by layer, how far apart merged patches are by method, and the KL of one merge."""
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.8))
    similarity = frames["similarity"]
    layers = similarity.layer.unique()
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(layers)))
    for layer, colour in zip(layers, colours, strict=True):
        points = similarity[similarity.layer == layer]
        label = f"layer {layer}" if layer in (layers[0], layers[len(layers) // 2], layers[-1]) else None
        axes[0].plot(points.distance, points["mean"], color=colour, label=label)
        axes[0].fill_between(points.distance, points.low, points.high, color=colour, alpha=0.2, linewidth=0)
    axes[0].set(title="similarity of tokens, unmerged", xlabel="distance on the grid", ylabel="mean cosine similarity")
    axes[0].legend()
    looks = frames["regions"].query("quantity == 'distance'").sort_values("mean")
    for i, row in enumerate(looks.itertuples()):
        axes[1].barh(i, row.mean, color=entry_of(row.method).colour)
        axes[1].errorbar(row.mean, i, xerr=[[row.mean - row.low], [row.high - row.mean]], color="black", capsize=2)
    axes[1].set_yticks(range(len(looks)), [entry_of(method).label for method in looks.method])
    axes[1].set(title="how far apart merged patches are", xlabel="mean distance of two patches in one token")
    for mode, line in zip(MODES, ("-", "--"), strict=True):
        points = frames["one_merge"].query("mode == @mode")
        errors = [points["mean"] - points.low, points.high - points["mean"]]
        axes[2].errorbar(
            points.distance, points["mean"], errors, color="black", linestyle=line, marker="o", capsize=2, label=mode
        )
    axes[2].set(title=f"cost of one merge in layer {premise.layer}", xlabel="distance of the pair", ylabel="KL (nats)")
    axes[2].set_yscale("log")
    axes[2].set_ylim(top=axes[2].get_ylim()[1] * 4)  # room for the legend
    axes[2].legend(title="which pair at this distance", ncols=2, loc="upper center")
    figure.suptitle(
        f"{premise.backbone.name} on {premise.data.name}, {similarity.n_images.iloc[0]:,} images, 95% intervals"
    )
    figure.tight_layout()
    figure.text(0.5, 0, "\n".join(sentences(frames)), ha="center", va="top", fontsize=8)
    return figure
