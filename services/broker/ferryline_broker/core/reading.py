"""May a client read from an offset of this replica, and up to where. Pure."""

from __future__ import annotations

import msgspec

from ferryline.protocol.messages import RECORDS
from ferryline_broker.core.replica import ROLE_PRIMARY, ROLE_SECONDARY, Replica


class ReadVerdict(msgspec.Struct, frozen=True, gc=False):
    """May a client read from here, and up to where. ``below``: exclusive; only committed records are ever served.

    ``unproven``: the refusal holds only if this broker is still the primary. Whoever serves the reader lets a barrier
    (`BarrierAsked`) commit, asks here again, and tells the reader only then.
    """

    code: str = ""
    message: str = ""
    below: int = 0
    safe_offset: int = -1
    unproven: bool = False


def check_read(replica: Replica, role: str, epoch: int, offset: int, offset_epoch: int, secondary: bool) -> ReadVerdict:
    """Only a primary serves, or, if the reader accepts it, a secondary up to its own high watermark (rule F7).

    An offset between high watermark and log end is no error: after a fail-over the watermark has yet to catch up.
    ``offset_epoch`` is the epoch of the record before ``offset`` as the reader knows it, -1 if it does not. One that
    does not may have its offset from a later primary, whose log is longer; one whose epoch is older than ours, from a
    later one that carried that epoch on. So only a proven primary says "above the end" or "cut".
    """
    if role != ROLE_PRIMARY and not (secondary and role == ROLE_SECONDARY):
        return ReadVerdict("NOT_PRIMARY", f"this broker is {role} of the partition")
    start, high, end = replica.log_start[RECORDS], replica.high_watermark[RECORDS], replica.log_end[RECORDS]
    if offset < start:
        return ReadVerdict("OFFSET_OUT_OF_RANGE", f"offset: {offset} is below the log start {start}", high)
    if role == ROLE_SECONDARY:
        return ReadVerdict(below=high)
    if offset_epoch > epoch:
        return ReadVerdict("NOT_PRIMARY", f"the reader knows epoch {offset_epoch}, this primary is of {epoch}")
    if offset_epoch >= 0 and offset > start:
        known, known_end = replica.epochs[RECORDS].end_offset_for(offset_epoch, end)
        if known != offset_epoch or known_end < offset:
            message = f"the log was cut below offset {offset}"
            return ReadVerdict("LOG_TRUNCATED", message, high, min(known_end, high), unproven=offset_epoch < epoch)
    elif offset > end:
        return ReadVerdict("OFFSET_OUT_OF_RANGE", f"offset: {offset} is above the log end {end}", high, unproven=True)
    return ReadVerdict(below=high)
