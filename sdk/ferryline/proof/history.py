"""Histories: what clients did and saw, one JSON object on a line. Format version 1.

The first line is the header, ``{"f":"header","version":1,"idempotent":true,"drained":true}``. Every other line is one
operation that has *ended*. Lines of one proc stand in its order, otherwise in any; several histories (one for each
process) may be read as one. Fields that hold their default are left out. Times are integers in microseconds of one
clock that all writers share (CLOCK_MONOTONIC on one machine); ``t0`` is not later than the true begin and ``t1`` not
earlier than the true end of everything the line tells. One line may carry many records: ``values`` and ``offsets`` are
lists of the same length in which ``[a, n]`` stands for a, a+1, ..., a+n-1.

A *value* is the integer that the payload of a record carries: unique in the whole history, small (arrays are indexed by
it), and rising in the order of sending within one producer and partition. Take values in blocks (`ValueBlocks`), and
write an ``attempt`` line for a block *before* its first record is sent: a value in no attempt and no send is a phantom
when it is read.

==============  =============================================================================================
f               what the line says
==============  =============================================================================================
header          version; idempotent: producers are, so duplicates are errors; drained: at the end everything was
                healed and read to the end, so what nobody has read is lost; linearizable: polls of ``poll`` lines
                with ``hw`` were answered by the primary, from its present knowledge
attempt         proc may from now on send ``values``; outcome unknown until a ``send`` says otherwise. t0
send            proc, topic, partition, values, t0, t1, type. ok: with ``offsets`` (and epoch) as acknowledged; fail:
                refused for certain, the records must never appear; info: unknown
assign          proc begins to read a partition at ``offset`` (null: not known): forget where it was. t0, t1
claim           the same through ``group``: with ``generation``, ``claim_epoch`` (if it is not the generation), and
                the ``offset`` it starts from (null: not known; -1: the group has committed nothing)
release         proc has given the partition up, or lost it. group, claim_epoch
poll            proc was handed ``values`` at ``offsets``, in this order; empty if there was nothing. group (if any),
                ``hw``: the high watermark that came with the answer
commit          proc committed ``offset`` (the next to read) for group, claim_epoch, generation. ok, fail or info
reset           somebody set the committed ``offset`` of a group on purpose. t0, t1
committed       a look at the committed ``offset`` of a group
view            proc, a member of ``group`` in ``generation``, now owns ``owned`` ([[topic, partition], ...]); a member
                that leaves says so with ``generation`` -1
calm            from t0 on nobody joins or leaves ``group`` (whose partitions are ``owned``); the views must agree at t1
watermark       the high watermark of a partition was seen to be ``offset``. broker, t0, t1
expired         retention: records of a partition below ``offset`` may be gone
replica_read    the copy on ``broker`` holds ``values`` at ``offsets``, read after the heal; several lines add up. One
                with no values says that the copy was read; without it nobody looks for losses there
fault           ``note`` says what was done to whom, from t0 to t1; for the explanations
==============  =============================================================================================

Records that clients never see (control records) take offsets, too, so gaps are judged by what is known to lie in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import BinaryIO

import msgspec

VERSION = 1
OK, FAIL, INFO = "ok", "fail", "info"
RECORD_KINDS = ("attempt", "send", "assign", "poll", "watermark", "expired", "replica_read")
GROUP_KINDS = ("claim", "release", "commit", "reset", "committed", "view", "calm")
KINDS = frozenset({"header", "fault", *RECORD_KINDS, *GROUP_KINDS})
VALUE_MAX = 2**31 - 1
OFFSET_MAX = 2**44 - 1
Numbers = list[int | tuple[int, int]]
Run = tuple[int, int]  # first, count


class HistoryError(ValueError):
    """A line is not what this format allows; says which line and why."""


class Op(msgspec.Struct, omit_defaults=True):
    """One line. Which fields count for which ``f`` is in the table of the module."""

    f: str
    proc: str = ""
    type: str = OK
    t0: int = 0
    t1: int = 0
    topic: str = ""
    partition: int = -1
    values: Numbers = []
    offsets: Numbers = []
    offset: int | None = None
    epoch: int = -1
    key: str = ""
    group: str = ""
    claim_epoch: int = -1
    generation: int = -1
    broker: int = 0
    hw: int = -1
    owned: list[tuple[str, int]] = []
    note: str = ""
    version: int = 0
    idempotent: bool = True
    drained: bool = True
    linearizable: bool = False

    def check(self) -> None:
        """Raise HistoryError if the line contradicts itself. Offsets out of range are for the checker to judge."""
        if self.f not in KINDS:
            raise HistoryError(f"f: {self.f!r} is unknown")
        if self.type not in (OK, FAIL, INFO):
            raise HistoryError(f"type: {self.type!r} is not ok, fail or info")
        if self.f == "header" and self.version != VERSION:
            raise HistoryError(f"version: {self.version} is not {VERSION}")
        if self.t1 and self.t1 < self.t0:
            raise HistoryError(f"t1: {self.t1} is before t0, {self.t0}")
        if any(number < 0 or number + count - 1 > VALUE_MAX for number, count in runs(self.values)):
            raise HistoryError(f"values: outside 0..{VALUE_MAX}")
        if any(count < 1 for numbers in (self.values, self.offsets) for _, count in runs(numbers)):
            raise HistoryError("values, offsets: a stretch holds at least one number")


def runs(numbers: Iterable[int | tuple[int, int]]) -> Iterator[Run]:
    """The list as (first, count) pairs."""
    for item in numbers:
        yield (item, 1) if isinstance(item, int) else item


def count_of(numbers: Numbers) -> int:
    """How many numbers the list stands for."""
    return sum(count for _, count in runs(numbers))


def expand(numbers: Numbers) -> list[int]:
    """Every number of the list."""
    return [number for first, count in runs(numbers) for number in range(first, first + count)]


def pack(numbers: Iterable[int]) -> Numbers:
    """The shortest list for ``numbers``, in their order: stretches of three and more become pairs."""
    packed: Numbers = []
    first = count = 0
    for number in numbers:
        if count and number == first + count:
            count += 1
            continue
        _put(packed, first, count)
        first, count = number, 1
    _put(packed, first, count)
    return packed


def _put(packed: Numbers, first: int, count: int) -> None:
    if count > 2:
        packed.append((first, count))
    else:
        packed.extend(range(first, first + count))


def together(values: Numbers, offsets: Numbers) -> Iterator[tuple[int, int, int]]:
    """(first value, first offset, count) of each longest stretch in which both rise one by one.

    Raises HistoryError unless both lists are of one length.
    """
    value = offset = total = 0
    for next_value, next_offset, count in _side_by_side(values, offsets):
        if total and next_value == value + total and next_offset == offset + total:
            total += count
            continue
        if total:
            yield value, offset, total
        value, offset, total = next_value, next_offset, count
    if total:
        yield value, offset, total


def _side_by_side(values: Numbers, offsets: Numbers) -> Iterator[tuple[int, int, int]]:
    rest = list(runs(offsets))
    rest.reverse()
    for value, left in runs(values):
        while left:
            if not rest:
                raise HistoryError("offsets: fewer than values")
            offset, count = rest.pop()
            taken = min(left, count)
            if taken < count:
                rest.append((offset + taken, count - taken))
            yield value, offset, taken
            value, left = value + taken, left - taken
    if rest:
        raise HistoryError("offsets: more than values")


class HistoryWriter:
    """Writes operations to an open binary file; the caller flushes and closes it."""

    def __init__(
        self, file: BinaryIO, *, idempotent: bool = True, drained: bool = True, linearizable: bool = False
    ) -> None:
        self._file = file
        self._encoder = msgspec.json.Encoder()
        header = Op("header", version=VERSION, idempotent=idempotent, drained=drained, linearizable=linearizable)
        self.write(header)

    def write(self, op: Op) -> None:
        """Append one line."""
        self._file.write(self._encoder.encode(op) + b"\n")


def read_history(lines: Iterable[bytes], name: str = "history") -> Iterator[Op]:
    """The operations of one history, header first, checked line by line. A last line cut short (its writer was killed)
    is left out.

    Raises HistoryError.
    """
    decoder = msgspec.json.Decoder(Op)
    first = True
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            return
        try:
            op = decoder.decode(line)
            op.check()
        except (msgspec.DecodeError, HistoryError) as error:
            raise HistoryError(f"{name}:{number}: {error}") from None
        if first and op.f != "header":
            raise HistoryError(f"{name}:{number}: a history begins with its header")
        first = False
        yield op
    if first:
        raise HistoryError(f"{name}: empty")


class ValueBlocks:
    """Hands out values so that each (producer, partition) gets stretches of its own: lines stay short.

    One instance for all producers of a process; processes begin at distant, not too distant, numbers (``first``).
    """

    def __init__(self, first: int = 0, size: int = 1024) -> None:
        self._next = first
        self._size = size
        self._open: dict[tuple[str, str, int], tuple[int, int]] = {}

    def take(self, proc: str, topic: str, partition: int) -> tuple[int, Run | None]:
        """The next value, and the block that was begun for it: write that in an ``attempt`` line first."""
        lane = (proc, topic, partition)
        value, end = self._open.get(lane, (0, 0))
        fresh: Run | None = None
        if value == end:
            value, end = self._next, self._next + self._size
            self._next = end
            fresh = (value, self._size)
        self._open[lane] = (value + 1, end)
        return value, fresh
