"""Where each epoch begins in a log: kept beside the log, and rebuilt from seals and headers at every start."""

from __future__ import annotations

from collections.abc import Iterable


class EpochStarts:
    """(epoch, start offset) pairs; epochs rise strictly, and so do starts but for the first two.

    The first pair may stand for an epoch of which no record is left (retention took them): that of the record before
    the log start, where it begins. So the tail epoch of an emptied log is still known, and a secondary that ends
    exactly at the log start can be compared.
    """

    __slots__ = ("pairs",)

    def __init__(self, pairs: Iterable[tuple[int, int]] = ()) -> None:
        self.pairs: list[tuple[int, int]] = []
        for epoch, start in pairs:
            self.observe(epoch, start)

    @property
    def tail(self) -> int:
        return self.pairs[-1][0] if self.pairs else -1

    def observe(self, epoch: int, offset: int) -> None:
        """A batch of ``epoch`` stands at ``offset``; in log order."""
        if self.pairs:
            last_epoch, last_start = self.pairs[-1]
            if epoch == last_epoch:
                return
            if offset == last_start and len(self.pairs) > 1:
                self.pairs.pop()
        self.pairs.append((epoch, offset))

    def begin_at(self, log_start: int, epoch_before: int) -> None:
        """The log begins at ``log_start`` now; the record before it was of ``epoch_before`` (-1: unknown or none)."""
        left = [pair for pair in self.pairs if pair[1] >= log_start]
        below = [epoch for epoch, start in self.pairs if start < log_start]
        epoch = below[-1] if below else epoch_before
        if epoch >= 0 and (not left or epoch < left[0][0]):
            left.insert(0, (epoch, log_start))
        self.pairs = left

    def cut(self, log_end: int, log_start: int, epoch_before: int) -> None:
        """Everything from ``log_end`` on is gone."""
        self.pairs = [pair for pair in self.pairs if pair[1] < log_end]
        if not self.pairs and epoch_before >= 0:
            self.pairs = [(epoch_before, log_start)]
