"""The library without the packages that only the harness needs."""

import inspect
import subprocess
import sys

PROGRAM = """
import sys
for name in ("hydra", "omegaconf", "wandb", "fvcore", "pandas", "pyarrow", "matplotlib", "sklearn", "scipy", "tqdm"):
    sys.modules[name] = None  # makes its import fail
import dhtm.kernels.batched  # imported first: any order must register the same operators
import timm, torch, dhtm
assert set(dhtm.kernels.BACKENDS) == {"reference", "torch", "numba", "triton"} and torch.ops.dhtm.agglomerate
model = dhtm.patch(timm.create_model("deit_tiny_patch16_224").eval(), dhtm.DHTM(k=40))
with torch.inference_mode():
    assert model(torch.randn(2, 3, 224, 224)).shape == (2, 1000)
assert dhtm.regions(model).n_tokens == 76
"""


def test_merging_needs_only_torch_and_timm():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_dhtm_regions_is_a_module_and_a_function():
    import dhtm
    import dhtm.regions as module
    from dhtm.regions import Regions

    assert inspect.ismodule(module) and module.Regions is Regions is dhtm.Regions
    assert list(inspect.signature(dhtm.regions).parameters) == ["model", "layer"]
