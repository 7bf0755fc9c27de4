"""Predict the five best classes for every image of a split, and store them."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from dhtm.harness.core.devices import exact
from dhtm.harness.core.errors import UserError
from dhtm.harness.data.splits import Split, UnreadableError, batches, mask
from dhtm.harness.runs.directory import RunDirectory
from dhtm.harness.runs.metrics import Observe
from dhtm.vit import image_ids, tokens_of_images

log = logging.getLogger(__name__)

CLASSES = [f"class_{place}" for place in range(1, 6)]


@torch.inference_mode()
def predict(
    model: nn.Module,
    split: Split,
    indices: Sequence[int],
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    title: str | None,
    num_workers: int | None = None,
    on_unreadable: Callable[[UnreadableError], None] | None = None,
    observers: Sequence[Observe] = (),
) -> Iterator[pd.DataFrame]:
    """Predict images of a split, batch after batch.

    Args:
        model: patched or not; it is moved to the device and dtype.
        indices: of the images.
        title: of the progress bar; None for no bar.
        num_workers: processes that load images; None for one per core where images are on disk.
        on_unreadable: called with the error of each unreadable image, which gets no prediction; None to raise the first.
        observers: make more columns from the log-probabilities (float32, over the outputs in ``split.among``).

    Yields:
        One row per image, in order: index, label (−1 without labels), class_1 … class_5 (the best first, −1 if the model has
        fewer outputs), correct (whether class_1 is right), nonfinite (whether any logit is), tokens after each layer if their
        number depends on the image, and group if the split has groups.
    """
    model.to(device=device, dtype=dtype).eval()
    added = mask(model.num_classes, split, device)
    counted = added.isfinite().nonzero().flatten()
    n_best = min(5, model.num_classes)
    is_adaptive = hasattr(model, "reducer") and model.reducer.adaptive
    with tqdm(total=len(indices), desc=title, unit=" images", disable=True if title is None else None) as bar:
        for ids, images, labels in batches(split, indices, batch_size, device, num_workers, on_unreadable):
            with image_ids(model, ids), exact(device):
                logits = model(images.to(dtype=dtype)).float()
            best = np.full((len(ids), 5), -1)
            best[:, :n_best] = (logits + added).topk(n_best).indices.cpu().numpy()
            frame = pd.DataFrame({"index": ids.numpy(), "label": labels.numpy()})
            frame[CLASSES] = best
            frame["correct"] = frame.class_1 == frame.label
            frame["nonfinite"] = ~logits.isfinite().all(dim=1).cpu().numpy()
            for observe in observers:
                frame = frame.assign(**observe(ids.numpy(), logits[:, counted].log_softmax(dim=1), best[:, 0]))
            if is_adaptive:
                frame["tokens"] = list(tokens_of_images(model).cpu().numpy())
            if split.groups is not None:
                frame["group"] = split.groups[ids.numpy()]
            yield frame
            bar.update(len(ids))


def store_predictions(
    predict_these: Callable[[Sequence[int], int], Iterator[pd.DataFrame]],
    indices: Sequence[int],
    batch_size: int,
    directory: RunDirectory,
    every_s: float,
    progress: Callable[[pd.DataFrame], None],
) -> int:
    """Predict images and store the predictions every ``every_s`` seconds and at the end, even after an error or a signal.

    If a GPU's memory runs out, the rest is predicted in batches of half the size.

    Args:
        predict_these: calls :func:`predict` for some of the images and a batch size.
        indices: of the images, in increasing order.
        progress: called with every batch's predictions.

    Returns:
        The batch size that fitted into memory.

    Raises:
        UserError: not even one image fits into memory.
    """
    fresh, last, last_stored = [], -1, time.monotonic()

    def store():
        nonlocal last_stored
        if fresh:
            directory.append(pd.concat(fresh, ignore_index=True))
        fresh.clear()
        last_stored = time.monotonic()

    while indices:
        try:
            for part in predict_these(indices, batch_size):
                fresh.append(part)
                last = part["index"].iloc[-1]
                progress(part)
                if time.monotonic() - last_stored >= every_s:
                    store()
            return batch_size
        except torch.OutOfMemoryError:
            pass  # handled outside this block, which keeps the tensors of the failed forward pass alive
        finally:  # also after a signal, Ctrl-C, or the loss of the data: the same command resumes from here
            store()
        if batch_size == 1:
            raise UserError("out of memory with one image at a time; choose another device=")
        torch.cuda.empty_cache()
        batch_size //= 2
        indices = [index for index in indices if index > last]
        log.warning("out of memory: resuming with batch_size=%d", batch_size)
    return batch_size
