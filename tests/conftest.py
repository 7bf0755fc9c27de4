"""Fixtures for all tests: composed configs, evaluations, scripts, and a small set of photographs."""

import os
import re
import shutil
import socket
import subprocess
import tempfile

# Parallel tests share the cores; with more threads than cores they would take many times as long. This must be set before
# PyTorch is imported, and the processes that tests start inherit it.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from processes import ROOT, start_script

if not torch.cuda.is_available():  # then Triton must use its interpreter, which it reads when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests use neither the network nor earlier downloads, as on a new machine that is offline.
_EMPTY = tempfile.mkdtemp(prefix="dhtm-tests-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": _EMPTY, "TORCH_HOME": _EMPTY, "WANDB_SILENT": "true"}


def only(*methods):
    """Return overrides that remove all other methods from the benchmark."""
    names = re.findall(r"@methods\.(\w+):", (ROOT / "configs/benchmark.yaml").read_text())
    return [f"~methods.{name}" for name in names if name not in methods]


@pytest.fixture(autouse=True)
def seeded():
    """Seed PyTorch, so that random models and images are the same every time."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def composed():
    """Return a function that composes a config as a script does: composed("method.k=10", config_name="evaluate")."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        yield lambda *overrides, config_name="evaluate", **more: compose(config_name, list(overrides), **more)


@pytest.fixture
def evaluated(composed, tmp_path):
    """Return a function that evaluates with overrides in this process, writes below ``tmp_path``, and returns the metrics."""
    from dhtm.harness import config
    from dhtm.harness.runs.evaluate import evaluate

    def evaluate_with(*overrides):
        folders = [f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache", "device=cpu"]
        return evaluate(config.evaluation(composed(*folders, *overrides)))

    return evaluate_with


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Return a function that runs a script in ``world`` processes, as torchrun does: ranks(2, "evaluate", "method.k=10").

    It returns one ``subprocess.CompletedProcess`` per rank.
    """

    def run(world, name, *arguments):
        with socket.socket() as unused:
            unused.bind(("localhost", 0))
            shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(unused.getsockname()[1]), "WORLD_SIZE": str(world)}
        folders, processes = [tmp_path_factory.mktemp("output") for _ in range(world)], []
        for rank, folder in enumerate(folders):
            torchrun = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            files = {"stdout": folder / "stdout", "stderr": folder / "stderr"}
            processes.append(start_script(name, *arguments, **files, **torchrun))
        for process in processes:
            process.join(300)
        codes = [process.exitcode for process in processes]
        assert None not in codes, f"timed out: {name} {arguments}"
        texts = [[(folder / file).read_text(encoding="utf-8") for file in ("stdout", "stderr")] for folder in folders]
        return [subprocess.CompletedProcess(name, code, *text) for code, text in zip(codes, texts, strict=True)]

    return run


@pytest.fixture(scope="session")
def script(ranks):
    """Return a function that runs a script as its own process, like subprocess.run: script("evaluate", "method.k=10")."""
    return lambda name, *arguments: ranks(1, name, *arguments)[0]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Return a small data root in ImageNet's layout: train/ and val/, three synsets, JPEGs of several sizes, some grey."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for synset, n_images in (("n01440764", 3), ("n02102040", 2), ("n02979186", 3)):
        folder = root / "val" / synset
        folder.mkdir(parents=True)
        for i in range(n_images):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            image = coarse.resize((320 + 16 * i, 260), Image.Resampling.BICUBIC)
            image = image.convert("L") if (synset, i) == ("n02979186", 1) else image
            image.save(folder / f"ILSVRC2012_val_{i:08d}.JPEG")
    shutil.copytree(root / "val", root / "train")
    shutil.copy(
        image_file := next((root / "val").glob("*/*")), root / "train" / image_file.parent.name / "one_more.JPEG"
    )
    return root
