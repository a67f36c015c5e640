"""Records that come over REST: into the logs of this broker, or on to the brokers that lead their partitions.

What is forwarded goes out once, as a PRODUCE frame over the session of one broker at another. A broker forwards no
frames, so nothing goes round; and nothing is sent a second time, because an answer that is lost leaves open whether the
records were stored. Whoever asked is told so (``definite``), and decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

from ferryline.protocol.errors import (
    FerrylineError,
    InternalError,
    NotReady,
    PrimaryNotAvailable,
    Throttled,
    from_info,
)
from ferryline.protocol.frames import Kind, decode_header
from ferryline.protocol.messages import Produce, ProduceAnswer, ProduceEntry
from ferryline.protocol.metadata import NO_BROKER, TopicMeta
from ferryline.protocol.records import BatchHeader, encode_batch
from ferryline_broker.clock import wall_ms
from ferryline_broker.core.events import AnswerProduce, Key, Produced, Refuse
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.node_sessions import NodeSessions
from ferryline_broker.ports import Answer
from ferryline_broker.produce import check_batch, refusal_info
from ferryline_broker.rest_shared import leads, with_address
from ferryline_broker.view import ClusterView

_TIMEOUT_MS = 30_000  # for the commit
_ANSWER_SLACK_S = 2.0  # for the way back: the primary's own time-out should be what ends a wait
FORWARDED_BYTES_MAX = 64 * 1024 * 1024  # on their way to others, all together

Encoded = tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]  # key, value, headers


class Placed(NamedTuple):
    """A record and where it belongs."""

    topic: TopicMeta
    partition: int
    record: Encoded

    @property
    def key(self) -> Key:
        return (self.topic.id, self.partition)


class _Batch(NamedTuple):
    topic: TopicMeta
    data: bytearray
    header: BatchHeader
    leader: int  # 0: this broker


class Appended(NamedTuple):
    """Where the first record of a batch stands."""

    base_offset: int
    epoch: int


class _Local:
    """A future for each batch that is appended here; REST is not the hot path."""

    def __init__(self) -> None:
        self.futures: list[asyncio.Future[Appended]] = []

    def expect(self) -> int:
        self.futures.append(asyncio.get_running_loop().create_future())
        return len(self.futures) - 1

    def settle(self, index: int, answer: Answer) -> None:
        future = self.futures[index]
        if future.done():
            return
        if isinstance(answer, AnswerProduce):
            future.set_result(Appended(answer.base_offset, answer.epoch))
        else:
            assert isinstance(answer, Refuse), answer
            future.set_exception(from_info(refusal_info(answer)))

    def emit(self) -> None:
        return


class Appender:
    """`append` is all; used from the loop's thread only."""

    def __init__(self, driver: PartitionDriver, view: ClusterView, sessions: NodeSessions, broker_id: int) -> None:
        self._driver = driver
        self._view = view
        self._sessions = sessions
        self._broker_id = broker_id
        self._forwarded_bytes = 0

    def spread(self, topic: TopicMeta, index: int) -> int:
        """The partition of a record without a key: one of those that this broker leads, if it leads any."""
        count = topic.config.partitions
        mine = [part.partition for part in self._view.metadata.partitions_of(topic.id) if leads(self._driver, part.key)]
        return mine[index % len(mine)] if mine else index % count

    async def append(self, placed: Sequence[Placed]) -> list[Appended | FerrylineError]:
        """What became of each record, in order. Raises what keeps all of them from being stored: nothing is appended
        while a batch is wrong or a partition has no primary, as far as this broker can tell."""
        together: dict[Key, list[int]] = {}
        for index, one in enumerate(placed):
            together.setdefault(one.key, []).append(index)
        order = sorted(together)
        batches = [self._batch([placed[index] for index in together[key]]) for key in order]
        size = sum(len(batch.data) for batch in batches if batch.leader)
        if self._forwarded_bytes + size > FORWARDED_BYTES_MAX and self._forwarded_bytes:
            limit = FORWARDED_BYTES_MAX
            raise Throttled(f"{self._forwarded_bytes} bytes are on their way to other brokers", limit=limit)
        self._forwarded_bytes += size
        try:
            outcomes = await self._append(order, batches)
        finally:
            self._forwarded_bytes -= size
        found: dict[int, Appended | FerrylineError] = {}
        for key, outcome in zip(order, outcomes, strict=True):
            for step, index in enumerate(together[key]):
                found[index] = _moved(outcome, step)
        return [found[index] for index in range(len(placed))]

    # -- inside -------------------------------------------------------------------------------------

    def _batch(self, placed: list[Placed]) -> _Batch:
        """One batch, checked here by the rules of its topic: a primary does not measure again what a node brings."""
        topic, partition, _ = placed[0]
        leader = self._leader(topic, partition)
        data = encode_batch([one.record for one in placed], timestamp_ms=wall_ms())
        return _Batch(topic, data, check_batch(memoryview(data), topic), leader)

    def _leader(self, topic: TopicMeta, partition: int) -> int:
        """0 for this broker. Raises UnknownPartition, PrimaryNotAvailable, NotReady."""
        if leads(self._driver, (topic.id, partition)):
            return 0
        part = self._view.metadata.partition(topic.id, partition)
        if part is None:
            raise self._view.not_here(topic.id, partition)
        if part.primary == NO_BROKER:
            raise PrimaryNotAvailable(f"{topic.name}/{partition} has no primary", epoch=part.epoch)
        if part.primary == self._broker_id:
            raise NotReady(f"{topic.name}/{partition} is to be led here, and is not yet")
        return part.primary

    async def _append(self, order: list[Key], batches: list[_Batch]) -> list[Appended | BaseException]:
        waiting, here = _Local(), []
        tasks: list[Any] = []
        for key, batch in zip(order, batches, strict=True):
            if batch.leader:
                tasks.append(self._forward(key, batch))
                continue
            number = waiting.expect()
            tasks.append(waiting.futures[number])
            here.append((self._driver.replicas[key], number, batch))
        for hosted, number, batch in here:
            self._feed(hosted, waiting, number, batch)
        outcomes: list[Appended | BaseException] = await asyncio.gather(*tasks, return_exceptions=True)
        return outcomes

    def _feed(self, hosted: HostedReplica, waiting: _Local, number: int, batch: _Batch) -> None:
        token = self._driver.token(waiting, number, hosted)
        self._driver.feed(hosted, Produced(token, batch.data, batch.header, _TIMEOUT_MS))

    async def _forward(self, key: Key, batch: _Batch) -> Appended:
        """Once, whatever comes of it."""
        ask = Produce(_TIMEOUT_MS, [ProduceEntry(*key, batch.topic.config.partitions, len(batch.data))])
        limit_s = _TIMEOUT_MS / 1000 + _ANSWER_SLACK_S
        frame = await self._sessions.request(batch.leader, Kind.PRODUCE, ask, [batch.data], timeout_s=limit_s)
        (result,) = decode_header(frame.header, ProduceAnswer).results
        if result.error is not None:
            raise with_address(self._view, from_info(result.error))
        return Appended(result.base_offset, result.epoch)


def _moved(outcome: Appended | BaseException, step: int) -> Appended | FerrylineError:
    if isinstance(outcome, Appended):
        return Appended(outcome.base_offset + step, outcome.epoch)
    return outcome if isinstance(outcome, FerrylineError) else InternalError(type(outcome).__name__)


def shown(outcome: Appended | FerrylineError) -> dict[str, Any]:
    """An outcome as answers tell it."""
    if isinstance(outcome, Appended):
        return {"offset": outcome.base_offset, "epoch": outcome.epoch}
    return {
        "error": {
            "code": outcome.code,
            "detail": outcome.message,
            "retriable": outcome.retriable,
            "definite": outcome.definite,
        }
    }
