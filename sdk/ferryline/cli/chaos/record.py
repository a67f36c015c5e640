"""Writes down what the clients of a run did and saw, as `ferryline.proof.history` wants it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from ferryline.proof.history import FAIL, INFO, OK, HistoryWriter, Numbers, Op, pack

Place = tuple[str, int]  # topic, partition
NUMBER_BYTES = 10  # the value in decimal, in front of the padding


def now_us() -> int:
    """The clock of histories: monotonic, in microseconds."""
    return time.monotonic_ns() // 1000


def payload(number: int, padding: bytes) -> bytes:
    """What a record carries: its number, so that it can be told from all others, and padding."""
    return b"%010d%b" % (number, padding)


def number_of(raw: bytes | None) -> int:
    """The number in a record; one that nobody sends when the record is not ours, so that it is a phantom."""
    try:
        return int((raw or b"")[:NUMBER_BYTES])
    except ValueError:
        return 2**31 - 1


class Recorder:
    """The history of one run: an open file and the next free number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.acked = 0
        self.refused = 0
        self.unknown = 0
        self.polled = 0
        self.last_ack_us = 0
        self.longest_gap_us = 0
        self._file = path.open("wb", buffering=1 << 20)
        self._writer = HistoryWriter(self._file)
        self._next = 0

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def attempt(self, proc: str, place: Place, count: int) -> int:
        """The first of ``count`` fresh numbers, which ``proc`` may send from now on."""
        first, self._next = self._next, self._next + count
        self._writer.write(
            Op("attempt", proc, t0=now_us(), topic=place[0], partition=place[1], values=[(first, count)])
        )
        return first

    def sent(
        self, proc: str, place: Place, outcome: str, t0: int, values: Sequence[int], offsets: Iterable[int] = ()
    ) -> None:
        """``values`` were acknowledged at ``offsets``, or refused, or nobody knows."""
        t1, count = now_us(), len(values)
        if outcome == OK:
            self.acked += count
            if self.last_ack_us:
                self.longest_gap_us = max(self.longest_gap_us, t1 - self.last_ack_us)
            self.last_ack_us = t1
        elif outcome == FAIL:
            self.refused += count
        else:
            self.unknown += count
        self._writer.write(
            Op("send", proc, outcome, t0, t1, place[0], place[1], values=pack(values), offsets=pack(offsets))
        )

    def polled_at(
        self, proc: str, place: Place, t0: int, values: Sequence[int], offsets: Sequence[int], group: str = ""
    ) -> None:
        self.polled += len(values)
        self._writer.write(
            Op(
                "poll",
                proc,
                t0=t0,
                t1=now_us(),
                topic=place[0],
                partition=place[1],
                values=pack(values),
                offsets=pack(offsets),
                group=group,
            )
        )

    def replica(self, broker: int, place: Place, t0: int, values: Sequence[int], offsets: Sequence[int]) -> None:
        """What a copy holds; also when that is nothing."""
        read: tuple[Numbers, Numbers] = (pack(values), pack(offsets))
        self._writer.write(
            Op(
                "replica_read",
                f"copy-{broker}",
                t0=t0,
                t1=now_us(),
                topic=place[0],
                partition=place[1],
                values=read[0],
                offsets=read[1],
                broker=broker,
            )
        )

    def begins(self, proc: str, place: Place, t0: int, offset: int | None) -> None:
        """A reader without group begins here."""
        self._writer.write(Op("assign", proc, t0=t0, t1=now_us(), topic=place[0], partition=place[1], offset=offset))

    def claimed(self, proc: str, place: Place, group: str, generation: int, t0: int, offset: int) -> None:
        self._group("claim", proc, place, group, generation, t0, offset, OK)

    def released(self, proc: str, place: Place, group: str, generation: int) -> None:
        self._group("release", proc, place, group, generation, now_us(), None, OK)

    def committed(
        self, proc: str, place: Place, group: str, generation: int, t0: int, offset: int, outcome: str
    ) -> None:
        self._group("commit", proc, place, group, generation, t0, offset, outcome)

    def _group(
        self, f: str, proc: str, place: Place, group: str, generation: int, t0: int, offset: int | None, outcome: str
    ) -> None:
        self._writer.write(
            Op(
                f,
                proc,
                outcome,
                t0,
                now_us(),
                place[0],
                place[1],
                offset=offset,
                group=group,
                claim_epoch=generation,
                generation=generation,
            )
        )

    def fault(self, note: str, t0: int) -> None:
        self._writer.write(Op("fault", "chaos", t0=t0, t1=now_us(), note=note))


__all__ = ["FAIL", "INFO", "NUMBER_BYTES", "OK", "Place", "Recorder", "now_us", "number_of", "payload"]
