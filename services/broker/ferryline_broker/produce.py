"""PRODUCE: check each batch, hand it to its partition, answer what became of it.

A refusal concerns one entry; the others go on. A client that leaves cancels nothing: its batches are appended and
committed, only nobody hears of it.
"""

from __future__ import annotations

from time import perf_counter

from ferryline.protocol.access import WRITE
from ferryline.protocol.errors import (
    BY_CODE,
    CorruptBatch,
    ErrorInfo,
    FerrylineError,
    InternalError,
    InvalidArgument,
    MalformedRequest,
    QuotaExceeded,
    RecordTooLarge,
    StalePartitioning,
    Throttled,
    UnknownTopic,
)
from ferryline.protocol.frames import Frame, Kind, decode_header
from ferryline.protocol.limits import BATCH_BYTES_MAX, FRAME_ENTRIES_MAX, TIMEOUT_MS_MAX, check_range
from ferryline.protocol.messages import Produce, ProduceAnswer, ProduceEntry, ProduceResult
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.records import HEADER_BYTES, NO_PRODUCER, BatchHeader, check_crc, read_header
from ferryline_broker.access_rules import topic_check
from ferryline_broker.core.events import AnswerProduce, Produced, Refuse
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.metrics import BrokerMetrics
from ferryline_broker.ports import Answer
from ferryline_broker.sessions import ClientState, state_of
from ferryline_broker.view import ClusterView
from ferryline_service.access.quotas import Quotas
from ferryline_service.server_session import ServerSession
from ferryline_service.tls import identity_broker_id


def refusal_info(refuse: Refuse) -> ErrorInfo:
    """A core's refusal as it travels: behaviour comes from the error's class."""
    cls = BY_CODE.get(refuse.code, InternalError)
    details: dict[str, object] = {}
    if refuse.primary:
        details = {"primary": refuse.primary, "epoch": refuse.epoch}
    return ErrorInfo(refuse.code, refuse.message or refuse.code, cls.retriable, cls.definite, details)


class ProduceRequest:
    """One PRODUCE frame on its way. Answers leave at the end of the pass in which they became known."""

    __slots__ = ("_bytes", "_correlation", "_handler", "_left", "_results", "_session", "_started", "_state", "paid")

    def __init__(
        self, handler: ProduceHandler, session: ServerSession, state: ClientState, frame: Frame, entries: int
    ) -> None:
        self._handler = handler
        self._session = session
        self._state = state
        self._correlation = frame.correlation
        self._left = entries
        self._results: list[ProduceResult] = []
        self._bytes = len(frame.payload)
        self.paid: dict[int, tuple[int, int]] = {}  # of callers with a quota: records and bytes, by entry
        self._started = perf_counter()

    def refuse(self, index: int, error: ErrorInfo) -> None:
        self._handler.metrics.error(error.code)
        self._results.append(ProduceResult(index, error=error))
        self._left -= 1

    def settle(self, index: int, answer: Answer) -> None:
        if type(answer) is AnswerProduce:
            self._results.append(ProduceResult(index, answer.base_offset, answer.epoch))
            self._left -= 1
        else:
            assert isinstance(answer, Refuse), answer
            error = refusal_info(answer)
            if error.definite and index in self.paid:
                self._handler.give_back(self._session, *self.paid[index])
            self.refuse(index, error)

    def emit(self) -> None:
        results, self._results = self._results, []
        if not results:
            return
        more = self._left > 0
        self._session.answer(Kind.PRODUCE, self._correlation, ProduceAnswer(results), more=more)
        self._handler.driver.answered(self._session)
        if not more:
            self._handler.settled(self._state, self._bytes, self._started)


class ProduceHandler:
    """Admits batches and bounds how many bytes may be unsettled, by session and in all."""

    def __init__(
        self,
        driver: PartitionDriver,
        view: ClusterView,
        metrics: BrokerMetrics,
        *,
        session_bytes_max: int,
        total_bytes_max: int,
        quotas: Quotas | None = None,
    ) -> None:
        self.metrics = metrics
        self.driver = driver
        self._view = view
        self._session_bytes_max = session_bytes_max
        self._hold_above = session_bytes_max // 2
        self._total_bytes_max = total_bytes_max
        self._total_bytes = 0
        self._quotas = quotas or Quotas()

    def handle(self, session: ServerSession, frame: Frame) -> None:
        ask = decode_header(frame.header, Produce)
        entries, payload = ask.entries, frame.payload
        timeout_ms = check_range(ask.timeout_ms, "timeout_ms", 1, TIMEOUT_MS_MAX)
        if not 0 < len(entries) <= FRAME_ENTRIES_MAX:
            raise MalformedRequest(f"entries: {len(entries)} is outside 1..{FRAME_ENTRIES_MAX}")
        sizes = [entry.size for entry in entries]
        if sum(sizes) != len(payload) or min(sizes) < 0:
            raise MalformedRequest(f"entries: their sizes do not add up to the {len(payload)} payload bytes")
        state, copied = state_of(session), identity_broker_id(session.identity) != 0
        self._account(state, len(payload))
        request = ProduceRequest(self, session, state, frame, len(entries))
        caller, check = session.caller, topic_check(session, self._view, Kind.PRODUCE, WRITE)
        over: QuotaExceeded | None = None  # then all that follows is over it, too: a later batch must not get in alone
        driver, at = self.driver, 0
        for index, entry in enumerate(entries):
            end = at + entry.size
            try:
                if check is not None:
                    check(entry.topic_id)
                hosted, topic = self._target(entry)
                data = payload[at:end]
                header = check_batch(data, topic, copied)
                if caller.limited:
                    if over is not None:
                        raise over
                    self._quotas.spend(caller, records=header.record_count, bytes=len(data))
                    request.paid[index] = (header.record_count, len(data))
            except FerrylineError as error:
                if over is None and isinstance(error, QuotaExceeded):
                    over = error
                    session.note_refused(Kind.PRODUCE, error)
                request.refuse(index, error.info())
            else:
                token = driver.token(request, index, hosted)
                # The one copy: the core stamps offset and epoch into it, and the log writes it.
                driver.feed(hosted, Produced(token, bytearray(data), header, timeout_ms))
            at = end
        driver.at_end(request)
        if state.produce_bytes > self._hold_above:
            session.hold_reading()

    def _account(self, state: ClientState, size: int) -> None:
        """Book the bytes of a request until it is settled, or refuse it whole."""
        if state.produce_bytes + size > self._session_bytes_max and state.produce_bytes:
            raise Throttled(f"{state.produce_bytes} bytes of this session are unsettled", limit=self._session_bytes_max)
        if self._total_bytes + size > self._total_bytes_max and self._total_bytes:
            raise Throttled(f"{self._total_bytes} bytes are unsettled on this broker", limit=self._total_bytes_max)
        state.produce_bytes += size
        self._total_bytes += size
        self.metrics.produce_bytes_in_flight = self._total_bytes

    def give_back(self, session: ServerSession, records: int, size: int) -> None:
        """A batch that was paid for was refused."""
        self._quotas.give_back(session.caller, records=records, bytes=size)

    def settled(self, state: ClientState, size: int, started: float) -> None:
        state.produce_bytes -= size
        self._total_bytes -= size
        self.metrics.produce_bytes_in_flight = self._total_bytes
        self.metrics.produce_seconds.observe(perf_counter() - started)
        if state.session.held and state.produce_bytes <= self._hold_above // 2:
            state.session.resume_reading()

    def _target(self, entry: ProduceEntry) -> tuple[HostedReplica, TopicMeta]:
        """The replica that this batch is for. Raises the refusal that tells the client what it got wrong."""
        view = self._view
        topic = view.topic(entry.topic_id)
        hosted = self.driver.replicas.get((entry.topic_id, entry.partition))
        if topic is None:
            raise UnknownTopic(f"topic_id: {entry.topic_id[:64]!r} is not known here")
        if entry.partitions != topic.config.partitions:
            raise StalePartitioning(
                f"partitions: {entry.partitions}, topic {topic.name} has {topic.config.partitions}",
                partitions=topic.config.partitions,
            )
        if hosted is None:
            raise view.not_here(entry.topic_id, entry.partition)
        return hosted, topic


def check_batch(data: memoryview, topic: TopicMeta, copied: bool = False) -> BatchHeader:
    """Everything a broker can say about a batch without decoding it. Raises CorruptBatch, RecordTooLarge or
    InvalidArgument, all definite.

    ``copied``: a broker brings a record that was accepted before. It is not measured again, against another topic's
    limit and with what was added to it: there is nobody left who could send it smaller.
    """
    size = len(data)
    if size > BATCH_BYTES_MAX:
        raise RecordTooLarge(f"batch: {size} bytes is over the limit of {BATCH_BYTES_MAX}", limit=BATCH_BYTES_MAX)
    header = read_header(data)
    if header.size != size:
        raise CorruptBatch(f"batch_length: {header.size} bytes are announced, {size} were sent")
    if header.is_control:
        raise InvalidArgument("attributes: control batches are the broker's own", field="attributes")
    if header.producer_id < NO_PRODUCER:
        raise InvalidArgument(f"producer_id: {header.producer_id} is negative", field="producer_id")
    if header.producer_id != NO_PRODUCER and (header.producer_epoch < 0 or header.base_sequence < 0):
        raise InvalidArgument(
            f"producer_epoch {header.producer_epoch} and base_sequence {header.base_sequence} must not be negative",
            field="base_sequence",
        )
    check_crc(data, header)
    limit = topic.config.max_record_bytes
    if size > limit and not copied:
        _check_records(data, header, limit)
    return header


def _check_records(data: memoryview, header: BatchHeader, limit: int) -> None:
    """Refuse a batch with a record over the topic's limit. Only batches larger than the limit come here.

    Records of an uncompressed batch carry their length in front, so this hops over them. A compressed batch cannot be
    looked into without decoding it, which is the clients' part; what it takes packed must not exceed the limit unless
    it holds several records.
    """
    if header.codec != "none":
        if header.record_count == 1:
            raise RecordTooLarge(f"record: {len(data)} packed bytes are over the limit of {limit}", limit=limit)
        return
    at, end = HEADER_BYTES, len(data)
    for _ in range(header.record_count):
        size, at = _varint(data, at, end)
        if size < 0 or at + size > end:
            raise CorruptBatch("records: a record is longer than its batch")
        if size > limit:
            content = _content_bytes(data, at, at + size)
            if content > limit:
                raise RecordTooLarge(f"record: {content} bytes are over the limit of {limit}", limit=limit)
        at += size


def _content_bytes(data: memoryview, at: int, end: int) -> int:
    """Key, value and headers of the record in [at, end), without its framing."""
    at += 1  # attributes
    _, at = _varint(data, at, end)  # timestamp delta
    _, at = _varint(data, at, end)  # offset delta
    total = 0
    for _ in ("key", "value"):
        length, at = _varint(data, at, end)
        total += max(0, length)
        at += max(0, length)
    headers, at = _varint(data, at, end)
    for _ in range(2 * max(0, headers)):
        length, at = _varint(data, at, end)
        total += max(0, length)
        at += max(0, length)
    return total


def _varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    """(value, position behind it) of a zigzag varint."""
    value = shift = 0
    while True:
        if at >= end or shift > 35:
            raise CorruptBatch("records: a length is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value >> 1) ^ -(value & 1), at
        shift += 7
