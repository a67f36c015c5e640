"""Judge the history of a queue group: `check_queue`. Nothing here knows how a broker works.

One list of `QueueOp`, in any order; which fields count for which ``f``:

==========  ====================================================================================================
f           what it says
==========  ====================================================================================================
record      ``offsets`` [one] of a committed record; ``lane`` ("": none); ``delay_ms`` after ``t0`` it may first be
            handed out; ``expires``: it may end by time
deliver     proc asked at t0 for at most ``limit`` records and was handed ``offsets``, leased together as (``epoch``,
            ``lease``), good for ``lease_ms``, each for the ``attempts``-th time, at t1
settle      proc said ``action`` of ``offsets`` under a receipt. ok: everything was done but for what is in ``stale`` or
            ``settled``; info: unknown; fail: certainly nothing was done
keep        proc said at t0 which leases it holds; it came before t1, or it may have come at any time
copy        the dead letters took a copy of ``offsets`` [one]
redrive     somebody set parked records free
==========  ====================================================================================================

Receipts are ordered by (epoch, lease), and everything that was delivered was committed before: so the order of two
leases is the order of their receipts, whatever the network did to the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import msgspec

OK, FAIL, INFO = "ok", "fail", "info"
Receipt = tuple[int, int]


class QueueOp(msgspec.Struct):
    """See the table of the module. Times in microseconds of one clock; t1 is 0 while nobody has answered."""

    f: str
    partition: str
    proc: str = ""
    type: str = OK
    t0: int = 0
    t1: int = 0
    epoch: int = 0
    lease: int = 0
    lease_ms: int = 0
    offsets: list[int] = []
    attempts: list[int] = []
    limit: int = 0
    action: str = ""
    delay_ms: int = -1
    stale: list[int] = []
    settled: list[int] = []
    leases: list[Receipt] = []
    lane: str = ""
    expires: bool = False

    @property
    def receipt(self) -> Receipt:
        """What names the lease."""
        return self.epoch, self.lease

    @property
    def done(self) -> list[int]:
        """Offsets for which a settlement certainly did something."""
        return [one for one in self.offsets if self.type == OK and one not in self.stale and one not in self.settled]


@dataclass(frozen=True)
class QueueRules:
    """What the group asked for. ``drift``: by how much a broker's clock may run wrong. ``drained``: at the end
    everything was settled, so a record that nothing happened to is lost."""

    ordering: str = "key"
    attempts_max: int = 5
    drift: float = 0.0
    drained: bool = True


@dataclass(frozen=True)
class Finding:
    """One broken promise."""

    rule: str
    text: str


class _Given(msgspec.Struct):
    """One record in one delivery."""

    op: QueueOp
    attempt: int

    @property
    def receipt(self) -> Receipt:
        return self.op.receipt


class _Partition:
    """What happened in one partition."""

    def __init__(self, name: str, rules: QueueRules) -> None:
        self.name = name
        self.rules = rules
        self.records: dict[int, QueueOp] = {}
        self.deliveries: list[QueueOp] = []
        self.given: dict[int, list[_Given]] = {}  # offset -> its deliveries, in the order of the leases
        self.settles: list[QueueOp] = []
        self.copies: dict[int, list[QueueOp]] = {}
        self.keeps: dict[str, list[QueueOp]] = {}  # by proc
        self.redriven = False
        self.said: dict[Receipt, list[QueueOp]] = {}  # everything that was said under a receipt
        self.acks: dict[int, list[QueueOp]] = {}  # offset -> acks that certainly counted

    def note(self, op: QueueOp) -> None:
        match op.f:
            case "record":
                self.records[op.offsets[0]] = op
            case "deliver":
                self.deliveries.append(op)
            case "settle":
                self.settles.append(op)
            case "copy":
                self.copies.setdefault(op.offsets[0], []).append(op)
            case "keep":
                self.keeps.setdefault(op.proc, []).append(op)
            case "redrive":
                self.redriven = True
            case _:
                raise ValueError(f"f: {op.f!r} is unknown")

    def order(self) -> None:
        """Everything is known: put it in order."""
        self.deliveries.sort(key=lambda op: op.receipt)
        for op in self.deliveries:
            for offset, attempt in zip(op.offsets, op.attempts, strict=True):
                self.given.setdefault(offset, []).append(_Given(op, attempt))
        for op in self.settles:
            self.said.setdefault(op.receipt, []).append(op)
            if op.action == "ack":
                for offset in op.done:
                    self.acks.setdefault(offset, []).append(op)

    def failed(self, action: str) -> Iterator[tuple[int, QueueOp]]:
        """Records that certainly failed. Of a run only the first: those behind it were given back unread."""
        for op in self.settles:
            if op.action == action and op.done:
                whole = self.rules.ordering == "partition"
                for offset in [min(op.done)] if whole else op.done:
                    yield offset, op

    def lane(self, offset: int) -> str:
        """The lane of a record; "" where there is none, or nobody knows."""
        record = self.records.get(offset)
        if record is None or self.rules.ordering == "none":
            return ""
        return "whole" if self.rules.ordering == "partition" else record.lane

    def late(self, offset: int) -> bool:
        """A delayed record joins its lane when it is due, behind others perhaps."""
        record = self.records.get(offset)
        return record is None or record.delay_ms > 0

    def dropped(self, given: _Given) -> bool:
        """Its receiver may have said that it does not hold this lease."""
        keeps = self.keeps.get(given.op.proc, ())
        return any((not op.t1 or op.t1 >= given.op.t0) and given.receipt not in op.leases for op in keeps)

    def at(self, offset: int) -> str:
        return f"{self.name} at {offset}"


def check_queue(ops: Iterable[QueueOp], rules: QueueRules) -> list[Finding]:
    """Everything that is wrong with this history, rule by rule."""
    partitions: dict[str, _Partition] = {}
    for op in ops:
        known = partitions.get(op.partition)
        if known is None:
            known = partitions[op.partition] = _Partition(op.partition, rules)
        known.note(op)
    found: list[Finding] = []
    for _, partition in sorted(partitions.items()):
        partition.order()
        for judge in JUDGES:
            found += judge(partition)
    return found


def _acked_stays(part: _Partition) -> Iterator[Finding]:
    """Q2, Q3, Q10: what was acknowledged is not handed out again, and not acknowledged under another lease; what its
    receiver gave back is not its to acknowledge."""
    rule = "Q2/Q10 no delivery after an ack"
    for offset, acks in part.acks.items():
        for ack in acks:
            for given in part.given.get(offset, ()):
                if given.receipt > ack.receipt:
                    told = f"{part.at(offset)}: leased as {given.receipt} after the ack of {ack.receipt} at {ack.t1}"
                    yield Finding(rule, told)
        if len(acks) > 1:
            receipts = sorted(ack.receipt for ack in acks)
            yield Finding("Q3 one receipt is acked", f"{part.at(offset)}: acks under {receipts} all counted")
    for op in part.settles:
        for offset in op.done if op.action == "release" else ():
            for ack in part.acks.get(offset, ()):
                if ack.receipt == op.receipt and ack.t0 > op.t1:
                    told = f"{part.at(offset)}: given back under {op.receipt} at {op.t1}, acked under it at {ack.t0}"
                    yield Finding("Q3 one receipt is acked", told)
        for offset in op.settled if op.type == OK else ():
            for given in part.given.get(offset, ()):
                if given.op.t0 > op.t1:
                    told = f"{part.at(offset)}: asked for at {given.op.t0}, told to be settled at {op.t1}"
                    yield Finding(rule, told)


def _attempts_count(part: _Partition) -> Iterator[Finding]:
    """Q4: attempts begin at 1, rise with every failure, and end at the limit."""
    rule = "Q4 attempts are counted"
    for offset, givens in part.given.items():
        for given in givens:
            if not 1 <= given.attempt <= part.rules.attempts_max:
                yield Finding(rule, f"{part.at(offset)}: attempt {given.attempt} of {part.rules.attempts_max}")
        if part.redriven:
            continue
        for before, after in pairwise(givens):
            if after.attempt <= before.attempt and _used_up(part, offset, before):
                told = f"{part.at(offset)}: attempt {before.attempt} as {before.receipt} failed"
                yield Finding(rule, f"{told}, then {after.attempt} as {after.receipt}")


def _used_up(part: _Partition, offset: int, given: _Given) -> bool:
    """This attempt certainly failed: it was nacked, or its lease ended with nobody saying anything."""
    said = part.said.get(given.receipt, [])
    whole = part.rules.ordering == "partition"
    if not said:
        return not part.dropped(given) and (not whole or offset == given.op.offsets[0])
    only = [op for op in said if offset in op.offsets]
    first = len(only) == 1 and only[0].action == "nack" and offset in only[0].done
    return first and (not whole or (offset == only[0].offsets[0] and len(said) == 1))


def _not_before(part: _Partition) -> Iterator[Finding]:
    """Q5: not before its delay is over, nor while the lease of somebody who said nothing lasts."""
    rule, slow = "Q5 not before its time", 1 - part.rules.drift
    for offset, givens in part.given.items():
        record = part.records.get(offset)
        if record is not None and record.delay_ms > 0 and givens[0].op.t1 < record.t0 + record.delay_ms * 1000 * slow:
            yield Finding(rule, f"{part.at(offset)}: sent at {record.t0}, delayed by {record.delay_ms} ms, "
                                f"delivered at {givens[0].op.t1}")  # fmt: skip
        for before, after in pairwise(givens):
            silent = not part.said.get(before.receipt)
            if silent and not part.dropped(before) and after.op.t1 < before.op.t0 + before.op.lease_ms * 1000 * slow:
                yield Finding(rule, f"{part.at(offset)}: leased as {before.receipt} from {before.op.t0} at the "
                                    f"earliest, delivered as {after.receipt} at {after.op.t1}")  # fmt: skip
    for offset, op in part.failed("nack"):  # redriven, it may have been parked by this, and set free at any time
        if op.delay_ms > 0 and not part.redriven:
            after_it = [given for given in part.given.get(offset, ()) if given.receipt > op.receipt]
            if after_it and after_it[0].op.t1 < op.t0 + op.delay_ms * 1000 * slow:
                yield Finding(rule, f"{part.at(offset)}: nacked at {op.t0} for {op.delay_ms} ms, "
                                    f"delivered at {after_it[0].op.t1}")  # fmt: skip


def _one_copy(part: _Partition) -> Iterator[Finding]:
    """Q7: what is dead is copied once, and after that it is nobody's."""
    rule = "Q7 one copy, and then nothing"
    for offset, copies in part.copies.items():
        if len(copies) > 1:
            yield Finding(rule, f"{part.at(offset)}: {len(copies)} copies, at {[copy.t0 for copy in copies]}")
        for given in part.given.get(offset, ()):
            if given.op.t0 > copies[0].t1:
                yield Finding(rule, f"{part.at(offset)}: copied at {copies[0].t1}, asked for at {given.op.t0}")
        for ack in part.acks.get(offset, ()):
            if ack.t0 > copies[0].t1:
                yield Finding(rule, f"{part.at(offset)}: copied at {copies[0].t1}, acked at {ack.t0}")


def _in_order(part: _Partition) -> Iterator[Finding]:
    """Q8: in each lane, records are leased in the order of the log, each when those before it are terminal."""
    rule = "Q8 order of a lane"
    before: dict[str, list[tuple[int, QueueOp]]] = {}  # the highest record of each lane in each delivery
    for op in part.deliveries:
        lanes = [part.lane(offset) for offset in op.offsets]
        if part.rules.ordering == "partition" and op.offsets != sorted(op.offsets):
            yield Finding(rule, f"{part.name}: {op.offsets} delivered together")
        if part.rules.ordering == "key":
            named = [lane for lane in lanes if lane]
            if len(named) != len(set(named)):
                yield Finding(rule, f"{part.name}: {op.offsets} delivered together, of lanes {lanes}")
        for offset, lane in zip(op.offsets, lanes, strict=True):
            if not lane or part.late(offset):
                continue
            for highest, other in before.get(lane, ()):
                if offset < highest and offset not in other.offsets:  # of a run that failed all come again
                    told = f"{part.at(offset)}: leased as {op.receipt} after {highest} as {other.receipt}"
                    yield Finding(rule, f"{told}, lane {lane}")
                    break
        for lane in sorted(set(lanes)):
            top = max(offset for offset, where in zip(op.offsets, lanes, strict=True) if where == lane)
            before.setdefault(lane, []).append((top, op))


def _one_of_a_lane(part: _Partition) -> Iterator[Finding]:
    """Q8: while a record is with somebody, no other of its lane is with anybody else."""
    lanes: dict[str, list[tuple[int, _Given]]] = {}
    for offset, givens in part.given.items():
        if lane := part.lane(offset):
            lanes.setdefault(lane, []).extend((offset, given) for given in givens)
    whole = part.rules.ordering == "partition"
    for offset, acks in part.acks.items():
        for ack in acks:
            if any(op.action not in ("ack", "extend") and offset in op.offsets for op in part.said[ack.receipt]):
                continue
            for other, given in lanes.get(part.lane(offset), ()):
                if other == offset or (whole and part.late(other)):
                    continue
                if given.receipt > ack.receipt and given.op.t1 < ack.t0:
                    told = f"{part.at(offset)}: acked under {ack.receipt} at {ack.t0}, but {other} of the same lane"
                    yield Finding("Q8 one of a lane", f"{told} had been delivered as {given.receipt}")


def _within_limits(part: _Partition) -> Iterator[Finding]:
    """Q11: nobody is given more than was asked for."""
    for op in part.deliveries:
        if op.limit and len(op.offsets) > op.limit:
            yield Finding("Q11 limits", f"{part.name}: {len(op.offsets)} records for {op.proc}, limit {op.limit}")


def check_ends(ops: Iterable[QueueOp], rules: QueueRules) -> list[Finding]:
    """Only whether every record ended: for what was written after a declared loss, where nothing else is sure."""
    partitions: dict[str, _Partition] = {}
    for op in ops:
        partitions.setdefault(op.partition, _Partition(op.partition, rules)).note(op)
    return [finding for _, partition in sorted(partitions.items()) for finding in _nothing_lost(partition)]


def _nothing_lost(part: _Partition) -> Iterator[Finding]:
    """Q1, Q12: every record ended, in one way that is known."""
    if not part.rules.drained:
        return
    maybe = {offset for op in part.settles if op.action == "ack" and op.type != FAIL for offset in op.offsets}
    for offset, record in sorted(part.records.items()):
        if offset not in maybe and offset not in part.copies and not record.expires:
            rule = "Q1/Q12 every record ends"
            yield Finding(rule, f"{part.at(offset)}: neither acked nor copied nor expired, and not there any more")


JUDGES: tuple[Callable[[_Partition], Iterator[Finding]], ...] = (
    _acked_stays, _attempts_count, _not_before, _one_copy, _in_order, _one_of_a_lane, _within_limits, _nothing_lost,
)  # fmt: skip
