"""Records that are leased before they are committed: with their lease they travel, and with it they are answered."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ferryline.protocol.messages import RECORDS, STATE, LogPosition, ReplicaFetch
from ferryline.protocol.queue_messages import ACK, REJECT
from ferryline.protocol.records import decode_batch, read_header
from ferryline_broker.core import events as ev
from ferryline_broker.core import queue_events as qe
from ferryline_broker.core.groups import StateEntry
from ferryline_broker.core.queue_entries import Leased, Opened, Released, packed, unpacked
from ferryline_broker.core.queue_table import NO_LEASE, QueueTable
from ferryline_broker.core.waiting import WaitList
from unit.core_pair import KEY, batch, part
from unit.test_core_queue import QueuePair

LEASE_MS = 10_000


def _entries(raw: bytes) -> list[Any]:
    return [msgspec.msgpack.decode(record.value or b"", type=StateEntry) for record in decode_batch(raw)]


class Waiting(QueuePair):
    """A receiver waits, and asks as soon as it is woken. ``facts`` change what the window is told of each record.
    ``stands``: it waits for more also when it is given something."""

    def __init__(self, *, stands: bool = False) -> None:
        self.stands = stands
        self.asked: list[int] = []  # tokens of the woken receiver
        self.facts: dict[str, Any] = {}
        self.held_logs: set[tuple[int, int]] = set()  # (broker, log): its flushes hang
        super().__init__()
        assert self.lease(1).offsets == []
        self.done.clear()

    def _do(self, broker: int, effect: ev.Effect) -> None:
        if isinstance(effect, ev.Flush) and (broker, effect.log) in self.held_logs:
            self.done.append((broker, effect))
            return
        super()._do(broker, effect)
        if isinstance(effect, qe.WakeReceivers):
            self.token += 1
            self.asked.append(self.token)
            ask = qe.LeaseAsked(self.token, "g", "m", "key", "start", LEASE_MS, 100, 2**20, stands=self.stands)
            self.inbox.insert(0, (broker, ask))

    def window(self, broker: int, ask: qe.ReadWindow) -> qe.WindowRead:
        found = super().window(broker, ask)
        singly = [one for batch in found.records for one in (batch.singly() if self.facts else [batch])]
        scanned = [msgspec.structs.replace(record, **self.facts) for record in singly]
        return msgspec.structs.replace(found, records=scanned)

    def leased(self) -> Any:
        """What the woken receiver was answered; None: nothing yet."""
        answers = [self.answer_to(token) for token in self.asked]
        found = [answer for answer in answers if getattr(answer, "offsets", [1])]
        return found[-1] if found else None

    def carried(self) -> list[tuple[bool, bool]]:
        """Of each answer to a secondary: does it carry records, and entries of the state log?"""
        return [(data.reads[RECORDS] is not None, data.reads[STATE] is not None) for data in self.effects(ev.SendData)]

    def flush_held(self) -> None:
        held, self.held_logs = self.held_logs, set()
        for broker, log in held:
            self.send(broker, ev.Flushed(log, self.disks[broker].end(log)))
        self.run()


def test_a_record_and_its_lease_travel_in_one_answer_and_cost_one_fetch() -> None:
    pair = Waiting()
    pair.put(1, "a")
    assert pair.leased().offsets == [1]
    assert pair.carried() == [(True, True)]
    assert len(pair.effects(ev.SendFetch)) == 1, "it says that both logs are flushed"
    assert not pair.effects(ev.SendProgress)


@pytest.mark.parametrize("held", [(1, RECORDS), (1, STATE), (2, RECORDS), (2, STATE)])
def test_the_lease_is_answered_when_both_logs_are_committed_and_not_before(held: tuple[int, int]) -> None:
    pair = Waiting()
    pair.held_logs = {held}
    pair.put(1, "a")
    assert pair.asked
    assert pair.leased() is None
    pair.flush_held()
    pair.tick(pair.config.fetch_retry_ms)
    assert pair.leased().offsets == [1]


@pytest.mark.parametrize("facts", [{"id": b"x"}, {"expires_ms": 5_000}])
def test_what_may_be_settled_by_looking_at_it_is_looked_at_when_it_is_committed(facts: dict[str, Any]) -> None:
    pair = Waiting()
    pair.facts = facts
    pair.held_logs = {(2, RECORDS)}
    pair.put(1, "a")
    assert not pair.asked
    pair.flush_held()
    pair.tick(pair.config.fetch_retry_ms)
    assert pair.leased().offsets == [1]


def test_nothing_is_read_ahead_behind_what_is_not_committed_or_while_a_secondary_is_away() -> None:
    pair = Waiting()
    pair.held_logs = {(2, RECORDS)}
    pair.put(1, "a")
    reads = len(pair.effects(qe.ReadWindow))
    pair.put(1, "b")
    assert len(pair.effects(qe.ReadWindow)) == reads, "the record before it is not committed"
    other = Waiting()
    other.tell(1, ev.PeerDown(2))
    other.put(1, "a")
    assert not other.effects(qe.ReadWindow)


@pytest.mark.parametrize(
    ("stands", "carried"),
    [(True, [(True, True)]), (False, [(True, False), (False, True)])],
)
def test_what_came_while_a_record_was_committed_is_leased_when_the_secondary_asks_for_it(
    stands: bool, carried: list[tuple[bool, bool]]
) -> None:
    pair = Waiting(stands=stands)
    pair.held_logs = {(2, RECORDS)}
    pair.put(1, "a")
    pair.put(1, "b")
    pair.put(1, "c")
    assert pair.leased() is None
    pair.done.clear()
    pair.flush_held()
    if not stands:
        assert pair.lease(1).offsets == [2, 3]
    assert pair.carried() == carried
    assert pair.leased().offsets == [2, 3]


def test_a_standing_word_is_not_given_while_there_is_more_to_lease() -> None:
    pair = QueuePair()
    assert pair.lease(1).offsets == []
    pair.put(1, "a", "b")
    pair.done.clear()
    asked = {"member": "m", "ordering": "key", "start": "start", "lease_ms": LEASE_MS, "records_max": 1}
    asked |= {"bytes_max": 2**20, "stands": True}
    assert pair.ask(1, qe.LeaseAsked, **asked).offsets == [1]
    assert not pair.effects(qe.WakeReceivers), "it would be asked again at once, past whoever has waited for longer"
    assert pair.ask(1, qe.LeaseAsked, **asked).offsets == [2]
    pair.put(1, "c")
    assert pair.effects(qe.WakeReceivers), "nothing was left, so its word stands"


def test_of_what_came_meanwhile_only_so_much_is_read_ahead_as_is_small() -> None:
    pair = Waiting(stands=True)
    pair.held_logs = {(2, RECORDS)}
    pair.put(1, "a")
    for token in (901, 902):
        pair.produce(1, token, batch(value=b"v" * 10_000))
    pair.done.clear()
    pair.flush_held()
    ahead = [(ask.offset, ask.below) for ask in pair.effects(qe.ReadWindow) if ask.ahead]
    assert ahead == [(2, 3)]


def test_what_must_be_looked_at_when_it_is_committed_is_not_read_ahead_again_and_again() -> None:
    pair = Waiting()
    pair.facts = {"id": b"x"}
    pair.done.clear()
    for token in range(901, 931):
        data = batch()
        pair.send(1, ev.Produced(token, data, read_header(data), 30_000))
    pair.run()
    assert len([ask for ask in pair.effects(qe.ReadWindow) if ask.ahead]) == 1


def test_nothing_is_read_ahead_for_a_secondary_that_catches_up_while_nothing_can_be_appended() -> None:
    pair = Waiting()
    pair.meta(part(1, 1, 2, (1, 2), min_isr=2))
    pair.cut = {2}
    pair.tell(1, ev.PeerDown(2))
    pair.put(1, "a")
    pair.put(1, "b")
    pair.meta(part(1, 1, 3, (1,), min_isr=2), 1)
    pair.done.clear()
    for number in range(20):
        position = LogPosition(1, 1, 1)
        fetch = ReplicaFetch(*KEY, 1, 1_000 + number, (position, position), 3)
        pair.tell(1, ev.FetchReceived(9, 2, pair.live[2] + 1, fetch))
        assert len(pair.effects(ev.SendData)) == number + 1, "it is served all the same"
    assert not pair.effects(qe.ReadWindow)


def test_what_was_read_ahead_when_the_last_secondary_left_is_read_again_once_it_is_committed() -> None:
    pair = Waiting()
    pair.meta(part(1, 1, 2, (1, 2), min_isr=2))
    asked = qe.WindowRead("g", 1, 2, [qe.Scanned(1, b"k")], 70, ahead=True)
    pair.meta(part(1, 1, 3, (1,), min_isr=2), 1)
    pair.tell(1, asked)
    assert pair.cores[1].next_deadline_ms() != pair.now + 100, "nothing is kept for later"


def test_a_large_batch_is_not_read_ahead() -> None:
    pair = Waiting()
    pair.produce(1, 900, batch(value=b"v" * 20_000))
    assert [ask.ahead for ask in pair.effects(qe.ReadWindow)] == [False]


def test_a_lease_does_not_end_before_its_record_is_committed() -> None:
    pair = Waiting()
    pair.held_logs = {(2, RECORDS)}
    pair.put(1, "a")
    end = pair.disks[1].end(STATE)
    for _ in range(2):
        pair.tick(LEASE_MS // 2 + 1)
    assert pair.disks[1].end(STATE) == end, "nothing was released, and no attempt was counted as failed"
    pair.flush_held()
    pair.tick(pair.config.fetch_retry_ms)
    answer = pair.leased()
    assert (answer.offsets, answer.attempts) == ([1], [1])


def test_a_lease_whose_record_was_lost_with_the_primaryship_is_void() -> None:
    pair = Waiting()
    pair.cut = {2}
    pair.put(1, "a")
    assert pair.leased() is None
    lost = pair.asked[0]
    pair.cut = {1}
    pair.meta(part(2, 2, 2, (2,)), 2)
    pair.tick(10)
    pair.put(2, "b")
    answer = pair.lease(2)
    assert (answer.offsets, answer.attempts) == ([2], [1]), "at offset 1 epoch 2 begins"
    pair.cut = set()
    pair.meta(part(2, 2, 3, (2,)), 1)
    assert isinstance(pair.answer_to(lost), ev.Refuse)
    assert pair.settle(2, answer, ACK).stale == [[]]


def test_a_lease_in_a_snapshot_that_names_a_lost_record_counts_no_attempt_for_those_that_stand() -> None:
    table = QueueTable("g", "key", 0)
    table.apply(Opened("g", "key", 0, -1))
    table.apply(Leased("g", 1, 1, "m", LEASE_MS, packed([0, 1]), 1))
    restored = QueueTable.of_row(table.row(lambda offset: 1), lambda offset, epoch: offset < 1, 0)
    assert not restored.leases
    assert not restored.holder
    assert [(at, story.attempts, story.last) for at, story in restored.stories.items()] == [(0, 0, NO_LEASE)]


def test_what_waits_for_a_record_waits_for_the_state_log_behind_it() -> None:
    pair = QueuePair()
    replica = pair.cores[1].replica
    replica.out, waits = [], WaitList(replica, 1)
    replica.high_watermark, replica.log_end = [5, 5], [10, 10]
    answer = qe.AnswerLease(7)
    waits.add(STATE, 6, 7, answer, 1_000, record=8)
    replica.high_watermark[STATE] = 7
    waits.release()
    assert not replica.out
    replica.high_watermark[:] = [9, 6]
    waits.release()
    assert not replica.out
    assert waits.next_deadline_ms() == 1_000
    replica.high_watermark[STATE] = 7
    waits.release()
    assert replica.out == [answer]
    replica.out = []


def test_batches_of_one_pass_travel_in_one_answer() -> None:
    pair = QueuePair()
    pair.done.clear()
    for token in (901, 902, 903):
        data = batch()
        pair.send(1, ev.Produced(token, data, read_header(data), 30_000))
    pair.run()
    assert {901, 902, 903} <= set(pair.answers())
    assert len([data for data in pair.effects(ev.SendData) if data.reads[RECORDS] is not None]) == 1


# -- settlements that nobody waits for ---------------------------------------------------------------


def settled_patiently(pair: QueuePair) -> int:
    """Acknowledge one record. Returns the token."""
    pair.put(1, "a")
    lease = pair.lease(1)
    pair.done.clear()
    item = qe.SettleItem(lease.epoch, lease.lease, ACK, lease.offsets)
    assert pair.ask(1, qe.SettleAsked, member="m", items=[item], patient=True) is None
    assert not pair.effects(ev.Flush)
    assert not pair.effects(ev.SendData)
    return pair.token


def test_a_patient_settlement_is_committed_with_what_is_appended_next() -> None:
    pair = QueuePair()
    token = settled_patiently(pair)
    pair.put(1, "b")
    assert isinstance(pair.answer_to(token), qe.AnswerSettle)
    carried = [(data.reads[RECORDS] is not None, data.reads[STATE] is not None) for data in pair.effects(ev.SendData)]
    assert carried == [(True, True)]


def test_a_patient_settlement_does_not_wait_longer_than_it_said() -> None:
    pair = QueuePair()
    token = settled_patiently(pair)
    assert pair.cores[1].next_deadline_ms() == pair.now + pair.config.patience_ms
    pair.tick(pair.config.patience_ms - 1)
    assert pair.answer_to(token) is None
    pair.tick(1)
    assert isinstance(pair.answer_to(token), qe.AnswerSettle)


def test_a_hand_over_does_not_wait_for_what_is_patient() -> None:
    pair = QueuePair()
    token = settled_patiently(pair)
    pair.tell(1, ev.HandOverAsked())
    assert isinstance(pair.answer_to(token), qe.AnswerSettle)
    assert pair.effects(ev.SendResign)


def test_alone_a_patient_settlement_is_flushed_in_time_too() -> None:
    pair = QueuePair()
    pair.meta(part(1, 1, 2, (1,), flush="replicated"))
    token = settled_patiently(pair)
    pair.tick(pair.config.patience_ms)
    assert isinstance(pair.answer_to(token), qe.AnswerSettle)


def test_whoever_is_not_patient_is_not_held_up_by_one_who_is() -> None:
    pair = QueuePair()
    pair.put(1, "a", "b")
    lease = pair.lease(1)
    first, second = lease.offsets
    item = qe.SettleItem(lease.epoch, lease.lease, ACK, [first])
    assert pair.ask(1, qe.SettleAsked, member="m", items=[item], patient=True) is None
    token = pair.token
    assert isinstance(pair.settle(1, lease, REJECT, second), qe.AnswerSettle)
    assert isinstance(pair.answer_to(token), qe.AnswerSettle)


def test_what_is_given_back_of_committed_records_stands_though_others_are_lost() -> None:
    pair = Waiting()
    pair.put(1, "a")
    assert pair.leased().offsets == [1]
    pair.lease(1)  # in vain: somebody waits again
    pair.held_logs = {(2, RECORDS)}
    pair.put(1, "b")
    end = pair.disks[1].end(STATE)
    pair.ask(1, qe.KeepAsked, member="m", leases=[])
    entries = [raw for header, raw in pair.disks[1].logs[STATE] if header.base_offset >= end]
    released = [entry for raw in entries for entry in _entries(raw) if isinstance(entry, Released)]
    assert [unpacked(entry.offsets) for entry in released] == [[1], [2]]
