"""The boundary between a script and the command line: exit codes, one-line errors and signals."""

import functools
import logging
import os
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dhtm.harness.core.errors import Preempted, UserError, one_line
from dhtm.harness.core.files import PROJECT

REQUEUE = 75  # the exit code after a signal to stop, EX_TEMPFAIL of sysexits.h: nothing is wrong, try again later


def command(resumes: bool) -> Callable[[Callable], Callable]:
    """Return a decorator that ends the process with a one-line error and exit code 1, and on Ctrl-C with 130.

    In a sweep, :class:`dhtm.harness.config.SweepCallback` handles errors.

    Args:
        resumes: whether the same command resumes a stopped one. If so, a signal to stop ends it with ``REQUEUE``.
    """
    kept = "; finished work is kept, the same command resumes from there" if resumes else ""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            logging.raiseExceptions = False  # else a closed pipe causes a traceback for each logged line
            if resumes:
                _expect_preemption()
            try:
                result = function(*args, **kwargs)
                sys.stdout.flush()
                return result
            except BrokenPipeError:  # the reader of the pipe, for example `head`, has closed it
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(0)
            except Preempted as error:
                _exit(REQUEUE, f"stopped by {error}{kept}")
            except KeyboardInterrupt:
                _exit(130, f"interrupted{kept}")
            except Exception as error:
                if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
                    raise
                _exit(1, f"error: {_message(error)}")

        return wrapper

    return decorate


def start(main: Callable, config_name: str, resumes: bool = False) -> None:
    """Run a script's main function with the config that Hydra composes from ``config_name`` and the command line."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises its errors instead of printing tracebacks
    # Hydra takes ~ and letters outside of ASCII, as paths may have them, only in quotes.
    path = r"^([^=]+)=(?=~|.*[^\x00-\x7f])([^,'\"\[\](){}$]*)$"
    sys.argv = [re.sub(path, r"\1='\2'", argument) for argument in sys.argv]
    main = command(resumes)(main)  # a launcher may call this in another process
    command(resumes)(hydra.main("../configs", config_name, version_base="1.3")(main))()


def accept_method_lists() -> None:
    """Turn method=a,b on the command line into methods=[a,b], because Hydra would take it for a sweep."""
    sys.argv = [re.sub(r"^method=\[?([^\]]*)\]?$", r"methods=[\1]", argument) for argument in sys.argv]


def register_resolvers() -> None:
    """Register the resolvers that the configs use, ``help_text`` and ``n_gpus``, in every process that composes configs."""
    # The number of GPUs, but at least 1: how many runs this machine has a device for.
    OmegaConf.register_new_resolver("n_gpus", lambda: max(1, torch.cuda.device_count()), replace=True)
    OmegaConf.register_new_resolver("help_text", _help_text, replace=True)
    # Hydra warns that a file in configs/hydra/launcher has the name of a plugin's own config. This is intended: the name
    # gives the file that config's types.
    warnings.filterwarnings("ignore", r"\n'hydra/launcher/\w+' is validated against ConfigStore schema")


def _help_text(config_name: str) -> str:
    """Return a script's help: the comment at the top of its config, its groups, and its keys with their comments."""
    lines = (PROJECT / "configs" / f"{config_name}.yaml").read_text(encoding="utf-8").splitlines()
    header = [line[2:] for line in lines[: lines.index("defaults:")]]
    keys = lines[lines.index("") + 1 :]
    groups = []
    for folder in sorted((PROJECT / "configs").iterdir()):  # those that the script takes: all but Hydra's own
        if folder.name != "hydra" and any(re.match(rf"(  - )?{folder.name}(s|@\S+)?:", line) for line in lines):
            groups.append(f"{folder.name}: {', '.join(sorted(file.stem for file in folder.glob('*.yaml')))}")
    title = "Groups, chosen by group=name (each choice is a file of configs/, which explains its keys):"
    keys = [f"  {line}".rstrip() for line in keys]
    return "\n".join([*header, "", title, *groups, "", "Keys, set by key=value:", *keys]).replace("$", "$$")


def _exit(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


def _message(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, HydraException):  # its message may list the available options, one per line
        override = f"{error.override}: " if isinstance(error, OverrideParseException) else ""
        cause = f" ({one_line(error.__cause__)})" if error.__cause__ else ""
        return override + " ".join(str(error).split()) + cause
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key or error.key}: {one_line(error)}"
    with tempfile.NamedTemporaryFile("w", prefix="dhtm-", suffix=".log", delete=False) as file:
        traceback.print_exception(error, file=file)
    return f"{type(error).__name__}: {one_line(error)} (traceback: {file.name})"


def _expect_preemption() -> None:
    process = os.getpid()

    def stop(number, frame) -> None:
        if os.getpid() == process:  # not a worker process that loads images
            raise Preempted(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) == signal.SIG_DFL:  # a launcher's own handler stays
            signal.signal(number, stop)
