"""Dead letters leave this broker: each `MoveDead` of a queue is carried out until its copy is committed at the target.

The copy goes to the partition of the dead-letter topic with the number of its own, under a producer id, epoch and
sequence that the source's state log holds. So every attempt, of this primary or the next, sends what the target can
tell from a first copy, and an answer that was lost costs nothing. What is repeated: everything, but for the three
answers that say that the target does not know this sequence (`_FORGOTTEN`): then the core takes the next epoch.

So it does when the target took the copy for a repetition of another one. That happens when the source's state log lost
what it knew: its group was deleted and came back, or a power cut took records together with what was said of them. To
notice, the first copy of a queue in a primaryship is read again where it stands; those after it stand further on.

A move ends with its primaryship; the next primary finds in the state log what was not done, and asks for it again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Protocol, TypeVar

from ferryline.protocol.dead_letters import dead_letters_of
from ferryline.protocol.errors import (
    FerrylineError,
    InternalError,
    NotReady,
    OffsetOutOfRange,
    OutOfOrderSequence,
    PrimaryNotAvailable,
    ProducerFenced,
    RequestTimedOut,
    StorageFailed,
    UnknownProducer,
    from_info,
)
from ferryline.protocol.frames import Kind, decode_header
from ferryline.protocol.messages import RECORDS, Fetch, FetchAnswer, FetchEntry, Produce, ProduceAnswer, ProduceEntry
from ferryline.protocol.metadata import NO_BROKER, TopicConfig, TopicMeta
from ferryline.protocol.records import DecodedRecord, decode_batch, read_header
from ferryline_broker.clock import wall_ms
from ferryline_broker.core.dead_copy import Origin, config_of, copy_of, is_copy
from ferryline_broker.core.events import AnswerProduce, Key, Produced, Refuse
from ferryline_broker.core.queue_events import DONE, UNKNOWN_PRODUCER, DeadMoved, MoveDead
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.node_sessions import NodeSessions
from ferryline_broker.ports import Answer
from ferryline_broker.produce import refusal_info
from ferryline_broker.queue_records import QueueRecords
from ferryline_broker.view import ClusterView
from ferryline_service.logs import get_logger

_AT_ONCE = 32  # moves that are read, encoded or on their way; each may hold one batch in memory
_PRODUCE_S = 10.0
_ANSWER_SLACK_S = 2.0  # for the way back: the target's own time-out should be what ends a wait
_RETRY_FIRST_S, _RETRY_MAX_S = 0.05, 5.0
_PLACED_MAX = 10_000  # queues whose last copy is remembered
_FORGOTTEN = (UnknownProducer, OutOfOrderSequence, ProducerFenced)
_log = get_logger()
T = TypeVar("T")


class TopicMaker(Protocol):
    """Who can have topics made: the link to the coordinator."""

    async def ensure_topic(self, name: str, config: TopicConfig, owner: str = "") -> TopicMeta: ...


class _Produced:
    """Waits for the answer of a core to one batch (`ports.Request`)."""

    __slots__ = ("answer",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.answer: asyncio.Future[Answer] = loop.create_future()

    def settle(self, _: int, answer: Answer) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)

    def emit(self) -> None:
        return


class DeadLetters:
    """Carries out moves; at most one for each queue of a partition. ``tell`` hears how each of them ended."""

    def __init__(
        self,
        driver: PartitionDriver,
        view: ClusterView,
        records: QueueRecords,
        topics: TopicMaker,
        sessions: NodeSessions,
        broker_id: int,
        tell: Callable[[HostedReplica, DeadMoved], None] | None = None,
    ) -> None:
        self.tell = tell or driver.feed
        self._driver = driver
        self._view = view
        self._records = records
        self._topics = topics
        self._sessions = sessions
        self._broker_id = broker_id
        self._loop = asyncio.get_running_loop()
        self._moves: dict[tuple[Key, str], asyncio.Task[None]] = {}
        self._placed: dict[tuple[Key, str], tuple[int, Key, int]] = {}  # own epoch, place of the last copy
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._news = asyncio.Event()  # set, and replaced, when the metadata changed
        self._closed = False

    def move(self, hosted: HostedReplica, effect: MoveDead) -> None:
        """Begin to carry out ``effect``, and return. A former move of the same queue, done or not, is dropped."""
        key = (hosted.key, effect.group)
        former = self._moves.pop(key, None)
        if former is not None:
            former.cancel()
        if self._closed:
            return
        task = self._loop.create_task(self._run(hosted, effect))
        self._moves[key] = task
        task.add_done_callback(lambda done: self._ended(key, done))

    def metadata_changed(self) -> None:
        """Whoever waits for a topic or its primary looks again now."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    def close(self) -> None:
        """Stop all moves where they are."""
        self._closed = True
        for task in list(self._moves.values()):
            task.cancel()
        self._sessions.close()

    def _ended(self, key: tuple[Key, str], task: asyncio.Task[None]) -> None:
        if self._moves.get(key) is task:
            del self._moves[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a move to the dead letters ended by mistake", group=key[1], exc_info=error)

    # -- one move -----------------------------------------------------------------------------------

    async def _run(self, hosted: HostedReplica, move: MoveDead) -> None:
        """Try until it is known how it ended, or the primaryship is over."""
        primary, began_ms, failures, told = hosted.core.primary, wall_ms(), 0, ""
        while primary is not None and hosted.core.primary is primary and not hosted.broken:
            news = self._news
            try:
                async with self._slots:
                    outcome = await self._attempt(hosted, move, began_ms)
            except Exception as error:
                failures += 1
                if not isinstance(error, FerrylineError):
                    _log.exception("a dead letter could not be moved", partition=hosted.name, offset=move.offset)
                elif error.code != told:
                    told = error.code
                    _log.warning(
                        "a dead letter waits",
                        partition=hosted.name,
                        offset=move.offset,
                        group=move.group,
                        error=str(error),
                    )
                await self._pause(failures, news)
                continue
            if hosted.core.primary is primary and not hosted.broken:
                hosted.counts.group(move.group).dead += outcome == DONE
                self.tell(hosted, DeadMoved(move.group, move.offset, move.sequence, outcome))
            return

    async def _pause(self, failures: int, news: asyncio.Event) -> None:
        """Wait longer after each failure, with jitter. A change of the metadata cuts the wait short, but not below a
        fifth: a thousand moves may wait for one topic."""
        limit_s = min(_RETRY_MAX_S, _RETRY_FIRST_S * 2 ** min(failures - 1, 10)) * random.uniform(0.5, 1.0)
        await asyncio.sleep(limit_s / 5)
        try:
            async with asyncio.timeout(limit_s * 4 / 5):
                await news.wait()
        except TimeoutError:
            pass

    async def _attempt(self, hosted: HostedReplica, move: MoveDead, began_ms: int) -> str:
        """Read, encode and produce, once. The bytes are the same each time. Raises FerrylineError: try again."""
        source = self._view.topic(hosted.key[0]) or hosted.topic
        name = dead_letters_of(source.name, source.config.retry)
        target = self._view.metadata.topic(name)
        if target is None:
            target = await self._topics.ensure_topic(name, config_of(source.config), source.owner)
        at = (target.id, hosted.key[1] % target.config.partitions)
        leader = self._leader(target, at)
        record = self._record(hosted, move.offset)
        if record is None:  # the queue must not wait for ever for what nobody has
            _log.error("a dead record was gone before it was copied", partition=hosted.name, offset=move.offset)
            return DONE
        origin = Origin(source.id, source.name, hosted.key[1])
        data = copy_of(origin, record, move, began_ms)
        try:
            offset = await self._produce(leader, target, at, data)
        except _FORGOTTEN as error:
            _log.warning("the target forgot a producer", partition=hosted.name, group=move.group, error=str(error))
            return UNKNOWN_PRODUCER
        queue, here = (hosted.key, move.group), (hosted.core.epoch, at, offset)
        known = self._placed.get(queue)
        if known is None or known[:2] != here[:2] or offset <= known[2]:
            found = await self._read(leader, at, offset)
            if found is None or not is_copy(found, origin, record, move):
                _log.warning("a copy was taken for another one", partition=hosted.name, group=move.group, at=offset)
                return UNKNOWN_PRODUCER
        if len(self._placed) >= _PLACED_MAX:
            self._placed.clear()  # costs a read each
        self._placed[queue] = here
        return DONE

    def _record(self, hosted: HostedReplica, offset: int) -> DecodedRecord | None:
        """None: it is gone. Raises StorageFailed."""
        try:
            found = self._records.records(hosted, [offset])
        except StorageFailed as failure:
            self._driver.storage_failed(hosted, RECORDS, failure)
            raise
        if not found and offset >= hosted.core.log_start[RECORDS]:
            raise NotReady(f"{hosted.name}: there is no record at {offset} yet")
        return found[0] if found else None

    # -- producing ----------------------------------------------------------------------------------

    def _leader(self, topic: TopicMeta, at: Key) -> int:
        part = self._view.metadata.partition(*at)
        if part is None or part.primary == NO_BROKER:
            raise PrimaryNotAvailable(f"{topic.name}/{at[1]} has no primary")
        return part.primary

    async def _produce(self, leader: int, topic: TopicMeta, at: Key, data: bytes) -> int:
        """The offset of the copy, once it is committed. Raises FerrylineError."""
        if leader == self._broker_id:
            return await self._produce_here(at, data)
        entry = ProduceEntry(*at, topic.config.partitions, len(data))
        ask = Produce(int(_PRODUCE_S * 1000), [entry])
        timeout_s = _PRODUCE_S + _ANSWER_SLACK_S
        frame = await self._sessions.request(leader, Kind.PRODUCE, ask, [data], timeout_s=timeout_s)
        result = _only(decode_header(frame.header, ProduceAnswer).results)
        if result.error is not None:
            raise from_info(result.error)
        return result.base_offset

    async def _produce_here(self, at: Key, data: bytes) -> int:
        hosted = self._replica(at)
        request = _Produced(self._loop)
        token = self._driver.token(request, 0, hosted)
        event = Produced(token, bytearray(data), read_header(data), int(_PRODUCE_S * 1000))
        self._driver.feed(hosted, event)
        try:
            async with asyncio.timeout(_PRODUCE_S + _ANSWER_SLACK_S):
                answer = await request.answer
        except TimeoutError:
            raise RequestTimedOut(f"{hosted.name}: no answer in time") from None
        if isinstance(answer, Refuse):
            raise from_info(refusal_info(answer))
        assert isinstance(answer, AnswerProduce), answer
        return answer.base_offset

    async def _read(self, leader: int, at: Key, offset: int) -> DecodedRecord | None:
        """The committed record at ``offset``; None if it is not retained. Raises FerrylineError."""
        if leader == self._broker_id:
            found = self._records.records(self._replica(at), [offset])
            return found[0] if found else None
        ask = Fetch(0, 1, [FetchEntry(*at, offset, bytes_max=1)])
        frame = await self._sessions.request(leader, Kind.FETCH, ask, timeout_s=_PRODUCE_S)
        result = _only(decode_header(frame.header, FetchAnswer).results)
        if result.error is not None:
            error = from_info(result.error)
            if isinstance(error, OffsetOutOfRange) and offset < error.details.get("log_start", 0):
                return None
            raise error
        if not result.size:
            raise NotReady(f"broker {leader} does not show what it has committed yet")
        header = read_header(frame.payload)
        records = list(decode_batch(frame.payload[: header.size], header))
        return records[offset - header.base_offset]

    def _replica(self, at: Key) -> HostedReplica:
        hosted = self._driver.replicas.get(at)
        if hosted is None:
            raise self._view.not_here(*at)
        return hosted


def _only(results: list[T]) -> T:
    if len(results) != 1:
        raise InternalError(f"one question was answered with {len(results)} results")
    return results[0]
