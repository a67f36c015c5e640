"""The facts of a history in arrays: what is known of every value, and of every offset of a partition (a *lane*).

About 18 bytes a record, and one more for each copy and group that has read it. Arrays come in pages, so that values may
begin anywhere and a mad offset costs one page. Stretches of records are handled by slices.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

PAGE = 1 << 16
NOTHING, ATTEMPTED, UNKNOWN, ACKED, REFUSED = range(5)  # outcome of a value
_LANE_SHIFT = 44
_EMPTY = array("i", [-1]) * PAGE
_NOWHERE = array("q", [-1]) * PAGE


class Marks:
    """One byte for each number, zero at first."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}

    def spans(self, first: int, count: int) -> Iterator[tuple[bytearray, int, int]]:
        """(page, position in it, length) of each part of a stretch; pages are made as needed."""
        while count:
            number, at = divmod(first, PAGE)
            page = self.pages.get(number)
            if page is None:
                page = self.pages[number] = bytearray(PAGE)
            taken = min(count, PAGE - at)
            yield page, at, taken
            first, count = first + taken, count - taken

    def set(self, first: int, count: int) -> int:
        """Mark a stretch; how many were marked before."""
        before = 0
        for page, at, taken in self.spans(first, count):
            if taken == 1:
                before += page[at]
                page[at] = 1
            else:
                before += page.count(1, at, at + taken)
                page[at : at + taken] = b"\1" * taken
        return before

    def has(self, number: int) -> bool:
        """Whether the number is marked."""
        page = self.pages.get(number // PAGE)
        return page is not None and bool(page[number % PAGE])

    def ends(self) -> tuple[int, int]:
        """(lowest, highest) marked number; (0, -1) of none."""
        low, high = 0, -1
        for number in sorted(self.pages):
            page = self.pages[number]
            first = page.find(1)
            if first < 0:
                continue
            if high < 0:
                low = number * PAGE + first
            high = number * PAGE + page.rfind(1)
        return low, high

    def missing(self, other: Marks) -> Iterator[int]:
        """Numbers that are marked here and not in ``other``, rising."""
        for number in sorted(self.pages):
            page = self.pages[number]
            theirs = other.pages.get(number, b"")
            if page == theirs:
                continue
            at = page.find(1)
            while at >= 0:
                if not theirs or not theirs[at]:
                    yield number * PAGE + at
                at = page.find(1, at + 1)

    def total(self) -> int:
        """How many are marked."""
        return sum(page.count(1) for page in self.pages.values())


class Lane:
    """One partition. ``at`` says which value lies at an offset, by acknowledgements and reads alike."""

    def __init__(self, number: int, topic: str, partition: int) -> None:
        self.number = number
        self.name = f"{topic}/{partition}"
        self.at: dict[int, array[int]] = {}
        self.acked = Marks()
        self.seen = Marks()
        self.copies: dict[int, Marks] = {}
        self.start = 0  # retention took what is below
        self.high = -1  # highest watermark that anybody was told
        self.acks: dict[str, array[int]] = {name: array("q") for name in ("t0", "t1", "low", "high", "proc")}
        self.polls = (array("q"), array("q"))  # t0, watermark: of answers by the primary

    def place(self, value: int, offset: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Values lie at these offsets. Yields (offset, other value, value) where something else lay."""
        while count:
            number, at = divmod(offset, PAGE)
            page = self.at.get(number)
            if page is None:
                page = self.at[number] = array("i", _EMPTY)
            taken = min(count, PAGE - at)
            if taken == 1:
                if page[at] == -1:
                    page[at] = value
                elif page[at] != value:
                    yield offset, page[at], value
            else:
                yield from self._place_many(page, at, value, offset, taken)
            value, offset, count = value + taken, offset + taken, count - taken

    @staticmethod
    def _place_many(page: array[int], at: int, value: int, offset: int, count: int) -> Iterator[tuple[int, int, int]]:
        there, wanted = page[at : at + count], array("i", range(value, value + count))
        if there == wanted:
            return
        if there.count(-1) == count:
            page[at : at + count] = wanted
            return
        for step, (old, new) in enumerate(zip(there, wanted, strict=True)):
            if old == -1:
                page[at + step] = new
            elif old != new:
                yield offset + step, old, new

    def known(self, first: int, end: int) -> int:
        """The first offset in [first, end) where a record is known to lie, -1 if there is none."""
        while first < end:
            number, at = divmod(first, PAGE)
            taken = min(end - first, PAGE - at)
            page = self.at.get(number)
            if page is not None and page[at : at + taken].count(-1) != taken:
                return first + next(step for step in range(taken) if page[at + step] != -1)
            first += taken
        return -1

    def value_at(self, offset: int) -> int:
        """What lies there, -1 unknown."""
        page = self.at.get(offset // PAGE)
        return -1 if page is None else page[offset % PAGE]

    def acknowledged(self, t0: int, t1: int, low: int, high: int, proc: int) -> None:
        """Remember a line of acknowledgements: its times and its least and greatest offset."""
        for name, number in (("t0", t0), ("t1", t1), ("low", low), ("high", high), ("proc", proc)):
            self.acks[name].append(number)

    def ack_of(self, offset: int) -> tuple[int, int] | None:
        """(proc, t1) of the acknowledgement of an offset. Walks all of them: for examples."""
        acks = self.acks
        for index, low in enumerate(acks["low"]):
            if low <= offset <= acks["high"][index]:
                return acks["proc"][index], acks["t1"][index]
        return None

    def location(self, offset: int) -> int:
        """Lane and offset in one number."""
        return self.number << _LANE_SHIFT | offset


class Values:
    """Outcome of every value, and the first place where it was known to lie."""

    def __init__(self) -> None:
        self._pages: dict[int, tuple[bytearray, array[int]]] = {}

    def settle(self, value: int, count: int, outcome: int) -> int | None:
        """Record an outcome. Returns a value that has one already, None if all is well."""
        while count:
            number, at = divmod(value, PAGE)
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = (bytearray(PAGE), array("q", _NOWHERE))
            taken = min(count, PAGE - at)
            old = page[0][at : at + taken]
            if outcome == ATTEMPTED:
                new = bytes(was or ATTEMPTED for was in old) if any(old) else bytes([ATTEMPTED]) * taken
            elif old.count(NOTHING) + old.count(ATTEMPTED) == taken:
                new = bytes([outcome]) * taken
            else:
                return value + next(step for step, was in enumerate(old) if was not in (NOTHING, ATTEMPTED))
            page[0][at : at + taken] = new
            value, count = value + taken, count - taken
        return None

    def outcome(self, value: int) -> int:
        """Of one value."""
        page = self._pages.get(value // PAGE)
        return NOTHING if page is None else page[0][value % PAGE]

    def not_acked(self, value: int, count: int) -> Iterator[tuple[int, int]]:
        """(value, outcome) of those that are not acknowledged."""
        while count:
            number, at = divmod(value, PAGE)
            taken = min(count, PAGE - at)
            page = self._pages.get(number)
            outcomes = page[0][at : at + taken] if page is not None else bytes(taken)
            if outcomes.count(ACKED) != taken:
                for step, outcome in enumerate(outcomes):
                    if outcome != ACKED:
                        yield value + step, outcome
            value, count = value + taken, count - taken

    def locate(self, value: int, location: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Values lie at these locations. Yields (value, first location, location) of each that also lies elsewhere."""
        while count:
            number, at = divmod(value, PAGE)
            taken = min(count, PAGE - at)
            page = self._pages.get(number)
            if page is not None:  # otherwise a phantom
                yield from self._locate(page[1], at, value, location, taken)
            value, location, count = value + taken, location + taken, count - taken

    @staticmethod
    def _locate(where: array[int], at: int, value: int, location: int, count: int) -> Iterator[tuple[int, int, int]]:
        if count == 1:
            if where[at] == -1:
                where[at] = location
            elif where[at] != location:
                yield value, where[at], location
            return
        there, wanted = where[at : at + count], array("q", range(location, location + count))
        if there == wanted:
            return
        if there.count(-1) == count:
            where[at : at + count] = wanted
            return
        for step in range(count):
            yield from Values._locate(where, at + step, value + step, location + step, 1)


def offset_of(location: int) -> int:
    """The offset in a location."""
    return location & ((1 << _LANE_SHIFT) - 1)
