"""Frames between brokers, collected over one pass of the loop: one frame per peer and run, not one per partition.

Order within a session is part of the protocol (a Progress counts only after its fetch), so what is collected keeps its
order: a run ends where the kind changes.
"""

from __future__ import annotations

from collections.abc import Callable

from ferryline.protocol.frames import Kind
from ferryline.protocol.messages import (
    Message,
    ReplicaData,
    ReplicaDatas,
    ReplicaFetch,
    ReplicaFetches,
    ReplicaProgress,
    ReplicaProgresses,
)
from ferryline_broker.core.events import Bytes

_DATA_FRAME_BYTES = 8 * 1024 * 1024  # a frame of replica data is closed beyond this; one answer may exceed it
_RUN_MAX = 2_000  # entries of one frame
Tell = Callable[[int, Message, list[Bytes]], None]


class DataOutbox:
    """Primary side, one per incoming session: answers to a secondary's fetches."""

    __slots__ = ("_answers", "_bytes", "_parts", "_tell", "broker_id")

    def __init__(self, broker_id: int, tell: Tell) -> None:
        self.broker_id = broker_id  # own
        self._tell = tell
        self._answers: list[ReplicaData] = []
        self._parts: list[Bytes] = []
        self._bytes = 0

    @property
    def held_bytes(self) -> int:
        return self._bytes

    def add(self, data: ReplicaData, parts: list[Bytes]) -> None:
        self._answers.append(data)
        for part in parts:
            self._parts.append(part)
            self._bytes += len(part)
        if self._bytes > _DATA_FRAME_BYTES or len(self._answers) >= _RUN_MAX:
            self.emit()

    def emit(self) -> None:
        if self._answers:
            answers, parts = self._answers, self._parts
            self._answers, self._parts, self._bytes = [], [], 0
            self._tell(Kind.REPLICA_DATA, ReplicaDatas(self.broker_id, answers), parts)


class FetchOutbox:
    """Secondary side, one per outgoing session: fetches and progress, in the order of the cores."""

    __slots__ = ("_items", "_tell")

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._items: list[ReplicaFetch | ReplicaProgress] = []

    def add(self, item: ReplicaFetch | ReplicaProgress) -> None:
        self._items.append(item)

    def clear(self) -> None:
        self._items = []

    def emit(self, broker_id: int, broker_epoch: int) -> None:
        items, self._items = self._items, []
        at, end = 0, len(items)
        while at < end:
            first = at
            is_fetch = type(items[at]) is ReplicaFetch
            while at < end and at - first < _RUN_MAX and (type(items[at]) is ReplicaFetch) == is_fetch:
                at += 1
            run = items[first:at]
            if is_fetch:
                header: Message = ReplicaFetches(broker_id, broker_epoch, run)  # type: ignore[arg-type]
                self._tell(Kind.REPLICA_FETCH, header, [])
            else:
                header = ReplicaProgresses(broker_id, broker_epoch, run)  # type: ignore[arg-type]
                self._tell(Kind.REPLICA_PROGRESS, header, [])
