"""The part of a queue that can be built again: lanes, priorities, delays. Pure.

Records enter by `scan`, in the order of the log; each is then in one place::

    scheduled   its deliver-at has not come: not in its lane yet
    waiting     behind the records of its lane that are out
    out         the head of its lane (or it has no lane): ready, leased, backing off, parked or dying

At most one record of a lane is ready or leased at a time. What becomes of a record that is out is decided by `Queue`;
here only its place in the lane is kept.

With ``runs`` (ordering="partition") all records are one lane, and its line is kept in the order of offsets: a record
that comes back, or comes late, stands where it belongs. A run that was leased together may be out beside records that
back off, are parked or dying. The first in line is ready only while nobody has a run, and nothing before it is out.
"""

from __future__ import annotations

import heapq
import math
from array import array
from bisect import bisect_left
from itertools import chain

import msgspec

from ferryline.protocol.queue_messages import PRIORITIES, PRIORITY_DEFAULT
from ferryline_broker.core.ageing import Ageing
from ferryline_broker.core.queue_events import Scanned


class Lane(msgspec.Struct, gc=False, eq=False):  # made for every key: cheaper than a class
    """Records of one key. ``out``: those that left the line; ``waiting[first:]``: the line, in order."""

    key: bytes
    out: set[int]
    waiting: array[int] | None = None  # made when somebody waits: most lanes are one record long
    first: int = 0

    def __len__(self) -> int:
        """How many wait."""
        return 0 if self.waiting is None else len(self.waiting) - self.first

    def push(self, offset: int) -> None:
        if self.waiting is None:
            self.waiting = array("q")
        self.waiting.append(offset)

    def pop(self) -> int:
        assert self.waiting is not None
        offset = self.waiting[self.first]
        self.first += 1
        if self.first > 512 and self.first * 2 > len(self.waiting):
            del self.waiting[: self.first]
            self.first = 0
        return offset

    def put_back(self, offset: int) -> None:
        """To the head of the line: it had left it, and its turn has not come after all."""
        if self.waiting is None:
            self.waiting = array("q")
        if self.first:
            self.first -= 1
            self.waiting[self.first] = offset
        else:
            self.waiting.insert(0, offset)

    def insert(self, offset: int) -> None:
        """Into a line that is in the order of offsets."""
        at = self._place(offset)
        if at == self.first:
            self.put_back(offset)
        elif self.waiting is not None:
            self.waiting.insert(at, offset)

    def discard(self, offset: int) -> bool:
        """Out of a line that is in the order of offsets, if it is there."""
        at = self._place(offset)
        if self.waiting is None or at == len(self.waiting) or self.waiting[at] != offset:
            return False
        del self.waiting[at]
        return True

    def _place(self, offset: int) -> int:
        return self.first if self.waiting is None else bisect_left(self.waiting, offset, self.first)

    def peek(self) -> int:
        assert self.waiting is not None
        return self.waiting[self.first]


class Window:
    """``scanned``: records below it have entered. ``lane_of`` has exactly the offsets that are out."""

    def __init__(self, scanned: int, overdue_ms: int, *, runs: bool = False) -> None:
        self.scanned = scanned
        self.runs = runs
        self.lanes: dict[bytes, Lane] = {}
        self.lane_of: dict[int, Lane | None] = {}
        self.ready: dict[int, int] = {}  # offset -> since when
        self.backing_off: dict[int, int] = {}  # offset -> until when
        self.scheduled: dict[int, tuple[int, bytes | None]] = {}  # offset -> (due, key of its lane)
        self.stopped: set[int] = set()  # out, and nobody knows until when: parked or dying
        self.waiting = 0  # in all lanes
        self._overdue_ms = overdue_ms
        self._heaps: list[list[int]] = [[] for _ in range(PRIORITIES)]
        self._ageing: Ageing | None = None  # made when priorities differ
        self._later: list[tuple[int, int]] = []  # (due, offset) of what is scheduled or backs off
        self._priority: dict[int, int] = {}  # where it is not the default
        self._expires: dict[int, int] = {}

    # -- entering -----------------------------------------------------------------------------------

    def scan(self, record: Scanned, now_ms: int) -> None:
        """A record that nobody has leased yet."""
        offset = record.offset
        if record.expires_ms or record.priority != PRIORITY_DEFAULT:
            self._note(record)
        if record.due_ms > now_ms:
            self.scheduled[offset] = (record.due_ms, record.lane)
            heapq.heappush(self._later, (record.due_ms, offset))
        else:
            self._arrive(offset, record.lane, now_ms)

    def scan_out(self, record: Scanned) -> None:
        """A record with a past: it is out already. Whoever in its lane only became ready by this rebuilding waits."""
        self._note(record)
        if record.lane is None:
            self.lane_of[record.offset] = None
            return
        lane = self._lane(record.lane)
        for early in sorted((offset for offset in lane.out if offset in self.ready), reverse=True):
            self.put_back(early)
        lane.out.add(record.offset)
        self.lane_of[record.offset] = lane

    def _note(self, record: Scanned) -> None:
        if record.expires_ms:
            self._expires[record.offset] = record.expires_ms
        if record.priority == PRIORITY_DEFAULT:
            return
        self._priority[record.offset] = record.priority
        if self._ageing is None:  # from now on somebody can wait behind others: whoever is ready already, too
            self._ageing = Ageing(self.ready, self._overdue_ms)
            for offset, since in self.ready.items():
                self._ageing.add(PRIORITY_DEFAULT, offset, since)

    def _lane(self, key: bytes) -> Lane:
        lane = self.lanes.get(key)
        if lane is None:
            lane = self.lanes[key] = Lane(key, set())
        return lane

    def _arrive(self, offset: int, key: bytes | None, now_ms: int) -> None:
        lane = None if key is None else self.lanes.get(key)
        if lane is None and not self.runs:  # nobody stands before it
            if key is not None:
                lane = self.lanes[key] = Lane(key, {offset})
            self.lane_of[offset] = lane
            self._offer(offset, now_ms)
            return
        assert key is not None, "with runs all records are one lane"
        lane = self._lane(key)
        if self.runs:
            lane.insert(offset)
            self.waiting += 1
            self._turn(lane, now_ms)
        elif lane.out or len(lane):
            lane.push(offset)
            self.waiting += 1
        else:
            self._step_out(lane, offset, now_ms)

    def _step_out(self, lane: Lane, offset: int, now_ms: int) -> None:
        lane.out.add(offset)
        self.lane_of[offset] = lane
        self._ready(offset, now_ms)

    def _turn(self, lane: Lane, now_ms: int) -> None:
        """With ``runs``: whoever comes first in the lane is ready, unless somebody has a run of it."""
        if len(self.lane_of) > len(self.ready) + len(self.backing_off) + len(self.stopped):
            return
        for other in list(self.ready):
            if len(lane) and lane.peek() < other:
                self.put_back(other)
        if not self.ready and len(lane) and lane.peek() < self.barrier():
            self.waiting -= 1
            self._step_out(lane, lane.pop(), now_ms)

    def barrier(self) -> float:
        """With ``runs``: nothing behind this offset may be leased, for it backs off, is parked or dying."""
        return min(chain(self.backing_off, self.stopped), default=math.inf)

    # -- leaving ------------------------------------------------------------------------------------

    def make_ready(self, offset: int, now_ms: int) -> None:
        """It is out and may be leased; with ``runs``, when its turn comes."""
        lane = self.lane_of[offset]
        if self.runs and lane is not None:
            self.put_back(offset)
            self._turn(lane, now_ms)
        else:
            self._ready(offset, now_ms)

    def _ready(self, offset: int, now_ms: int) -> None:
        self.backing_off.pop(offset, None)
        self.stopped.discard(offset)
        self._offer(offset, now_ms)

    def _offer(self, offset: int, now_ms: int) -> None:
        self.ready[offset] = now_ms
        level = self._priority.get(offset, PRIORITY_DEFAULT)
        heapq.heappush(self._heaps[level], offset)
        if self._ageing is not None:
            self._ageing.add(level, offset, now_ms)

    def back_off(self, offset: int, until_ms: int, now_ms: int) -> None:
        """It is out, and its lane waits with it until then."""
        self.backing_off[offset] = until_ms
        heapq.heappush(self._later, (until_ms, offset))
        self._left(offset, now_ms)

    def stop(self, offset: int, now_ms: int) -> None:
        """It is out, parked or dying, and its lane waits with it."""
        self.ready.pop(offset, None)
        self.backing_off.pop(offset, None)
        self.stopped.add(offset)
        self._left(offset, now_ms)

    def _left(self, offset: int, now_ms: int) -> None:
        """A record is not with a receiver any more, and still out: what stands before it may go on."""
        lane = self.lane_of[offset]
        if self.runs and lane is not None:
            self._turn(lane, now_ms)

    def put_back(self, offset: int) -> None:
        """Back into its line: its turn has not come after all."""
        self.ready.pop(offset, None)
        self.backing_off.pop(offset, None)
        self.stopped.discard(offset)
        lane = self.lane_of.pop(offset)
        assert lane is not None
        lane.out.discard(offset)
        if self.runs:
            lane.insert(offset)
        else:
            lane.put_back(offset)
        self.waiting += 1

    def gone(self, offsets: list[int], now_ms: int) -> None:
        """They are terminal: the next of their lanes step out. An offset that never entered changes nothing."""
        places = (self.backing_off, self._priority, self._expires, self.scheduled)
        elsewhere = [place for place in places if place]
        ready, lane_of, stopped = self.ready, self.lane_of, self.stopped
        for offset in offsets:
            ready.pop(offset, None)
            for place in elsewhere:
                place.pop(offset, None)
            if stopped:
                stopped.discard(offset)
            lane = lane_of.pop(offset, None)
            if self.runs:
                self._gone_of_run(offset, now_ms)
                continue
            if lane is None:
                continue
            lane.out.discard(offset)
            if lane.out:
                continue
            if lane.waiting is not None and len(lane):
                self.waiting -= 1
                self._step_out(lane, lane.pop(), now_ms)
            else:
                del self.lanes[lane.key]

    def _gone_of_run(self, offset: int, now_ms: int) -> None:
        for lane in list(self.lanes.values()):  # one at most
            lane.out.discard(offset)
            self.waiting -= lane.discard(offset)
            self._turn(lane, now_ms)

    # -- choosing -----------------------------------------------------------------------------------

    def choose(self, limit: int, run: int, now_ms: int, strict: bool = False) -> tuple[list[int], list[int]]:
        """(taken, expired): up to ``limit`` records to lease, ``run`` of a lane at most, in the order in which they are
        to be worked on; and those met on the way whose time is over: they are gone."""
        if run == 1 and not strict and self._ageing is None and not self._expires:
            return self._plain(limit), []
        taken: list[int] = []
        expired: list[int] = []
        barrier = self.barrier() if run > 1 else 0
        while len(taken) < limit and self.ready:
            offset = self.pick(now_ms, strict)
            if offset is None:
                break
            found: int | None = offset
            left = run
            while found is not None:
                if self.expired(found, now_ms):
                    expired.append(found)
                    self.gone([found], now_ms)
                    if found == offset:
                        break  # it stood for its lane
                else:
                    taken.append(found)
                    left -= 1
                found = self.follow(offset, barrier) if left and len(taken) < limit else None
        return taken, expired

    def _plain(self, limit: int) -> list[int]:
        """What `pick` would choose, where all have the same priority and nobody's time ends; in ascending order."""
        heap, ready = self._heaps[PRIORITY_DEFAULT], self.ready
        taken: list[int] = []
        while heap and len(taken) < limit:
            offset = heapq.heappop(heap)
            if ready.pop(offset, None) is not None:
                taken.append(offset)
        return taken

    def pick(self, now_ms: int, strict: bool = False) -> int | None:
        """The record that should be leased next; it is out, and not ready any more. None: nothing is ready.

        ``strict``: of the highest priority there is, however long others have been ready.
        """
        if self._ageing is not None:
            if strict:
                self._ageing.shorten()
            elif (overdue := self._ageing.pick(now_ms)) is not None:
                del self.ready[overdue]
                self._forget_gone(self._heaps[self._priority.get(overdue, PRIORITY_DEFAULT)])
                return overdue
        for heap in reversed(self._heaps):
            while heap:
                offset = heapq.heappop(heap)
                if self.ready.pop(offset, None) is not None:
                    return offset
        return None

    def _forget_gone(self, heap: list[int]) -> None:
        """What is always picked by age leaves its heap only here: higher ones may never let anybody look at it."""
        while heap and heap[0] not in self.ready:
            heapq.heappop(heap)

    def follow(self, offset: int, below: float) -> int | None:
        """The next record of the same lane joins a lease that ``offset`` is in. None: there is none ``below``."""
        lane = self.lane_of[offset]
        if lane is None or not len(lane) or lane.peek() >= below:
            return None
        found = lane.pop()
        self.waiting -= 1
        lane.out.add(found)
        self.lane_of[found] = lane
        return found

    def contended(self, offsets: list[int]) -> bool:
        """Whether others of one of their lanes wait, or have waited, for one that is out."""
        return any(lane is not None and lane.waiting is not None for lane in map(self.lane_of.get, offsets))

    def expired(self, offset: int, now_ms: int) -> bool:
        return self._expires.get(offset, now_ms + 1) <= now_ms

    # -- time ---------------------------------------------------------------------------------------

    def due(self, now_ms: int) -> None:
        """What was scheduled, or backed off, until now becomes ready, or joins its lane."""
        later = self._later
        while later and later[0][0] <= now_ms:
            due, offset = heapq.heappop(later)
            told = self.scheduled.get(offset)
            if told is not None and told[0] == due:
                del self.scheduled[offset]
                self._arrive(offset, told[1], now_ms)
            elif self.backing_off.get(offset) == due:
                self.make_ready(offset, now_ms)

    def next_due_ms(self) -> int | None:
        later = self._later
        while later:
            due, offset = later[0]
            if self.backing_off.get(offset) == due or (offset in self.scheduled and self.scheduled[offset][0] == due):
                return due
            heapq.heappop(later)
        return None

    def place(self, offset: int) -> tuple[str, int]:
        """(state, detail) of an offset for `explain`: what it waits behind, or until when."""
        if offset in self.ready:
            return "available", 0
        if offset in self.backing_off:
            return "delayed", self.backing_off[offset]
        if offset in self.scheduled:
            return "delayed", self.scheduled[offset][0]
        if offset in self.lane_of:
            return "out", 0
        if offset >= self.scanned:
            return "not in window", 0
        for lane in self.lanes.values():
            if lane.waiting is not None and offset in lane.waiting[lane.first :]:
                return "waiting", min(lane.out) if lane.out else -1
        return "unknown", 0
