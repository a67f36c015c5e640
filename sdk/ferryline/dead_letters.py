"""Dead letters of a topic: what is there and why, and back to where it came from.

::

    letters = client.dead_letters("orders")
    async for letter in letters.browse(reason="no stock"):
        print(letter.origin_topic, letter.origin_offset, letter.exception)
    done = await letters.redrive(reason="no stock", rate=100)

A redrive leases letters as the queue group `REDRIVE_GROUP`, sends each to its origin as a new record, and acknowledges
it when that is stored. So what was redriven is not redriven again, and a run that broke off is simply repeated: the new
record's id is made of the letter's place, and a queue delivers an id once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from ferryline.message import At
from ferryline.options import check_seconds
from ferryline.positions import look_up
from ferryline.protocol.dead_letters import (
    ADDED,
    HEADER_ATTEMPTS,
    HEADER_EXCEPTION,
    HEADER_GROUP,
    HEADER_HISTORY,
    HEADER_ORIGIN_OFFSET,
    HEADER_ORIGIN_PARTITION,
    HEADER_ORIGIN_TIMESTAMP,
    HEADER_ORIGIN_TOPIC,
    HEADER_REASON,
    HEADER_TRUNCATED,
    SUFFIX,
    dead_letters_of,
)
from ferryline.protocol.errors import UnknownGroup
from ferryline.protocol.limits import OFFSET_MAX, check_name, check_range
from ferryline.protocol.metadata import RetryPolicy, TopicMeta
from ferryline.protocol.queue_messages import HEADER_ID
from ferryline.queue_admin import Queue, StoredRecord

if TYPE_CHECKING:
    from ferryline.client import Client

REDRIVE_GROUP = "dead-letters"  # of the topic of dead letters: what it has settled was redriven
PAGE = 200
RATE_MAX = 1_000_000.0


class DeadLetter(msgspec.Struct, frozen=True):
    """A record that a queue gave up, and its story. ``origin_topic`` is "" if it is no dead letter at all.

    ``history``: of each attempt that told something, ``attempt``, ``reason`` and ``detail``, oldest first.
    """

    record: StoredRecord
    origin_topic: str
    origin_partition: int
    origin_offset: int
    origin_timestamp_ms: int
    group: str
    reason: str
    attempts: int
    exception: str
    history: list[dict[str, Any]]
    truncated: int  # bytes that are missing, for no batch could carry the whole

    @classmethod
    def of(cls, record: StoredRecord) -> DeadLetter:
        """What the headers of a record say; what they do not say is 0 or ""."""
        headers = record.headers

        def number(name: str) -> int:
            text = headers.text(name)
            return int(text) if text.isdigit() and len(text) < 20 else 0

        try:
            history = msgspec.json.decode(headers.get(HEADER_HISTORY) or b"[]", type=list[dict[str, Any]])
        except msgspec.DecodeError:
            history = []
        return cls(
            record,
            headers.text(HEADER_ORIGIN_TOPIC),
            number(HEADER_ORIGIN_PARTITION),
            number(HEADER_ORIGIN_OFFSET),
            number(HEADER_ORIGIN_TIMESTAMP),
            headers.text(HEADER_GROUP),
            headers.text(HEADER_REASON),
            number(HEADER_ATTEMPTS),
            headers.text(HEADER_EXCEPTION),
            history,
            number(HEADER_TRUNCATED),
        )

    @property
    def why_not(self) -> str:
        """Why it cannot be redriven; "" if it can."""
        if not self.origin_topic:
            return "it does not say where it came from"
        return f"{self.truncated} bytes of it are missing" if self.truncated else ""

    def resent(self, topic_id: str) -> list[tuple[str, bytes | None]]:
        """Headers of the record that is sent to the origin: its own, and an id by which repetitions are told."""
        own = [(name, value) for name, value in self.record.headers.pairs if name not in ADDED and name != HEADER_ID]
        return [*own, (HEADER_ID, f"redrive/{topic_id}/{self.record.partition}/{self.record.offset}".encode())]


def why_not(letter: DeadLetter, here: str, origin: TopicMeta | None) -> str:
    """Why a letter of topic ``here`` cannot go back to its origin, as that is known; "" if it can.

    Whoever may send to ``here`` can write what a letter says of itself. A redrive sends by the right of somebody else,
    so it goes only to topics whose dead letters come here.
    """
    if letter.why_not or origin is None:
        return letter.why_not
    if here in (dead_letters_of(origin.name, origin.config.retry), dead_letters_of(origin.name, RetryPolicy())):
        return ""
    return f"dead letters of {origin.name} go to another topic: it says that it came from there, and cannot have"


class Choice(msgspec.Struct, frozen=True):
    """Which letters are meant: all, or those of a key, with a reason that contains a text, given up by a group."""

    key: bytes | None = None
    reason: str = ""
    group: str = ""

    def takes(self, letter: DeadLetter) -> bool:
        if self.key is not None and letter.record.key != self.key:
            return False
        if self.group and letter.group != self.group:
            return False
        told = [letter.reason, *(str(one.get("reason", "")) for one in letter.history)]
        return not self.reason or any(self.reason in reason for reason in told)


class Redrive(msgspec.Struct):
    """How far a redrive has come. ``refused``: letters that stay, with why. ``left``: those that were not meant."""

    redriven: int = 0
    left: int = 0
    refused: list[tuple[DeadLetter, str]] = []
    origins: dict[str, int] = {}  # topic -> records sent there


Progress = Callable[[Redrive], None]


class DeadLetters:
    """Dead letters of a topic. Made by ``client.dead_letters``; nothing is sent before a method is called."""

    def __init__(self, client: Client, topic: str) -> None:
        self.topic = check_name(topic)
        self._client = client

    def __repr__(self) -> str:
        return f"<DeadLetters of {self.topic}>"

    async def name(self, *, timeout: float | None = None) -> str:
        """The topic that takes them, by the retry policy; given a topic of dead letters, that one."""
        if self.topic.endswith(SUFFIX):
            return self.topic
        meta = await self._client.learn_topic(self.topic, timeout=timeout)
        return dead_letters_of(meta.name, meta.config.retry)

    async def browse(
        self, *, key: str | bytes | None = None, reason: str = "", group: str = "", timeout: float | None = None
    ) -> AsyncGenerator[DeadLetter, None]:
        """Letters that were not redriven yet, as of now, partition by partition. Changes nothing.

        Raises UnknownTopic when nothing has died yet.
        """
        choice = _choice(key, reason, group)
        meta = await self._client.learn_topic(await self.name(timeout=timeout), timeout=timeout)
        ends = await self._ends(meta, timeout)
        for partition, end in ends.items():
            async for letter in self._page_through(meta, partition, end, timeout):
                if choice.takes(letter):
                    yield letter

    async def everything(self, partition: int, since_ms: int = 0) -> AsyncGenerator[DeadLetter, None]:
        """All letters of one partition that are there now, from a moment on: those that were redriven, too."""
        meta = await self._client.learn_topic(await self.name())
        end = (await self._ends(meta, None))[check_range(partition, "partition", 0, meta.config.partitions - 1)]
        async for record in self._read(meta.name, partition, At(since_ms), end):
            yield DeadLetter.of(record)

    async def redrive(
        self,
        *,
        key: str | bytes | None = None,
        reason: str = "",
        group: str = "",
        count: int = 0,
        rate: float = 0.0,
        dry_run: bool = False,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Redrive:
        """Send letters back to the topics they came from, as new records: order across them is not kept.

        ``count``: at most so many, 0 for all that are there now. ``rate``: records a second, 0 for no limit.
        ``timeout``: seconds without any headway after which it gives up; what was done stays done, so try again.
        """
        choice = _choice(key, reason, group)
        check_range(count, "count", 0, OFFSET_MAX)
        check_seconds(rate, "rate", 0.0, RATE_MAX)
        meta = await self._client.learn_topic(await self.name(timeout=timeout), timeout=timeout)
        done = Redrive()
        if dry_run:
            await self._count(meta, choice, count, done, timeout)
            return done
        from ferryline.redrive import Run

        limit = self._client.timeout if timeout is None else timeout
        run = Run(self._client, meta, choice, count, rate, done, progress or (lambda _: None), limit)
        await run.run(await self._ends(meta, timeout))
        return done

    # -- inside ------------------------------------------------------------------------------------

    async def _count(self, meta: TopicMeta, choice: Choice, count: int, done: Redrive, timeout: float | None) -> None:
        for partition, end in (await self._ends(meta, timeout)).items():
            async for letter in self._page_through(meta, partition, end, timeout):
                if not choice.takes(letter) or (count and done.redriven >= count):
                    done.left += 1
                elif why := why_not(letter, meta.name, self._client.routing.topic(letter.origin_topic)):
                    done.refused.append((letter, why))
                else:
                    done.redriven += 1
                    done.origins[letter.origin_topic] = done.origins.get(letter.origin_topic, 0) + 1

    async def _ends(self, meta: TopicMeta, timeout: float | None) -> dict[int, int]:
        """The high watermark of each partition: what dies from now on is not meant."""
        limit = self._client.timeout if timeout is None else timeout
        asked = {(meta.id, number): "end" for number in range(meta.config.partitions)}
        return {
            key[1]: found.high_watermark for key, found in sorted((await look_up(self._client, asked, limit)).items())
        }

    async def _page_through(
        self, meta: TopicMeta, partition: int, end: int, timeout: float | None
    ) -> AsyncGenerator[DeadLetter, None]:
        """Letters below ``end`` that no redrive has settled."""
        queue, at = Queue(self._client, meta.name, REDRIVE_GROUP), 0
        while at < end:
            try:
                page = await queue.peek(PAGE, partition=partition, offset=at, timeout=timeout)
            except UnknownGroup:
                async for record in self._read(meta.name, partition, at, end):
                    yield DeadLetter.of(record)
                return
            for record in page:
                if record.offset < end:
                    yield DeadLetter.of(record)
            if not page:
                return
            at = page[-1].offset + 1

    async def _read(self, topic: str, partition: int, start: int | At, end: int) -> AsyncGenerator[StoredRecord, None]:
        async with self._client.consumer(topic, partitions=[partition], start="start") as consumer:
            [place] = consumer.assignment
            lowest = await consumer.seek(place, "start")
            await consumer.seek(place, max(start, lowest) if isinstance(start, int) else start)
            while consumer.position(place) < end:
                for message in await consumer.pull(PAGE, 1.0):
                    if message.offset < end:
                        yield StoredRecord(
                            topic, partition, message.offset, message.timestamp_ms, message.key, message.raw,
                            message.headers,
                        )  # fmt: skip


def _choice(key: str | bytes | None, reason: str, group: str) -> Choice:
    return Choice(key.encode() if isinstance(key, str) else key, reason, check_name(group, "group") if group else "")
