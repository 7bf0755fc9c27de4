"""Random values for random keys on the command line: the script succeeds, or fails with an error of one line.

`make test` tries a few and `make stress` hundreds, drawn from a fixed seed.
"""

import json
import random

import pytest
from omegaconf import DictConfig, OmegaConf


def keys(config, prefix=""):
    for key, value in config.items_ex(resolve=False):
        if isinstance(value, DictConfig):
            yield from keys(value, f"{prefix}{key}.")
        yield f"{prefix}{key}"


VALUES = [
    "abc", "-1", "0", "1.5", "1e99", "nan", "inf", "null", "true", "''", "[]", "[1,2]", "[[1]]", "{a:1}", "'a b'", "../..",
    "/dev/null", "99999999999999999999", "${nothing}", "${oc.env:NO_SUCH_VARIABLE}", "'${', '", "ü", "1,2", "[", "'",
]  # fmt: skip

NAMES = ["abc", "''", "../..", "/dev/null", "ü", "${nothing}", "'a b'", "["]


@pytest.mark.parametrize("n_commands", [12, pytest.param(300, marks=pytest.mark.stress)])
def test_random_overrides_succeed_or_fail_with_one_line(composed, script, tmp_path, n_commands):
    config = composed("target.reduction_pct=20", "data.limit=2")
    fixed = ["data.limit=2", "num_workers=0", "device=cpu"]
    rng = random.Random(1)
    paths = [key for key in keys(config) if key.split(".")[0] not in ("results_dir", "cache_dir", "checkpoints_dir")]
    for _ in range(n_commands):
        key = rng.choice(paths)
        # If a choice is a list or a number, Hydra's own error names neither the key nor the value.
        is_choice = key == "experiment" or OmegaConf.is_dict(config.get(key))
        override = f"{key}={rng.choice(NAMES if is_choice else VALUES)}"
        result = script("evaluate", *fixed, f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache", override)
        code, output = result.returncode, result.stdout + result.stderr
        assert "Traceback" not in output, (override, output)
        assert code == 0 or (code == 1 and output.strip()), (override, output)
        if code == 1 and "error: " in output:
            line = output[output.index("error: ") :].strip()
            assert "\n" not in line, (override, line)
            _, _, value = override.partition("=")
            parts = (key.split(".")[0], key.split(".")[-1], value)
            assert any(part in line for part in parts if part), ("must name the key or the value", override, line)
    for file in (tmp_path / "runs").glob("*/metrics.json"):
        metrics = json.loads(file.read_text())
        config = OmegaConf.load(file.parent / "config.yaml")
        assert metrics["n_images"] == min(config.data.limit or 2000, 2000) and metrics["method"] == config.method.name
