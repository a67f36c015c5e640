"""What requests about queues must be before anybody looks further: their ranges, and the words they may use."""

from __future__ import annotations

from collections.abc import Sequence

from ferryline.protocol.errors import InvalidArgument, MalformedRequest
from ferryline.protocol.limits import FRAME_ENTRIES_MAX, OFFSET_MAX, check_name, check_range
from ferryline.protocol.queue_messages import ACTIONS, SettleEntry
from ferryline_broker.queue_requests import RECORDS_MAX

LEASE_MS_MIN, LEASE_MS_MAX = 1_000, 12 * 3_600_000
DELAY_MS_MAX = 366 * 86_400_000
REASON_CHARS_MAX, DETAIL_CHARS_MAX = 256, 4_096
MEMBER_CHARS_MAX = 256


def check_group(group: str, member: str, entries: int) -> None:
    check_name(group, "group")
    if len(member) > MEMBER_CHARS_MAX:
        raise InvalidArgument(f"member: {len(member)} characters, limit {MEMBER_CHARS_MAX}", field="member")
    if not 0 < entries <= FRAME_ENTRIES_MAX:
        raise MalformedRequest(f"entries: {entries} is outside 1..{FRAME_ENTRIES_MAX}")


def check_distinct(entries: Sequence[tuple[str, int]]) -> None:
    """One partition ten thousand times over would be looked at, answered and remembered so often."""
    if len(set(entries)) != len(entries):
        raise MalformedRequest("entries: a partition is named twice")


def check_one_of(value: str, what: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InvalidArgument(f"{what}: {value[:32]!r} is not one of {', '.join(known)}", field=what)


def check_settle(entry: SettleEntry) -> None:
    """Raises InvalidArgument, naming what is out of its range."""
    check_one_of(entry.action, "action", ACTIONS)
    check_range(entry.delay_ms, "delay_ms", -1, DELAY_MS_MAX)
    if not 0 < len(entry.offsets) <= RECORDS_MAX:
        raise InvalidArgument(f"offsets: {len(entry.offsets)} is outside 1..{RECORDS_MAX}", field="offsets")
    check_range(min(entry.offsets), "offsets", 0, OFFSET_MAX)
    check_range(max(entry.offsets), "offsets", 0, OFFSET_MAX)
    if len(entry.reason) > REASON_CHARS_MAX:
        raise InvalidArgument(f"reason: {len(entry.reason)} characters, limit {REASON_CHARS_MAX}", field="reason")
    if len(entry.detail) > DETAIL_CHARS_MAX:
        raise InvalidArgument(f"detail: {len(entry.detail)} characters, limit {DETAIL_CHARS_MAX}", field="detail")
