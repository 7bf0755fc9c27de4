"""Mistakes of the user, told in one line."""

import functools
import math
import sys
from collections.abc import Callable

from omegaconf import DictConfig


class UserError(Exception):
    """Something that the user can mend; the message says what, where and how."""


class UnavailableError(UserError):
    """What was asked for cannot be had: a target out of reach, or weights that nobody has trained."""


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


def command(function: Callable) -> Callable:
    """For the function behind a script: a UserError ends it with its one line and exit code 1, Ctrl-C with 130."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted; finished runs are kept, the same command goes on from there", file=sys.stderr)
            sys.exit(130)

    return wrapped
