"""METADATA and OFFSETS: what a client must know before it can produce or fetch."""

from __future__ import annotations

import asyncio

from ferryline.protocol.access import READ
from ferryline.protocol.errors import (
    FerrylineError,
    InvalidArgument,
    MalformedRequest,
    NotPrimary,
    ShuttingDown,
    StorageFailed,
    Throttled,
)
from ferryline.protocol.frames import Frame, Kind, decode_header
from ferryline.protocol.limits import FRAME_ENTRIES_MAX, OFFSET_MAX, WAIT_MS_MAX, check_range
from ferryline.protocol.messages import RECORDS, Offsets, OffsetsAnswer, OffsetsEntry, OffsetsResult
from ferryline.protocol.metadata import MetadataAnswer, MetadataRequest
from ferryline_broker.access_rules import topic_check
from ferryline_broker.core.events import AnswerBarrier, BarrierAsked, Refuse
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.metrics import BrokerMetrics
from ferryline_broker.ports import Answer
from ferryline_broker.produce import refusal_info
from ferryline_broker.view import ClusterView
from ferryline_service.server_session import ServerSession

_BARRIER_MS = 10_000
_OF_ONE_MAX = 100  # requests of one session that wait; clients have one, and must not take the places of others
Position = tuple[int, int]


class _ParkedMetadata:
    __slots__ = ("correlation", "known", "session", "timer")

    def __init__(self, session: ServerSession, correlation: int, known: Position) -> None:
        self.session = session
        self.correlation = correlation
        self.known = known  # (coordinator epoch, revision) that the asker has
        self.timer: asyncio.TimerHandle | None = None


class MetadataHandler:
    """Serves this broker's copy, or what changed in it, as soon as it is newer than the asker's. So clients can start,
    and learn of new primaries, while no coordinator answers."""

    def __init__(self, view: ClusterView, *, parked_max: int) -> None:
        self._view = view
        self._parked_max = parked_max
        self._parked: dict[_ParkedMetadata, None] = {}
        self._sessions: dict[ServerSession, set[_ParkedMetadata]] = {}
        self._loop = asyncio.get_running_loop()

    def handle(self, session: ServerSession, frame: Frame) -> None:
        ask = decode_header(frame.header, MetadataRequest)
        check_range(ask.wait_ms, "wait_ms", 0, WAIT_MS_MAX)
        metadata = self._view.metadata
        same = not ask.cluster_id or ask.cluster_id == metadata.cluster_id
        known = (ask.coord_epoch, ask.revision) if same and ask.revision >= 0 else (-1, -1)
        parked = _ParkedMetadata(session, frame.correlation, known)
        if metadata.cluster_id and known < self._view.position:
            self._answer(parked)
            return
        if ask.wait_ms == 0:
            self._nothing_new(parked)
            return
        if len(self._parked) >= self._parked_max:
            raise Throttled(f"{self._parked_max} metadata requests are parked on this broker")
        mine = self._sessions.get(session)
        if mine is None:
            mine = self._sessions[session] = set()
            session.close_callbacks.append(self._forget)
        if len(mine) >= _OF_ONE_MAX:
            raise Throttled(f"{_OF_ONE_MAX} metadata requests of this session wait", limit=_OF_ONE_MAX)
        mine.add(parked)
        self._parked[parked] = None
        parked.timer = self._loop.call_later(ask.wait_ms / 1000, self._expire, parked)

    def changed(self) -> None:
        """The metadata moved: answer everybody who knows less."""
        position = self._view.position
        for parked in [parked for parked in self._parked if parked.known < position]:
            self._unpark(parked)
            self._answer(parked)

    def _answer(self, parked: _ParkedMetadata) -> None:
        parked.session.answer(Kind.METADATA, parked.correlation, self._view.news(*parked.known))

    def _nothing_new(self, parked: _ParkedMetadata) -> None:
        metadata = self._view.metadata
        answer = MetadataAnswer(
            metadata.cluster_id, metadata.coord_epoch, metadata.revision, False, feature_level=metadata.feature_level
        )
        parked.session.answer(Kind.METADATA, parked.correlation, answer)

    def _expire(self, parked: _ParkedMetadata) -> None:
        if parked in self._parked:
            self._unpark(parked)
            self._nothing_new(parked)

    def _unpark(self, parked: _ParkedMetadata) -> None:
        del self._parked[parked]
        self._sessions.get(parked.session, set()).discard(parked)
        if parked.timer is not None:
            parked.timer.cancel()

    def _forget(self, session: ServerSession) -> None:
        for parked in self._sessions.pop(session, set()):
            self._unpark(parked)

    def close(self) -> None:
        for parked in list(self._parked):
            self._unpark(parked)
            parked.session.fail(Kind.METADATA, parked.correlation, ShuttingDown("this broker is stopping"))


class OffsetsRequest:
    """One OFFSETS frame; entries with ``at="latest"`` wait for a barrier."""

    __slots__ = ("_correlation", "_left", "_results", "_session", "hosted")

    def __init__(self, session: ServerSession, correlation: int, count: int) -> None:
        self._session = session
        self._correlation = correlation
        self._left = count
        self._results: list[OffsetsResult | None] = [None] * count
        self.hosted: dict[int, HostedReplica] = {}

    def put(self, index: int, result: OffsetsResult) -> None:
        self._results[index] = result
        self._left -= 1

    def settle(self, index: int, answer: Answer) -> None:
        hosted = self.hosted[index]
        topic_id, partition = hosted.key
        if isinstance(answer, AnswerBarrier):
            self.put(index, offsets_result(hosted, hosted.core.high_watermark[RECORDS]))
        else:
            assert isinstance(answer, Refuse), answer
            self.put(index, OffsetsResult(topic_id, partition, error=refusal_info(answer)))

    def emit(self) -> None:
        if self._left == 0:
            self._left = -1
            results = [result for result in self._results if result is not None]
            self._session.answer(Kind.OFFSETS, self._correlation, OffsetsAnswer(results))


def offsets_result(hosted: HostedReplica, offset: int, counted_from: int = -1) -> OffsetsResult:
    core = hosted.core
    records = hosted.records_from(counted_from) if counted_from >= 0 else -1
    return OffsetsResult(*hosted.key, offset, core.log_start[RECORDS], core.high_watermark[RECORDS], None, records)


class OffsetsHandler:
    """Looks up offsets by position and by time, at the primary."""

    def __init__(self, driver: PartitionDriver, view: ClusterView, metrics: BrokerMetrics) -> None:
        self._driver = driver
        self._view = view
        self._metrics = metrics

    def handle(self, session: ServerSession, frame: Frame) -> None:
        ask = decode_header(frame.header, Offsets)
        if not 0 < len(ask.entries) <= FRAME_ENTRIES_MAX:
            raise MalformedRequest(f"entries: {len(ask.entries)} is outside 1..{FRAME_ENTRIES_MAX}")
        request = OffsetsRequest(session, frame.correlation, len(ask.entries))
        check = topic_check(session, self._view, Kind.OFFSETS, READ)
        for index, entry in enumerate(ask.entries):
            try:
                if check is not None:
                    check(entry.topic_id)
                self._look_up(request, index, entry)
            except FerrylineError as error:
                self._metrics.error(error.code)
                request.put(index, OffsetsResult(entry.topic_id, entry.partition, error=error.info()))
        self._driver.at_end(request)

    def _look_up(self, request: OffsetsRequest, index: int, entry: OffsetsEntry) -> None:
        hosted = self._driver.replicas.get((entry.topic_id, entry.partition))
        if hosted is None:
            raise self._view.not_here(entry.topic_id, entry.partition)
        core = hosted.core
        if not hosted.serves_readers:
            primary = core.part.primary if core.part is not None else 0
            raise NotPrimary(f"this broker is {core.role} of the partition", primary=primary, epoch=core.epoch)
        if entry.at == "start":
            request.put(index, offsets_result(hosted, core.log_start[RECORDS]))
        elif entry.at == "end":
            check_range(entry.counted_from, "counted_from", -1, OFFSET_MAX)
            request.put(index, offsets_result(hosted, core.high_watermark[RECORDS], entry.counted_from))
        elif entry.at == "latest":
            request.hosted[index] = hosted
            self._driver.feed(hosted, BarrierAsked(self._driver.token(request, index, hosted), _BARRIER_MS))
        elif entry.at == "time":
            check_range(entry.timestamp_ms, "timestamp_ms", 0, 2**62)
            try:
                found = hosted.logs[RECORDS].offset_for_time(entry.timestamp_ms)
            except StorageFailed as failure:
                self._driver.storage_failed(hosted, RECORDS, failure)
                raise
            found = max(core.log_start[RECORDS], min(found, core.high_watermark[RECORDS]))
            request.put(index, offsets_result(hosted, found))
        else:
            raise InvalidArgument(f"at: {entry.at[:20]!r} is not start, end, latest or time", field="at")
