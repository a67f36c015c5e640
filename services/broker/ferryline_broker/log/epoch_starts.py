"""Where each epoch begins in a log: kept beside the log, and rebuilt from seals and headers at every start."""

from __future__ import annotations

from collections.abc import Iterable


class EpochStarts:
    """(epoch, start offset) pairs; both rise strictly.

    The first pair may stand for an epoch of which no record is left (retention took them): it begins at the log start
    and makes way for the first epoch that really begins there. So the tail epoch of an emptied log is still known.
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
            if offset == last_start:
                self.pairs.pop()
        self.pairs.append((epoch, offset))

    def begin_at(self, log_start: int, epoch_before: int) -> None:
        """The log begins at ``log_start`` now; the record before it was of ``epoch_before`` (-1: unknown or none)."""
        above = [pair for pair in self.pairs if pair[1] > log_start]
        spanning = [epoch for epoch, start in self.pairs if start <= log_start]
        epoch = spanning[-1] if spanning else epoch_before
        self.pairs = ([(epoch, log_start)] if epoch >= 0 else []) + above

    def cut(self, log_end: int, log_start: int, epoch_before: int) -> None:
        """Everything from ``log_end`` on is gone."""
        self.pairs = [pair for pair in self.pairs if pair[1] < log_end]
        if not self.pairs and epoch_before >= 0:
            self.pairs = [(epoch_before, log_start)]
