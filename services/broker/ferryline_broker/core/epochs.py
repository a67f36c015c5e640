"""The epoch index: where each epoch begins in one log. It decides where two logs part ways."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable


class EpochIndex:
    """Start offsets of epochs in one log, ascending in both.

    Invariant: epochs rise strictly, and so do starts, except that the first epoch may be empty: retention took its
    records, and it begins at the log start like the second. It is the epoch of the record before the log start. Without
    it, a secondary that ends exactly there could not be told that the logs agree, and an in-sync one would stop.
    Derivable from the log, so it is rebuilt at start and never trusted from disk.
    """

    __slots__ = ("_epochs", "_starts")

    def __init__(self, starts: Iterable[tuple[int, int]] = ()) -> None:
        self._epochs: list[int] = []
        self._starts: list[int] = []
        for epoch, start in starts:
            self.observe(epoch, start)

    def observe(self, epoch: int, offset: int) -> None:
        """A batch of ``epoch`` stands at ``offset``. Must be called in log order."""
        if self._epochs:
            last = self._epochs[-1]
            if epoch == last:
                return
            assert epoch > last, f"epoch {epoch} after {last} at offset {offset}"
            start = self._starts[-1]
            emptied = len(self._starts) == 1 and offset == start
            assert emptied or offset > start, f"epoch {epoch} starts at {offset}, not after {start}"
        self._epochs.append(epoch)
        self._starts.append(offset)

    @property
    def tail_epoch(self) -> int:
        """Epoch of the last batch, -1 for an empty log."""
        return self._epochs[-1] if self._epochs else -1

    def end_offset_for(self, epoch: int, log_end: int) -> tuple[int, int]:
        """(e, end): the largest known epoch ``e`` <= ``epoch`` and the offset at which ``e`` ends here.

        (-1, log start of the first epoch) when this log knows no epoch that old.
        """
        at = bisect_right(self._epochs, epoch) - 1
        if at < 0:
            return (-1, self._starts[0] if self._starts else log_end)
        end = self._starts[at + 1] if at + 1 < len(self._starts) else log_end
        return (self._epochs[at], end)

    def epoch_at(self, offset: int) -> int:
        """Epoch of the record at ``offset``; -1 below the first known epoch."""
        at = bisect_right(self._starts, offset) - 1
        return self._epochs[at] if at >= 0 else -1

    def epoch_before(self, log_start: int) -> int:
        """Epoch of the record before ``log_start``, -1 if there was none or nobody knows."""
        return self._epochs[0] if log_start > 0 and self._starts and self._starts[0] <= log_start else -1

    def truncate(self, log_end: int) -> None:
        """Forget epochs that begin at or above ``log_end``."""
        while self._starts and self._starts[-1] >= log_end:
            self._starts.pop()
            self._epochs.pop()

    def advance(self, log_start: int) -> None:
        """Forget epochs that end below ``log_start``; the one of the record before it begins there."""
        while len(self._starts) > 1 and self._starts[1] < log_start:
            self._starts.pop(0)
            self._epochs.pop(0)
        if self._starts and self._starts[0] < log_start:
            self._starts[0] = log_start

    def items(self) -> list[tuple[int, int]]:
        return list(zip(self._epochs, self._starts, strict=True))
