"""One partition that a consumer reads: what was fetched, what was handed out, what was processed."""

from __future__ import annotations

from collections import deque
from typing import Any

from ferryline.message import Message, Source
from ferryline.protocol.errors import FerrylineError
from ferryline.protocol.metadata import NO_BROKER
from ferryline.protocol.records import BatchHeader, check_crc, decode_messages
from ferryline.requests import Key


class Partition:
    """One partition that is being read.

    ``position``: the next offset to hand out; everything before it was handed out or skipped. ``processed``: what the
    application has come back from. ``fetch_offset``: the next to fetch. processed <= position <= fetch_offset.
    """

    __slots__ = (
        "batches",
        "buffered",
        "check",
        "committed",
        "count",
        "error",
        "failures",
        "fetch_epoch",
        "fetch_offset",
        "generation",
        "gone",
        "high_watermark",
        "index",
        "key",
        "log_start",
        "messages",
        "next_offset",
        "paused",
        "policy",
        "position",
        "processed",
        "queued",
        "retry_at",
        "revoked",
        "rewound",
        "source",
        "target",
        "ticket",
    )

    def __init__(self, key: Key, source: Source, offset: int, offset_epoch: int = -1, *, check: bool = True) -> None:
        self.key = key
        self.source = source
        self.check = check  # verify the CRC of batches
        self.generation = 0
        self.batches: deque[tuple[BatchHeader, memoryview]] = deque()
        self.buffered = 0
        self.messages: list[Message[Any]] = []  # of the batch that is being handed out
        self.index = self.count = 0
        self.next_offset = offset  # after that batch
        self.position = self.processed = self.fetch_offset = offset
        self.committed = -1
        self.fetch_epoch = offset_epoch  # epoch of the record before fetch_offset, -1 unknown
        self.high_watermark = self.log_start = -1
        self.policy = False  # the offset came from the start policy, not from a commit or a seek
        self.paused = self.revoked = self.gone = self.queued = False
        self.rewound = False  # the next commit may go back
        self.ticket = 0  # of the outstanding fetch, 0: none
        self.target = (NO_BROKER, -1)  # whom it was sent to
        self.retry_at = 0.0
        self.failures = 0
        self.error: FerrylineError | None = None

    @property
    def has_data(self) -> bool:
        return self.index < self.count or bool(self.batches)

    def jump(self, offset: int, offset_epoch: int = -1) -> None:
        """Go on from another offset: drop what was fetched."""
        self.drop()
        self.position = self.processed = self.fetch_offset = self.next_offset = offset
        self.fetch_epoch = offset_epoch
        self.error = None
        self.failures, self.retry_at = 0, 0.0

    def drop(self) -> None:
        """Forget what was fetched and not handed out, and the fetch that is on its way."""
        self.batches.clear()
        self.buffered = self.index = self.count = self.ticket = 0
        self.messages = []
        self.fetch_offset = self.next_offset = self.position

    def load(self) -> bool:
        """Decode the next batch that has records to hand out. Returns False when nothing is left.

        Raises CorruptBatch; the position stays before the damaged batch.
        """
        while self.batches:
            header, data = self.batches[0]
            if header.is_control or header.next_offset <= self.position:
                self.position = max(self.position, header.next_offset)
            else:
                if self.check:
                    check_crc(data, header)
                source = self.source
                messages: list[Message[Any]] = decode_messages(
                    data, header, Message, source, plain=source.decode is None
                )
                if header.base_offset < self.position:
                    messages = [message for message in messages if message.offset >= self.position]
                self.messages = messages
                self.index, self.count = 0, len(messages)
                self.next_offset = header.next_offset
            self.batches.popleft()
            self.buffered -= header.size
            if self.index < self.count:
                return True
        return False

    def take(self, limit: int) -> list[Message[Any]]:
        """Up to ``limit`` records, in order; moves the position."""
        if self.index >= self.count and not self.load():
            return []
        start, self.index = self.index, min(self.index + limit, self.count)
        taken = self.messages[start : self.index]
        if self.index == self.count:
            self.position = self.next_offset
            self.messages = []
            self.index = self.count = 0
            self.skip_control()
        else:
            self.position = taken[-1].offset + 1
        return taken

    def skip_control(self) -> None:
        """Control records are nobody's data: step over them at once, so that position and lag tell the truth."""
        if self.index < self.count:
            return
        while self.batches and self.batches[0][0].is_control:
            header, _ = self.batches.popleft()
            self.buffered -= header.size
            finished = self.processed == self.position
            self.position = self.next_offset = max(self.position, header.next_offset)
            if finished:
                self.processed = self.position


def located(error: FerrylineError, partition: Partition) -> FerrylineError:
    """The same error, saying where: topic, partition and offset."""
    topic, number = partition.source.topic, partition.source.partition
    details = {**error.details, "topic": topic, "partition": number, "offset": partition.fetch_offset}
    return type(error)(f"{topic}/{number} at offset {partition.fetch_offset}: {error.message}", **details)
