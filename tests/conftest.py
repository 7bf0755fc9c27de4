"""What the tests share: composing configs, running scripts, and small data of the real form."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Of tests side by side each gets its share of the cores: threads that wait for each other's cores take many times as long.
# Set before PyTorch is imported, and handed on to the processes that tests start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

if (
    not torch.cuda.is_available()
):  # then Triton's kernels run in its interpreter, which must be said before it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parents[1]

# No test may reach for the network, or find what an earlier download left: both must be as on a new machine offline.
_EMPTY = tempfile.mkdtemp(prefix="dhtm-tests-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": _EMPTY, "TORCH_HOME": _EMPTY, "WANDB_SILENT": "true"}


@pytest.fixture(scope="session")
def composed():
    """Compose a config as a script would: composed("method.k=10", config_name="evaluate")."""

    def compose_config(*overrides, config_name="evaluate"):
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            return compose(config_name, list(overrides))

    return compose_config


@pytest.fixture(scope="session")
def script():
    """Run a script of scripts/ in a process of its own: script("evaluate", "method.k=10")."""

    def run(name, *arguments, cwd=ROOT, **options):
        command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False, **options)

    return run


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
