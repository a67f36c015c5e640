"""How a command fails: one line with the error's code, one with the remedy, and an exit status that scripts can use.

0 done · 1 failed · 2 wrong usage · 3 not found · 4 denied · 5 unavailable
"""

from __future__ import annotations

from typing import Any

from ferryline.protocol import errors

OK, FAILED, USAGE, NOT_FOUND, DENIED, UNAVAILABLE = range(6)


class Failed(Exception):
    """A command ends with this status after the message was printed to stderr."""

    def __init__(self, message: str, status: int = FAILED, *, code: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.remedy = remedy


_STATUS: tuple[tuple[type[errors.FerrylineError], int], ...] = (
    (errors.NotFound, NOT_FOUND),
    (errors.Unauthorized, DENIED),
    (errors.InvalidRequest, USAGE),
    (errors.Unavailable, UNAVAILABLE),
    (errors.NotPrimary, UNAVAILABLE),
    (errors.Throttled, UNAVAILABLE),
    (errors.RequestTimedOut, UNAVAILABLE),
    (errors.CommitUnknown, UNAVAILABLE),
    (errors.ConnectionFailed, UNAVAILABLE),
    (errors.ConnectionLost, UNAVAILABLE),
    (errors.OutcomeUnknown, UNAVAILABLE),
    (errors.DeadlineExceeded, UNAVAILABLE),
)


def exit_status(error: BaseException) -> int:
    """Exit status for an error of the tree; 1 for what has no class of its own."""
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return status
    return FAILED


def describe(error: errors.FerrylineError) -> dict[str, Any]:
    """An error as --output json prints it."""
    return {
        "code": error.code,
        "message": error.message,
        "remedy": error.remedy,
        "retriable": error.retriable,
        "definite": error.definite,
        "details": error.details,
    }
