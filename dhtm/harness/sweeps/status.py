"""The progress of sweeps: a table of the records of :mod:`dhtm.harness.sweeps.records`.

This module also runs as a program, scripts/status.py. So it imports nothing slow, not even this package.
"""

import argparse
import collections
import datetime
import json
import os
import sys
from pathlib import Path

from filelock import FileLock, Timeout
from tabulate import tabulate

STATES = ("done", "skipped", "failed", "running", "stopped", "waiting")


def states(folder: Path) -> list[dict]:
    """Return the record of each run of a sweep, in order.

    ``state`` is one of STATES, and ``differs`` are its overrides that not all runs of the sweep have.
    """
    runs, found = _read(folder / "sweep.json")["runs"], []
    common = set.intersection(*map(set, runs)) if len(runs) > 1 else set()
    for number, overrides in enumerate(runs):
        run = _read(run_file(folder, number, "json")) or {"state": "waiting"}
        if run["state"] == "running" and not _is_locked(run_file(folder, number, "lock")):
            run["state"] = "stopped"
        found.append(run | {"differs": " ".join(override for override in overrides if override not in common)})
    return found


def table(folder: Path) -> str:
    """Return a table of a sweep's runs, each named by the overrides that differ, and the number of runs in each state."""
    runs = states(folder)
    rows = [(run["differs"], run["state"], _remark(folder, i, run)) for i, run in enumerate(runs)]
    counts = collections.Counter(run["state"] for run in runs)
    summary = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    if before := sum(run.get("before", False) for run in runs):
        summary = summary.replace(" done", f" done ({before} already finished)")
    if counts["done"] + counts["skipped"] < len(runs) and not (counts["running"] or _is_locked(folder / "lock")):
        summary += "; the same command carries out the rest"
    return f"{_read(folder / 'sweep.json')['command']}\n{tabulate(rows, tablefmt='plain', disable_numparse=True)}\n{summary}"


def progress(folder: Path, number: int) -> str:
    """Describe a sweep's current run, and when the sweep will be done if the remaining runs take the mean time so far."""
    runs = states(folder)
    took = [_time(run["ended"]) - _time(run["started"]) for run in runs if run["state"] == "done"]
    text = f"run {number + 1} of {len(runs)}"
    if not took:
        return text
    rest = sum(took, datetime.timedelta()) / len(took) * (len(runs) - number)
    return f"{text}; this sweep will be done at about {datetime.datetime.now() + rest:%H:%M}"


def run_file(folder: Path, number: int, ending: str) -> Path:
    """Return a file of one run of a sweep: json (its record), log, or lock (held while it runs)."""
    return folder / f"{number:03d}.{ending}"


def _remark(folder: Path, number: int, run: dict) -> str:
    if run["state"] == "done":
        return "already finished" if run["before"] else _when(run["ended"])
    if run["state"] == "skipped":
        return run["reason"]
    if run["state"] == "failed":
        return f"{run['reason']} (log: {os.path.relpath(run_file(folder, number, 'log'))})"
    if run["state"] in ("running", "stopped"):
        images = f"{_n_stored(Path(run['path']))} of {run['n_images']} images stored, " if "path" in run else ""
        return f"{images}started {_when(run['started'])}"
    return ""


def _when(stamp: str) -> str:
    return f"{_time(stamp):%Y-%m-%d %H:%M:%S} UTC"


def _time(stamp: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(stamp)


def _n_stored(run: Path) -> int:
    """Count the images of an unfinished run whose predictions are stored."""
    from pyarrow import parquet  # here, because it takes a moment

    total = 0
    for file in run.glob("shards/[0-9]*.parquet"):
        try:
            total += parquet.read_metadata(file).num_rows
        except (OSError, ValueError):  # removed meanwhile, or damaged: the run handles this
            continue
    return total


def _is_locked(file: Path) -> bool:
    """Return whether a process holds the lock on a file."""
    if not file.exists():
        return False
    try:
        with FileLock(file, timeout=0):
            return False
    except (Timeout, OSError):  # another user's file may not be readable: assume that it is locked
        return True


def _read(file: Path) -> dict | None:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None


def _table_or_error(folder: Path) -> str:
    try:
        return table(folder)
    except ValueError as error:  # the other sweeps must still be shown
        return f"{folder}: damaged ({error}); remove it, and run the sweep's command again"


def main() -> None:
    """Print the tables of all sweeps in a results directory, the newest last."""
    parser = argparse.ArgumentParser(prog="status.py", description=f"Show the runs of sweeps: {', '.join(STATES)}.")
    parser.add_argument("setting", nargs="*", metavar="results_dir=DIR", help="where the runs are (results/runs)")
    settings = dict(setting.partition("=")[::2] for setting in parser.parse_args().setting)
    root = settings.pop("results_dir", "results/runs").strip("'\"")  # quoted for Hydra, where a path needs it
    if settings:
        sys.exit(f"error: {next(iter(settings))}: only results_dir=DIR can be set here")
    folder = Path(os.path.expanduser(root))  # noqa: PTH111, because an unknown user is no error
    files = sorted(folder.glob("sweeps/*/sweep.json"), key=lambda file: file.stat().st_mtime)
    if not files:
        sys.exit(f"error: results_dir={root}: no sweep was started there; run make sweep, or set results_dir=DIR")
    print(*(_table_or_error(file.parent) for file in files), sep="\n\n")


if __name__ == "__main__":
    main()
