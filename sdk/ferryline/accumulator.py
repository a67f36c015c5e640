"""Where records wait until their batch is closed: one accumulator per partition, grouped by topic.

What a batch is after it was closed is the business of `Sender` and its core.
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import count, repeat

from ferryline.message import RecordMetadata
from ferryline.protocol.errors import FerrylineError
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.records import BatchBuilder, decode_batch, set_producer

RecordFuture = asyncio.Future[RecordMetadata]
Pairs = list[tuple[str, bytes | None]]
PartitionKey = tuple[str, int]
Record = tuple[int, bytes | None, bytes | None, Pairs, int, RecordFuture]
"""(timestamp_ms, key, value, headers, bytes, future): a record off the common path."""

RECORD_OVERHEAD = 64  # what a buffered record costs besides its bytes: its future, its place in lists


class Batch:
    """A closed batch with the futures of its records, until its last word."""

    __slots__ = ("builder", "bytes", "data", "futures", "identity", "key", "keyed", "number", "partitions",
                 "returned", "topic")  # fmt: skip

    def __init__(self, number: int, topic: TopicBuffer, accumulator: Accumulator, builder: BatchBuilder) -> None:
        self.number = number
        self.topic = topic
        self.key = accumulator.key
        self.keyed = accumulator.keyed
        self.partitions = topic.partitions  # that its keys were hashed with
        self.bytes = accumulator.bytes  # as counted against buffer_bytes
        self.futures = accumulator.futures
        self.builder: BatchBuilder | None = builder
        self.data = bytearray()
        self.identity = (-1, -1, -1)
        self.returned = False  # the core gave it back to be routed anew

    def seal(self, pid: int, pepoch: int, sequence: int) -> bytearray:
        """The encoded batch under this identity: encoded once, sealed again only after the epoch was bumped."""
        identity = (pid, pepoch, sequence)
        if self.builder is not None:
            self.data = self.builder.build(pid, pepoch, sequence)
            self.builder = None
        elif identity != self.identity:
            set_producer(self.data, pid, pepoch, sequence)
        self.identity = identity
        return self.data

    def complete(self, base_offset: int) -> None:
        """Resolve the futures, in order. A million of these a second: the loop over them runs in C."""
        results = map(RecordMetadata, repeat(self.topic.name), repeat(self.key[1]), count(base_offset))
        settling = map(asyncio.Future.set_result, self.futures, results)
        while True:
            try:
                deque(settling, maxlen=0)
            except asyncio.InvalidStateError:
                continue  # the application has given this one up; go on behind it
            return

    def fail(self, error: FerrylineError) -> None:
        for future in self.futures:
            if not future.done():
                future.set_exception(error)

    def records(self) -> list[Record]:
        """Its records again, to be routed anew."""
        data = self.seal(-1, -1, -1)
        share = self.bytes // len(self.futures)
        rest = self.bytes - share * len(self.futures)
        sizes = [share + rest] + [share] * (len(self.futures) - 1)
        return [
            (record.timestamp, record.key, record.value, record.headers, size, future)
            for record, size, future in zip(decode_batch(data), sizes, self.futures, strict=True)
        ]


class Accumulator:
    """The open batch of one partition. ``builder`` is None while it is empty."""

    __slots__ = ("builder", "bytes", "closed_at", "futures", "key", "keyed", "opened_ms", "waiting")

    def __init__(self, key: PartitionKey) -> None:
        self.key = key
        self.builder: BatchBuilder | None = None
        self.futures: list[RecordFuture] = []
        self.bytes = 0
        self.keyed = False  # a record is here because of its key
        self.opened_ms = 0
        self.closed_at = float("-inf")  # loop time, of the batch before this one
        self.waiting = False  # has lingered long enough; grows until the core has room


class TopicBuffer:
    """The accumulators of one topic, for as long as its partition count stays."""

    __slots__ = ("accumulators", "id", "max_record_bytes", "moving", "name", "parked", "partitions", "returned",
                 "turn", "unsettled")  # fmt: skip

    def __init__(self, meta: TopicMeta) -> None:
        self.id = meta.id
        self.name = meta.name
        self.partitions = meta.config.partitions
        self.max_record_bytes = meta.config.max_record_bytes
        self.accumulators = [Accumulator((meta.id, number)) for number in range(meta.config.partitions)]
        self.turn = 0  # partition that records without a key go to now
        self.unsettled = 0  # closed batches that have had no last word
        # While the topic gets more partitions, what was hashed with the old count is settled first: otherwise a record
        # of a key that moves could be stored before an earlier one.
        self.moving = False
        self.returned: list[Batch] = []  # given back by the core
        self.parked: deque[tuple[Record, int | None]] = deque()  # sent meanwhile, with the partition asked for
