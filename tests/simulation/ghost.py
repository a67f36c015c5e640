"""What is true, whatever the cores believe: the committed logs, and how every copy compares with them.

A record is *committed* from the moment at which any replica puts its high watermark above it: from then on readers may
see it and producers may be answered. `Truth` keeps the committed batches of one log for ever; `Copy` follows one log of
one broker batch by batch. Both are fed by the driver, from effects that were carried out, never by the cores.

A broken rule raises `Violation`.
"""

from __future__ import annotations

from collections.abc import Iterable

from ferryline_broker.core.events import Key

Identity = tuple[int, int, int]  # producer id, epoch, first sequence
Batch = tuple[int, int, int, int]  # base offset, next offset, epoch, crc


class Violation(AssertionError):
    """An invariant does not hold. ``rule`` names it."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule = rule


class Truth:
    """The committed batches of one log. It only grows, except by a declared loss (unclean recovery)."""

    __slots__ = ("batches", "brought", "end", "key", "log", "lost", "named", "places")

    def __init__(self, key: Key, log: int) -> None:
        self.key, self.log = key, log
        self.batches: dict[int, Batch] = {}  # by base offset, in order
        self.end = 0
        self.lost: list[tuple[int, int]] = []  # declared: offsets [from, to) that were committed once
        self.brought: list[tuple[int, int, int]] = []  # by recoveries: offsets [from, to), and the epoch they began
        self.named: dict[tuple[int, int], Identity] = {}  # (base offset, crc) as appended by a primary -> its producer
        self.places: dict[Identity, int] = {}  # where each identity was committed

    def extend(self, batch: Batch, log_start: int = 0) -> None:
        """``log_start``: of the replica that commits it. What retention has taken may come again: nobody knows it."""
        assert batch[0] == self.end, (batch, self.end)
        identity = self.named.get((batch[0], batch[3]))
        if identity is not None:
            before = self.places.get(identity, -1)
            if before >= log_start and not self.lost:
                raise Violation("D2 duplicate", f"{self.key}: the batch at {before} was committed again at {batch[0]}")
            self.places[identity] = batch[0]
        self.batches[batch[0]] = batch
        self.end = batch[1]

    def recovered_from(self, copy: Copy, epoch: int) -> bool:
        """An operator chose the replica of ``copy`` (rule C7) for ``epoch``: from now on the truth is what it holds.

        After an earlier loss this may be an older history that was found again: what its replica knows to be committed
        is so once more, and its log may begin above everything that was committed since. Returns whether anything
        committed was given up.
        """
        copy.compare()
        lost = copy.agreed < self.end
        if lost:
            if copy.agreed < copy.end:
                self.brought.append((copy.agreed, copy.end, epoch))
            self.declare_loss(copy.agreed)
        if self.lost and copy.start > self.end:
            self.lost.append((self.end, copy.start))
            self.end = copy.start
        while self.lost and self.end < copy.watermark:
            batch = copy.batches.get(self.end)
            if batch is None:
                raise Violation("watermark inside a batch", f"{copy} at {self.end}, recovered")
            self.extend(batch, copy.start)
        return lost

    def was_brought(self, offset: int) -> bool:
        """A recovery that gave up committed records put this one in their place; nobody had committed it before."""
        batch = next((b for b in self.batches.values() if b[0] <= offset < b[1]), None)
        return batch is not None and any(low <= offset < end and batch[2] < epoch for low, end, epoch in self.brought)

    def declare_loss(self, offset: int) -> None:
        if offset >= self.end:
            return
        self.lost.append((offset, self.end))
        while self.batches and next(reversed(self.batches)) >= offset:
            self.batches.popitem()
        self.end = offset


class Copy:
    """One log of one broker, as written. ``synced``: survives a power cut below this offset.

    ``agreed``: everything in [start, agreed) is the same as the truth.
    """

    __slots__ = ("agreed", "batches", "broker", "end", "start", "synced", "truth", "watermark")

    def __init__(self, truth: Truth, broker: str) -> None:
        self.truth = truth
        self.broker = broker
        self.batches: dict[int, Batch] = {}
        self.start = 0
        self.end = 0
        self.synced = 0
        self.agreed = 0
        self.watermark = 0  # of the process that runs now

    @property
    def tail_epoch(self) -> int:
        return next(reversed(self.batches.values()))[2] if self.batches else -1

    def load(self, start: int, batches: Iterable[Batch], *, synced: bool) -> None:
        """As found on the disk."""
        self.start = self.end = start
        self.batches.clear()
        for batch in batches:
            self.batches[batch[0]] = batch
            self.end = batch[1]
        self.synced = self.end if synced else min(self.synced, self.end)
        self.agreed = start
        self.compare()

    def append(self, batch: Batch) -> None:
        if batch[0] != self.end:
            raise Violation("contiguity", f"{self.broker} {self._where} appends at {batch[0]}, end is {self.end}")
        self.batches[batch[0]] = batch
        self.end = batch[1]
        self.compare()

    def truncate(self, offset: int, *, recovered: bool) -> None:
        if offset < self.watermark and not recovered:
            raise Violation(
                "D1.7 no truncation below the high watermark",
                f"{self.broker} {self._where} cuts at {offset}, high watermark {self.watermark}",
            )
        while self.batches and next(reversed(self.batches)) >= offset:
            self.batches.popitem()
        self.end = offset
        self.synced = min(self.synced, offset)
        self.agreed = min(self.agreed, offset)
        self.watermark = min(self.watermark, offset)

    def cut_to_synced(self) -> None:
        """A power cut: only what was synced is sure to be found again."""
        self.watermark = 0
        self.truncate(max(self.synced, self.start), recovered=True)

    def reset(self, offset: int) -> None:
        self.batches.clear()
        self.start = self.end = self.synced = self.agreed = self.watermark = offset

    def advance_start(self, offset: int) -> None:
        if offset > self.truth.end:
            raise Violation("L11", f"{self.broker} {self._where} starts at {offset}, committed up to {self.truth.end}")
        for base in [base for base in self.batches if base < offset]:
            del self.batches[base]
        self.start = max(self.start, offset)
        self.agreed = max(self.agreed, self.start)

    def compare(self) -> None:
        """Move ``agreed`` on as far as both agree."""
        truth, batches = self.truth.batches, self.batches
        limit = min(self.end, self.truth.end)
        while self.agreed < limit:
            mine = batches.get(self.agreed)
            if mine is None or truth.get(self.agreed) != mine:
                return
            self.agreed = mine[1]

    def raise_watermark(self, value: int) -> bool:
        """The broker says that everything below ``value`` is committed. Returns whether the truth grew by it."""
        truth = self.truth
        if value > self.end:
            raise Violation("D1.7 high watermark <= log end", f"{self.broker} {self._where}: {value} > {self.end}")
        if value < self.watermark:
            raise Violation("D1.7 high watermark rises", f"{self.broker} {self._where}: {self.watermark} -> {value}")
        self.watermark = value
        self.compare()
        if self.agreed < min(value, truth.end):
            mine, other = self.batches.get(self.agreed), truth.batches.get(self.agreed)
            raise Violation(
                "D1.3/D1.6 logs match below the high watermark",
                f"{self.broker} {self._where} offset {self.agreed}: holds {mine}, committed is {other}",
            )
        grew = value > truth.end
        while truth.end < value:
            batch = self.batches.get(truth.end)
            if batch is None:
                raise Violation("watermark inside a batch", f"{self.broker} {self._where} at {truth.end} for {value}")
            truth.extend(batch, self.start)
        if grew:
            self.agreed = max(self.agreed, truth.end)
        return grew

    @property
    def rank(self) -> tuple[int, int]:
        """How recovery compares logs: the epoch of the last batch, then the end."""
        return (next(reversed(self.batches.values()))[2] if self.batches else -1, self.end)

    @property
    def complete(self) -> bool:
        self.compare()
        return self.agreed >= self.truth.end >= self.start

    @property
    def durably_complete(self) -> bool:
        return self.complete and self.synced >= self.truth.end

    @property
    def _where(self) -> str:
        return f"{self.truth.key[0][:6]}-{self.truth.key[1]} log {self.truth.log}"

    def __repr__(self) -> str:
        return (
            f"{self.broker}[{self.start}..{self.end}) synced {self.synced} agreed {self.agreed}/{self.truth.end} "
            f"hw {self.watermark} tail {list(self.batches.values())[-3:]}"
        )
