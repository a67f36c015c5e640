"""The queue checker on histories made by hand: each rule has one that breaks it, and one that only looks like it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ferryline.proof.queues import FAIL, INFO, QueueOp, QueueRules, check_queue

S = 1_000_000
PART = "orders-0"


def record(offset: int, lane: str = "a", **fields: Any) -> QueueOp:
    return QueueOp("record", PART, offsets=[offset], lane=lane, **fields)


def deliver(
    t: int, lease: int, *offsets: int, epoch: int = 1, attempts: int = 1, took: int = 1, **fields: Any
) -> QueueOp:
    """Asked for at second t, delivered at second t + 1."""
    fields = {"proc": "m", "lease_ms": 30_000, "limit": 10, **fields}
    counts = [attempts] * len(offsets)
    return QueueOp(
        "deliver", PART, t0=t * S, t1=(t + took) * S, epoch=epoch, lease=lease, offsets=list(offsets), attempts=counts,
        **fields,
    )  # fmt: skip


def settle(t: int, lease: int, action: str, *offsets: int, epoch: int = 1, **fields: Any) -> QueueOp:
    return QueueOp(
        "settle", PART, proc="m", t0=t * S, t1=(t + 1) * S, epoch=epoch, lease=lease, action=action,
        offsets=list(offsets), **fields,
    )  # fmt: skip


def copied(t: int, offset: int) -> QueueOp:
    return QueueOp("copy", PART, t0=t * S, t1=t * S, offsets=[offset])


def keep(t: int, *leases: tuple[int, int]) -> QueueOp:
    return QueueOp("keep", PART, proc="m", t0=t * S, t1=(t + 1) * S, leases=list(leases))


def found(*ops: QueueOp, **rules: Any) -> list[str]:
    return [finding.rule.split()[0] for finding in check_queue(ops, QueueRules(**rules))]


def test_a_quiet_history_has_no_findings() -> None:
    ops = [
        record(0), record(1), record(2, "b"),
        deliver(0, 1, 0, 2), settle(2, 1, "ack", 0), settle(3, 1, "nack", 2, delay_ms=1_000),
        deliver(4, 2, 1, 2, attempts=1), settle(6, 2, "ack", 1, 2),
    ]  # fmt: skip
    ops[6].attempts = [1, 2]
    assert found(*ops) == []
    assert found(*reversed(ops)) == [], "the order of the lines does not matter"


BAD: dict[str, tuple[str, list[QueueOp], dict[str, Any]]] = {
    "delivered again after an ack": (
        "Q2/Q10", [deliver(0, 1, 0), settle(2, 1, "ack", 0), deliver(5, 2, 0, attempts=2)], {}),
    "delivered again after an ack and a fail-over": (
        "Q2/Q10", [deliver(0, 9, 0), settle(2, 9, "ack", 0), deliver(5, 1, 0, epoch=2, attempts=2)], {}),
    "asked for after it was told to be settled": (
        "Q2/Q10", [deliver(0, 1, 0), settle(2, 1, "ack", 0, settled=[0]), deliver(5, 2, 0, attempts=2)], {}),
    "two receipts acked": (
        "Q3", [settle(2, 2, "ack", 0), settle(2, 1, "ack", 0)], {}),
    "more attempts than allowed": ("Q4", [deliver(0, 1, 0, attempts=6)], {}),
    "a nack that did not count": (
        "Q4", [deliver(0, 1, 0), settle(2, 1, "nack", 0, delay_ms=0), deliver(5, 2, 0)], {}),
    "an ended lease that did not count": ("Q4", [deliver(0, 1, 0), deliver(40, 2, 0)], {}),
    "an ended lease that did not count, long after its receiver said what it keeps": (
        "Q4", [keep(-9), deliver(0, 1, 0), deliver(40, 2, 0)], {}),
    "the first of a run was not blamed": (
        "Q4", [deliver(0, 1, 0, 1), deliver(40, 2, 0, 1)], {"ordering": "partition"}),
    "handed out before it was due": ("Q5", [record(0, delay_ms=9_000, t0=S), deliver(5, 1, 0)], {}),
    "handed out while it backs off": (
        "Q5", [deliver(0, 1, 0), settle(2, 1, "nack", 0, delay_ms=9_000), deliver(4, 2, 0, attempts=2)], {}),
    "handed out while it is leased": ("Q5", [deliver(0, 1, 0), deliver(4, 2, 0, attempts=2)], {}),
    "handed out by the next primary while it is leased": (
        "Q5", [deliver(0, 1, 0), deliver(4, 1, 0, epoch=2, attempts=2)], {}),
    "handed out although its receiver keeps it": (
        "Q5", [deliver(0, 1, 0), keep(2, (1, 1)), deliver(5, 2, 0, attempts=2)], {}),
    "acked after it was given back": (
        "Q3", [deliver(0, 1, 0), settle(2, 1, "release", 0), settle(4, 1, "ack", 0)], {}),
    "two copies": ("Q7", [copied(3, 0), copied(9, 0)], {}),
    "handed out after its copy": ("Q7", [deliver(5, 1, 0), copied(3, 0)], {}),
    "acked after its copy": ("Q7", [deliver(0, 1, 0), copied(3, 0), settle(4, 1, "ack", 0)], {}),
    "an earlier one after a later one": (
        "Q8", [record(0), record(1), deliver(0, 1, 1), deliver(5, 2, 0)], {}),
    "two of a lane together": ("Q8", [record(0), record(1), deliver(0, 1, 0, 1)], {}),
    "a run out of order": ("Q8", [deliver(0, 1, 1, 0)], {"ordering": "partition"}),
    "two of a lane with two receivers": (
        "Q8", [record(0), record(1), deliver(0, 1, 0), deliver(1, 2, 1), settle(5, 1, "ack", 0)], {}),
    "a run with two receivers": (
        "Q8", [record(0), record(1), deliver(0, 1, 0), deliver(1, 2, 1), settle(5, 1, "ack", 0)],
        {"ordering": "partition"}),
    "more than asked for": ("Q11", [deliver(0, 1, *range(11))], {}),
    "gone without a trace": ("Q1/Q12", [record(0), deliver(0, 1, 0), settle(2, 1, "ack", 0, type=FAIL)], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_broken_promise_is_found(name: str) -> None:
    rule, ops, rules = BAD[name]
    drained = rule == "Q1/Q12"
    assert found(*ops, **{"drained": drained, **rules}) == [rule]


NEAR: dict[str, tuple[list[QueueOp], dict[str, Any]]] = {
    "an answer of an older lease that came late": (
        [deliver(0, 2, 0, attempts=2), settle(2, 2, "ack", 0), deliver(-40, 1, 0, took=46)], {}),
    "an ack of which nobody knows": ([deliver(0, 1, 0), settle(2, 1, "ack", 0, type=INFO), deliver(5, 2, 0)], {}),
    "an ack that came too late": (
        [deliver(0, 1, 0), deliver(31, 2, 0, attempts=2), settle(33, 1, "ack", 0, stale=[0]),
         settle(34, 2, "ack", 0)], {}),
    "an ack that was repeated": (
        [deliver(0, 1, 0), settle(2, 1, "ack", 0), settle(4, 1, "ack", 0, settled=[0])], {}),
    "given back, so it did not count": (
        [deliver(0, 1, 0), settle(2, 1, "release", 0), deliver(5, 2, 0)], {}),
    "dropped by its receiver, so it did not count": ([deliver(0, 1, 0), keep(2), deliver(5, 2, 0)], {}),
    "perhaps dropped by its receiver, long ago": (
        [QueueOp("keep", PART, proc="m", t0=-9 * S), deliver(0, 1, 0), deliver(5, 2, 0)], {}),
    "behind the first of a run": (
        [deliver(0, 1, 0, 1), settle(2, 1, "nack", 0, 1, delay_ms=0),
         QueueOp("deliver", PART, t0=5 * S, t1=6 * S, epoch=1, lease=2, offsets=[0, 1], attempts=[2, 1])],
        {"ordering": "partition"}),
    "a run that comes again after its first failed": (
        [record(0), record(1), deliver(0, 1, 0, 1), deliver(40, 2, 0, attempts=2),
         msgspec.structs.replace(deliver(80, 3, 0, 1), attempts=[3, 1])],
        {"ordering": "partition"}),
    "redriven, so it begins anew": (
        [deliver(0, 1, 0), settle(2, 1, "nack", 0, delay_ms=0), QueueOp("redrive", PART), deliver(5, 2, 0)], {}),
    "nacked for the last time, parked and redriven": (
        [deliver(0, 1, 0), settle(2, 1, "nack", 0, delay_ms=9_000), QueueOp("redrive", PART), deliver(5, 2, 0)], {}),
    "handed out right when its delay ends": (
        [deliver(0, 1, 0), settle(2, 1, "nack", 0, delay_ms=9_000), deliver(10, 2, 0, attempts=2)], {}),
    "handed out when its lease has ended": ([deliver(0, 1, 0), deliver(29, 2, 0, attempts=2)], {}),
    "leased again by the next primary, which gave the lease its whole time again": (
        [deliver(0, 1, 0), deliver(35, 1, 0, epoch=2, attempts=2)], {}),
    "copied while somebody still works on it": ([deliver(0, 1, 0), copied(3, 0)], {}),
    "a late one after a later one": (
        [record(0, delay_ms=1), record(1), deliver(0, 1, 1), settle(2, 1, "ack", 1), deliver(5, 2, 0)], {}),
    "other lanes": ([record(0), record(1, "b"), deliver(0, 1, 1), deliver(5, 2, 0)], {}),
    "no lanes": ([record(0), record(1), deliver(0, 1, 0, 1)], {"ordering": "none"}),
    "records without a key": ([record(0, ""), record(1, ""), deliver(0, 1, 0, 1)], {}),
    "the next one as soon as this one is acked": (
        [record(0), record(1), deliver(0, 1, 0), settle(2, 1, "ack", 0), deliver(2, 2, 1)], {}),
    "expired": ([record(0, expires=True)], {"drained": True}),
    "copied and nothing else": ([record(0), copied(3, 0)], {"drained": True}),
    "perhaps acked": ([record(0), settle(2, 1, "ack", 0, type=INFO)], {"drained": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR)
def test_what_is_allowed_is_not_blamed(name: str) -> None:
    ops, rules = NEAR[name]
    assert found(*ops, **{"drained": False, **rules}) == []


def test_partitions_have_nothing_to_do_with_each_other() -> None:
    other = deliver(5, 2, 0, attempts=2)
    other.partition = "orders-1"
    assert found(deliver(0, 1, 0), settle(2, 1, "ack", 0), other, drained=False) == []


def test_an_unknown_line_is_refused() -> None:
    with pytest.raises(ValueError, match="'acked' is unknown"):
        found(QueueOp("acked", PART))
