"""The benchmark writes what it says; how fast anything is, no test judges."""

import pandas as pd
import pytest

from dhtm.harness.benchmark import benchmark
from dhtm.harness.errors import UserError


def test_a_row_for_every_method_at_the_same_cost(composed, tmp_path):
    options = ["backbone=deit_micro", "rounds=2", "batch_size=2", "device=cpu", f"output={tmp_path}/new/speed.csv"]
    dropped = [f"~methods.{name}" for name in ("sinkhorn", "token_mergence", "random", "dpc_knn")]
    frame = benchmark(composed(*options, *dropped, config_name="benchmark"))
    assert frame.method.tolist() == ["unmerged", "tome", "lotm", "k_medoids", "patch_merger", "sit", "dhtm"]
    merged = frame.set_index("method").drop("unmerged")
    assert merged.flops_reduction_pct.between(28, 32).all()
    assert (frame.ms > 0).all() and frame.speedup[0] == 1
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "new/speed.csv"), frame, rtol=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=0", "rounds=0: it must be"),
        ("dtype=int8", "dtype=int8: choose"),
        ("output=/proc/x/y.csv", "cannot write"),
    ],
)
def test_bad_options(composed, override, message):
    with pytest.raises(UserError, match=message):
        benchmark(composed("backbone=deit_micro", override, config_name="benchmark"))
