"""Mistakes of the user, told in one line."""

import functools
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dhtm.harness.core.redaction import redacted


class UserError(Exception):
    """Something that the user can mend; the message says what, where and how, but no password that is part of a value."""

    def __init__(self, message: str):
        super().__init__(redacted(message))


class UnavailableError(UserError):
    """What was asked for cannot be had: a target out of reach, or weights that nobody has trained."""


class Preempted(BaseException):
    """The system wants the process to stop: SIGTERM, or SIGUSR1, which SLURM sends before it."""


REQUEUE = 75  # the exit code then, EX_TEMPFAIL of sysexits.h: nothing is wrong, try again later


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, for use inside another message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def require_number(
    config: DictConfig,
    key: str,
    least: float = 0,
    below: float = math.inf,
    integer: bool = False,
    optional: bool = False,
) -> None:
    """Raise a UserError unless a key of a config is a number in [least, below), or null where it is optional."""
    value = config[key]
    if optional and value is None:
        return
    kinds = int if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < below:
        limit = f" and below {below:g}" if below < math.inf else ""
        raise UserError(
            f"{key}={value}: it must be {'an integer' if integer else 'a number'} from {least:g}{limit}"
            + (", or null" if optional else "")
        )


def require_text(config: DictConfig, *keys: str) -> None:
    """Raise a UserError unless keys of a config are texts."""
    for key in keys:
        if not isinstance(value := OmegaConf.select(config, key), str):
            raise UserError(f"{key}={value}: it must be a name")


def path_given(value: object, setting: str) -> Path:
    """The path that a setting has for its value, ~ and ~user resolved; a UserError if it is none."""
    if not isinstance(value, str | Path):
        raise UserError(f"{setting}={value}: it must be a path")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise UserError(f"{setting}={value}: nobody has such a home; write the path in full") from None


def command(goes_on: bool) -> Callable[[Callable], Callable]:
    """For the function behind a script: a UserError ends it with its one line and exit code 1, Ctrl-C with 130.

    Args:
        goes_on: the same command goes on from where it was stopped; then a signal to stop ends it with REQUEUE, and in a
            sweep a UserError is left to :class:`dhtm.harness.sweeps.callback.Sweep`.
    """
    kept = "; what is done is kept, the same command goes on from there" if goes_on else ""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            if goes_on:
                _expect_preemption()
            try:
                return function(*args, **kwargs)
            except (UserError, OmegaConfBaseException) as error:
                if goes_on and _in_sweep():
                    raise
                omegaconf = isinstance(error, OmegaConfBaseException)  # a value that refers to what is not there, say
                said = f"{error.full_key or error.key}: {one_line(error)}" if omegaconf else error
                print(f"error: {said}", file=sys.stderr)
                sys.exit(1)
            except Preempted as error:
                print(f"stopped by {error}{kept}", file=sys.stderr)
                sys.exit(REQUEUE)
            except KeyboardInterrupt:
                print(f"interrupted{kept}", file=sys.stderr)
                sys.exit(130)

        return wrapped

    return decorate


def _in_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


_process = None  # the one to stop, and not one that loads images for it


def _expect_preemption() -> None:
    global _process
    _process = os.getpid()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) in (signal.SIG_DFL, _stop):  # a launcher's own handler stays
            signal.signal(number, _stop)


def _stop(number, frame) -> None:
    if os.getpid() == _process:
        raise Preempted(signal.Signals(number).name)
