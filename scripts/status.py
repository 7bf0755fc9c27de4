"""Show how far the sweeps are: `python scripts/status.py results_dir=DIR`, on any machine that sees DIR, at any time."""

import runpy
from pathlib import Path

# By its path, as a program: to import it as a part of the package would take seconds.
runpy.run_path(
    str(Path(__file__).resolve().parents[1] / "dhtm" / "harness" / "sweeps" / "status.py"), run_name="__main__"
)
