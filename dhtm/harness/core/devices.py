"""Where things are computed: devices, dtypes, and the processes that share a task."""

import atexit
import contextlib
import datetime
import fcntl
import functools
import itertools
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from dhtm.harness.core.errors import UserError, one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device that a config asks for; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"device={name}: not to be had here ({one_line(error)}); device=auto takes what is there"
        ) from error
    return device


def pick_dtype(name: str, key: str) -> torch.dtype:
    """The dtype that a config names under a key."""
    if name not in DTYPES:
        raise UserError(f"{key}={name}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def pick_batch_size(device: torch.device) -> int:
    """A batch size that is fast on the device; results do not depend on it."""
    return 512 if device.type == "cuda" else 64


@contextlib.contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """The same sums every time, float32 in float32: not in TF32, in which cuDNN would embed patches by default.

    What has no such kernel on a GPU runs as it can, with PyTorch's warning.
    """
    if device.type != "cuda":  # where it is so anyway
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may choose other kernels
    matmul, deterministic = torch.backends.cuda.matmul, torch.are_deterministic_algorithms_enabled()
    before, warn_only = matmul.allow_tf32, torch.is_deterministic_algorithms_warn_only_enabled()
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        False,
    )
    matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def rank() -> int:
    """The number of this process among those that torchrun started; 0 where it is alone."""
    return int(os.environ.get("RANK", 0))


# For configs/hydra/launcher: for how many runs this machine has a device; without a GPU, for one. And Hydra would warn that a
# file there is named as the plugin's own config, whose types it then has: that is what is wanted.
OmegaConf.register_new_resolver("n_gpus", lambda: max(1, torch.cuda.device_count()), replace=True)
warnings.filterwarnings("ignore", r"\n'hydra/launcher/\w+' is validated against ConfigStore schema")


@functools.cache
def take_gpu() -> None:
    """Make one of the GPUs here this process's "cuda" until it ends: one that the fewest other processes have taken so."""
    gpus = range(torch.cuda.device_count())
    if not gpus:
        return
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")  # of the machine's GPUs, those that are seen here
    folder = Path(tempfile.gettempdir()) / f"dhtm-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for turn, gpu in ((turn, gpu) for turn in itertools.count() for gpu in gpus):
        lock = (folder / f"{names[gpu] if any(names) else gpu}.{turn}").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        atexit.register(lock.close)  # keeps it open until then
        torch.cuda.set_device(gpu)
        return


class Ranks:
    """The processes that train or evaluate together, one a device, as torchrun starts them; or this process alone."""

    def __init__(self, device: str):
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), rank()
        self.first = self.rank == 0
        local, n_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        on_gpus = self.world > 1 and n_gpus > 0 and device in ("auto", "cuda")
        if on_gpus and local >= n_gpus:
            raise UserError(
                f"device={device}: {local + 1} processes or more, but {n_gpus} GPUs here; set torchrun's --nproc-per-node="
                f"{n_gpus}, or device=cpu"
            )
        self.device = pick_device(f"cuda:{local}" if on_gpus else device)
        if self.world > 1 and not dist.is_initialized():  # one group for all runs of this process
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            # A rank may wait long for the first one's turn at a run; that of a rank which died is ended by torchrun.
            patience = datetime.timedelta(days=1)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=patience)
            if self.device.type != "cuda":  # NCCL's may wait for the others, who wait for this one if it fails
                atexit.register(dist.destroy_process_group)

    def gather(self, value: Any) -> list[Any]:
        """Everyone's values, in the order of ranks."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until everyone is here."""
        if self.world > 1:
            dist.barrier()
