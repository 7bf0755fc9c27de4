"""How far sweeps are: what dhtm.harness.sweeps.callback noted, as a table.

Also a program, scripts/status.py, and therefore without imports that take seconds, as the package's own do.
"""

import argparse
import collections
import datetime
import fcntl
import json
import os
import sys
import time
from pathlib import Path

from tabulate import tabulate

STATES = ("done", "skipped", "failed", "running", "stopped", "waiting")
_SILENCE = 300  # seconds without a sign of life that count as death where a file system has no locks


def states(folder: Path) -> list[dict]:
    """What became of each run of a sweep, in order: ``state``, one of STATES, and what else was noted of it."""
    found = []
    for number in range(len(_read(folder / "sweep.json")["runs"])):
        run = _read(run_file(folder, number)) or {"state": "waiting"}
        if run["state"] == "running" and not _alive(log_file(folder, number), Path(run.get("path", folder)) / "shards"):
            run["state"] = "stopped"
        found.append(run)
    return found


def table(folder: Path) -> str:
    """A sweep's runs, each by the overrides that set it apart, and how many there are of each state."""
    sweep, runs = _read(folder / "sweep.json"), states(folder)
    common = set.intersection(*map(set, sweep["runs"])) if len(runs) > 1 else set()
    rows = [
        (" ".join(override for override in overrides if override not in common), run["state"], _remark(folder, i, run))
        for i, (overrides, run) in enumerate(zip(sweep["runs"], runs, strict=True))
    ]
    counts = collections.Counter(run["state"] for run in runs)
    before = sum(run.get("before", False) for run in runs)
    told = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    if before:
        told = told.replace(" done", f" done ({before} of them before)")
    if counts["done"] + counts["skipped"] < len(runs) and not (counts["running"] or _alive(folder / "lock")):
        told += "; the same command carries out what is not done"
    return f"{sweep['command']}\n{tabulate(rows, tablefmt='plain', disable_numparse=True)}\n{told}"


def run_file(folder: Path, number: int) -> Path:
    """Where it is noted what became of a run of a sweep."""
    return folder / f"{number:03d}.json"


def log_file(folder: Path, number: int) -> Path:
    """A run's log, locked by the process that carries it out."""
    return folder / f"{number:03d}.log"


def _remark(folder: Path, number: int, run: dict) -> str:
    if run["state"] == "done":
        return "before" if run["before"] else _when(run["ended"])
    if run["state"] == "skipped":
        return run["reason"]
    if run["state"] == "failed":
        return f"{run['reason']} (log: {os.path.relpath(log_file(folder, number))})"
    if run["state"] in ("running", "stopped"):
        images = f"{_n_stored(Path(run['path']))} of {run['n_images']} images stored, " if "path" in run else ""
        return f"{images}begun {_when(run['started'])}"
    return ""


def _when(stamp: str) -> str:
    return f"{datetime.datetime.fromisoformat(stamp):%Y-%m-%d %H:%M:%S} UTC"


def _n_stored(run: Path) -> int:
    """Images whose predictions are stored, of a run that goes on."""
    from pyarrow import parquet  # which is not needed where no run goes on, and takes a moment

    total = 0
    for file in run.glob("shards/[0-9]*.parquet"):
        try:
            total += parquet.read_metadata(file).num_rows
        except (OSError, ValueError):  # gone or damaged: the run sees to it
            continue
    return total


def _alive(file: Path, *others: Path) -> bool:
    """Does a process hold the lock on a file? Where that cannot be known: did it, or another path, change of late?"""
    try:
        with file.open("r+") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # somebody else's file, or no locks there
        return any(path.exists() and time.time() - path.stat().st_mtime < _SILENCE for path in (file, *others))


def _read(file: Path) -> dict | None:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None


def _table_or_complaint(folder: Path) -> str:
    try:
        return table(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder}: damaged ({type(error).__name__}); remove it, and give the sweep's command again"


def main() -> None:
    """Print the tables of all sweeps beside some results, the newest last."""
    parser = argparse.ArgumentParser(prog="status.py", description=f"Show the runs of sweeps: {', '.join(STATES)}.")
    parser.add_argument("setting", nargs="*", metavar="results_dir=DIR", help="where the runs are (results/runs)")
    settings = dict(setting.partition("=")[::2] for setting in parser.parse_args().setting)
    root = settings.pop("results_dir", "results/runs")
    if settings:
        sys.exit(f"error: {next(iter(settings))}: results_dir=DIR is all that can be set here")
    folder = Path(os.path.expanduser(root))  # noqa: PTH111, by which ~nobody is no error
    files = sorted(folder.glob("sweeps/*/sweep.json"), key=lambda file: file.stat().st_mtime)
    if not files:
        sys.exit(f"error: results_dir={root}: no sweep was begun there; make sweep, or results_dir=DIR")
    print(*(_table_or_complaint(file.parent) for file in files), sep="\n\n")


if __name__ == "__main__":
    main()
