"""One queue without a partition around it: lanes, leases, retries, parking, priorities, delays, and replay."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ferryline.protocol.metadata import RetryPolicy
from ferryline.protocol.queue_messages import ACK, EXTEND, NACK, REJECT, RELEASE
from ferryline_broker.core.intervals import Runs
from ferryline_broker.core.queue import Queue
from ferryline_broker.core.queue_config import QueueConfig, backoff_ms
from ferryline_broker.core.queue_entries import Released, packed, unpacked
from ferryline_broker.core.queue_events import Scanned, SettleItem
from ferryline_broker.core.queue_table import QueueTable
from ferryline_broker.core.queue_view import explain, stats
from tests.scanned import together

LEASE_MS = 10_000
EPOCH = 3
ALL_COMMITTED = 1 << 62


class World:
    """A queue, the records it reads, and what it has told. ``keys[i]`` is the key of the record at offset i."""

    def __init__(self, *keys: str | None, ordering: str = "key", **policy: Any) -> None:
        self.now = 1_000
        self.policy = msgspec.structs.replace(RetryPolicy(attempts=3, backoff_ms=0), **policy)
        self.records: list[Scanned] = []
        self.entries: list[Any] = []
        self.queue = self._queue(QueueTable("g", ordering, 0))
        self.add(*keys)

    def _queue(self, table: QueueTable) -> Queue:
        return Queue(table, EPOCH, QueueConfig(heads=100), lambda offset: 1, self.now)

    def add(self, *keys: str | None, **fields: Any) -> None:
        for key in keys:
            lane = None if key is None else key.encode()
            self.records.append(Scanned(len(self.records), lane, **fields))
        self.fill()

    def fill(self) -> None:
        while (wanted := self.queue.next_read(len(self.records))) is not None:
            start, below = wanted
            below = min(below, start + 7)  # in small pieces
            self.queue.scan(together(self.records[start:below]), below, self.now)

    def lease(self, count: int = 100, member: str = "m") -> list[int]:
        lease = self.queue.lease(member, LEASE_MS, count, self.now)
        self._took()
        return sorted(lease.offsets) if lease is not None else []

    def settle(self, action: str, *offsets: int, member: str = "m", **fields: Any) -> tuple[list[int], list[int]]:
        """Under the receipt of the last lease that any of these offsets was in."""
        epoch, lease = self.identity(offsets[0])
        return self.settle_as((epoch, lease), action, *offsets, member=member, **fields)

    def settle_as(
        self, identity: tuple[int, int], action: str, *offsets: int, member: str = "m", **fields: Any
    ) -> tuple[list[int], list[int]]:
        item = SettleItem(*identity, action, list(offsets), **fields)
        outcome = self.queue.settle(item, member, self.policy, self.now)
        self._took()
        return outcome

    def identity(self, offset: int) -> tuple[int, int]:
        story = self.queue.table.story(offset)
        return story.last if story is not None else (EPOCH, self.queue.table.next_lease - 1)

    def tick(self, by_ms: int) -> None:
        self.now += by_ms
        self.queue.tick(self.policy, self.now, ALL_COMMITTED)
        self._took()

    def _took(self) -> None:
        self.entries += self.queue.out
        self.queue.out.clear()
        self.fill()

    def promoted(self, *, by_snapshot: bool = False) -> World:
        """The next primary, which has nothing but the entries, or a snapshot of them."""
        table = QueueTable("g", self.queue.table.ordering, 0)
        if by_snapshot:
            row = self.queue.table.row(lambda offset: 1 if offset >= 0 else -1)
            row = msgspec.msgpack.decode(msgspec.msgpack.encode(row), type=type(row))
            table = QueueTable.of_row(row, lambda offset, epoch: True, 0)
        else:
            for entry in self.entries:
                table.apply(entry)
        other = World(ordering=self.queue.table.ordering)
        other.now, other.policy, other.records = self.now + 5_000, self.policy, list(self.records)
        other.entries = list(self.entries)
        other.queue = other._queue(table)
        other.fill()
        return other


# -- lanes -------------------------------------------------------------------------------------------


def test_only_one_record_of_a_lane_is_out_at_a_time() -> None:
    world = World("a", "a", "b", "a", None, None, "b")
    assert world.lease() == [0, 2, 4, 5]
    assert world.lease() == []
    world.settle(ACK, 0)
    assert world.lease() == [1]
    world.settle(ACK, 2)
    assert world.lease() == [6]
    world.settle(ACK, 1)
    assert world.lease() == [3]


def test_the_lane_waits_while_its_record_is_retried() -> None:
    world = World("a", "a", "b")
    assert world.lease() == [0, 2]
    world.settle(NACK, 0, delay_ms=500)
    assert world.lease() == []
    world.tick(499)
    assert world.lease() == []
    world.tick(1)
    assert world.lease() == [0]
    assert world.queue.table.attempts([0]) == [2]


def test_a_lease_that_ends_is_given_to_somebody_else_and_its_receipt_is_stale_then() -> None:
    world = World("a", "a")
    assert world.lease(member="one") == [0]
    first = world.identity(0)
    world.tick(LEASE_MS)
    assert world.lease(member="two") == [0]
    assert world.settle_as(first, ACK, 0, member="one") == ([0], [])
    assert world.settle(ACK, 0, member="two") == ([], [])
    assert world.settle_as(first, ACK, 0, member="one") == ([], [0])


def test_a_late_ack_counts_while_nobody_has_the_record() -> None:
    world = World("a", "a")
    world.lease()
    receipt = world.identity(0)
    world.tick(LEASE_MS)
    assert world.settle_as(receipt, ACK, 0) == ([], [])
    assert world.lease() == [1]


def test_a_record_that_came_back_cannot_be_failed_or_extended_again() -> None:
    world = World("a")
    world.lease()
    receipt = world.identity(0)
    world.tick(LEASE_MS)
    for action in (NACK, REJECT, RELEASE, EXTEND):
        assert world.settle_as(receipt, action, 0) == ([0], [])
    assert world.lease() == [0]
    assert world.queue.table.attempts([0]) == [2]


def test_an_extended_lease_ends_later_and_only_its_holder_extends_it() -> None:
    world = World("a")
    world.lease()
    world.tick(LEASE_MS - 1)
    assert world.settle(EXTEND, 0, member="other") == ([0], [])
    assert world.settle(EXTEND, 0) == ([], [])
    world.tick(LEASE_MS - 1)
    assert world.lease() == []
    world.tick(1)
    assert world.lease() == [0]


def test_what_is_given_back_costs_no_attempt_and_cannot_be_acked_any_more() -> None:
    world = World("a", "b")
    world.lease()
    receipt = world.identity(0)
    assert world.settle(RELEASE, 0) == ([], [])
    assert world.settle_as(receipt, ACK, 0) == ([0], [])
    assert world.lease() == [0]
    assert world.queue.table.attempts([0]) == [1]


def test_ordering_none_has_no_lanes() -> None:
    world = World("a", "a", "a", ordering="none")
    assert world.lease() == [0, 1, 2]


def test_a_partition_in_order_is_leased_in_runs_to_one_receiver() -> None:
    world = World(*"abcdef", ordering="partition")
    assert world.lease(4) == [0, 1, 2, 3]
    assert world.lease(member="other") == []
    world.settle(ACK, 0)
    receipt = world.identity(1)
    world.settle(NACK, 1, delay_ms=0)  # 2 and 3 stood behind it: they come back without an attempt
    assert world.settle_as(receipt, ACK, 2) == ([2], [])
    assert world.lease(member="other") == [1, 2, 3, 4, 5]
    assert world.queue.table.attempts([1, 2, 3, 4]) == [2, 1, 1, 1]


def test_only_the_first_of_a_run_is_blamed_when_its_lease_ends() -> None:
    world = World(*"abc", ordering="partition")
    for _ in range(3):
        assert world.lease() == [0, 1, 2]
        world.tick(LEASE_MS)
    assert world.queue.table.stories[0].dying is not None
    assert world.queue.table.attempts([1]) == [0]


# -- dead letters and parking ------------------------------------------------------------------------


def test_the_last_attempt_is_followed_by_a_copy_and_the_lane_waits_for_it() -> None:
    world = World("a", "a", "b")
    for attempt in (1, 2, 3):
        assert 0 in world.lease()
        world.settle(NACK, 0, delay_ms=0, reason=f"no {attempt}", detail="trace")
    move = world.queue.next_move()
    assert move is not None
    assert (move.offset, move.producer_epoch, move.sequence, move.attempts) == (0, 0, 0, 3)
    assert move.history == [(1, "no 1", "trace"), (2, "no 2", "trace"), (3, "no 3", "trace")]
    assert world.queue.next_move() is None, "one at a time"
    assert world.lease() == []
    world.queue.moved(0, 0, True, world.now)
    assert world.lease() == [1]


def test_a_target_that_forgot_the_producer_gets_the_copies_under_the_next_epoch() -> None:
    world = World(None, None)
    world.lease()
    world.settle(REJECT, 0, 1)
    move = world.queue.next_move()
    assert move is not None
    world.queue.moved(0, 0, False, world.now)
    again = [world.queue.next_move(), None]
    assert again[0] is not None
    assert (again[0].offset, again[0].producer_epoch, again[0].sequence) == (0, 1, 0)
    world.queue.moved(0, 0, True, world.now)
    second = world.queue.next_move()
    assert second is not None
    assert (second.offset, second.producer_epoch, second.sequence) == (1, 1, 1)


def test_a_parked_lane_stands_until_it_is_redriven_in_place() -> None:
    world = World("a", "a", "b", "a", on_dead="park")
    world.lease()
    world.settle(REJECT, 0, reason="poison")
    world.settle(ACK, 2)
    assert world.lease() == []
    assert stats(world.queue, 4, lambda first, end: [])["parked"] == 1
    waits = {"offset": 1, "attempts": 0, "state": "waiting", "behind": 0, "behind_state": "parked"}
    assert explain(world.queue, 1, 4, world.now) == waits
    assert world.queue.redrive(lambda offset: True, world.now) == [0]
    assert world.lease() == [0]
    world.settle(ACK, 0)
    assert world.lease() == [1]
    world.settle(ACK, 1)
    assert world.lease() == [3]


def test_back_off_is_drawn_from_the_policy_and_the_same_everywhere() -> None:
    policy = RetryPolicy(attempts=20, backoff_ms=1_000, backoff_max_ms=60_000)
    draws = [backoff_ms("g", offset, 3, policy) for offset in range(2_000)]
    assert all(0 <= draw <= 4_000 for draw in draws)
    assert 1_900 < sum(draws) / len(draws) < 2_100, "evenly drawn"
    assert draws == [backoff_ms("g", offset, 3, policy) for offset in range(2_000)]
    assert all(backoff_ms("g", offset, 19, policy) <= 60_000 for offset in range(100))


# -- priority, delay, expiry -------------------------------------------------------------------------


def test_higher_priorities_first_and_within_one_by_offset() -> None:
    world = World(None, None)
    world.add(None, priority=9)
    world.add(None, priority=0)
    world.add(None, priority=9)
    lease = world.queue.lease("m", LEASE_MS, 100, world.now)
    assert lease is not None
    assert lease.order == [2, 4, 0, 1, 3], "within one lease, too"


def test_nobody_waits_longer_than_the_bound_behind_higher_priorities() -> None:
    world = World()
    world.add(None, priority=0)
    for _ in range(5):
        world.add(None, priority=9)
        world.lease(1)
        world.now += 1_900
    world.add(None, priority=9)
    assert world.lease(1) == [6]
    world.now += 600
    world.add(None, priority=9)
    assert world.lease(1) == [0], "ready for longer than overdue_ms"


def test_a_delayed_record_joins_its_lane_when_it_is_due() -> None:
    world = World("a")
    world.add("b", due_ms=world.now + 5_000)
    world.add("b")
    assert world.lease() == [0, 2]
    assert world.queue.next_deadline_ms() == world.now + 5_000
    world.tick(5_000)
    assert world.lease() == [], "2 is out"
    world.settle(ACK, 2)
    assert world.lease() == [1]


def test_what_was_not_looked_at_yet_says_so() -> None:
    world = World("a")
    world.records.append(Scanned(1, b"b"))
    told = explain(world.queue, 1, 2, world.now)
    assert (told["state"], told["why"][:24]) == ("not in window", "it was not looked at yet")


def test_what_expired_is_never_delivered_and_frees_its_lane() -> None:
    world = World()
    world.add("a", expires_ms=world.now + 100)
    world.add("a")
    world.now += 100
    assert world.lease() == [1]
    assert world.queue.table.is_settled(0)


# -- start, gaps, replay -----------------------------------------------------------------------------


def test_the_start_moves_over_the_settled_prefix_and_over_offsets_without_records() -> None:
    world = World(None, None, None, None)
    world.lease()
    world.settle(ACK, 1, 2)
    assert world.queue.table.start == 0
    world.settle(ACK, 0)
    assert world.queue.table.start == 3
    world.queue.scan([], 9, world.now)  # control records
    world.settle(ACK, 3)
    assert world.queue.table.start == 9
    assert len(world.queue.table.settled) == 0


@pytest.mark.parametrize("by_snapshot", [False, True])
def test_a_new_primary_knows_what_was_leased_acked_and_parked(by_snapshot: bool) -> None:
    world = World("a", "a", "b", "b", "c", None, "d", on_dead="park")
    assert world.lease(member="one") == [0, 2, 4, 5, 6]
    world.settle(ACK, 2, member="one")
    world.settle(REJECT, 4, member="one", reason="poison")
    world.settle(NACK, 6, member="one", delay_ms=2_000)
    assert world.lease(member="two") == [3]
    receipt = world.identity(0)
    other = world.promoted(by_snapshot=by_snapshot)
    assert other.lease() == [], "0, 3 and 5 are leased, 1 waits, 4 is parked, 6 backs off anew"
    assert other.settle_as(receipt, ACK, 0, member="one") == ([], [])
    assert other.lease() == [1]
    other.tick(2_000)
    assert other.lease() == [6]
    other.tick(LEASE_MS - 2_000)
    assert other.lease() == [1, 3, 5]
    assert stats(other.queue, 7, lambda first, end: [])["parked"] == 1


def test_lanes_are_not_opened_before_everything_with_a_past_is_seen_again() -> None:
    """A delayed record was overtaken by a later one of its lane, which is leased. After the promotion it is due, and
    comes first in the log: it must not be out beside the leased one."""
    world = World()
    world.add("a", due_ms=world.now + 4_000)
    world.add(*["x"] * 20, "a")
    assert world.lease() == [1, 21]
    other = world.promoted()
    assert other.now > 5_000
    assert other.lease() == []
    other.settle(ACK, 21)
    assert other.lease() == [0]


def test_a_member_that_says_what_it_keeps_loses_the_rest_without_an_attempt() -> None:
    world = World("a", "b", "c")
    world.lease(1)
    kept = world.identity(0)[1]
    assert world.lease(2) == [1, 2]
    world.queue.keep("m", {kept}, world.now)
    assert world.lease(member="other") == [1, 2]
    assert world.queue.table.attempts([1]) == [1]
    assert world.queue.table.attempts([0]) == [1]


def test_a_paused_queue_hands_out_nothing_but_takes_acks() -> None:
    world = World("a", "a")
    world.lease()
    world.queue.table.paused = True
    assert world.settle(ACK, 0) == ([], [])
    assert world.lease() == []
    world.queue.table.paused = False
    assert world.lease() == [1]


# -- small things ------------------------------------------------------------------------------------


def test_offsets_travel_as_distances() -> None:
    assert packed([100, 101, 103]) == [100, 1, 2]
    assert unpacked([100, 1, 2]) == [100, 101, 103]
    assert Released("g", "nacked", packed([7]), 1, [0]).offsets == [7]


def test_runs_join_and_are_cut() -> None:
    runs = Runs()
    for first, end in ((5, 7), (1, 3), (3, 4), (10, 12), (7, 10), (0, 1)):
        runs.add(first, end)
    assert list(runs) == [(0, 4), (5, 12)]
    assert runs.total == 11
    assert 4 not in runs
    assert 11 in runs
    assert runs.next_outside(5) == 12
    runs.cut_below(6)
    assert list(runs) == [(6, 12)]
    runs.cut_below(12)
    assert list(runs) == []


def test_an_id_that_comes_again_is_delivered_once() -> None:
    world = World()
    world.add("a", id=b"one")
    world.add("a", id=b"one")
    world.add("a", id=b"two")
    assert world.lease() == [0]
    world.settle(ACK, 0)
    assert world.lease() == [2], "1 is settled as a duplicate"
    world.now += 300_000
    world.add("b", id=b"one")
    assert world.lease() == [3], "after the dedupe window it is a new one"


def test_records_that_were_ready_before_priorities_differed_count_as_waiting_too() -> None:
    world = World(None)
    world.now += 9_000
    world.add(*[None] * 3, priority=9)
    world.now += 1_000
    assert world.lease(1) == [0]


def test_a_redrive_of_some_takes_the_first_ones_in_whatever_order_they_were_parked() -> None:
    world = World(*[None] * 6, ordering="none", on_dead="park")
    world.lease()
    for offset in (4, 2, 5, 1):
        world.settle(REJECT, offset)
    asked: list[int] = []

    def first_two(offset: int) -> bool:
        asked.append(offset)
        return len(asked) < 3

    assert world.queue.redrive(first_two, world.now) == [1, 2]
    assert asked == [1, 2, 4, 5]
    assert world.queue.table.parked() == [4, 5]
