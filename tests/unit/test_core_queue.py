"""Queues in whole partitions: what is answered when, and what the next primary goes on with."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ferryline.protocol.messages import RECORDS, STATE
from ferryline.protocol.metadata import RetryPolicy
from ferryline.protocol.queue_messages import ACK, EXTEND, REJECT
from ferryline.protocol.records import decode_batch, encode_batch
from ferryline_broker.core import events as ev
from ferryline_broker.core import queue_events as qe
from ferryline_broker.core.partition import ReplicaConfig
from tests.scanned import together
from unit.core_pair import Pair, part


class QueuePair(Pair):
    """A pair whose driver reads windows. Dead letters are only noted."""

    def __init__(self, config: ReplicaConfig | None = None) -> None:
        super().__init__(config=config)
        self.token = 0
        self.meta(part(1, 1, 1, (1, 2)))
        self.tick(10)

    def _do(self, broker: int, effect: ev.Effect) -> None:
        super()._do(broker, effect)
        if isinstance(effect, qe.ReadWindow) and effect.ahead:
            self.inbox.insert(0, (broker, self.window(broker, effect)))
        elif isinstance(effect, qe.ReadWindow):
            self.send(broker, self.window(broker, effect))

    def window(self, broker: int, ask: qe.ReadWindow) -> qe.WindowRead:
        scanned: list[qe.Scanned | qe.ScannedBatch] = []
        end = ask.offset
        for header, raw in self.disks[broker].logs[RECORDS]:
            if header.next_offset <= ask.offset or header.base_offset >= ask.below:
                continue
            end = header.next_offset
            if not header.is_control:
                scanned += together([qe.Scanned(record.offset, record.key) for record in decode_batch(raw)])
        return qe.WindowRead(ask.group, ask.offset, end, scanned, 100, ask.ahead)

    def put(self, broker: int, *keys: str) -> None:
        self.token += 1
        self.produce(broker, self.token, encode_batch([(key.encode(), b"v", []) for key in keys]))

    def ask(self, broker: int, kind: Any, **fields: Any) -> Any:
        """The answer to a queue event, or None if it is not known yet."""
        self.token += 1
        self.tell(broker, kind(self.token, fields.pop("group", "g"), **fields))
        return self.answer_to(self.token)

    def answer_to(self, token: int) -> Any:
        found = [e for _, e in self.done if getattr(e, "token", 0) == token and not isinstance(e, ev.Append)]
        assert len(found) < 2, found
        return found[0] if found else None

    def lease(self, broker: int, member: str = "m", limit: int = 100, group: str = "g") -> Any:
        fields: dict[str, Any] = {"ordering": "key", "start": "start", "lease_ms": 10_000, "bytes_max": 2**20}
        fields["group"] = group
        answer = self.ask(broker, qe.LeaseAsked, member=member, records_max=limit, **fields)
        if isinstance(answer, qe.AnswerLease) and not answer.offsets:  # the window has been read by now
            answer = self.ask(broker, qe.LeaseAsked, member=member, records_max=limit, **fields)
        return answer

    def settle(self, broker: int, lease: qe.AnswerLease, action: str, *offsets: int, **fields: Any) -> Any:
        item = qe.SettleItem(lease.epoch, lease.lease, action, list(offsets or lease.offsets), **fields)
        return self.ask(broker, qe.SettleAsked, member="m", items=[item])

    def fail_over(self, primary: int, epoch: int, isr: tuple[int, ...] = (1, 2)) -> None:
        self.meta(part(primary, epoch, epoch, isr))
        self.tick(10)


def test_a_lease_is_answered_only_when_both_copies_have_it() -> None:
    pair = QueuePair()
    pair.put(1, "a", "b")
    pair.lease(1, limit=1)
    pair.hold_flush.add(2)
    assert pair.lease(1) is None
    token = pair.token
    pair.hold_flush.clear()
    pair.send(2, ev.Flushed(STATE, pair.disks[2].end(STATE)))
    pair.run()
    answer = pair.answer_to(token)
    assert len(answer.offsets) == 1


def test_an_ack_is_answered_only_when_both_copies_have_it() -> None:
    pair = QueuePair()
    pair.put(1, "a")
    lease = pair.lease(1)
    pair.hold_flush.add(2)
    assert pair.settle(1, lease, ACK) is None
    pair.hold_flush.clear()
    token = pair.token
    pair.send(2, ev.Flushed(STATE, pair.disks[2].end(STATE)))
    pair.run()
    assert pair.answer_to(token) == qe.AnswerSettle(token, [[]], [[]], [0])


def test_an_extension_is_promised_only_by_a_primary_that_can_commit() -> None:
    pair = QueuePair()
    pair.put(1, "a")
    lease = pair.lease(1)
    pair.hold_flush.add(2)
    assert pair.settle(1, lease, EXTEND) is None, "it stands behind a barrier"


def test_the_next_primary_repeats_the_copy_that_was_begun() -> None:
    pair = QueuePair()
    pair.put(1, "a")
    lease = pair.lease(1)
    pair.settle(1, lease, REJECT, reason="poison")
    first = pair.effects(qe.MoveDead, 1)
    assert [(move.offset, move.sequence, move.reason) for move in first] == [(lease.offsets[0], 0, "poison")]
    pair.fail_over(2, 2)
    again = pair.effects(qe.MoveDead, 2)
    assert [(move.offset, move.producer_epoch, move.sequence) for move in again] == [(lease.offsets[0], 0, 0)]
    pair.tell(2, qe.DeadMoved("g", lease.offsets[0], 0))
    assert pair.lease(2).offsets == []
    assert pair.ask(2, qe.QueueAsked, op="explain", offset=lease.offsets[0]).details["state"] == "settled"


def test_no_copy_is_made_before_its_beginning_is_committed() -> None:
    pair = QueuePair()
    pair.put(1, "a")
    lease = pair.lease(1)
    pair.hold_flush.add(2)
    pair.settle(1, lease, REJECT)
    assert pair.effects(qe.MoveDead) == []
    pair.hold_flush.clear()
    pair.send(2, ev.Flushed(STATE, pair.disks[2].end(STATE)))
    pair.run()
    assert len(pair.effects(qe.MoveDead)) == 1


def test_what_happens_while_nothing_can_be_appended_is_looked_at_later() -> None:
    pair = QueuePair()
    pair.put(1, "a", "b")
    lease = pair.lease(1)
    pair.settle(1, lease, REJECT)
    assert len(pair.effects(qe.MoveDead)) == 1
    pair.meta(part(1, 1, 2, (1,), min_isr=2))
    pair.tell(1, qe.DeadMoved("g", lease.offsets[0], 0))
    assert pair.ask(1, qe.QueueAsked, op="stats").code == "NOT_ENOUGH_REPLICAS"
    pair.tick(200)
    pair.meta(part(1, 1, 3, (1, 2), min_isr=2))
    pair.tick(200)
    pair.tick(200)
    assert [move.offset for move in pair.effects(qe.MoveDead)] == lease.offsets, "the second follows the first"


def test_a_queue_holds_back_retention_until_it_has_settled() -> None:
    pair = QueuePair()
    pair.put(1, "a", "b")
    lease = pair.lease(1)
    core = pair.cores[1]
    first, second = lease.offsets
    assert core.retention_limit(pair.now) == first
    pair.settle(1, lease, ACK, first)
    assert core.retention_limit(pair.now) == second
    week = 7 * 86_400_000
    assert core.retention_limit(pair.now + week) == core.high_watermark[RECORDS], "nobody has asked for so long"


def test_a_snapshot_bounds_what_the_next_primary_reads() -> None:
    pair = QueuePair(msgspec.structs.replace(ReplicaConfig(), snapshot_bytes=2_000))
    for number in range(60):
        pair.put(1, f"k{number}", f"k{number}")
        lease = pair.lease(1)
        pair.settle(1, lease, ACK, lease.offsets[0])
    assert pair.cores[1].log_start[STATE] > 0
    pair.tick(300)
    before = pair.ask(1, qe.QueueAsked, op="stats").details
    start = pair.cores[2].log_start[STATE]
    assert start > 0
    pair.disks[2].logs[STATE] = [one for one in pair.disks[2].logs[STATE] if one[0].base_offset >= start]
    pair.fail_over(2, 2)
    after = pair.ask(2, qe.QueueAsked, op="stats").details
    assert [after[name] for name in ("leased", "start", "members")] == [
        before[name] for name in ("leased", "start", "members")
    ]
    assert before["leased"] > 0
    assert pair.settle(2, lease, ACK, lease.offsets[-1]).stale == [[]], "its receipt is still good"


def test_beginnings_of_epochs_are_not_counted_among_what_is_left() -> None:
    pair = QueuePair()
    pair.put(1, "k", "l")
    leased = pair.lease(1, limit=1)
    pair.settle(1, leased, ACK)

    def left(broker: int) -> list[int]:
        asked = [pair.ask(broker, qe.QueueAsked, op="purge", dry_run=True), pair.ask(broker, qe.QueueAsked, op="stats")]
        return [asked[0].details["purged"], asked[1].details["unsettled"]]

    assert left(1) == [1, 1]
    for primary, epoch in ((2, 2), (1, 3)):
        pair.fail_over(primary, epoch)
        assert left(primary) == [1, 1], "nobody has received since, so nobody has looked at the new marks"
    last = pair.lease(1)
    pair.settle(1, last, ACK)
    assert left(1) == [0, 0]


def test_a_partition_has_so_many_queue_groups_and_no_more_over_a_fail_over_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferryline_broker.core.queues.QUEUES_MAX", 3)
    pair = QueuePair()
    pair.put(1, "k")
    for group in ("a", "b", "c"):
        assert pair.lease(1, group=group).offsets
    pair.fail_over(2, 2)
    refused = pair.lease(2, group="d")
    assert (refused.code, "delete one first" in refused.message) == ("THROTTLED", True)
    assert isinstance(pair.lease(2, group="a"), qe.AnswerLease), "those that there are go on"
    assert isinstance(pair.ask(2, qe.QueueAsked, group="b", op="delete"), qe.AnswerQueue)
    assert pair.lease(2, group="d").offsets, "and one that is gone makes room"


def test_the_retry_policy_of_the_topic_counts() -> None:
    pair = QueuePair()
    pair.put(1, "a", "a")
    pair.tell(1, ev.RetryChanged(RetryPolicy(attempts=1, on_dead="park")))
    lease = pair.lease(1)
    pair.tick(10_001)  # the lease ends, and it was the only attempt
    assert pair.ask(1, qe.QueueAsked, op="stats").details["parked"] == 1
    assert pair.ask(1, qe.QueueAsked, op="redrive", count=0).details == {"offsets": lease.offsets}
    assert pair.lease(1).offsets == lease.offsets


def test_whoever_asks_in_vain_leaves_word_for_those_who_ask_after_him() -> None:
    pair = QueuePair()
    core, now = pair.cores[1], lambda: pair.now
    assert not core.queue_waited_for("g", "key", now()), "nobody has asked"
    assert pair.lease(1).offsets == []
    assert core.queue_waited_for("g", "key", now())
    assert not core.queue_waited_for("g", "none", now()), "that is refused, and has to be told"
    assert not core.queue_waited_for("h", "key", now())
    assert not core.queue_waited_for("g", "key", now() + 3_000), "a queue that is asked for nothing falls asleep"
    pair.put(1, "a")
    assert not core.queue_waited_for("g", "key", now()), "there is something"
    assert pair.lease(1).offsets
    assert not core.queue_waited_for("g", "key", now()), "nobody was told that there is nothing"
    assert pair.lease(1).offsets == []
    assert pair.ask(1, qe.QueueAsked, op="delete")
    assert not core.queue_waited_for("g", "key", now()), "the group has been forgotten"
