"""Any value of any key on the command line: what it asks for, or one line.

`make test` tries a few, `make stress` hundreds; both draw them anew from fixed seeds.
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
def test_overrides(composed, script, tmp_path, n_commands):
    config = composed("target.reduction_pct=20", "data.limit=2")
    fixed = ["data.limit=2", "num_workers=0", "device=cpu"]
    rng = random.Random(1)
    paths = [key for key in keys(config) if key.split(".")[0] not in ("results_dir", "cache_dir", "checkpoints_dir")]
    for _ in range(n_commands):
        key = rng.choice(paths)
        # Hydra itself refuses the name of a choice that does not exist, with a traceback of its own.
        is_choice = key == "experiment" or OmegaConf.is_dict(config.get(key))
        change = f"{key}={rng.choice(NAMES if is_choice else VALUES)}"
        result = script("evaluate", *fixed, f"results_dir={tmp_path}/runs", f"cache_dir={tmp_path}/cache", change)
        code, said = result.returncode, result.stdout + result.stderr
        assert "Traceback" not in said, (change, said)
        assert code == 0 or (code == 1 and said.strip()), (change, said)
        if code == 1 and "error: " in said:
            line = said[said.index("error: ") :].strip()
            assert "\n" not in line, (change, line)
            _, _, value = change.partition("=")
            named = (key.split(".")[0], key.split(".")[-1], value)
            assert any(name in line for name in named if name), ("names what is wrong", change, line)
    for file in (tmp_path / "runs").glob("*/metrics.json"):
        metrics = json.loads(file.read_text())
        config = OmegaConf.load(file.parent / "config.yaml")
        assert metrics["n_images"] == min(config.data.limit or 2000, 2000) and metrics["method"] == config.method.name
