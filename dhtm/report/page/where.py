"""Where the accuracy goes: by class, by image, and between methods."""

import io
from itertools import combinations_with_replacement, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import cohen_kappa_score
from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer

from dhtm.harness.config import evaluation_of_run
from dhtm.harness.core.errors import UserError
from dhtm.harness.data.scenes import PATCH_CLASSES, Digits
from dhtm.harness.data.splits import Split, batches, open_split
from dhtm.harness.models.weights import load_model
from dhtm.harness.runs.directory import predictions
from dhtm.harness.runs.metrics import share_interval
from dhtm.report.regions import draw_side_by_side
from dhtm.report.registry import METHODS, label_of, title_of
from dhtm.report.runs import Pair, at_target
from dhtm.report.tables import DASH, number, with_interval
from dhtm.vit import image_ids, regions

TARGETS = (40, 30, 20, 50, 10, 60)  # percent fewer FLOPs; the one with most methods is shown, the first in a tie
N_SCENES = 500  # scenes in which the digit's tokens are counted
_TOKENS = (1, 4, 7, 10, 14, 19, 10**6)  # first number of tokens in each column
MOST = 5  # images whose outputs change most
N_PICTURES = 3
MAX_METHODS = 6  # side by side


def where_it_goes(runs: pd.DataFrame, pair: Pair, results_dir: Path) -> dict[str, Any] | None:
    """Return what to show of a backbone on a data set: tables by caption, and pictures; None if there is nothing."""
    frame = methods_at_one_cost(runs, pair)
    if frame.empty or not all((results_dir / run_id / "predictions.parquet").exists() for run_id in frame.run_id):
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
    title = f"{title_of(*pair)}, {frame.target.max():g}% fewer FLOPs"
    return {"title": title, "tables": parts, "pictures": pictures, "reason": reason}


def _load(merged: pd.DataFrame, results_dir: Path) -> tuple[list[VisionTransformer], Split, Any]:
    """Return the patched model of each run, the split that all ran on, and its data set."""
    runs = [evaluation_of_run(results_dir / run_id, ["device=cpu"]) for run_id in merged.run_id]
    models = [load_model(run.backbone, run.method, run.checkpoints_dir, seed=run.seed)[0] for run in runs]
    data = runs[0].data
    split = open_split(data, data.split, resolve_data_config(model=models[0]), models[0].num_classes)
    if split.fingerprint != merged.data_fingerprint.iloc[0]:
        raise UserError(f"the images of data={data.name} have changed since the runs")
    return models, split, data


@torch.inference_mode()
def _pictures(
    labels: pd.Series, models: list[VisionTransformer], split: Split, notable: dict[int, str]
) -> list[tuple[bytes, str]]:
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
        pictures.append((buffer.getvalue(), f"{title}, and its regions under {', '.join(names)}"))
    return pictures


def methods_at_one_cost(runs: pd.DataFrame, pair: Pair) -> pd.DataFrame:
    """Return the off-the-shelf runs solved for the target with most methods, the unmerged one first; none without a target."""
    found = [at_target(runs, *pair, target) for target in TARGETS]
    found = [frame[~frame.trained.astype(bool) & ~frame.untrained.astype(bool)] for frame in found]
    frame = max(found, key=lambda frame: frame.target.notna().sum())
    if not frame.target.notna().any() or not (frame.method == "unmerged").any():
        return frame.head(0)
    frame = frame.assign(label=[label_of(run) for run in frame.itertuples()])
    places = {method: place for place, method in enumerate(METHODS)}  # those of unknown methods are the last
    return frame.sort_values("method", key=lambda methods: methods.map(places), kind="stable")


def by_class(found: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return top-1 in percent with its interval, one row per class and one column per method."""
    columns = {}
    for name, of_run in found.items():
        columns[name] = {
            str(label): with_interval(
                100 * of_class.correct.mean(), *share_interval(of_class.correct, of_class.get("group")), 1
            )
            for label, of_class in of_run.groupby("label")
        }
    return pd.DataFrame(columns).rename_axis("class").reset_index()


def most_changed(found: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the images of greatest KL under each method, with their classes."""
    rows = []
    for name, of_run in found.items():
        for index, image in of_run.nlargest(MOST, "kl").iterrows():
            rows.append(
                {
                    "method": name, "image": f"{index}", "KL, nats": number(image.kl, 4),
                    "class": f"{image.label:.0f}" if image.label >= 0 else DASH,
                    "unmerged model": f"{image.unmerged_class:.0f}", "merged model": f"{image.class_1:.0f}",
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def flips(found: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return how many images only the merged or only the unmerged model gets right, and which of them change most."""
    rows = []
    for name, of_run in found.items():
        row = {"method": name}
        for way, chosen in zip(("won", "lost"), _flips(of_run), strict=True):
            images = of_run[chosen].nlargest(MOST, "kl").index
            row[way], row[f"{way}: images of greatest KL"] = str(chosen.sum()), ", ".join(map(str, images)) or DASH
        rows.append(row)
    return pd.DataFrame(rows)


def notable_images(of_run: pd.DataFrame) -> dict[int, str]:
    """Return the images of greatest KL in a run, among its flips won, and among its flips lost, each with a description."""
    won, lost = _flips(of_run)
    chosen = {"the greatest KL": of_run.kl, "the greatest KL among the flips won": of_run.kl[won]}
    chosen["the greatest KL among the flips lost"] = of_run.kl[lost]
    return {int(kl.idxmax()): words for words, kl in reversed(chosen.items()) if len(kl)}


def _flips(of_run: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    was_right = of_run.unmerged_class == of_run.label
    return of_run.correct & ~was_right, ~of_run.correct & was_right


def agreement_between(found: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return Cohen's kappa of the best classes of every two methods: 1 if they always agree, 0 if as often as by chance."""
    table = pd.DataFrame("", index=list(found), columns=list(found))
    for a, b in combinations_with_replacement(found, 2):
        table.loc[b, a] = number(cohen_kappa_score(found[a].class_1, found[b].class_1), 3)
    return table.rename_axis("kappa").reset_index()


@torch.inference_mode()
def object_regions(model: VisionTransformer, split: Split, data: Digits) -> pd.Series:
    """Return the number of tokens that cover the digit after the last layer, for the first scenes, by index."""
    indices = list(range(min(N_SCENES, len(split.dataset))))
    classes = data.patch_classes(data.split, indices, model.patch_embed.grid_size)
    counts = []
    for ids, images, _ in batches(split, indices, 64, torch.device("cpu"), 0):
        with image_ids(model, ids):
            model(images)
        assignment = regions(model).assignment.numpy()
        is_digit = classes[ids.numpy()] == PATCH_CLASSES.index("digit")
        counts += [len(np.unique(tokens[inside])) for tokens, inside in zip(assignment, is_digit, strict=True)]
    return pd.Series(counts, index=indices)


def by_regions(found: dict[str, pd.DataFrame], kept: dict[str, pd.Series]) -> pd.DataFrame:
    """Return top-1 in percent by the number of tokens that cover the digit, one row per method."""
    rows = []
    for name, counts in kept.items():
        correct = found[name].correct.reindex(counts.index)
        row = {"method": name, "mean tokens": number(counts.mean(), 1)}
        for low, high in pairwise(_TOKENS):
            inside = correct[counts.between(low, high - 1)]
            label = f"{low} to {high - 1}" if high < _TOKENS[-1] else f"{low} or more"
            row[label] = f"{100 * inside.mean():.1f} ({len(inside)})" if len(inside) else DASH
        rows.append(row)
    return pd.DataFrame(rows)
