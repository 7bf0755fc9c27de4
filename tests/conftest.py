"""What the tests share: composing configs, running scripts, and small data of the real form."""

import os
import shutil
import socket
import subprocess
import tempfile

# Tests that run side by side share the cores: threads that wait for each other's cores take many times as long. This is set
# before PyTorch is imported, and the processes that tests start inherit it.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from processes import ROOT, start_script

if not torch.cuda.is_available():  # Triton's kernels then run in its interpreter, if this is set before its import
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No test may use the network or find what an earlier download left, as on a new machine that is offline.
_EMPTY = tempfile.mkdtemp(prefix="dhtm-tests-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": _EMPTY, "TORCH_HOME": _EMPTY, "WANDB_SILENT": "true"}


@pytest.fixture(autouse=True)
def seeded():
    """Random models and images are the same in every run of the tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def composed():
    """Compose a config as a script would: composed("method.k=10", config_name="evaluate")."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        yield lambda *overrides, config_name="evaluate", **more: compose(config_name, list(overrides), **more)


@pytest.fixture
def evaluated(composed, tmp_path):
    """Evaluate in this process, by overrides; returns the metrics. Results and cache are in the test's own folder."""
    from dhtm.harness import config
    from dhtm.harness.runs.evaluate import evaluate

    def evaluate_with(*overrides):
        folders = [f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache", "device=cpu"]
        return evaluate(config.evaluation(composed(*folders, *overrides)))

    return evaluate_with


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Run a script in ``world`` processes, told of each other as torchrun does: ranks(2, "evaluate", "method.k=10").

    Returns:
        For each rank what subprocess.run would return.
    """

    def run(world, name, *arguments):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}
        said, processes = [tmp_path_factory.mktemp("said") for _ in range(world)], []
        for rank, folder in enumerate(said):
            torchrun = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            files = {"stdout": folder / "stdout", "stderr": folder / "stderr"}
            processes.append(start_script(name, *arguments, **files, **torchrun))
        for process in processes:
            process.join(300)
        codes = [process.exitcode for process in processes]
        assert None not in codes, f"it did not end: {name} {arguments}"
        texts = [[(folder / file).read_text(encoding="utf-8") for file in ("stdout", "stderr")] for folder in said]
        return [subprocess.CompletedProcess(name, code, *text) for code, text in zip(codes, texts, strict=True)]

    return run


@pytest.fixture(scope="session")
def script(ranks):
    """Run a script of scripts/ in a process of its own: script("evaluate", "method.k=10"). Returns as subprocess.run."""
    return lambda name, *arguments: ranks(1, name, *arguments)[0]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A data root as ImageNet ships, but small: train/ and val/ of three synsets of JPEGs, one of them grey, of odd sizes."""
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
