"""Show how far the sweeps are: `python scripts/status.py results_dir=DIR`, on any machine that sees DIR, at any time."""

import runpy
from importlib.util import find_spec
from pathlib import Path

# Run it by its path, because importing the package would take seconds.
package = Path(find_spec("dhtm").origin).parent
runpy.run_path(str(package / "harness" / "sweeps" / "status.py"), run_name="__main__")
