"""Errors that the user can fix, reported in one line."""

import math
from collections.abc import Collection

from dhtm.harness.core.redaction import redacted


class UserError(Exception):
    """A mistake that the user can fix. The message says what, where and how; passwords in it are hidden."""

    def __init__(self, message: str):
        super().__init__(redacted(message))


class UnavailableError(UserError):
    """The run cannot exist: the target cost is out of reach, or nobody has trained the weights."""


class Preempted(BaseException):
    """The system asks the process to stop, by SIGTERM or by SIGUSR1, which SLURM sends first."""


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's message, for use inside another message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def require_number(
    name: str, value: object, least: float = 0, below: float = math.inf, integer: bool = False, optional: bool = False
) -> None:
    """Raise a UserError unless a setting is a number in [least, below), or None where it is optional."""
    if optional and value is None:
        return
    kinds = int if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < below:
        limit = f" and below {below:g}" if below < math.inf else ""
        kind = "an integer" if integer else "a number"
        raise UserError(f"{name}={value}: it must be {kind} from {least:g}{limit}{', or null' if optional else ''}")


def require_choice(name: str, value: object, options: Collection[object]) -> None:
    """Raise a UserError unless a setting has one of the given values."""
    if value not in options:
        raise UserError(f"{name}={value}: choose one of {', '.join(map(str, options))}")
