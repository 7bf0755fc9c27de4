"""Start scripts as processes, which tests kill or wait for.

A script takes seconds to start, mostly for imports. Here it runs in a process forked from a server that has already imported
what scripts import, and has done nothing else. As in a new process, no thread, generator or device is in use yet.
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
    """Wait until the condition holds, checking it every 10 ms."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition does not hold after {seconds} s"
        time.sleep(0.01)


def start_script(name, *arguments, stdout=os.devnull, stderr=os.devnull, **variables):
    """Start a script of scripts/ as the leader of a new process group.

    Args:
        name: file name without ".py".
        stdout, stderr: files that its output is written to.
        variables: environment variables, added to those of this process.

    Returns:
        The ``multiprocessing.Process``.
    """
    options = [name, list(map(str, arguments)), str(stdout), str(stderr), dict(os.environ) | variables]
    process = _server.Process(target=_script, args=options)
    process.start()
    atexit.register(_end, process)  # runs before multiprocessing's own handler, which waits for the process
    return process


def _end(process):
    """Kill a process and its children if it is still running."""
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):  # it does not lead a group yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def _script(name, arguments, stdout, stderr, environment):
    multiprocessing.set_start_method(None, force=True)  # the script's children start in the default way
    os.setsid()
    # If the tests run as a background job of a shell, they ignore SIGINT, and their children inherit this.
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
        atexit._run_exitfuncs()  # multiprocessing's children do not run these themselves
