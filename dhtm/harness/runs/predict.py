"""The five best classes for every image of a split, kept as they come."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dhtm.harness.core.devices import exact
from dhtm.harness.core.errors import UserError
from dhtm.harness.data.loading import batches
from dhtm.harness.data.splits import Split, UnreadableError
from dhtm.harness.runs.store import RunDirectory
from dhtm.vit import image_ids

log = logging.getLogger(__name__)


def stop(unreadable: UnreadableError) -> None:
    """Raise the error of an image that cannot be read."""
    raise unreadable


@torch.inference_mode()
def predict(
    model: nn.Module,
    split: Split,
    indices: Sequence[int],
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    name: str | None,
    num_workers: int | None = None,
    on_unreadable: Callable[[UnreadableError], None] = stop,
) -> Iterator[pd.DataFrame]:
    """Predictions for some images of a split, batch after batch.

    Args:
        model: a patched model, which is moved to the device and dtype.
        indices: of the images.
        name: what to call this on a progress bar; None for no bar.
        num_workers: processes that load images; None for one a core where images are on disk.
        on_unreadable: is told of every image that cannot be read, in place of a prediction.

    Yields:
        index, label, top5 (best first), correct (is the first right) and nonfinite, a row an image in order.
    """
    model.to(device=device, dtype=dtype).eval()
    hidden = True if name is None else None
    added = mask(model, split, device)
    with tqdm(total=len(indices), desc=name, unit=" images", disable=hidden) as bar:
        for ids, images, labels in batches(split, indices, batch_size, device, num_workers, on_unreadable):
            with image_ids(model, ids), exact(device):
                logits = model(images.to(dtype=dtype)).float()
            finite = logits.isfinite().all(dim=1)
            logits = logits + added
            top5 = logits.topk(min(5, logits.shape[1])).indices.cpu()
            yield pd.DataFrame(
                {
                    "index": ids.numpy(),
                    "label": labels.numpy(),
                    "top5": list(top5.numpy()),
                    "correct": (top5[:, 0] == labels).numpy(),
                    "nonfinite": ~finite.cpu().numpy(),
                }
            )
            bar.update(len(ids))


def mask(model: nn.Module, split: Split, device: torch.device) -> Tensor:
    """What to add to logits, [C], so that only those outputs win that are asked."""
    if split.among is None:
        return torch.zeros(model.num_classes, device=device)
    added = torch.full((model.num_classes,), -torch.inf, device=device)
    added[list(split.among)] = 0
    return added


class _Packed:
    """Predictions in a few arrays: small objects by the thousand, kept among a forward's large ones, fragment the heap."""

    def __init__(self, predictions: pd.DataFrame):
        self.others, self.top5 = predictions.drop(columns="top5"), np.stack(predictions.top5)

    def frame(self) -> pd.DataFrame:
        frame = self.others.copy()
        frame.insert(2, "top5", list(self.top5))
        return frame


def predict_and_keep(
    run: RunDirectory,
    every_s: float,
    progress: Callable[[pd.DataFrame], None],
    model: nn.Module,
    split: Split,
    indices: Sequence[int],
    batch_size: int,
    *arguments,
) -> tuple[list[pd.DataFrame], int]:
    """:func:`predict`, but what is predicted is stored with the run every so many seconds, and in the end, whatever ends it.

    ``progress`` is called with every batch's predictions. Where a GPU's memory runs out, the rest is predicted in batches
    of half the size.

    Returns:
        The predictions, and the batch size that was possible.

    Raises:
        UserError: there is no memory for one image.
    """
    kept, fresh, stored = [], [], time.monotonic()

    def keep():
        nonlocal stored
        if fresh:
            frame = pd.concat(fresh, ignore_index=True)
            run.append(frame)
            kept.append(_Packed(frame))
        fresh.clear()
        stored = time.monotonic()

    while indices:
        try:
            for part in predict(model, split, indices, batch_size, *arguments):
                fresh.append(part)
                progress(part)
                if time.monotonic() - stored >= every_s:
                    keep()
            keep()  # other ranks may take longer, or die
            return [packed.frame() for packed in kept], batch_size
        except torch.OutOfMemoryError:
            pass  # and out of this block, which holds on to the tensors of the forward that failed
        except BaseException:  # an image that cannot be read, a signal, Ctrl-C: the same command goes on from here
            keep()
            raise
        keep()
        if batch_size == 1:
            raise UserError("out of memory with one image at a time; choose another device=")
        torch.cuda.empty_cache()
        batch_size //= 2
        log.warning("out of memory: going on with batch_size=%d", batch_size)
        done = {index for packed in kept for index in packed.others["index"]}
        indices = [index for index in indices if index not in done]
    return [packed.frame() for packed in kept], batch_size
