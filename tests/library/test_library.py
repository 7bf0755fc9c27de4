"""The library by itself, for somebody who only wants the speed-up."""

import subprocess
import sys

PROGRAM = """
import sys
for name in ("hydra", "omegaconf", "wandb", "fvcore", "pandas", "pyarrow", "matplotlib", "sklearn", "scipy", "tqdm"):
    sys.modules[name] = None  # importing it fails
import timm, torch, dhtm
model = dhtm.patch(timm.create_model("deit_tiny_patch16_224").eval(), dhtm.DHTM(k=40))
with torch.inference_mode():
    assert model(torch.randn(2, 3, 224, 224)).shape == (2, 1000)
assert dhtm.regions(model).n_tokens == 76
"""


def test_merging_needs_torch_and_timm_alone():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
