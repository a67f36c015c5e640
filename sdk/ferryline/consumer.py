"""The consumer: reads partitions in order, alone or as a member of a group.

What an application was given counts as processed when it comes back for more; auto-commit commits only that, never what
was just handed out. An explicit `Consumer.commit` commits everything handed out.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ferryline.core.membership import OpenPartition
from ferryline.fetcher import Fetcher, Partition, located
from ferryline.membership import Membership
from ferryline.message import At, Message, Source, TopicPartition, at
from ferryline.producer import check_seconds
from ferryline.protocol.errors import (
    ClientClosed,
    CorruptBatch,
    FerrylineError,
    InvalidArgument,
    StaleMember,
    UnknownPartition,
    UnknownTopic,
)
from ferryline.protocol.frames import Kind
from ferryline.protocol.limits import COMMIT_METADATA_BYTES_MAX, OFFSET_MAX, check_name, check_range
from ferryline.protocol.messages import (
    Commit,
    CommitEntry,
    Committed,
    CommittedAnswer,
    CommittedResult,
    Offsets,
    OffsetsAnswer,
    OffsetsEntry,
    OffsetsResult,
)
from ferryline.protocol.metadata import TopicMeta
from ferryline.requests import Key, ask_primaries
from ferryline.serializers import decoder_for

if TYPE_CHECKING:
    from ferryline.client import Client

log = logging.getLogger("ferryline.consumer")

T = TypeVar("T")
Where = int | str | At | datetime
Position = tuple[str, int]  # (topic, partition), a TopicPartition
Handler = Callable[[Message[Any]], Awaitable[None] | None]
ERROR_PAUSE_S = 0.5  # before a partition whose error was raised is fetched again
_STARTS = {"start": "start", "earliest": "start", "end": "end", "latest": "end"}


class Consumer(Generic[T]):
    """Reads one or several topics. Made by ``client.consumer()``; use it with ``async with``, or `start` and `close`.

    With ``group`` the members of the group share the partitions and the group remembers how far it has come. Without,
    it reads all partitions (or those given) on its own. One reader at a time: iteration, `batches`, `pull` and
    `subscribe` exclude each other.

    ``value``: the type of values (default bytes, as they are). ``start``: where to begin where the group has committed
    nothing: "start", "end" or `at`.
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
        on_assign: Callable[[list[TopicPartition]], None] | None = None,
        on_revoke: Callable[[list[TopicPartition]], None] | None = None,
    ) -> None:
        self.topics = tuple(dict.fromkeys([topics] if isinstance(topics, str) else topics))
        if not self.topics:
            raise InvalidArgument("topics: at least one is needed", field="topics")
        for name in self.topics:
            check_name(name)
        if group is not None:
            check_name(group, "group")
        self.group = group
        self._client = client
        self._decode = decoder_for(value)
        self._start_at = _where(start, "start")
        self._chosen = None if partitions is None else sorted(set(partitions))
        if self._chosen is not None and len(self.topics) > 1:
            raise InvalidArgument("partitions: can be chosen for one topic only", field="partitions")
        self._auto_commit = auto_commit and group is not None
        self._auto_commit_s = check_seconds(auto_commit_interval, "auto_commit_interval", 0.01, 3600.0)
        self._instance_id = check_name(instance_id, "instance_id") if instance_id else ""
        self._session_ms = int(check_seconds(session_timeout, "session_timeout", 1.0, 3600.0) * 1000)
        self._max_processing_s = check_seconds(max_processing, "max_processing", 1.0, 7 * 86_400.0)
        check_range(partition_bytes, "partition_bytes", 1024, 16 * 1024 * 1024)
        check_range(buffer_bytes, "buffer_bytes", partition_bytes, 2**40)
        self._partition_bytes, self._buffer_bytes = partition_bytes, buffer_bytes
        self._check_crcs = check_crcs
        self._on_assign, self._on_revoke = on_assign, on_revoke
        self._fetcher: Fetcher | None = None
        self._membership: Membership | None = None
        self._hands: list[Partition] = []  # what the application was given last comes from these
        self._reading: Partition | None = None  # iteration goes on here
        self._handed_out = 0
        self._error: FerrylineError | None = None  # the membership failed
        self._committer: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = False
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
        if self._started:
            return
        await self._client.start()
        metas = [await self._client.learn_topic(name) for name in self.topics]
        self._started = True
        self._fetcher = Fetcher(self._client, partition_bytes=self._partition_bytes, buffer_bytes=self._buffer_bytes)
        self._client.closables.append(self)
        if self.group is not None and self._chosen is None:
            self._membership = Membership(
                self._client,
                self.group,
                self.topics,
                instance_id=self._instance_id,
                session_ms=self._session_ms,
                max_processing_s=self._max_processing_s,
                progress=self._progress,
                opened=self._opened,
                revoked=self._revoked,
                dropped=self._dropped,
                failed=self._failed,
            )
            await self._membership.start()
        else:
            try:
                await self._assign(metas)
            except BaseException:
                await self.close()
                raise
        if self._auto_commit:
            self._committer = asyncio.get_running_loop().create_task(self._commit_now_and_then())

    async def close(self) -> None:
        """Commit what was processed (with auto-commit), leave the group, stop fetching. Bounded by a few seconds."""
        if self._closed:
            return
        self._closed = True
        if not self._started or self._fetcher is None:
            return
        if self._committer is not None:
            self._committer.cancel()
        for task in list(self._tasks):
            task.cancel()
        try:
            if self._auto_commit:
                await self._commit_processed(timeout=3.0)
        except FerrylineError as error:
            log.warning("closing: %s", error)
        finally:
            if self._membership is not None:
                await self._membership.leave()
            await self._fetcher.close()
            if self in self._client.closables:
                self._client.closables.remove(self)

    async def _assign(self, metas: list[TopicMeta]) -> None:
        """Read partitions without a membership. With a group, go on where it stands."""
        assert self._fetcher is not None
        keys: list[tuple[Key, Source]] = []
        for meta in metas:
            numbers = self._chosen if self._chosen is not None else range(meta.config.partitions)
            for number in numbers:
                if not 0 <= number < meta.config.partitions:
                    raise UnknownPartition(
                        f"partitions: {number} is not in 0..{meta.config.partitions - 1} of topic {meta.name}",
                        field="partitions",
                    )
                keys.append(((meta.id, number), Source(meta.name, number, self._decode)))
        timeout = self._client.timeout
        known: dict[Key, CommittedResult] = {}
        if self.group is not None:
            known = await self._positions_of_group([key for key, _ in keys], timeout)
        missing = [key for key, _ in keys if key not in known or known[key].offset < 0]
        looked_up = await self._look_up(dict.fromkeys(missing, self._start_at), timeout) if missing else {}
        for key, source in keys:
            if key in looked_up:
                partition = Partition(key, source, looked_up[key].offset, check=self._check_crcs)
                partition.policy = True
            else:
                found = known[key]
                partition = Partition(key, source, found.offset, found.offset_epoch, check=self._check_crcs)
                partition.committed = found.offset
            self._fetcher.add(partition)

    # -- what the membership decides -----------------------------------------------------------------

    def _opened(self, opening: OpenPartition) -> None:
        meta = self._client.routing.cluster.topics.get(opening.key[0])
        if meta is None or self._fetcher is None:
            return
        source = Source(meta.name, opening.key[1], self._decode)
        if opening.offset >= 0:
            offset, fresh = opening.offset, False
        elif self._start_at == "start":
            offset, fresh = opening.log_start, True
        elif self._start_at == "end":
            offset, fresh = opening.high_watermark, True
        else:
            self._spawn(self._open_at(opening, source))
            return
        self._open(opening, source, max(offset, 0), fresh=fresh)

    async def _open_at(self, opening: OpenPartition, source: Source) -> None:
        """The start policy is a moment or an offset: the broker knows where that is."""
        while not self._closed and self._is_ours(opening):
            try:
                found = await self._look_up({opening.key: self._start_at}, self._client.timeout)
            except FerrylineError as error:
                log.warning("%s/%d: %s", source.topic, source.partition, error)
                await asyncio.sleep(0.2)
                continue
            if self._is_ours(opening):
                self._open(opening, source, found[opening.key].offset, fresh=True)
            return

    def _is_ours(self, opening: OpenPartition) -> bool:
        return self._membership is not None and self._membership.generation(opening.key) == opening.generation

    def _open(self, opening: OpenPartition, source: Source, offset: int, *, fresh: bool) -> None:
        assert self._fetcher is not None
        partition = Partition(
            opening.key, source, offset, -1 if fresh else opening.offset_epoch, check=self._check_crcs
        )
        partition.generation = opening.generation
        partition.committed = opening.offset
        partition.policy = fresh
        partition.high_watermark, partition.log_start = opening.high_watermark, opening.log_start
        self._fetcher.add(partition)
        if self._on_assign is not None:
            self._on_assign([TopicPartition(source.topic, source.partition)])

    def _revoked(self, key: Key) -> None:
        partition = self._fetcher.partitions.get(key) if self._fetcher is not None else None
        if partition is None:  # the start position was still being looked up
            self._release(key)
            return
        partition.revoked = True
        partition.drop()
        if self._reading is partition:
            self._reading = None
        if partition not in self._hands:
            self._spawn(self._let_go(partition))

    async def _let_go(self, partition: Partition) -> None:
        """The application is done with a revoked partition: commit what it finished, then release."""
        try:
            if self._auto_commit and partition.processed != partition.committed and not partition.gone:
                await self._commit({partition: partition.processed}, "", self._client.timeout)
        except FerrylineError as error:
            log.warning("%s/%d was given up: %s", *partition.key, error)
        if not partition.gone:
            self._forget(partition)
            self._release(partition.key, partition.generation)

    def _release(self, key: Key, generation: int | None = None) -> None:
        if self._membership is not None:
            held = self._membership.generation(key) if generation is None else generation
            if held is not None:
                self._membership.released(key, held)

    def _dropped(self, key: Key) -> None:
        partition = self._fetcher.partitions.get(key) if self._fetcher is not None else None
        if partition is not None:
            log.info("%s/%d belongs to another member now", partition.source.topic, partition.source.partition)
            self._forget(partition)

    def _forget(self, partition: Partition) -> None:
        assert self._fetcher is not None
        self._fetcher.remove(partition.key)
        if partition in self._hands:
            self._hands.remove(partition)
        if self._reading is partition:
            self._reading = None
        if self._on_revoke is not None:
            self._on_revoke([TopicPartition(partition.source.topic, partition.source.partition)])

    def _failed(self, error: FerrylineError) -> None:
        self._error = error
        if self._fetcher is not None:
            self._fetcher.wake()

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- reading -----------------------------------------------------------------------------------

    def __aiter__(self) -> Consumer[T]:
        return self

    async def __anext__(self) -> Message[T]:
        """The next record; ends when the consumer is closed. Raises LogTruncated, OffsetOutOfRange, UnknownTopic."""
        partition = self._reading
        if partition is not None and partition.index < partition.count:
            # The common path: the record before this one is finished, the next is at hand.
            partition.processed = partition.position
            message: Message[T] = partition.messages[partition.index]
            partition.index += 1
            partition.position = message.offset + 1
            return message
        while True:
            self._finish()
            if self._closed:
                raise StopAsyncIteration
            partition = self._next_ready()
            if partition is None:
                await self._wait(None)
                continue
            taken = self._decoded(partition, 1)
            if taken:
                self._hand_out([partition])
                self._reading = partition
                self._refill(partition)
                return taken[0]
            self._refill(partition)

    async def pull(self, max_records: int = 500, max_wait: float = 1.0) -> list[Message[T]]:
        """What is there now, up to ``max_records``; waits for something at most ``max_wait`` seconds, then is empty."""
        check_range(max_records, "max_records", 1, 10_000_000)
        self._finish()
        deadline = asyncio.get_running_loop().time() + max_wait
        while True:
            if self._closed:
                raise ClientClosed("the consumer is closed")
            batch = self._gather(max_records)
            if batch or not await self._wait(deadline - asyncio.get_running_loop().time()):
                return batch

    async def batches(self, max_records: int = 500, max_wait: float = 1.0) -> AsyncIterator[list[Message[T]]]:
        """Lists of records: full ones, or what came within ``max_wait`` seconds after the first. Never empty."""
        check_range(max_records, "max_records", 1, 10_000_000)
        loop = asyncio.get_running_loop()
        while True:
            self._finish()
            batch: list[Message[T]] = []
            deadline: float | None = None
            while len(batch) < max_records:
                if self._closed:
                    return
                more = self._gather(max_records - len(batch))
                if more:
                    batch = batch + more if batch else more
                    deadline = deadline or loop.time() + max_wait
                elif not await self._wait(None if deadline is None else deadline - loop.time()):
                    break
            yield batch

    def subscribe(self, handler: Handler) -> Subscription:
        """Call ``handler(message)``, sync or async, for each record, in order, until the subscription is stopped.

        Prefetch is bounded by ``buffer_bytes``. A record counts as processed when the handler has returned. What the
        handler raises ends the subscription, and awaiting it raises that.
        """
        return Subscription(self, handler)

    def _finish(self) -> None:
        """The application is back: what it was given is processed."""
        if not self._started:
            raise ClientClosed("the consumer was not started: use `async with`, or await start()")
        if self._hands:
            hands, self._hands = self._hands, []
            self._reading = None
            for partition in hands:
                partition.processed = partition.position
                if partition.revoked and not partition.gone:
                    self._spawn(self._let_go(partition))

    def _hand_out(self, partitions: list[Partition]) -> None:
        self._hands = partitions
        self._handed_out += 1
        for partition in partitions:
            partition.policy = False

    def _next_ready(self, *, raising: bool = True) -> Partition | None:
        """The next partition with data, in turn. Raises the error of a partition once its data is used up.

        With ``raising`` False the error stays for the next call, so that records already gathered are handed out.
        """
        fetcher = self._running()
        if self._error is not None and raising:
            error, self._error = self._error, None
            raise error
        ready = fetcher.ready
        while ready:
            partition = ready.popleft()
            partition.queued = False
            if partition.gone or partition.revoked or partition.paused:
                continue
            if partition.has_data:
                return partition
            if partition.error is not None:
                if not raising:
                    partition.queued = True
                    ready.appendleft(partition)
                    return None
                error = partition.error
                partition.error = None  # raised again if it is still so at the next fetch
                partition.retry_at = asyncio.get_running_loop().time() + ERROR_PAUSE_S
                fetcher.schedule()
                raise error
        return None

    def _refill(self, partition: Partition) -> None:
        """Queue it again if there is more, and fetch if it runs low."""
        fetcher = self._running()
        fetcher.offer(partition)
        if not partition.ticket and partition.buffered <= self._partition_bytes // 2:
            fetcher.schedule()

    def _gather(self, limit: int) -> list[Message[T]]:
        """Records at hand, from as many partitions as it takes."""
        batch: list[Message[T]] = []
        while len(batch) < limit:
            partition = self._next_ready(raising=not batch)
            if partition is None:
                break
            taken = self._decoded(partition, limit - len(batch))
            if taken:
                batch = batch + taken if batch else taken
                if partition not in self._hands:
                    self._hand_out([*self._hands, partition])
            self._refill(partition)
        return batch

    def _decoded(self, partition: Partition, limit: int) -> list[Message[T]]:
        """Take records; bytes that do not decode are fetched again after their error was raised."""
        try:
            return partition.take(limit)
        except CorruptBatch as error:
            located_error = located(error, partition)
            partition.drop()
            partition.retry_at = asyncio.get_running_loop().time() + ERROR_PAUSE_S
            self._running().schedule()
            raise located_error from None

    async def _wait(self, timeout: float | None) -> bool:
        return await self._running().news(timeout)

    def _running(self) -> Fetcher:
        if self._fetcher is None:
            raise ClientClosed("the consumer was not started: use `async with`, or await start()")
        return self._fetcher

    def _progress(self) -> object:
        """Changes whenever the application takes a record; None while it waits for one. Read by another thread."""
        partition = self._reading
        return (self._handed_out, partition.index if partition is not None else 0) if self._hands else None

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
            if self._reading is partition:
                self._reading = None

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
        goal = _where(where, "where")
        offset = goal
        if not isinstance(offset, int):
            found = await self._look_up({target.key: goal}, timeout or self._client.timeout)
            offset = found[target.key].offset
            target = self._find(partition)
        if self._reading is target:
            self._reading = None
        if target in self._hands:
            self._hands.remove(target)
        target.jump(offset)
        target.rewound = True
        target.policy = False
        self._running().schedule()
        return offset

    async def lag(self, *, timeout: float | None = None) -> dict[TopicPartition, int]:
        """Records between the position and the high watermark, by partition."""
        fetcher = self._running()
        found = await self._look_up(dict.fromkeys(fetcher.partitions, "end"), timeout or self._client.timeout)
        return {
            TopicPartition(partition.source.topic, partition.source.partition): max(
                0, found[key].offset - partition.position
            )
            for key, partition in fetcher.partitions.items()
            if key in found
        }

    async def committed(self, partition: Position, *, timeout: float | None = None) -> int | None:
        """What the group has committed in a partition; None: nothing yet."""
        if self.group is None:
            raise InvalidArgument("group: a consumer without a group commits nothing", field="group")
        key = self._key(partition)
        found = await self._positions_of_group([key], timeout or self._client.timeout)
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
        if self.group is None:
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
        if wanted:
            await self._commit(wanted, metadata, timeout or self._client.timeout)

    async def _commit(self, wanted: dict[Partition, int], metadata: str, timeout: float) -> None:
        offsets = {
            partition.key: (offset, partition.rewound or offset < partition.committed)
            for partition, offset in wanted.items()
            if offset > partition.committed or partition.rewound or offset < partition.committed
        }
        if not offsets:
            return
        if self._membership is not None:
            outcomes = await self._membership.commit(offsets, metadata, timeout=timeout)
        else:
            outcomes = await self._commit_alone(offsets, metadata, timeout)
        failed: FerrylineError | None = None
        for partition in wanted:
            outcome = outcomes.get(partition.key)
            if isinstance(outcome, FerrylineError):
                failed = failed or located(outcome, partition)
            elif outcome is not None:
                partition.committed = outcome.offset
                partition.rewound = False
        if failed is not None:
            raise failed

    async def _commit_alone(
        self, offsets: dict[Key, tuple[int, bool]], metadata: str, timeout: float
    ) -> dict[Key, CommittedResult | FerrylineError]:
        """Commits of a reader that is no member: generation 0, good only while no member has claimed."""

        def header(keys: list[Key]) -> Commit:
            entries = [CommitEntry(*key, 0, offsets[key][0], metadata, offsets[key][1]) for key in keys]
            return Commit(self.group or "", "", entries)

        return await ask_primaries(self._client, Kind.COMMIT, offsets, header, CommittedAnswer, timeout=timeout)

    async def _commit_processed(self, timeout: float) -> None:
        fetcher = self._running()
        wanted = {
            partition: partition.processed
            for partition in fetcher.partitions.values()
            if partition.processed > partition.committed or (partition.rewound and not partition.policy)
        }
        if wanted:
            await self._commit(wanted, "", timeout)

    async def _commit_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(self._auto_commit_s)
            try:
                await self._commit_processed(self._client.timeout)
            except StaleMember as error:
                log.info("auto-commit: %s", error)
            except FerrylineError as error:
                log.warning("auto-commit: %s", error)

    async def _positions_of_group(self, keys: list[Key], timeout: float) -> dict[Key, CommittedResult]:
        def header(asked: list[Key]) -> Committed:
            return Committed(self.group or "", [*asked])

        outcomes = await ask_primaries(self._client, Kind.COMMITTED, keys, header, CommittedAnswer, timeout=timeout)
        return _all_good(outcomes)

    async def _look_up(self, asked: Mapping[Key, Where], timeout: float) -> dict[Key, OffsetsResult]:
        """Where "start", "end", a moment or an offset are."""

        def header(keys: list[Key]) -> Offsets:
            return Offsets([_offsets_entry(key, asked[key]) for key in keys])

        outcomes = await ask_primaries(self._client, Kind.OFFSETS, asked, header, OffsetsAnswer, timeout=timeout)
        found: dict[Key, OffsetsResult] = _all_good(outcomes)
        for key, where in asked.items():
            if isinstance(where, int):
                found[key] = OffsetsResult(*key, where, found[key].log_start, found[key].high_watermark)
        return found

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


class Subscription:
    """A handler that is called for each record. Await it to learn how it ended; `stop` ends it after the record that
    is being handled."""

    def __init__(self, consumer: Consumer[Any], handler: Handler) -> None:
        self._consumer = consumer
        self._handler = handler
        self._stopping = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def __await__(self) -> Any:
        return asyncio.shield(self._task).__await__()

    async def stop(self) -> None:
        """End after the record that is being handled. Raises what the handler raised."""
        self._stopping.set()
        await self._task

    async def _run(self) -> None:
        stopping = asyncio.get_running_loop().create_task(self._stopping.wait())
        try:
            while not self._stopping.is_set():
                batch = await self._next(stopping)
                for message in batch:
                    result = self._handler(message)
                    if inspect.isawaitable(result):
                        await result
                    # One record at a time is pulled, so that a stop never leaves given but unhandled records behind.
        finally:
            stopping.cancel()

    async def _next(self, stopping: asyncio.Task[bool]) -> list[Message[Any]]:
        pulling = asyncio.get_running_loop().create_task(self._consumer.pull(1, 3600.0))
        await asyncio.wait({pulling, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not pulling.done():
            pulling.cancel()
            await asyncio.wait({pulling})
            return [] if pulling.cancelled() else pulling.result()
        return pulling.result()


def _where(where: Any, field: str) -> int | str | At:
    """A position as the brokers understand it. Raises InvalidArgument, naming the field."""
    if isinstance(where, datetime):
        return at(where)
    if isinstance(where, At):
        return where
    if isinstance(where, str) and where in _STARTS:
        return _STARTS[where]
    if isinstance(where, int) and not isinstance(where, bool):
        return check_range(where, field, 0, OFFSET_MAX)
    raise InvalidArgument(f'{field}: {where!r} is none of an offset, "start", "end", at(datetime)', field=field)


def _offsets_entry(key: Key, where: Where) -> OffsetsEntry:
    if isinstance(where, At):
        return OffsetsEntry(*key, "time", where.timestamp_ms)
    return OffsetsEntry(*key, where if isinstance(where, str) else "start")


def _all_good(outcomes: dict[Key, Any]) -> dict[Key, Any]:
    for outcome in outcomes.values():
        if isinstance(outcome, FerrylineError):
            raise outcome
    return outcomes
