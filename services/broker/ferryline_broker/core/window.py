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

Of most keys only one record is here: such a lane need not be an object, ``lanes`` has its offset and ``lane_of`` its
key. So the records of a batch enter and leave together, by a few operations of dictionaries for all of them.
"""

from __future__ import annotations

import heapq
import math
from itertools import chain

from ferryline.protocol.queue_messages import PRIORITIES, PRIORITY_DEFAULT
from ferryline_broker.core.ageing import Ageing
from ferryline_broker.core.heads import Heads, exhaust
from ferryline_broker.core.lane import Lane
from ferryline_broker.core.queue_events import Scanned


class Window:
    """``scanned``: records below it have entered. ``lane_of`` has exactly the offsets that are out, each with its lane,
    the key of a lane that is only this record, or None if it has no lane."""

    def __init__(self, scanned: int, overdue_ms: int, *, runs: bool = False) -> None:
        self.scanned = scanned
        self.runs = runs
        self.lanes: dict[bytes, Lane | int] = {}  # an offset: of a record that is out, and all there is
        self.lane_of: dict[int, Lane | bytes | None] = {}
        self.ready: dict[int, int] = {}  # offset -> since when
        self.backing_off: dict[int, int] = {}  # offset -> until when
        self.scheduled: dict[int, tuple[int, bytes | None]] = {}  # offset -> (due, key of its lane)
        self.stopped: set[int] = set()  # out, and nobody knows until when: parked or dying
        self.waiting = 0  # in all lanes
        self._overdue_ms = overdue_ms
        self._heads = [Heads(self.ready) for _ in range(PRIORITIES)]
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

    def scan_batch(self, offsets: range, lanes: list[bytes | None], now_ms: int) -> None:
        """`scan` for records of which there is nothing to know but their lanes."""
        distinct = set(lanes)
        alone = len(distinct) == len(lanes) and None not in distinct and self.lanes.keys().isdisjoint(distinct)
        if not alone or self.runs or self._ageing is not None:
            for offset, lane in zip(offsets, lanes, strict=True):
                self._arrive(offset, lane, now_ms)
            return
        self.lanes.update(zip(lanes, offsets, strict=True))  # type: ignore[arg-type]  # keys, all of them
        self.lane_of.update(zip(offsets, lanes, strict=True))
        self.ready.update(dict.fromkeys(offsets, now_ms))
        self._heads[PRIORITY_DEFAULT].extend(offsets)

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
        if isinstance(lane, Lane):
            return lane
        grown = self.lanes[key] = Lane(key, set() if lane is None else {lane})
        if lane is not None:
            self.lane_of[lane] = grown
        return grown

    def _arrive(self, offset: int, key: bytes | None, now_ms: int) -> None:
        if not self.runs and (key is None or key not in self.lanes):  # nobody stands before it
            if key is not None:
                self.lanes[key] = offset
            self.lane_of[offset] = key
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
        if self.runs and isinstance(lane, Lane):
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
        self._heads[level].add(offset)
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
        if self.runs and isinstance(lane, Lane):
            self._turn(lane, now_ms)

    def put_back(self, offset: int) -> None:
        """Back into its line: its turn has not come after all."""
        self.ready.pop(offset, None)
        self.backing_off.pop(offset, None)
        self.stopped.discard(offset)
        lane = self.lane_of[offset]
        if isinstance(lane, bytes):
            lane = self._lane(lane)
        assert lane is not None
        del self.lane_of[offset]
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
        self.stopped.difference_update(offsets)
        ready, lane_of = self.ready, self.lane_of
        if not elsewhere and ready.keys().isdisjoint(offsets):
            lanes = list(map(lane_of.get, offsets))
            if set(map(type, lanes)) == {bytes}:  # as a rule: each was the only one of its lane
                exhaust(map(lane_of.__delitem__, offsets))
                exhaust(map(self.lanes.__delitem__, lanes))  # type: ignore[arg-type]  # keys, all of them
                return
        for offset in offsets:
            ready.pop(offset, None)
            for place in elsewhere:
                place.pop(offset, None)
            lane = lane_of.pop(offset, None)
            if self.runs:
                self._gone_of_run(offset, now_ms)
            elif isinstance(lane, bytes):
                del self.lanes[lane]
            elif lane is not None:
                self._gone_of_lane(lane, offset, now_ms)

    def _gone_of_lane(self, lane: Lane, offset: int, now_ms: int) -> None:
        lane.out.discard(offset)
        if lane.out:
            return
        if len(lane):
            self.waiting -= 1
            self._step_out(lane, lane.pop(), now_ms)
        else:
            del self.lanes[lane.key]

    def _gone_of_run(self, offset: int, now_ms: int) -> None:
        for lane in list(self.lanes.values()):  # one at most
            assert isinstance(lane, Lane)
            lane.out.discard(offset)
            self.waiting -= lane.discard(offset)
            self._turn(lane, now_ms)

    # -- choosing -----------------------------------------------------------------------------------

    def choose(self, limit: int, run: int, now_ms: int, strict: bool = False) -> tuple[list[int], list[int]]:
        """(taken, expired): up to ``limit`` records to lease, ``run`` of a lane at most, in the order in which they are
        to be worked on; and those met on the way whose time is over: they are gone."""
        if run == 1 and not strict and self._ageing is None and not self._expires:
            return self._heads[PRIORITY_DEFAULT].take(limit), []  # all have the same priority, and nobody's time ends
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

    def pick(self, now_ms: int, strict: bool = False) -> int | None:
        """The record that should be leased next; it is out, and not ready any more. None: nothing is ready.

        ``strict``: of the highest priority there is, however long others have been ready.
        """
        if self._ageing is not None:
            if strict:
                self._ageing.shorten()
            elif (overdue := self._ageing.pick(now_ms)) is not None:
                del self.ready[overdue]
                # What is always picked by age is forgotten only here: higher ones may never let anybody look at it.
                self._heads[self._priority.get(overdue, PRIORITY_DEFAULT)].forget_gone()
                return overdue
        for heads in reversed(self._heads):
            offset = heads.pop()
            if offset is not None:
                return offset
        return None

    def follow(self, offset: int, below: float) -> int | None:
        """The next record of the same lane joins a lease that ``offset`` is in. None: there is none ``below``."""
        lane = self.lane_of[offset]
        if not isinstance(lane, Lane) or not len(lane) or lane.peek() >= below:
            return None
        found = lane.pop()
        self.waiting -= 1
        lane.out.add(found)
        self.lane_of[found] = lane
        return found

    def contended(self, offsets: list[int]) -> bool:
        """Whether others of one of their lanes wait, or have waited, for one that is out."""
        lanes = list(map(self.lane_of.get, offsets))
        return Lane in set(map(type, lanes)) and any(isinstance(one, Lane) and one.waiting is not None for one in lanes)

    def key_of(self, offset: int) -> bytes | None:
        """The key of the lane that a record is in which is out; None if it has none, or is not out."""
        lane = self.lane_of.get(offset)
        return lane.key if isinstance(lane, Lane) else lane

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
            if isinstance(lane, Lane) and lane.waiting is not None and offset in lane.waiting[lane.first :]:
                return "waiting", min(lane.out) if lane.out else -1
        return "unknown", 0
