"""What of the fetched records is handed out next, and what the application has in its hands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ferryline.fetcher import Fetcher
from ferryline.message import Message
from ferryline.partition import Partition, located
from ferryline.protocol.errors import CorruptBatch, FerrylineError

ERROR_PAUSE_S = 0.5  # before a partition whose error was raised is fetched again


class Reader:
    """Hands records out, in order within each partition, partitions in turn.

    ``hands``: partitions that the records given last come from; they count as processed when the application is back
    (`finish`). ``reading``: the one that iteration goes on with. ``done(partition)`` is told when the application has
    finished with a revoked one.
    """

    def __init__(self, fetcher: Fetcher, done: Callable[[Partition], None]) -> None:
        self.hands: list[Partition] = []
        self.reading: Partition | None = None
        self.error: FerrylineError | None = None  # of the membership, to be raised once
        self._fetcher = fetcher
        self._done = done
        self._handed_out = 0

    def finish(self) -> None:
        """The application is back: what it was given is processed."""
        if self.hands:
            hands, self.hands = self.hands, []
            self.reading = None
            for partition in hands:
                partition.processed = partition.position
                if partition.revoked and not partition.gone:
                    self._done(partition)

    def one(self) -> Message[Any] | None:
        """The next record, if one is at hand. Iteration goes on in `reading`."""
        while (partition := self._next_ready()) is not None:
            taken = self._taken(partition, 1)
            if taken:
                self._hand_out([partition])
                self.reading = partition
            self._fetcher.refill(partition)
            if taken:
                return taken[0]
        return None

    def some(self, limit: int) -> list[Message[Any]]:
        """Records at hand, up to ``limit``, from as many partitions as it takes."""
        batch: list[Message[Any]] = []
        while len(batch) < limit:
            partition = self._next_ready(raising=not batch)
            if partition is None:
                break
            taken = self._taken(partition, limit - len(batch))
            if taken:
                batch += taken
                if partition not in self.hands:
                    self._hand_out([*self.hands, partition])
            self._fetcher.refill(partition)
        return batch

    def put_back(self, batch: list[Message[Any]]) -> None:
        """The application never got these: they are handed out again."""
        first: dict[tuple[str, int], int] = {}
        for message in batch:
            first.setdefault((message.topic, message.partition), message.offset)
        hands, self.hands = self.hands, []
        for partition in hands:
            offset = first.get((partition.source.topic, partition.source.partition))
            if offset is not None and not partition.gone:
                processed = partition.processed
                partition.jump(offset)
                partition.processed = min(processed, offset)
                if partition.revoked:
                    self._done(partition)
        self._fetcher.schedule()

    def leave(self, partition: Partition) -> None:
        """Hand nothing more out of a partition; what was given stays given."""
        if self.reading is partition:
            self.reading = None

    def forget(self, partition: Partition) -> None:
        """A partition is gone, or goes on elsewhere: what was given of it is not processed any more."""
        self.leave(partition)
        if partition in self.hands:
            self.hands.remove(partition)

    def progress(self) -> object:
        """Changes whenever the application takes a record; None while it waits for one. Read by another thread."""
        partition = self.reading
        return (self._handed_out, partition.index if partition is not None else 0) if self.hands else None

    def fail(self, error: FerrylineError) -> None:
        self.error = error
        self._fetcher.wake()

    def _hand_out(self, partitions: list[Partition]) -> None:
        self.hands = partitions
        self._handed_out += 1
        for partition in partitions:
            partition.policy = False

    def _next_ready(self, *, raising: bool = True) -> Partition | None:
        """The next partition with data. Raises the error of a partition once its data is used up.

        With ``raising`` False an error stays for the next call, so that records already gathered are handed out.
        """
        if self.error is not None and raising:
            error, self.error = self.error, None
            raise error
        ready = self._fetcher.ready
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
                raise self._once(partition, partition.error)
        return None

    def _once(self, partition: Partition, error: FerrylineError) -> FerrylineError:
        """Raised now, and again if it is still so at the next fetch."""
        partition.error = None
        partition.retry_at = asyncio.get_running_loop().time() + ERROR_PAUSE_S
        self._fetcher.schedule()
        return error

    def _taken(self, partition: Partition, limit: int) -> list[Message[Any]]:
        """Take records. Bytes that do not decode become the partition's error; they are fetched again after it."""
        try:
            return partition.take(limit)
        except CorruptBatch as error:
            told = located(error, partition)
            partition.drop()
            partition.error = told
            return []
