"""What became of records: lost, doubled, out of order, from nowhere. The rows of a log checker.

Feed it all sends (`send`), then all reads (`read`, in each consumer's order), then call `finish`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from ferryline.proof.findings import Findings, listed, seconds
from ferryline.proof.history import FAIL, OFFSET_MAX, OK, HistoryError, Op, count_of, runs, together
from ferryline.proof.lanes import ACKED, ATTEMPTED, NOTHING, REFUSED, UNKNOWN, Lane, Marks, Values, offset_of

EXTRA_MAX = 1_000_000  # places of doubled records that are remembered, so that each counts once


class Position:
    """Where a consumer is in one partition; -1: anywhere."""

    __slots__ = ("next", "since_us")

    def __init__(self) -> None:
        self.next = -1
        self.since_us = 0


class RecordJudge:
    """Judges records. Lanes are shared with the judge of groups."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.lanes: dict[tuple[str, int], Lane] = {}
        self.idempotent = self.drained = True
        self.linearizable = False
        self._values = Values()
        self._procs: list[str] = []
        self._proc_numbers: dict[str, int] = {}
        self._order: dict[tuple[int, int], array[int]] = {}  # (proc, lane): value, offset, count, ...
        self._extra: set[tuple[int, int]] = set()
        self._recovered = Marks()
        self._positions: dict[tuple[str, int], Position] = {}
        self._gaps: dict[tuple[int, int, int, str], tuple[str, int]] = {}

    def lane(self, op: Op) -> Lane:
        """The partition an operation is about."""
        return self.lane_of(op.topic, op.partition)

    def lane_of(self, topic: str, number: int) -> Lane:
        """A partition by name."""
        lane = self.lanes.get((topic, number))
        if lane is None:
            if number < 0 or not topic:
                raise HistoryError(f"partition: {topic!r}/{number} is none")
            lane = self.lanes[topic, number] = Lane(len(self.lanes), topic, number)
        return lane

    # -- sends ---------------------------------------------------------------------------------------

    def send(self, op: Op) -> None:
        """An attempt, or the outcome of a send."""
        outcome = (
            ATTEMPTED if op.f == "attempt" else ACKED if op.type == OK else REFUSED if op.type == FAIL else UNKNOWN
        )
        for value, count in runs(op.values):
            twice = self._values.settle(value, count, outcome)
            if twice is not None:
                raise HistoryError(f"{op.proc}: value {twice} has two outcomes")
        if op.f == "attempt":
            return
        total = count_of(op.values)
        self.findings.fact("sent", total)
        self.findings.fact({ACKED: "acknowledged", REFUSED: "refused", UNKNOWN: "unknown"}[outcome], total)
        if outcome == ACKED:
            self._acked(op, total)

    def _acked(self, op: Op, total: int) -> None:
        lane = self.lane(op)
        try:
            stretches = list(together(op.values, op.offsets))
            sane = all(0 <= offset <= OFFSET_MAX - count for _, offset, count in stretches)
        except HistoryError:
            sane = False
        if not sane or not stretches:
            told = f"{lane.name}: {total} values from {op.values[:1]} were acknowledged at {op.offsets[:3]}"
            self.findings.add("offset sanity", total, told, op.t1)
            return
        proc = self._proc(op.proc)
        order = self._order.setdefault((proc, lane.number), array("q"))
        for value, offset, count in stretches:
            self._place(lane, value, offset, count, op.t1)
            lane.acked.set(offset, count)
            if order and order[-3] + order[-1] == value and order[-2] + order[-1] == offset:
                order[-1] += count
            else:
                order.extend((value, offset, count))
        low = min(offset for _, offset, _ in stretches)
        high = max(offset + count - 1 for _, offset, count in stretches)
        lane.acknowledged(op.t0, op.t1, low, high, proc)

    def _proc(self, name: str) -> int:
        number = self._proc_numbers.get(name)
        if number is None:
            number = self._proc_numbers[name] = len(self._procs)
            self._procs.append(name)
        return number

    def _place(self, lane: Lane, value: int, offset: int, count: int, at_us: int) -> None:
        for where, old, new in lane.place(value, offset, count):
            told = f"{lane.name} offset {where} held value {old} and value {new}"
            self.findings.add("inconsistent offset", 1, told, at_us)
        kind = "duplicate" if self.idempotent else "duplicates"
        for found, first, second in self._values.locate(value, lane.location(offset), count):
            if (found, second) in self._extra:
                continue
            if len(self._extra) < EXTRA_MAX:
                self._extra.add((found, second))
            told = f"value {found} lies at {self._named(first)} and at {self._named(second)}"
            self.findings.add(kind, 1, told, at_us)

    def _named(self, location: int) -> str:
        lane = list(self.lanes.values())[location >> 44]
        return f"{lane.name} offset {offset_of(location)}"

    # -- reads ---------------------------------------------------------------------------------------

    def begin(self, op: Op) -> None:
        """A consumer begins to read (assign, claim), or stops (release): what it read before binds it no more."""
        position = self._positions.setdefault((op.proc, self.lane(op).number), Position())
        position.next = op.offset if op.f != "release" and op.offset is not None else -1
        position.since_us = op.t1

    def read(self, op: Op) -> None:
        """A poll, or what one copy holds."""
        lane = self.lane(op)
        copy = lane.copies.setdefault(op.broker, Marks()) if op.f == "replica_read" else None
        position = None if copy is not None else self._positions.setdefault((op.proc, lane.number), Position())
        inside = False
        for value, offset, count in together(op.values, op.offsets):
            if not 0 <= offset <= OFFSET_MAX - count:
                raise HistoryError(f"{op.proc}: {lane.name} was read at offset {offset}")
            self._judge_values(lane, value, offset, count, op)
            self._place(lane, value, offset, count, op.t1)
            if copy is not None:
                copy.set(offset, count)
                continue
            lane.seen.set(offset, count)
            assert position is not None
            self._step(position, lane, op, offset, count, inside)
            inside = True
        if copy is not None:
            return
        self.findings.fact("polled", count_of(op.values))
        lane.high = max(lane.high, op.hw)
        if self.linearizable and op.hw >= 0 and op.t0:
            lane.polls[0].append(op.t0)
            lane.polls[1].append(op.hw)

    def _judge_values(self, lane: Lane, value: int, offset: int, count: int, op: Op) -> None:
        who = f"broker {op.broker}" if op.f == "replica_read" else op.proc
        for found, outcome in self._values.not_acked(value, count):
            where = f"value {found} at {lane.name} offset {offset + found - value}, read by {who}"
            if outcome == NOTHING:
                self.findings.add("phantom", 1, where, op.t1)
            elif outcome == REFUSED:
                self.findings.add("aborted read", 1, where, op.t1)
            elif not self._recovered.set(found, 1):
                self.findings.add("recovered")

    def _step(self, position: Position, lane: Lane, op: Op, offset: int, count: int, inside: bool) -> None:
        where = "internal" if inside else "external"
        if 0 <= position.next != offset:
            if offset < position.next:
                told = f"{op.proc} was at {lane.name} offset {position.next} and was given {offset}"
                self.findings.add(f"{where} nonmonotonic poll", 1, told, op.t1)
            else:  # whether something lies in between is known at the end
                self._gaps.setdefault((lane.number, position.next, offset, where), (op.proc, op.t1))
        position.next = offset + count

    # -- the end -------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Judge what only the whole history can tell."""
        lanes = list(self.lanes.values())
        for (number, first, end, where), (reader, at_us) in self._gaps.items():
            lane = lanes[number]
            skipped = lane.known(max(first, lane.start), end)
            if skipped >= 0:
                told = (
                    f"{reader} went from {lane.name} offset {first} to {end}; value {lane.value_at(skipped)} lies at "
                )
                self.findings.add(f"{where} poll skip", 1, told + str(skipped), at_us)
        for (proc, number), order in self._order.items():
            self._sent_order(self._procs[proc], lanes[number], order)
        for lane in lanes:
            if self.drained:
                self._missing(lane)
            for broker in sorted(lane.copies):
                self._missing_on(lane, broker, lane.copies[broker])
            self._real_time(lane)
        self.findings.fact("partitions", len(lanes))

    def _sent_order(self, proc: str, lane: Lane, order: array[int]) -> None:
        stretches: Sequence[int] = range(0, len(order), 3)
        if any(order[at] > order[at + 3] for at in range(0, len(order) - 3, 3)):
            stretches = sorted(stretches, key=order.__getitem__)
        end, last = -1, -1
        for at in stretches:
            value, offset, count = order[at : at + 3]
            if offset < end:
                told = f"{proc} sent value {last} before {value}; in {lane.name} they lie at {end - 1} and {offset}"
                self.findings.add("nonmonotonic send", 1, told)
            if offset + count > end:
                end, last = offset + count, value + count - 1

    def _missing(self, lane: Lane) -> None:
        _, highest = lane.seen.ends()
        for offset in lane.acked.missing(lane.seen):
            if offset < lane.start:
                self.findings.add("expired")
                continue
            kind = "lost" if offset < highest else "unseen"
            self._tell(kind, lane, offset, f"; {lane.name} was read up to {highest}")

    def _missing_on(self, lane: Lane, broker: int, copy: Marks) -> None:
        low, high = copy.ends()
        for offset in lane.acked.missing(copy):
            if offset < lane.start:
                continue
            part = "postfix" if offset > high else "prefix" if offset < low else "middle"
            self._tell(f"lost on replica, {part}", lane, offset, f"; broker {broker} holds {low}..{high}")

    def _tell(self, kind: str, lane: Lane, offset: int, more: str) -> None:
        if not self.findings.wants(kind):
            self.findings.add(kind)
            return
        ack = lane.ack_of(offset)
        told, at_us = f"{lane.name} offset {offset}: value {lane.value_at(offset)}", 0
        if ack is not None:
            at_us = ack[1]
            told += f", acknowledged to {self._procs[ack[0]]} at {seconds(at_us)}"
        holders = [broker for broker in sorted(lane.copies) if lane.copies[broker].has(offset)]
        if holders:
            more += f"; it is on broker {listed(holders)}"
        self.findings.add(kind, 1, told + more, at_us)

    def _real_time(self, lane: Lane) -> None:
        acks = lane.acks
        timed = [index for index in range(len(acks["t1"])) if acks["t1"][index]]
        timed.sort(key=acks["t1"].__getitem__)
        begun = sorted(timed, key=acks["t0"].__getitem__)
        later = ((acks["t0"][index], acks["low"][index], index) for index in begun)
        compare(timed, acks, later, partial(self._not_real_time, lane))
        polls = sorted(zip(*lane.polls, [-1] * len(lane.polls[0]), strict=True))
        compare(timed, acks, polls, partial(self._stale, lane))

    def _not_real_time(self, lane: Lane, best: int, index: int) -> None:
        acks = lane.acks
        told = (
            f"{lane.name} offset {acks['high'][best]} was acknowledged at {seconds(acks['t1'][best])}; "
            f"offset {acks['low'][index]} was sent at {seconds(acks['t0'][index])}"
        )
        self.findings.add("real time", 1, told, acks["t0"][index])

    def _stale(self, lane: Lane, best: int, _: int) -> None:
        acks = lane.acks
        told = f"{lane.name} offset {acks['high'][best]} was acknowledged at {seconds(acks['t1'][best])}"
        self.findings.add("stale read", 1, f"{told}; a later answer ended below it", acks["t1"][best])


def compare(
    ended: list[int],
    acks: dict[str, array[int]],
    later: Iterable[tuple[int, int, int]],
    broken: Callable[[int, int], None],
) -> None:
    """Tell ``broken`` of each of ``later`` (begin, offset, index) whose offset is not above all that ended before it.

    ``ended`` are the acknowledgements in the order of their ends; ``later`` is in the order of its begins.
    """
    best, at = -1, 0
    for begin, offset, index in later:
        while at < len(ended) and acks["t1"][ended[at]] < begin:
            if best < 0 or acks["high"][ended[at]] > acks["high"][best]:
                best = ended[at]
            at += 1
        if best >= 0 and acks["high"][best] >= offset:
            broken(best, index)
