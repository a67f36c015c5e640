"""Brokers and a coordinator that answer on real sockets and keep records in memory, for tests of the SDK.

They can do what a real cluster does only with effort: refuse, fall silent, answer half, die between frames. Nothing is
replicated here; what the services do is tested with the services.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from aiohttp import web

from ferryline.protocol.errors import ErrorInfo, FerrylineError, NotPrimary, StaleMember, UnknownTopic
from ferryline.protocol.exchanges import BindingMeta, ExchangeMeta
from ferryline.protocol.frames import Frame, Kind, decode_header
from ferryline.protocol.messages import (
    Claim,
    Commit,
    Committed,
    CommittedAnswer,
    CommittedResult,
    Fetch,
    FetchAnswer,
    FetchResult,
    GroupAssignment,
    GroupHeartbeat,
    GroupPartition,
    Offsets,
    OffsetsAnswer,
    OffsetsResult,
    Produce,
    ProduceAnswer,
    ProduceResult,
)
from ferryline.protocol.metadata import (
    BrokerMeta,
    MetadataAnswer,
    MetadataRequest,
    PartitionMeta,
    TopicConfig,
    TopicMeta,
)
from ferryline.protocol.records import check_crc, decode_batch, read_header, stamp
from ferryline_service.metrics import ServiceMetrics
from ferryline_service.session import ServerSession, SessionEndpoint
from unit.sdk_fake_queue import FakeQueues

Key = tuple[str, int]
COORDINATOR = 0


@dataclass
class Log:
    """One partition: its batches, what producers it has seen, what groups have committed."""

    batches: list[bytes] = field(default_factory=list)
    end: int = 0
    start: int = 0
    producers: dict[int, tuple[int, int]] = field(default_factory=dict)  # pid -> (pepoch, next sequence)
    recent: dict[tuple[int, int, int], int] = field(default_factory=dict)  # identity -> base offset
    committed: dict[str, tuple[int, str]] = field(default_factory=dict)
    generations: dict[str, int] = field(default_factory=dict)

    def records_from(self, offset: int) -> int:
        headers = [read_header(batch) for batch in self.batches]
        return sum(one.record_count for one in headers if not one.is_control and one.base_offset >= offset)


class Node:
    """One process of the fake cluster: an HTTP server with sessions."""

    def __init__(self, cluster: FakeCluster, broker_id: int) -> None:
        self.cluster = cluster
        self.id = broker_id
        self.frames = 0
        self.silent = False  # reads frames and answers none
        self.port = 0
        self.runner: web.AppRunner | None = None
        self.routes: list[web.RouteDef] = []  # REST, as far as a test needs it
        self.endpoint: SessionEndpoint

    async def start(self) -> None:
        self.endpoint = SessionEndpoint(
            server="broker" if self.id else "coordinator",
            cluster_id=self.cluster.cluster_id,
            broker_id=self.id,
            on_frame=self.on_frame,
            metrics=ServiceMetrics("fake"),
        )
        app = web.Application()
        app.add_routes([*self.endpoint.routes(), *self.routes])
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port, ssl_context=self.cluster.ssl)
        await site.start()
        self.port = self.runner.addresses[0][1]

    async def stop(self) -> None:
        """Die at once: connections are reset, the port refuses."""
        runner, self.runner = self.runner, None
        if runner is not None:
            for session in list(self.endpoint.sessions):
                session.abort("killed")
            await runner.cleanup()

    @property
    def url(self) -> str:
        return f"{'https' if self.cluster.ssl else 'http'}://localhost:{self.port}"

    def on_frame(self, session: ServerSession, frame: Frame) -> Any:
        self.frames += 1
        if self.silent:
            return None
        handlers: dict[int, Callable[[ServerSession, Frame], Any]] = {
            Kind.METADATA: self.metadata,
            Kind.PRODUCE: self.produce,
            Kind.FETCH: self.fetch,
            Kind.OFFSETS: self.offsets,
            Kind.CLAIM: self.claim,
            Kind.COMMIT: self.commit,
            Kind.COMMITTED: self.committed,
            Kind.GROUP_HEARTBEAT: self.heartbeat,
            Kind.RECEIVE: partial(self.cluster.queues.receive, self),
            Kind.SETTLE: partial(self.cluster.queues.settle, self),
            Kind.KEEP: partial(self.cluster.queues.keep, self),
        }
        result = handlers[frame.kind](session, frame)
        return asyncio.ensure_future(result) if asyncio.iscoroutine(result) else None

    async def metadata(self, session: ServerSession, frame: Frame) -> None:
        request = decode_header(frame.header, MetadataRequest)
        await self.cluster.newer_than(request.revision, request.wait_ms / 1000)
        session.answer(frame.kind, frame.correlation, self.cluster.answer())

    def produce(self, session: ServerSession, frame: Frame) -> Any:
        request = decode_header(frame.header, Produce)
        results, at = [], 0
        for index, entry in enumerate(request.entries):
            data = bytearray(frame.payload[at : at + entry.size])
            at += entry.size
            key = (entry.topic_id, entry.partition)
            try:
                if self.cluster.on_produce is not None:
                    self.cluster.on_produce(self, key, data)
                offset = self.cluster.append(self.id, key, data)
                results.append(ProduceResult(index, offset, self.cluster.epochs[key]))
            except FerrylineError as error:
                results.append(ProduceResult(index, error=error.info()))
        if self.cluster.ack_delay_s:
            return self.later(session, frame, results)
        session.answer(frame.kind, frame.correlation, ProduceAnswer(results))
        self.cluster.wake()
        return None

    async def later(self, session: ServerSession, frame: Frame, results: list[ProduceResult]) -> None:
        await asyncio.sleep(self.cluster.ack_delay_s)
        for result in results[:-1]:
            session.answer(frame.kind, frame.correlation, ProduceAnswer([result]), more=True)
        session.answer(frame.kind, frame.correlation, ProduceAnswer(results[-1:]))
        self.cluster.wake()

    async def fetch(self, session: ServerSession, frame: Frame) -> None:
        request = decode_header(frame.header, Fetch)
        deadline = asyncio.get_running_loop().time() + request.wait_ms / 1000
        while True:
            results, parts, found = [], [], False
            for entry in request.entries:
                key = (entry.topic_id, entry.partition)
                try:
                    log = self.cluster.log(self.id, key)
                    if self.cluster.on_fetch is not None:
                        self.cluster.on_fetch(key, entry.offset)
                    data = self.cluster.read(log, entry.offset, entry.bytes_max)
                    if data or not request.wait_ms:
                        results.append(FetchResult(*key, log.end, log.start, len(data)))
                        parts.append(data)
                    found = found or bool(data)
                except FerrylineError as error:
                    results.append(FetchResult(*key, error=error.info()))
                    found = True
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0 and not found:  # like a broker: who has nothing is named only if nobody has anything
                logs = [
                    (entry, self.cluster.log(self.id, (entry.topic_id, entry.partition))) for entry in request.entries
                ]
                results = [FetchResult(e.topic_id, e.partition, log.end, log.start) for e, log in logs]
            if found or left <= 0:
                break
            try:
                await asyncio.wait_for(self.cluster.appended.wait(), left)
            except TimeoutError:
                pass
        session.answer(frame.kind, frame.correlation, FetchAnswer(results), parts)

    def offsets(self, session: ServerSession, frame: Frame) -> None:
        results = []
        for entry in decode_header(frame.header, Offsets).entries:
            key = (entry.topic_id, entry.partition)
            try:
                log = self.cluster.log(self.id, key)
            except FerrylineError as error:
                results.append(OffsetsResult(*key, error=error.info()))
                continue
            offset = {"start": log.start, "end": log.end, "latest": log.end}.get(entry.at, -1)
            if entry.at == "time":
                offset = self.cluster.offset_at(log, entry.timestamp_ms)
            counts = entry.counted_from >= 0 and self.cluster.counts_records
            records = log.records_from(entry.counted_from) if counts else -1
            results.append(OffsetsResult(*key, offset, log.start, log.end, None, records))
        session.answer(frame.kind, frame.correlation, OffsetsAnswer(results))

    def claim(self, session: ServerSession, frame: Frame) -> None:
        request = decode_header(frame.header, Claim)
        results = []
        for entry in request.entries:
            key = (entry.topic_id, entry.partition)
            try:
                log = self.cluster.log(self.id, key)
                if entry.generation < log.generations.get(request.group, 0):
                    raise StaleMember("a later generation has claimed")
                log.generations[request.group] = entry.generation
                results.append(self.position(log, key, request.group))
            except FerrylineError as error:
                results.append(CommittedResult(*key, error=error.info()))
        session.answer(frame.kind, frame.correlation, CommittedAnswer(results))

    def position(self, log: Log, key: Key, group: str) -> CommittedResult:
        offset, metadata = log.committed.get(group, (-1, ""))
        generation = log.generations.get(group, 0)
        return CommittedResult(*key, offset, -1, generation, metadata, log.start, log.end)

    def commit(self, session: ServerSession, frame: Frame) -> None:
        request = decode_header(frame.header, Commit)
        results = []
        for entry in request.entries:
            key = (entry.topic_id, entry.partition)
            try:
                log = self.cluster.log(self.id, key)
                if entry.generation != log.generations.get(request.group, 0):
                    raise StaleMember("a later generation has claimed")
                if entry.reset or entry.offset > log.committed.get(request.group, (-1, ""))[0]:
                    log.committed[request.group] = (entry.offset, entry.metadata)
                results.append(self.position(log, key, request.group))
            except FerrylineError as error:
                results.append(CommittedResult(*key, error=error.info()))
        session.answer(frame.kind, frame.correlation, CommittedAnswer(results))

    def committed(self, session: ServerSession, frame: Frame) -> None:
        request = decode_header(frame.header, Committed)
        results = []
        for topic_id, partition in request.entries:
            try:
                log = self.cluster.log(self.id, (topic_id, partition))
                results.append(self.position(log, (topic_id, partition), request.group))
            except FerrylineError as error:
                results.append(CommittedResult(topic_id, partition, error=error.info()))
        session.answer(frame.kind, frame.correlation, CommittedAnswer(results))

    def heartbeat(self, session: ServerSession, frame: Frame) -> None:
        beat = decode_header(frame.header, GroupHeartbeat)
        session.answer(frame.kind, frame.correlation, self.cluster.group_heartbeat(beat))


class FakeCluster:
    """``brokers`` brokers and one coordinator. ``epochs`` and ``primaries`` of partitions may be set by tests."""

    def __init__(self, brokers: int = 1, *, ssl_context: ssl.SSLContext | None = None) -> None:
        self.cluster_id = "c" * 32
        self.ssl = ssl_context
        self.coordinator = Node(self, COORDINATOR)
        self.brokers = {number: Node(self, number) for number in range(1, brokers + 1)}
        self.topics: dict[str, TopicMeta] = {}
        self.exchanges: dict[str, ExchangeMeta] = {}
        self.primaries: dict[Key, int] = {}
        self.epochs: dict[Key, int] = {}
        self.logs: dict[Key, Log] = {}
        self.queues = FakeQueues(self)
        self.revision = 0
        self.counts_records = True  # False: a release that does not
        self.changed = asyncio.Event()
        self.appended = asyncio.Event()
        self.ack_delay_s = 0.0
        self.on_produce: Callable[[Node, Key, bytearray], None] | None = None
        self.on_fetch: Callable[[Key, int], None] | None = None
        self.on_heartbeat: Callable[[GroupHeartbeat], GroupAssignment | FerrylineError] | None = None
        self.beats: list[GroupHeartbeat] = []
        self._members: dict[str, dict[str, list[str]]] = {}
        self._assigned: dict[tuple[str, Key], tuple[str, int]] = {}
        self._cache: tuple[Any, Any] = (None, None)

    async def __aenter__(self) -> FakeCluster:
        for node in [self.coordinator, *self.brokers.values()]:
            await node.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for node in [self.coordinator, *self.brokers.values()]:
            await node.stop()

    # -- metadata ----------------------------------------------------------------------------------

    def create(self, name: str, partitions: int = 1, **config: Any) -> TopicMeta:
        topic_id = hashlib.md5(f"{name}{self.revision}".encode()).hexdigest()
        meta = self.topics[name] = TopicMeta(topic_id, name, TopicConfig(partitions=partitions, **config))
        self._place(meta)
        return meta

    def grow(self, name: str, partitions: int) -> None:
        old = self.topics[name]
        config = TopicConfig(partitions=partitions, max_record_bytes=old.config.max_record_bytes)
        self.topics[name] = TopicMeta(old.id, name, config, old.version + 1)
        self._place(self.topics[name])

    def delete(self, name: str) -> None:
        del self.topics[name]
        self.change()

    def exchange(self, name: str, kind: str, *bindings: BindingMeta, alternate: str = "") -> None:
        """An exchange as it shall be from now on."""
        known = self.exchanges.get(name)
        version = known.version + 1 if known is not None else 1
        self.exchanges[name] = ExchangeMeta(name, kind, alternate, bindings, version)
        self.change()

    def _place(self, meta: TopicMeta) -> None:
        ids = sorted(self.brokers)
        for number in range(meta.config.partitions):
            key = (meta.id, number)
            if key not in self.logs:
                self.logs[key] = Log()
                self.epochs[key] = 1
                self.primaries[key] = ids[number % len(ids)]
        self.change()

    def move(self, key: Key, broker: int) -> None:
        self.primaries[key] = broker
        self.epochs[key] += 1
        self.change()

    def change(self) -> None:
        self.revision += 1
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    def wake(self) -> None:
        appended, self.appended = self.appended, asyncio.Event()
        appended.set()

    async def newer_than(self, revision: int, wait_s: float) -> None:
        if self.revision <= revision and wait_s:
            try:
                await asyncio.wait_for(self.changed.wait(), wait_s)
            except TimeoutError:
                pass

    def answer(self) -> MetadataAnswer:
        live = [node for node in self.brokers.values() if node.runner is not None]
        partitions = [
            PartitionMeta(meta.id, number, (primary,), primary, self.epochs[meta.id, number], self.revision, (primary,))
            for meta in self.topics.values()
            for number in range(meta.config.partitions)
            for primary in [self.primaries[meta.id, number]]
        ]
        return MetadataAnswer(
            self.cluster_id,
            1,
            self.revision,
            True,
            [BrokerMeta(node.id, node.url, node.url, 1, fenced=False) for node in live],
            list(self.topics.values()),
            partitions,
            coordinators=[self.coordinator.url],
            exchanges=list(self.exchanges.values()),
        )

    # -- records -----------------------------------------------------------------------------------

    def log(self, broker: int, key: Key) -> Log:
        if key not in self.logs or not any(meta.id == key[0] for meta in self.topics.values()):
            raise UnknownTopic(f"no topic {key[0]}")
        if self.primaries[key] != broker:
            raise NotPrimary("not here", primary=self.primaries[key], epoch=self.epochs[key])
        return self.logs[key]

    def append(self, broker: int, key: Key, data: bytearray) -> int:
        log = self.log(broker, key)
        header = read_header(data)
        check_crc(data, header)
        identity = (header.producer_id, header.producer_epoch, header.base_sequence)
        if identity in log.recent:
            return log.recent[identity]
        pepoch, expected = log.producers.get(header.producer_id, (-1, 0))
        if header.producer_epoch != pepoch:
            expected = 0
        if header.base_sequence != expected:
            raise_code("OUT_OF_ORDER_SEQUENCE" if pepoch >= 0 else "UNKNOWN_PRODUCER")
        log.producers[header.producer_id] = (header.producer_epoch, expected + header.record_count)
        base = log.end
        stamp(data, base, self.epochs[key])
        log.batches.append(bytes(data))
        log.end += header.record_count
        log.recent[identity] = base
        return base

    def read(self, log: Log, offset: int, bytes_max: int) -> bytes:
        if offset < log.start or offset > log.end:
            raise_code("OFFSET_OUT_OF_RANGE", log_start=log.start, high_watermark=log.end)
        out, size = [], 0
        for batch in reversed(log.batches) if offset == log.end else log.batches:
            if read_header(batch).next_offset <= offset:
                if offset == log.end:
                    break
                continue
            if out and size + len(batch) > bytes_max:
                break
            out.append(batch)
            size += len(batch)
        return b"".join(out)

    def offset_at(self, log: Log, timestamp_ms: int) -> int:
        for batch in log.batches:
            for record in decode_batch(batch):
                if record.timestamp >= timestamp_ms:
                    return record.offset
        return log.end

    def records(self, name: str) -> dict[int, list[tuple[bytes | None, bytes | None]]]:
        """What is stored, by partition."""
        meta = self.topics[name]
        return {
            number: [(r.key, r.value) for batch in self.logs[meta.id, number].batches for r in decode_batch(batch)]
            for number in range(meta.config.partitions)
        }

    def records_at(self, name: str, where: Any) -> tuple[bytes | None, bytes | None]:
        """Key and value of the record at a RecordMetadata."""
        return self.records_cached(name)[where.partition][where.offset]

    def records_cached(self, name: str) -> dict[int, list[tuple[bytes | None, bytes | None]]]:
        ends = tuple(log.end for log in self.logs.values())
        if self._cache[0] != ends:
            self._cache = (ends, self.records(name))
        return self._cache[1]

    # -- groups ------------------------------------------------------------------------------------

    def group_heartbeat(self, beat: GroupHeartbeat) -> GroupAssignment:
        """An even spread; a partition changes hands only after its owner has left it out."""
        self.beats.append(beat)
        if self.on_heartbeat is not None:
            answer = self.on_heartbeat(beat)
            if isinstance(answer, FerrylineError):
                raise answer
            return answer
        members = self._members.setdefault(beat.group, {})
        if beat.leave:
            members.pop(beat.member, None)
            self._release(beat, set())
            return GroupAssignment(beat.member, [], sequence=beat.sequence)
        members[beat.member] = beat.topics
        holds = {(item.topic_id, item.partition) for item in beat.owned}
        target = self._target(beat.group)
        wanted = {key for key, member in target.items() if member == beat.member}
        self._release(beat, holds | wanted)
        for key in sorted(wanted):
            owner, generation = self._assigned.get((beat.group, key), ("", 0))
            if not owner:
                self._assigned[beat.group, key] = (beat.member, generation + 1)
        mine = {k[1]: g for k, (m, g) in self._assigned.items() if k[0] == beat.group and m == beat.member}
        assigned = [GroupPartition(*key, mine[key], b"token") for key in sorted(mine) if key in wanted]
        revoked = [GroupPartition(*key, mine[key]) for key in sorted(mine) if key not in wanted]
        return GroupAssignment(beat.member, assigned, revoked, heartbeat_ms=50, sequence=beat.sequence)

    def _release(self, beat: GroupHeartbeat, keep: set[Key]) -> None:
        for (group, key), (member, generation) in list(self._assigned.items()):
            if group == beat.group and member == beat.member and key not in keep:
                self._assigned[group, key] = ("", generation)

    def _target(self, group: str) -> dict[Key, str]:
        members = self._members[group]
        topics = sorted({topic for topics in members.values() for topic in topics} & set(self.topics))
        keys = [(self.topics[name].id, n) for name in topics for n in range(self.topics[name].config.partitions)]
        wanting = {self.topics[name].id: sorted(m for m in members if name in members[m]) for name in topics}
        return {key: wanting[key[0]][index % len(wanting[key[0]])] for index, key in enumerate(keys)}


def raise_code(code: str, **details: Any) -> None:
    """Raise the error with this code."""
    from ferryline.protocol.errors import from_info

    raise from_info(ErrorInfo(code, code, details=details))
