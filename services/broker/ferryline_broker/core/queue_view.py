"""What an operator may want to know of a queue in one partition. Pure; changes nothing."""

from __future__ import annotations

from typing import Any

from ferryline_broker.core.queue import Queue


def stats(queue: Queue, high_watermark: int) -> dict[str, Any]:
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
        **counts(queue, high_watermark),
    }


def counts(queue: Queue, high_watermark: int) -> dict[str, int]:
    """Records by state. ``unsettled`` counts offsets that hold no record (control batches) until they are seen."""
    table, window = queue.table, queue.window
    stories = table.stories.values()
    return {
        "unsettled": max(0, high_watermark - table.start - table.settled.total),
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
    story = table.stories.get(offset)
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
        told["behind"] = detail
    elif state == "delayed":
        told["due_in_ms"] = max(0, detail - now_ms)
    if state in ("available", "waiting") and table.paused:
        told["paused"] = True
    if state == "available" and not queue.hungry:
        told["why"] = "no receiver asks for records"
    return told
