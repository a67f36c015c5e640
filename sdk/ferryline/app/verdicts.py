"""Decide what becomes of a record once its handler has ended. Pure: chance is an argument."""

from __future__ import annotations

import msgspec

from ferryline.app.errors import Reject
from ferryline.protocol.queue_messages import ACK, NACK, REJECT
from ferryline.retry import Retry


class Verdict(msgspec.Struct, frozen=True):
    """``action``: ack, nack or reject. ``delay``: seconds until the next attempt; None: as the topic's policy says.

    ``last``: no attempt will follow.
    """

    action: str
    delay: float | None = None
    reason: str = ""
    last: bool = False


def judge(
    error: Exception | None,
    reason: str,
    *,
    hopeless: bool,
    attempt: int,
    attempts: int,
    retry: Retry | None,
    draw: float,
) -> Verdict:
    """What follows from how the attempt ended. ``draw`` is from [0, 1).

    ``hopeless``: the record itself is at fault (it cannot be read, its result cannot be stored): trying again is of no
    use. Without ``retry`` the topic's policy decides about waits, and about the last attempt.
    """
    if error is None:
        return Verdict(ACK, last=True)
    if hopeless or isinstance(error, Reject):
        return Verdict(REJECT, reason=reason, last=True)
    if retry is None:
        return Verdict(NACK, reason=reason, last=attempt >= attempts)
    if attempt >= attempts:
        return Verdict(REJECT, reason=reason, last=True)
    return Verdict(NACK, delay_s(retry, attempt, draw), reason)


def delay_s(retry: Retry, attempt: int, draw: float) -> float:
    """The wait after an attempt: an even share of [0, limit], where the limit doubles with each."""
    limit: float = min(retry.backoff.longest, retry.backoff.first * 2.0 ** min(attempt - 1, 60))
    return limit * draw
