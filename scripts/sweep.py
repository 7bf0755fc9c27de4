"""Run the paper's experiments (Tables 1 and 2, Figures 1 and 4), then the report: `python scripts/sweep.py key=value ...`.

Overrides come from the command line or, for `make sweep`, from the variable ARGS of the environment, quoted as in a shell.
The evaluations get all overrides, which `python scripts/evaluate.py --help` explains, and the report those that it knows,
such as output_dir. experiment=NAME runs only that experiment. At the end the state of every run is printed. The exit code is
1 if any run failed.
"""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

REPORT_KEYS = {"results_dir", "output_dir", "tracker"}
REQUEUE = 75  # the scripts' own exit code when the system stops them, dhtm.harness.core.command.REQUEUE


def key(override: str) -> str:
    return override.lstrip("+~").split("=")[0].split(".")[0]


class Sweep:
    """The script that is running, and whether the system has asked this process to stop."""

    def __init__(self):
        self.process, self.stopped = None, False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.stop)

    def stop(self, number, frame) -> None:
        self.stopped = True
        if self.process:
            self.process.send_signal(number)  # the script then saves its state

    def run(self, script: str, *arguments: str) -> int:
        """Run a script and return its exit code, 0 or 1; any other, or a signal, ends this process too."""
        if self.stopped:
            sys.exit(REQUEUE)
        self.process = subprocess.Popen([sys.executable, str(Path(__file__).with_name(script)), *arguments])
        try:
            code = self.process.wait()
        except KeyboardInterrupt:  # the script got it too, and reports it
            self.process.wait()
            raise
        if self.stopped or code not in (0, 1):
            sys.exit(REQUEUE if self.stopped else code if code > 0 else 128 - code)
        return code


def start_times(results: list[str]) -> dict[Path, int]:
    """Return the start time of each sweep in the results directory."""
    root = results[-1].partition("=")[2].strip("'\"") if results else "results/runs"  # quoted for Hydra
    root = Path(os.path.expanduser(root))  # noqa: PTH111, because ~nobody is no error here: evaluate.py reports it
    return {file: file.stat().st_mtime_ns for file in root.glob("sweeps/*/sweep.json")}


def main() -> None:
    overrides = sys.argv[1:] or shlex.split(os.environ.get("ARGS", ""))
    if {"-h", "--help"} & set(overrides):
        print(__doc__)
        return
    chosen = [override for override in overrides if key(override) == "experiment"]
    experiments = chosen or [f"experiment={name}" for name in ("figure1", "figure4", "table1", "table2")]
    shared = [override for override in overrides if key(override) not in ("experiment", "output_dir")]
    results = [override for override in overrides if key(override) == "results_dir"]
    sweep, failed = Sweep(), False
    for experiment in experiments:
        before = start_times(results)
        if sweep.run("evaluate.py", "-m", experiment, *shared):
            if start_times(results) == before:  # a mistake in the overrides, which it has reported
                sys.exit(1)
            failed = True
    failed |= bool(sweep.run("report.py", *(override for override in overrides if key(override) in REPORT_KEYS)))
    sweep.run("status.py", *results)
    sys.exit(failed)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
