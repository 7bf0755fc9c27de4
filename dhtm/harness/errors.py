"""Mistakes of the user, told in one line."""

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something that the user can mend; the message says what, where and how."""


class UnavailableError(UserError):
    """What was asked for cannot be had: a target out of reach, or weights that nobody has trained."""


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, for use inside another message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
