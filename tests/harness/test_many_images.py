"""An evaluation of as many images as ImageNet's validation set has."""

import contextlib
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import timm
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file

ARCHITECTURE = "test_vit"  # timm's smallest, for 160×160 images


@pytest.mark.stress
def test_memory_stays_flat_and_each_image_is_predicted_once(tmp_path):
    n_images, n_classes = 50_000, 1000
    rng = np.random.default_rng(0)
    for number in range(n_classes):
        folder = tmp_path / "root" / "val" / f"{number:04d}"
        folder.mkdir(parents=True)
        for i in range(n_images // n_classes):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.JPEG")
    save_file(timm.create_model(ARCHITECTURE).state_dict(), tmp_path / "weights.safetensors")
    command = [
        sys.executable, str(ROOT / "scripts/evaluate.py"), "backbone.name=smallest",
        f"backbone.architecture={ARCHITECTURE}", f"backbone.checkpoint={tmp_path}/weights.safetensors",
        "backbone.num_classes=1000", "data=imagefolder", f"data.root={tmp_path}/root", "method.k=20",
        "method.layers=[2,4]", f"results_dir={tmp_path}/runs", "device=cpu", "num_workers=2", "store_every_s=5",
        f"cache_dir={tmp_path}/cache",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT)
    used = []
    while process.poll() is None:
        if n_stored(tmp_path / "runs") > n_images // 10:  # after start-up
            used.append(memory(process.pid))
        time.sleep(1)
    assert process.returncode == 0
    first, last = (np.median(part) for part in np.array_split(used, 5)[::4])
    # All images take 3.8 GB. The unmerged model's outputs take 0.2 GB, and PyArrow keeps the memory that reading them took.
    assert last < first + 1e9, "memory grows with the number of images"
    files = list((tmp_path / "runs").glob("*/predictions.parquet"))
    assert len(files) == 2, "must be this run and the unmerged model's"
    for file in files:
        rows = pd.read_parquet(file)
        assert rows["index"].tolist() == list(range(n_images))
        assert rows.label.tolist() == [index // 50 for index in range(n_images)]


def n_stored(results):
    """Return roughly how many predictions are stored, judging by the names of the shards."""
    return max((int(file.name[:8]) for file in results.glob("*/shards/[0-9]*.parquet")), default=0)


def memory(pid):
    """Return the bytes that a process and its children, which load images, do not share with others."""
    process, total = psutil.Process(pid), 0
    for member in [process, *process.children()]:
        with contextlib.suppress(psutil.Error):  # it has ended
            total += member.memory_full_info().uss
    return total
