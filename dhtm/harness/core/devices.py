"""Devices, dtypes, and exact arithmetic on a GPU."""

import contextlib
import functools
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from dhtm.harness.core.errors import explain

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """Return the device of this name; "auto" is the GPU if there is one.

    Raises:
        UserError: the device is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with explain(f"device={name}: not available", remedy="; device=auto chooses an available one"):
        device = torch.device(name)
        torch.empty(1, device=device).item()
    return device


def pick_batch_size(device: torch.device) -> int:
    """Return a batch size that is fast on the device; results do not depend on it."""
    return 512 if device.type == "cuda" else 64


@contextlib.contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """On a GPU, compute float32 without TF32 and use deterministic kernels where they exist.

    By default, cuDNN would embed patches in TF32. A CPU needs no settings.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS's deterministic kernels
    matmul, mode = torch.backends.cuda.matmul, torch.get_deterministic_debug_mode()
    tf32, matmul.allow_tf32 = matmul.allow_tf32, False
    torch.set_deterministic_debug_mode("warn")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = tf32
        torch.set_deterministic_debug_mode(mode)


@functools.cache  # once per process, which keeps its GPU for all its runs
def take_gpu() -> FileLock | None:
    """Make the GPU that the fewest other processes have taken this process's "cuda"; return its lock, held until the end."""
    gpus = range(torch.cuda.device_count())
    if not gpus:
        return None
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")  # the machine's numbers of the visible GPUs
    folder = Path(tempfile.gettempdir()) / f"dhtm-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for turn, gpu in ((turn, gpu) for turn in itertools.count() for gpu in gpus):
        lock = FileLock(folder / f"{names[gpu] if any(names) else gpu}.{turn}")
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            torch.cuda.set_device(gpu)
            return lock
