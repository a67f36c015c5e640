"""A queue as a whole, for whoever looks after it: how much waits and why, what is next, stop, go on, empty, redrive.

::

    queue = client.queue("jobs", "media")
    for part in await queue.stats():
        print(part.partition, part.ready, part.parked)
    await queue.redrive(reason="no stock")

Every question goes to the primary of each partition and is repeated until answered or the deadline has come. Changes
are answered when they are committed; repeating one that was carried out changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ferryline.message import Headers
from ferryline.protocol.errors import FerrylineError, UnknownGroup
from ferryline.protocol.frames import Kind
from ferryline.protocol.limits import OFFSET_MAX, check_name, check_range
from ferryline.protocol.queue_messages import QueueAnswer, QueueAsk, QueueResult
from ferryline.protocol.records import decode_batch
from ferryline.requests import Key, ask_primaries

if TYPE_CHECKING:
    from ferryline.client import Client

PEEK_MAX = 10_000
_ANY_GROUP = "any"  # of a question that concerns no single group


class QueuePart(msgspec.Struct, frozen=True):
    """One partition of a queue. Counts are records.

    ``ready`` may be leased now, ``waiting`` stand behind another one of their lane, ``delayed`` are not due yet;
    records that were not looked at yet are in none of these. ``members``: records leased, by receiver.
    """

    partition: int
    start: int = 0  # everything below is settled
    high_watermark: int = 0
    scanned: int = 0  # records below were looked at
    settled_above_start: int = 0
    ready: int = 0
    waiting: int = 0
    delayed: int = 0
    leased: int = 0
    parked: int = 0
    dying: int = 0  # on their way to the dead letters
    paused: bool = False
    ordering: str = ""
    members: dict[str, int] = {}
    unsettled: int = 0  # not done yet, whatever their state


class StoredRecord(msgspec.Struct, frozen=True):
    """A record as it stands in the log, handed out to nobody."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers


class Redriven(msgspec.Struct, frozen=True):
    """Parked records that are available again (or would be), by partition."""

    offsets: dict[int, list[int]]

    @property
    def count(self) -> int:
        return sum(len(found) for found in self.offsets.values())


class Queue:
    """One queue group of a topic. Made by ``client.queue``; nothing is sent before a method is called.

    Every call ends within ``timeout`` seconds (default: the client's), with a value or a FerrylineError. It raises
    UnknownGroup when no receiver of the group ever asked for records of the topic.
    """

    def __init__(self, client: Client, topic: str, group: str) -> None:
        self.topic = check_name(topic)
        self.group = check_name(group, "group")
        self._client = client

    def __repr__(self) -> str:
        return f"<Queue {self.topic} of {self.group}>"

    # -- looking -----------------------------------------------------------------------------------

    async def stats(self, *, timeout: float | None = None) -> list[QueuePart]:
        """Each partition that the group has received from."""
        found = await self._ask("stats", None, timeout)
        return [msgspec.convert({**one.details, "partition": one.partition}, QueuePart) for one in found]

    async def explain(self, partition: int, offset: int, *, timeout: float | None = None) -> dict[str, Any]:
        """Where one record is and why it is not delivered: ``state`` and what belongs to it (docs/queues.md)."""
        check_range(offset, "offset", 0, OFFSET_MAX)
        [found] = await self._ask("explain", [partition], timeout, offset=offset)
        return found.details

    async def peek(
        self, count: int = 10, *, partition: int | None = None, offset: int = -1, timeout: float | None = None
    ) -> list[StoredRecord]:
        """The first records from ``offset`` on that are not settled, of each partition or of one. Leases nothing.

        Fewer than ``count`` come where one answer would be too large: go on behind the last one.
        """
        check_range(count, "count", 1, PEEK_MAX)
        found: list[StoredRecord] = []
        known = False
        for number in await self._partitions(partition, timeout):
            records = await self._peek_one(number, count - len(found), offset, timeout)
            known |= records is not None
            found += records or []
            if len(found) >= count:
                break
        if not known:
            raise self._unknown()
        return found

    # -- changing ----------------------------------------------------------------------------------

    async def pause(self, *, timeout: float | None = None) -> None:
        """Hand out no more; what is leased may be settled."""
        await self._ask("pause", None, timeout)

    async def resume(self, *, timeout: float | None = None) -> None:
        """Go on after `pause`."""
        await self._ask("resume", None, timeout)

    async def purge(self, *, dry_run: bool = False, timeout: float | None = None) -> int:
        """Settle everything there is, unread; the records stay in the topic for others. Returns how many."""
        found = await self._ask("purge", None, timeout, dry_run=dry_run)
        return sum(int(one.details.get("purged", 0)) for one in found)

    async def redrive(
        self,
        *,
        partition: int | None = None,
        count: int = 0,
        key: str | bytes | None = None,
        reason: str = "",
        dry_run: bool = False,
        timeout: float | None = None,
    ) -> Redriven:
        """Parked records are available again, where they stand, with no attempts behind them: their lanes go on.

        ``count``: at most so many in all, 0 for no limit. ``key``: of this key only. ``reason``: only those that a
        reason was given for which contains this. When an answer was lost, what was done already is not named again.
        """
        check_range(count, "count", 0, PEEK_MAX)
        raw = key.encode() if isinstance(key, str) else key
        offsets: dict[int, list[int]] = {}
        left = count
        for number in await self._partitions(partition, timeout):
            if count and left <= 0:
                break
            found = await self._ask(
                "redrive", [number], timeout, missing_ok=True, count=left, key=raw, reason=reason, dry_run=dry_run
            )
            for one in found:
                offsets[one.partition] = list(one.details.get("offsets", []))
                left -= len(offsets[one.partition]) if count else 0
        return Redriven({number: found for number, found in offsets.items() if found})

    async def delete(self, *, timeout: float | None = None) -> None:
        """Forget the group: what it settled, leased and parked. A receiver that comes back begins anew."""
        await self._ask("delete", None, timeout)

    # -- inside ------------------------------------------------------------------------------------

    def _limit(self, timeout: float | None) -> float:
        return self._client.timeout if timeout is None else timeout

    def _checked(self, partition: int, count: int) -> int:
        return check_range(partition, "partition", 0, count - 1)

    async def _partitions(self, partition: int | None, timeout: float | None) -> list[int]:
        meta = await self._client.learn_topic(self.topic, timeout=timeout)
        count = meta.config.partitions
        return list(range(count)) if partition is None else [self._checked(partition, count)]

    async def _ask(
        self,
        op: str,
        partitions: Sequence[int] | None,
        timeout: float | None,
        *,
        missing_ok: bool = False,
        **fields: Any,
    ) -> list[QueueResult]:
        """One result for each partition where the group is known. Raises the first refusal of another kind."""
        meta = await self._client.learn_topic(self.topic, timeout=timeout)
        count = meta.config.partitions
        chosen = range(count) if partitions is None else [self._checked(number, count) for number in partitions]
        keys = [(meta.id, number) for number in chosen]
        outcomes = await ask_queues(self._client, self.group, op, keys, self._limit(timeout), **fields)
        known = [one for one in outcomes.values() if not isinstance(one, FerrylineError)]
        for error in outcomes.values():
            if isinstance(error, FerrylineError) and not isinstance(error, UnknownGroup):
                raise error
        if not known and not missing_ok:
            raise self._unknown()
        return sorted(known, key=lambda one: one.partition)

    async def _peek_one(
        self, partition: int, count: int, offset: int, timeout: float | None
    ) -> list[StoredRecord] | None:
        """None: the group is not known there."""
        meta = await self._client.learn_topic(self.topic, timeout=timeout)
        key, payloads = (meta.id, partition), dict[Key, memoryview]()
        asked = {"count": count, "offset": offset}
        found = await ask_queues(self._client, self.group, "peek", [key], self._limit(timeout), payloads, **asked)
        outcome = found[key]
        if isinstance(outcome, UnknownGroup):
            return None
        if isinstance(outcome, FerrylineError):
            raise outcome
        data = payloads[key]
        records = decode_batch(data) if data else iter(())
        return [
            StoredRecord(self.topic, partition, at, one.timestamp, one.key, one.value, Headers(one.headers))
            for at, one in zip(outcome.details["offsets"], records, strict=True)
        ]

    def _unknown(self) -> UnknownGroup:
        return UnknownGroup(f"group {self.group!r} has never received from {self.topic}", group=self.group)


async def ask_queues(
    client: Client,
    group: str,
    op: str,
    keys: Sequence[Key],
    timeout: float,
    payloads: dict[Key, memoryview] | None = None,
    **fields: Any,
) -> dict[Key, QueueResult | FerrylineError]:
    """What each partition says; ``payloads`` takes what comes with it."""

    def header(asked: list[Key]) -> QueueAsk:
        return QueueAsk(group, op, asked, **fields)

    return await ask_primaries(client, Kind.QUEUE, keys, header, QueueAnswer, timeout=timeout, payloads=payloads)


async def groups_of(client: Client, topic: str, *, timeout: float | None = None) -> dict[str, list[int]]:
    """The queue groups that have received from a topic, each with its partitions."""
    meta = await client.learn_topic(topic, timeout=timeout)
    keys = [(meta.id, number) for number in range(meta.config.partitions)]
    outcomes = await ask_queues(client, _ANY_GROUP, "groups", keys, client.timeout if timeout is None else timeout)
    found: dict[str, list[int]] = {}
    for key, one in sorted(outcomes.items()):
        if isinstance(one, FerrylineError):
            raise one
        for group in one.details["groups"]:
            found.setdefault(group, []).append(key[1])
    return found
