"""Errors that the user can fix, reported in one line."""

import contextlib
import textwrap
from collections.abc import Iterator


class UserError(Exception):
    """A mistake that the user can fix. The message says what, where and how."""


class UnavailableError(UserError):
    """The run is impossible: the target cost is out of reach, or there are no trained weights."""


class Preempted(BaseException):
    """The system asks the process to stop, by SIGTERM or, as SLURM does first, by SIGUSR1."""


@contextlib.contextmanager
def explain(
    what: str, kind: type[Exception] | tuple[type[Exception], ...] = Exception, remedy: str = ""
) -> Iterator[None]:
    """Turn exceptions of a kind into UserErrors that say what is wrong, why (in the library's words), and the remedy."""
    try:
        yield
    except UserError:
        raise
    except kind as error:
        raise UserError(f"{what} ({one_line(error)}){remedy}") from error


def one_line(error: BaseException) -> str:
    """Return the beginning of an exception's message on one line, for use inside another message."""
    return textwrap.shorten(str(error), 300, placeholder=" …") or type(error).__name__
