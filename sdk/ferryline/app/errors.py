"""What handlers raise to say what is to become of a record, and what callers of tasks are told."""

from __future__ import annotations

from typing import Any

from ferryline.protocol.errors import FerrylineError


class Reject(Exception):
    """Raised by a handler: this record can never be done. It goes to the dead letters, or is parked, at once."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason or "rejected by the handler")
        self.reason = reason or "rejected by the handler"


class JobFailed(FerrylineError):
    """A job has failed for good: its attempts are used up, or it was rejected. ``traceback`` is of the last one."""

    code = "JOB_FAILED"
    http_status = 500
    remedy = "`job.status()` tells the attempts; the record is in the dead letters of its queue."

    def __init__(self, message: str = "", traceback: str = "", **details: Any) -> None:
        super().__init__(message, **details)
        self.traceback = traceback
