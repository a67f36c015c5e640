"""The epoch index: where each epoch begins in one log. It decides where two logs part ways. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable


class EpochIndex:
    """Epochs of the records in [log start, log end), and the epoch of the record before the log start.

    Invariants: epochs and starts rise strictly; ``before`` is never above the first epoch. ``before`` is -1 where no
    record was ever retained away, or nobody remembers. It is a field of its own, because it stays true through every
    cut: a log that is cut back to its start still knows where it parts from others, and a secondary that ends exactly
    there can be told that the logs agree. Derivable from the log and its start, so it is rebuilt when a log is opened.
    """

    __slots__ = ("_epochs", "_starts", "before")

    def __init__(self, starts: Iterable[tuple[int, int]] = (), before: int = -1) -> None:
        self.before = before
        self._epochs: list[int] = []
        self._starts: list[int] = []
        for epoch, start in starts:
            self.observe(epoch, start)

    def observe(self, epoch: int, offset: int) -> None:
        """A batch of ``epoch`` stands at ``offset``. Must be called in log order."""
        if self._epochs:
            if epoch == self._epochs[-1]:
                return
            assert offset > self._starts[-1], f"epoch {epoch} starts at {offset}, not after {self._starts[-1]}"
        assert epoch >= self.tail_epoch, f"epoch {epoch} after {self.tail_epoch} at offset {offset}"
        self._epochs.append(epoch)
        self._starts.append(offset)

    @property
    def tail_epoch(self) -> int:
        """Epoch of the last record, also when retention took it; -1 for a log that never held one."""
        return self._epochs[-1] if self._epochs else self.before

    def end_offset_for(self, epoch: int, log_end: int) -> tuple[int, int]:
        """(e, end): the largest known epoch ``e`` <= ``epoch`` and the offset at which ``e`` ends here.

        (-1, log start) when this log knows no epoch that old.
        """
        at = bisect_right(self._epochs, epoch) - 1
        if at < 0:
            log_start = self._starts[0] if self._starts else log_end
            return (self.before if self.before <= epoch else -1, log_start)
        end = self._starts[at + 1] if at + 1 < len(self._starts) else log_end
        return (self._epochs[at], end)

    def epoch_at(self, offset: int) -> int:
        """Epoch of the record at ``offset``; -1 below the log start."""
        at = bisect_right(self._starts, offset) - 1
        return self._epochs[at] if at >= 0 else -1

    def truncate(self, log_end: int) -> None:
        """Forget epochs that begin at or above ``log_end``."""
        while self._starts and self._starts[-1] >= log_end:
            self._starts.pop()
            self._epochs.pop()

    def advance(self, log_start: int, log_end: int) -> None:
        """Forget epochs that end at or below ``log_start``; one that spans it begins there."""
        gone = bisect_right(self._starts, log_start - 1)
        if not gone:
            return
        self.before = self._epochs[gone - 1]
        end = self._starts[gone] if gone < len(self._starts) else log_end
        if end > log_start:
            gone -= 1
            self._starts[gone] = log_start
        del self._starts[:gone], self._epochs[:gone]

    def marks(self, low: int, below: int) -> list[int]:
        """Where epochs begin in [low, below), each with a control record. What retention left of an epoch begins with a
        record of its own."""
        first = bisect_left(self._starts, low)
        if first == 0 and self._starts and self._starts[0] > 0 and self.before in (-1, self._epochs[0]):
            first = 1
        return self._starts[first : bisect_left(self._starts, below)]

    def items(self) -> list[tuple[int, int]]:
        """(epoch, start offset) pairs in log order."""
        return list(zip(self._epochs, self._starts, strict=True))
