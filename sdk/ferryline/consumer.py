"""The consumer: reads partitions in order, alone or as a member of a group.

What an application was given counts as processed when it comes back for more; auto-commit commits only that, never what
was just handed out. An explicit `Consumer.commit` commits everything handed out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ferryline.assignment import Assignment
from ferryline.fetcher import Fetcher
from ferryline.message import Message, TopicPartition
from ferryline.options import ConsumerOptions, OnPartitions, Where, check_wait, check_where
from ferryline.partition import Partition
from ferryline.positions import behind, committed, look_up
from ferryline.protocol.errors import (
    ClientClosed,
    FerrylineError,
    InvalidArgument,
    UnknownPartition,
    UnknownTopic,
)
from ferryline.protocol.limits import COMMIT_METADATA_BYTES_MAX, OFFSET_MAX, check_range
from ferryline.reader import Reader
from ferryline.requests import Key
from ferryline.subscription import Handler, Subscription

if TYPE_CHECKING:
    from ferryline.client import Client

log = logging.getLogger("ferryline.consumer")

T = TypeVar("T")
# So many records that were waited for are handed out before the next fetch is written, which takes as long as all else
# that they go through here. With more, or with what was at hand, brokers are to read ahead while these are worked on.
_AT_ONCE = 64
Position = tuple[str, int]  # (topic, partition), as TopicPartition


class Consumer(Generic[T]):
    """Reads one or several topics. Made by ``client.consumer()``; use it with ``async with``, or `start` and `close`.

    With ``group`` the members of the group share the partitions and the group remembers how far it has come. Without,
    it reads all partitions (or those given) on its own. One reader at a time: iteration, `batches`, `pull` and
    `subscribe` exclude each other.

    ``value``: the type of values (default bytes, as they are). ``start``: where to begin where the group has committed
    nothing: "start", "end", an offset or `at`.
    """

    def __init__(
        self,
        client: Client,
        topics: str | Sequence[str],
        *,
        group: str | None = None,
        value: Any = bytes,
        start: Where = "start",
        partitions: Iterable[int] | None = None,
        auto_commit: bool = True,
        auto_commit_interval: float = 1.0,
        instance_id: str = "",
        session_timeout: float = 45.0,
        max_processing: float = 3600.0,
        partition_bytes: int = 1024 * 1024,
        buffer_bytes: int = 64 * 1024 * 1024,
        check_crcs: bool = True,
        on_assign: OnPartitions | None = None,
        on_revoke: OnPartitions | None = None,
    ) -> None:
        self._client = client
        self._options = ConsumerOptions.checked(
            topics,
            group=group,
            value=value,
            start=start,
            partitions=partitions,
            auto_commit=auto_commit,
            auto_commit_interval=auto_commit_interval,
            instance_id=instance_id,
            session_timeout=session_timeout,
            max_processing=max_processing,
            partition_bytes=partition_bytes,
            buffer_bytes=buffer_bytes,
            check_crcs=check_crcs,
            on_assign=on_assign,
            on_revoke=on_revoke,
        )
        self._fetcher: Fetcher | None = None
        self._reader: Reader | None = None
        self._assignment: Assignment | None = None
        self._closed = False

    # -- life --------------------------------------------------------------------------------------

    async def __aenter__(self) -> Consumer[T]:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Join the group, or look up where to begin. Raises UnknownTopic, ConnectionFailed, DeadlineExceeded."""
        if self._closed:
            raise ClientClosed("the consumer is closed")
        if self._fetcher is not None:
            return
        options = self._options
        await self._client.start()
        metas = [await self._client.learn_topic(name) for name in options.topics]
        self._fetcher = Fetcher(
            self._client, partition_bytes=options.partition_bytes, buffer_bytes=options.buffer_bytes
        )
        self._reader = reader = Reader(self._fetcher, self._finished)
        self._assignment = Assignment(self._client, options, self._fetcher, reader)
        self._client.closables.append(self)
        try:
            await self._assignment.start(metas)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Commit what was processed (with auto-commit), leave the group, stop fetching. Bounded by a few seconds."""
        if self._closed:
            return
        self._closed = True
        if self._fetcher is None or self._assignment is None:
            return
        try:
            await self._assignment.close()
        finally:
            await self._fetcher.close()
            if self in self._client.closables:
                self._client.closables.remove(self)

    def _finished(self, partition: Partition) -> None:
        if self._assignment is not None:
            self._assignment.finished(partition)

    # -- reading -----------------------------------------------------------------------------------

    def __aiter__(self) -> Consumer[T]:
        return self

    async def __anext__(self) -> Message[T]:
        """The next record; ends when the consumer is closed. Raises LogTruncated, OffsetOutOfRange, UnknownTopic."""
        reader = self._reader or self._not_started()
        partition = reader.reading
        if partition is not None and partition.index < partition.count:
            # The common path: the record before this one is finished, the next is at hand.
            partition.processed = partition.position
            message: Message[T] = partition.messages[partition.index]
            partition.index += 1
            partition.position = message.offset + 1
            return message
        reader.finish()
        if self._running().due:
            await self._running().breathe()
        while not self._closed:
            found = reader.one()
            if found is not None:
                return found
            await self._running().news(None)
        raise StopAsyncIteration

    async def pull(self, max_records: int = 500, max_wait: float = 1.0) -> list[Message[T]]:
        """What is there now, up to ``max_records``; waits for something at most ``max_wait`` seconds, then is empty."""
        check_range(max_records, "max_records", 1, 10_000_000)
        reader, loop = self._reader or self._not_started(), asyncio.get_running_loop()
        reader.finish()
        deadline = loop.time() + check_wait(max_wait)
        waited = False
        while True:
            if self._closed:
                raise ClientClosed("the consumer is closed")
            batch = reader.some(max_records)
            if batch:
                if waited and len(batch) <= _AT_ONCE:
                    return batch
                try:
                    await self._running().breathe()
                except BaseException:
                    reader.put_back(batch)
                    raise
                return batch
            if not await self._running().news(deadline - loop.time()):
                return batch
            waited = True

    async def batches(self, max_records: int = 500, max_wait: float = 1.0) -> AsyncIterator[list[Message[T]]]:
        """Lists of records: full ones, or what came within ``max_wait`` seconds after the first. Never empty."""
        check_range(max_records, "max_records", 1, 10_000_000)
        check_wait(max_wait)
        reader = self._reader or self._not_started()
        while True:
            reader.finish()
            batch: list[Message[T]] = []
            try:
                waited = await self._fill(batch, max_records, max_wait)
                if not waited or len(batch) > _AT_ONCE:
                    await self._running().breathe()
            except BaseException:
                reader.put_back(batch)
                raise
            if self._closed:
                return
            yield batch

    async def _fill(self, batch: list[Message[T]], limit: int, max_wait: float) -> bool:
        """Returns whether it had to wait, so that the loop has run."""
        fetcher, loop = self._running(), asyncio.get_running_loop()
        reader = self._reader or self._not_started()
        deadline: float | None = None
        waited = False
        while len(batch) < limit and not self._closed:
            try:
                more = reader.some(limit - len(batch))
            except FerrylineError as error:
                if not batch:
                    raise
                reader.fail(error)  # what was gathered goes first
                break
            if more:
                batch += more
                deadline = deadline or loop.time() + max_wait
                continue
            left = None if deadline is None else deadline - loop.time()
            waited = waited or left is None or left > 0
            if not await fetcher.news(left):
                break
        return waited

    def subscribe(self, handler: Handler) -> Subscription:
        """Call ``handler(message)``, sync or async, for each record, in order, until the subscription is stopped.

        Prefetch is bounded by ``buffer_bytes``. A record counts as processed when the handler has returned. What the
        handler raises ends the subscription, and awaiting it raises that.
        """
        return Subscription(self, handler)

    def finished(self) -> None:
        """Say that what was handed out last is processed, without asking for more."""
        (self._reader or self._not_started()).finish()

    def _running(self) -> Fetcher:
        if self._fetcher is None:
            self._not_started()
        assert self._fetcher is not None
        return self._fetcher

    def _not_started(self) -> Reader:
        raise ClientClosed("the consumer was not started: use `async with`, or await start()")

    # -- positions ---------------------------------------------------------------------------------

    @property
    def assignment(self) -> list[TopicPartition]:
        """The partitions that this consumer reads now."""
        if self._fetcher is None:
            return []
        sources = [partition.source for partition in self._fetcher.partitions.values()]
        return sorted(TopicPartition(source.topic, source.partition) for source in sources)

    def position(self, partition: Position) -> int:
        """The next offset that the application will be given. Raises InvalidArgument if it is not read here."""
        return self._find(partition).position

    def pause(self, *partitions: Position) -> None:
        """Hand nothing out of these partitions (default: all) until `resume`; the membership goes on."""
        for partition in self._several(partitions):
            partition.paused = True
            (self._reader or self._not_started()).leave(partition)

    def resume(self, *partitions: Position) -> None:
        """Go on where `pause` stopped."""
        fetcher = self._running()
        for partition in self._several(partitions):
            partition.paused = False
            fetcher.offer(partition)
        fetcher.schedule()

    async def seek(self, partition: Position, where: Where, *, timeout: float | None = None) -> int:
        """Go on from an offset, from "start" or "end", or from a moment (`at`, or a datetime). Returns the offset.

        With auto-commit the group follows, also backwards.
        """
        target = self._find(partition)
        goal = check_where(where, "where")
        offset = goal
        if not isinstance(offset, int):
            found = await look_up(self._client, {target.key: goal}, timeout or self._client.timeout)
            offset = found[target.key].offset
            target = self._find(partition)
        (self._reader or self._not_started()).forget(target)
        target.jump(offset)
        target.rewound = True
        target.policy = False
        self._running().schedule()
        return offset

    async def lag(self, *, timeout: float | None = None) -> dict[TopicPartition, int]:
        """Committed records from the position on, by partition: 0 where everything is read."""
        partitions = dict(self._running().partitions)
        positions = {key: partition.position for key, partition in partitions.items()}
        found = await behind(self._client, positions, timeout or self._client.timeout)
        sources = {key: partition.source for key, partition in partitions.items()}
        return {TopicPartition(sources[key].topic, sources[key].partition): count for key, count in found.items()}

    async def committed(self, partition: Position, *, timeout: float | None = None) -> int | None:
        """What the group has committed in a partition; None: nothing yet."""
        if self._options.group is None:
            raise InvalidArgument("group: a consumer without a group commits nothing", field="group")
        key = self._key(partition)
        found = await committed(self._client, self._options.group, [key], timeout or self._client.timeout)
        return found[key].offset if found[key].offset >= 0 else None

    async def commit(
        self,
        offsets: Mapping[TopicPartition, int] | Message[Any] | None = None,
        *,
        metadata: str = "",
        timeout: float | None = None,
    ) -> None:
        """Remember for the group how far it has come: everything handed out, or up to a message, or given offsets.

        An offset is that of the next record to read. Durable when this returns. Raises StaleMember when a partition
        belongs to another member by now, DeadlineExceeded, RequestTimedOut.
        """
        if self._options.group is None:
            raise InvalidArgument("group: a consumer without a group commits nothing", field="group")
        if len(metadata.encode()) > COMMIT_METADATA_BYTES_MAX:
            raise InvalidArgument(f"metadata: over {COMMIT_METADATA_BYTES_MAX} bytes", field="metadata")
        wanted: dict[Partition, int] = {}
        if offsets is None:
            partitions = self._running().partitions.values()
            wanted = {item: item.position for item in partitions if item.position != item.committed}
        elif isinstance(offsets, Message):
            wanted[self._find((offsets.topic, offsets.partition))] = offsets.offset + 1
        else:
            for position, offset in offsets.items():
                wanted[self._find(position)] = check_range(offset, "offset", 0, OFFSET_MAX)
        if wanted and self._assignment is not None:
            await self._assignment.commit(wanted, metadata, timeout or self._client.timeout)

    def _key(self, partition: Position) -> Key:
        topic, number = partition
        meta = self._client.routing.topic(topic)
        if meta is None:
            raise UnknownTopic(f"topic: {topic!r} does not exist", field="topic", topic=topic)
        if not 0 <= number < meta.config.partitions:
            raise UnknownPartition(f"partition: {number} is not in 0..{meta.config.partitions - 1}", field="partition")
        return (meta.id, number)

    def _find(self, partition: Position) -> Partition:
        found = self._running().partitions.get(self._key(partition))
        if found is None:
            raise InvalidArgument(f"partition: {partition[0]}/{partition[1]} is not read here", field="partition")
        return found

    def _several(self, partitions: tuple[Position, ...]) -> list[Partition]:
        if not partitions:
            return list(self._running().partitions.values())
        return [self._find(partition) for partition in partitions]
