"""Run every experiment of configs/experiment, then the report: `python scripts/sweep.py key=value ...`.

Overrides come from the command line or, for `make sweep`, from the environment's ARGS, quoted as in a shell. They go to
the evaluations, and those that are the report's too go to it; experiment=NAME runs that one alone.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPORT_KEYS = {"results_dir", "output_dir", "tracker"}


def key(override: str) -> str:
    return override.lstrip("+~").split("=")[0].split(".")[0]


def run(script: str, *arguments: str) -> None:
    code = subprocess.run([sys.executable, str(ROOT / "scripts" / script), *arguments], check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    overrides = sys.argv[1:] or shlex.split(os.environ.get("ARGS", ""))
    chosen = [override for override in overrides if key(override) == "experiment"]
    experiments = chosen or [
        f"experiment={file.stem}" for file in sorted((ROOT / "configs" / "experiment").glob("*.yaml"))
    ]
    shared = [override for override in overrides if key(override) not in ("experiment", "output_dir")]
    for experiment in experiments:
        run("evaluate.py", "-m", experiment, *shared)
    run("report.py", *(override for override in overrides if key(override) in REPORT_KEYS))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the script that was running has said so
        sys.exit(130)
