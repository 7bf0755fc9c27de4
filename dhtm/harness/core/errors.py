"""Errors that the user can fix, reported in one line."""


class UserError(Exception):
    """A mistake that the user can fix. The message says what, where and how."""


class UnavailableError(UserError):
    """The run cannot exist: the target cost is out of reach, or nobody has trained the weights."""


class Preempted(BaseException):
    """The system asks the process to stop, by SIGTERM or by SIGUSR1, which SLURM sends first."""


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's message, for use inside another message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
