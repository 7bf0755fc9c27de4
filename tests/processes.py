"""Processes that tests start, kill and wait for.

A script takes seconds to start, most of them for imports. Here it runs in a process forked from a server that has imported
what scripts import and has done nothing else: no thread, generator or device is in use yet, as in a new process.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        "dhtm.harness.config", "dhtm.kernels.cpu", "dhtm.report.report", "fvcore.nn",
        "processes", "scipy.stats", "sklearn.datasets", "sklearn.model_selection",
    ]
)  # fmt: skip


def wait_for(condition, seconds=120):
    """Look again and again until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.01)


def start_script(name, *arguments, stdout=os.devnull, stderr=os.devnull, **variables):
    """Start a script of scripts/, as the leader of a process group.

    Args:
        name: without its ending.
        stdout, stderr: files for what it writes.
        variables: for its environment, besides those of this process.

    Returns:
        The process, of multiprocessing.
    """
    options = [name, list(map(str, arguments)), str(stdout), str(stderr), dict(os.environ) | variables]
    process = _server.Process(target=_script, args=options)
    process.start()
    atexit.register(_end, process)  # before multiprocessing waits for it
    return process


def _end(process):
    """Kill a process and those that it has started, if it still is there."""
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):  # it has no group yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def _script(name, arguments, stdout, stderr, environment):
    multiprocessing.set_start_method(None, force=True)  # for its own children as by default, not as this one was
    os.setsid()
    # A shell's background jobs ignore it, and so do their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    file = ROOT / "scripts" / f"{name}.py"
    sys.argv, sys.path[0] = [str(file), *arguments], str(file.parent)
    try:
        runpy.run_path(str(file), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process ends without
