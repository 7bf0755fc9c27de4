"""What a result depends on: the run id, the version of the code, the software and the machine."""

import hashlib
import inspect
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dhtm.harness.core.files import PROJECT
from dhtm.reducer import Reducer

# Raise this by hand whenever a change to this package can alter a prediction; tests/harness/test_provenance.py compares
# predictions with those of the present version. The code's version is this number and a hash of the method's file.
VERSION = 2

PACKAGES = ("torch", "timm", "torchvision", "fvcore", "numpy", "hydra-core")
# Environment variables that a result or its speed may depend on; no others are recorded.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TRITON_INTERPRET",
)  # fmt: skip


def run_id(**determinants: Any) -> str:
    """Return the name of a run: 16 hexadecimal digits of the SHA-256 of everything that determines its result."""
    return hashlib.sha256(json.dumps(determinants, sort_keys=True).encode()).hexdigest()[:16]


def code_version(reducer: Reducer) -> str:
    """Return the version of the code behind a method's results: VERSION and the SHA-256 of the file that defines the method."""
    source = Path(inspect.getfile(type(reducer))).read_bytes()
    return f"{VERSION}-{hashlib.sha256(source).hexdigest()[:16]}"


def versions() -> dict[str, str]:
    """Return the versions of the software that a result may depend on."""
    return {"python": platform.python_version(), **{package: metadata.version(package) for package in PACKAGES}}


def git_commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" if tracked files differ from it; None outside a checkout."""
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip() or None


def uncommitted_changes() -> str:
    """Return how the code of this checkout differs from its commit, as `git diff` prints it."""
    return _git("diff", "HEAD", "--", "dhtm", "baselines", "scripts", "configs")


def _git(*arguments: str) -> str:
    """Return what git prints about this checkout; "" outside a checkout or without git."""
    try:
        result = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, check=False)
    except OSError:
        return ""
    return result.stdout.decode(errors="replace")


def environment() -> dict:
    """Return the machine and the software of a run, without names of hosts or users, and without secrets."""
    cuda = torch.cuda.is_available()
    return {
        "versions": versions(),
        "git_commit": git_commit(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
