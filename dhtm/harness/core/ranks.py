"""The processes that share a task, as torchrun starts them."""

import atexit
import datetime
import os
from typing import Any

import torch
import torch.distributed as dist

from dhtm.harness.core.devices import pick_device


def rank() -> int:
    """Return the rank of this process among those that torchrun started; 0 if it runs alone."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return how many processes torchrun started; 1 if this process runs alone."""
    return int(os.environ.get("WORLD_SIZE", 1))


class Ranks:
    """The processes that train or evaluate together, one per device; or this process alone."""

    def __init__(self, device: str):
        self.world, self.rank = world_size(), rank()
        self.first = self.rank == 0
        on_gpus = self.world > 1 and torch.cuda.is_available() and device in ("auto", "cuda")
        self.device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpus else device)
        if self.world > 1 and not dist.is_initialized():  # one group serves all runs of this process
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            # The ranks may wait long while the first waits for a run's lock; if a rank dies, torchrun ends the others.
            patience = datetime.timedelta(days=1)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=patience)
            if self.device.type != "cuda":  # with NCCL, a failed rank and the others could wait for each other
                atexit.register(dist.destroy_process_group)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of ranks."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values
