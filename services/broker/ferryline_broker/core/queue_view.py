"""What an operator may want to know of a queue in one partition. Pure; changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ferryline_broker.core.queue import Queue

EpochMarks = Callable[[int, int], list[int]]  # `EpochIndex.marks` of the records


def stats(queue: Queue, high_watermark: int, marks: EpochMarks) -> dict[str, Any]:
    """What there is of a queue in one partition, by state and by member."""
    table, window = queue.table, queue.window
    members: dict[str, int] = {}
    for lease in table.leases.values():
        members[lease.member] = members.get(lease.member, 0) + len(lease.offsets)
    return {
        "start": table.start,
        "high_watermark": high_watermark,
        "ordering": table.ordering,
        "paused": table.paused,
        "scanned": window.scanned,
        "settled_above_start": table.settled.total,
        "members": members,
        **counts(queue, high_watermark, marks),
    }


def counts(queue: Queue, high_watermark: int, marks: EpochMarks) -> dict[str, int]:
    """Records by state. ``marks`` says where epochs begin: no record is there, and the queue need not have seen it."""
    table, window = queue.table, queue.window
    stories = table.stories.values()
    empty = sum(not table.is_settled(offset) for offset in marks(table.start, high_watermark))
    return {
        "unsettled": max(0, high_watermark - table.start - table.settled.total - empty),
        "ready": len(window.ready),
        "waiting": window.waiting,
        "delayed": len(window.scheduled) + len(window.backing_off),
        "leased": len(table.holder),
        "parked": sum(story.parked for story in stories),
        "dying": sum(story.dying is not None for story in stories),
    }


def explain(queue: Queue, offset: int, high_watermark: int, now_ms: int) -> dict[str, Any]:
    """Where a record is, and what it waits for."""
    table = queue.table
    story = table.story(offset)
    told: dict[str, Any] = {"offset": offset, "attempts": story.attempts if story else 0}
    if story is not None and story.history:
        told["history"] = [{"attempt": a, "reason": r, "detail": d} for a, r, d in story.history]
    lease = table.holder.get(offset)
    if offset >= high_watermark:
        state, detail = "not committed", 0
    elif table.is_settled(offset):
        state, detail = "settled", 0
    elif lease is not None:
        state, detail = "leased", 0
        told |= {
            "member": lease.member,
            "leased_for_ms": now_ms - lease.since_ms,
            "lease_ends_in_ms": lease.deadline_ms - now_ms,
        }
    elif story is not None and (story.parked or story.dying is not None):
        state, detail = "parked" if story.parked else "dying", 0
    else:
        state, detail = queue.window.place(offset)
    told["state"] = state
    if state == "waiting":
        if detail >= 0:
            told["behind"] = detail
            told["behind_state"] = explain(queue, detail, high_watermark, now_ms)["state"]
    elif state == "delayed":
        told["due_in_ms"] = max(0, detail - now_ms)
    if state in ("available", "waiting", "delayed", "not in window") and table.paused:
        told["paused"] = True
    if state == "available" and not queue.hungry:
        told["why"] = _nobody_asks(queue)
    elif state == "not in window":
        told["why"] = _not_looked_at(queue)
    return told


def _nobody_asks(queue: Queue) -> str:
    leases = queue.table.leases.values()
    if not leases:
        return "no receiver asks for records"
    records, receivers = len(queue.table.holder), len({lease.member for lease in leases})
    return f"no receiver asks for records: {receivers} have {records} that are not settled, and no room for more"


def _not_looked_at(queue: Queue) -> str:
    window = queue.window
    if len(window.ready) >= queue.config.heads or window.waiting >= queue.config.waiting:
        return f"{len(window.ready)} records before it are available and {window.waiting} wait behind others"
    return "it was not looked at yet: no receiver has asked for records since it came"
