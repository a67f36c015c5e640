"""FETCH: committed batches of many partitions in one answer, parked until there are any.

Rules: only below the high watermark; whole batches, at least one even when it is larger than what was asked for;
entries are served round robin, so that a partition with much to read does not starve those behind it; a reader that
does not read gets no further answers, and the broker keeps nothing for it but the parked request. One that has used its
quota up waits here, too, as long as it waits at all; it pays for what it is given.
"""

from __future__ import annotations

import asyncio
from time import perf_counter

from ferryline.protocol.access import READ
from ferryline.protocol.errors import (
    BY_CODE,
    ErrorInfo,
    InternalError,
    MalformedRequest,
    ShuttingDown,
    StorageFailed,
    Throttled,
)
from ferryline.protocol.frames import Frame, Kind, decode_header
from ferryline.protocol.limits import FRAME_ENTRIES_MAX, OFFSET_MAX, WAIT_MS_MAX, check_range
from ferryline.protocol.messages import RECORDS, Fetch, FetchAnswer, FetchEntry, FetchResult
from ferryline_broker.access_rules import refusal, topic_check
from ferryline_broker.core.events import Bytes, Key
from ferryline_broker.core.partition import ReadVerdict
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.hosted import HostedReplica, count_records
from ferryline_broker.metrics import BrokerMetrics
from ferryline_broker.proof import Proof
from ferryline_broker.sessions import ClientState, state_of
from ferryline_broker.view import ClusterView
from ferryline_service.access.quotas import Quotas
from ferryline_service.server_session import ServerSession

_QUEUED_BYTES_MAX = 2 * 1024 * 1024
_OF_ONE_MAX = 1_000  # fetches of one session that are not answered, and partitions that those name:
_ENTRIES_OF_ONE_MAX = 100_000  # each is kept, also for a peer that asks and never reads


class ParkedFetch:
    """One FETCH that has not been answered yet."""

    __slots__ = (
        "_correlation", "_counted", "_entries", "_handler", "_pause", "_started", "_timer",
        "ask", "done", "late", "proofs", "session", "state",
    )  # fmt: skip

    def __init__(self, handler: FetchHandler, session: ServerSession, state: ClientState, frame: Frame) -> None:
        self._handler = handler
        self.session = session
        self.state = state
        self.ask = decode_header(frame.header, Fetch)
        self._correlation = frame.correlation
        self._started = perf_counter()
        self._timer: asyncio.TimerHandle | None = None
        self._pause: asyncio.TimerHandle | None = None  # the reader has used its quota up
        self._entries: list[HostedReplica] = []
        self._counted = False
        self.done = False
        self.late = False  # its time is over: it is answered as soon as nothing is left to be proved
        self.proofs: dict[Key, Proof] = {}  # that this broker is still the primary, for those who doubt it

    def count(self) -> None:
        """It is not answered at once: it counts among those of its session until it is done."""
        if not self._counted:
            self._counted = True
            self.state.parked += 1
            self.state.entries += len(self.ask.entries)

    def emit(self) -> None:
        """Something moved: answer if there is anything to say."""
        if not self.done:
            self._handler.serve(self, last=self.late)

    def proof(self, hosted: HostedReplica) -> Proof:
        """The proof for this replica; a new one is begun only once."""
        found = self.proofs.get(hosted.key)
        if found is None:
            found = self.proofs[hosted.key] = Proof(self._handler.driver, hosted, self)
        return found

    @property
    def proving(self) -> bool:
        return any(not proof.settled for proof in self.proofs.values())

    def park(self, hosted: list[HostedReplica], loop: asyncio.AbstractEventLoop) -> None:
        self._entries = hosted
        for replica in hosted:
            replica.readers[self] = None
        self._timer = loop.call_later(self.ask.wait_ms / 1000, self._expire)

    def pause(self, wait_ms: int, loop: asyncio.AbstractEventLoop) -> None:
        """Look again after ``wait_ms``, whatever comes in between."""
        if self._pause is None:
            self._pause = loop.call_later(wait_ms / 1000, self._go_on)

    def _go_on(self) -> None:
        self._pause = None
        self.emit()

    @property
    def parked(self) -> bool:
        return self._timer is not None

    def _expire(self) -> None:
        if not self.done:
            self._handler.serve(self, last=True)

    def answer(self, results: list[FetchResult], parts: list[Bytes]) -> None:
        self.close()
        self.session.answer(Kind.FETCH, self._correlation, FetchAnswer(results), parts)
        self._handler.driver.answered(self.session)
        self._handler.metrics.fetch_seconds.observe(perf_counter() - self._started)

    def refuse(self, error: ShuttingDown) -> None:
        self.close()
        self.session.fail(Kind.FETCH, self._correlation, error)

    def close(self) -> None:
        """Leave every list; answer nothing."""
        if self.done:
            return
        self.done = True
        if self._counted:
            self.state.parked -= 1
            self.state.entries -= len(self.ask.entries)
        if self._pause is not None:
            self._pause.cancel()
        if self._timer is not None:
            self._timer.cancel()
            self._handler.unparked(self)
            for replica in self._entries:
                replica.readers.pop(self, None)


class FetchHandler:
    """Serves and parks fetches."""

    def __init__(
        self,
        driver: PartitionDriver,
        view: ClusterView,
        metrics: BrokerMetrics,
        *,
        answer_bytes_max: int,
        parked_max: int,
        quotas: Quotas | None = None,
    ) -> None:
        self.metrics = metrics
        self.driver = driver
        self._view = view
        self._answer_bytes_max = answer_bytes_max
        self._parked_max = parked_max
        self._quotas = quotas or Quotas()
        self._parked: dict[ParkedFetch, None] = {}
        self._waiting: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    def handle(self, session: ServerSession, frame: Frame) -> None:
        state = state_of(session)
        parked = ParkedFetch(self, session, state, frame)
        ask = parked.ask
        check_range(ask.wait_ms, "wait_ms", 0, WAIT_MS_MAX)
        check_range(ask.bytes_max, "bytes_max", 1, 2**31 - 1)
        if len(ask.entries) > FRAME_ENTRIES_MAX:
            raise MalformedRequest(f"entries: {len(ask.entries)} is over the limit of {FRAME_ENTRIES_MAX}")
        for entry in ask.entries:
            check_range(entry.offset, "offset", 0, OFFSET_MAX)
            check_range(entry.bytes_max, "bytes_max", 1, 2**31 - 1)
        if len(self._parked) >= self._parked_max:
            raise Throttled(f"{self._parked_max} fetches are parked on this broker")
        if state.parked >= _OF_ONE_MAX or (state.parked and state.entries + len(ask.entries) > _ENTRIES_OF_ONE_MAX):
            raise Throttled(f"{state.parked} fetches of this session, of {state.entries} partitions, are not answered")
        if not ask.wait_ms:
            self._quotas.check(session.caller)
        self.serve(parked, last=ask.wait_ms == 0 or not ask.entries)

    def serve(self, parked: ParkedFetch, *, last: bool = False) -> None:
        """Answer with what there is; park (again) if there is nothing, unless this is the ``last`` chance."""
        session = parked.session
        if session.closed:
            parked.close()
            return
        if session.queued_bytes > _QUEUED_BYTES_MAX:
            session.flush()  # several requests in one pass: see whether the peer takes the answers to the first ones
        if not session.writable:
            self._when_drained(parked, last)
            return
        if session.caller.limited and (wait_ms := self._quotas.wait_ms(session.caller)):
            parked.pause(wait_ms, self._loop)
            results, parts, hosted = self._nothing(parked)
        else:
            results, parts, hosted = self._collect(parked)
        if last and not results and parked.proving:
            parked.late = True
        elif results or last:
            if not results:
                results = [_nothing(entry, self.driver) for entry in parked.ask.entries]
            if parts and session.caller.limited:
                records, size = sum(map(count_records, parts)), sum(map(len, parts))
                self._quotas.charge(session.caller, records=records, bytes=size)
            parked.answer(results, parts)
        elif not parked.parked:
            self._parked[parked] = None
            self.metrics.parked_fetches = len(self._parked)
            parked.park(hosted, self._loop)
            if not parked.state.watched:
                parked.state.watched = True
                session.close_callbacks.append(self._forget)
            parked.count()

    def _nothing(self, parked: ParkedFetch) -> tuple[list[FetchResult], list[Bytes], list[HostedReplica]]:
        """Like `_collect` where there is nothing."""
        found = (self.driver.replicas.get((entry.topic_id, entry.partition)) for entry in parked.ask.entries)
        return [], [], [hosted for hosted in found if hosted is not None]

    def _collect(self, parked: ParkedFetch) -> tuple[list[FetchResult], list[Bytes], list[HostedReplica]]:
        """Results that say something, their payload, and the replicas to wait on otherwise."""
        ask, state = parked.ask, parked.state
        entries = ask.entries
        count = len(entries)
        left = min(ask.bytes_max, self._answer_bytes_max)
        results: list[FetchResult] = []
        parts: list[Bytes] = []
        found: list[HostedReplica] = []
        first = state.rotation % count if count else 0
        replicas = self.driver.replicas
        check = topic_check(parked.session, self._view, Kind.FETCH, READ)  # what was granted may be revoked meanwhile
        for step in range(count):
            entry = entries[(first + step) % count]
            if check is not None and (refused := refusal(check, entry.topic_id)) is not None:
                results.append(FetchResult(entry.topic_id, entry.partition, error=refused))
                continue
            hosted = replicas.get((entry.topic_id, entry.partition))
            if hosted is None:
                error = self._view.not_here(entry.topic_id, entry.partition).info()
                results.append(FetchResult(entry.topic_id, entry.partition, error=error))
                continue
            found.append(hosted)
            if left <= 0:
                continue
            verdict = hosted.check_read(entry.offset, entry.offset_epoch, ask.secondary)
            proof = parked.proof(hosted) if verdict.unproven else None
            if proof is not None and not proof.settled:
                continue
            if proof is not None and proof.error is not None:
                results.append(FetchResult(entry.topic_id, entry.partition, error=proof.error))
            elif verdict.code:
                results.append(self._refused(hosted, entry, verdict))
            elif entry.offset < verdict.below:
                try:
                    data = hosted.read(entry.offset, verdict.below, min(entry.bytes_max, left), at_least_one=not parts)
                except StorageFailed as failure:
                    self.driver.storage_failed(hosted, RECORDS, failure)
                    results.append(FetchResult(entry.topic_id, entry.partition, error=failure.info()))
                    continue
                if not data:
                    continue
                left -= len(data)
                parts.append(data)
                results.append(
                    FetchResult(
                        entry.topic_id, entry.partition, verdict.below, hosted.core.log_start[RECORDS], len(data)
                    )
                )
        if parts:
            state.rotation = first + 1
        return results, parts, found

    def _refused(self, hosted: HostedReplica, entry: FetchEntry, verdict: ReadVerdict) -> FetchResult:
        code = verdict.code
        cls = BY_CODE.get(code, InternalError)
        start = hosted.core.log_start[RECORDS]
        details: dict[str, object] = {}
        if code == "NOT_PRIMARY":
            part = hosted.core.part
            if part is not None and part.primary:
                details = {"primary": part.primary, "epoch": part.epoch}
        else:
            details = {"log_start": start, "high_watermark": verdict.below}
            if code == "LOG_TRUNCATED":
                details["safe_offset"] = verdict.safe_offset
        self.metrics.error(code)
        info = ErrorInfo(code, verdict.message, cls.retriable, cls.definite, details)
        return FetchResult(entry.topic_id, entry.partition, verdict.below, start, error=info)

    # -- parking ------------------------------------------------------------------------------------

    def unparked(self, parked: ParkedFetch) -> None:
        self._parked.pop(parked, None)
        self.metrics.parked_fetches = len(self._parked)

    def _forget(self, session: ServerSession) -> None:
        for parked in [parked for parked in self._parked if parked.session is session]:
            parked.close()

    def _when_drained(self, parked: ParkedFetch, last: bool) -> None:
        """The peer reads more slowly than we write: keep the request, not its answer."""
        parked.count()
        task = self._loop.create_task(self._serve_drained(parked, last))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _serve_drained(self, parked: ParkedFetch, last: bool) -> None:
        await parked.session.drained()
        if not parked.done:
            self.serve(parked, last=last)

    def close(self) -> None:
        """Answer everybody who waits: a stop must not take as long as the longest poll."""
        for parked in list(self._parked):
            parked.refuse(ShuttingDown("this broker is stopping"))
        for task in list(self._waiting):
            task.cancel()


def _nothing(entry: FetchEntry, driver: PartitionDriver) -> FetchResult:
    hosted = driver.replicas.get((entry.topic_id, entry.partition))
    if hosted is None:
        return FetchResult(entry.topic_id, entry.partition)
    core = hosted.core
    return FetchResult(entry.topic_id, entry.partition, core.high_watermark[RECORDS], core.log_start[RECORDS])
