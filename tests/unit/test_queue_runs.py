"""Runs of ordering="partition" that fail in parts, queues that are deleted, retained, or told by another primary."""

from __future__ import annotations

import pytest

from ferryline.protocol.messages import RECORDS, STATE
from ferryline.protocol.queue_messages import ACK, NACK, REJECT
from ferryline.protocol.records import decode_batch
from ferryline_broker.core import events as ev
from ferryline_broker.core import queue_events as qe
from ferryline_broker.core.epochs import EpochIndex
from ferryline_broker.core.groups import ForgetEntry, GroupTable, encode_entry
from ferryline_broker.core.queue import Queue
from ferryline_broker.core.queue_config import QueueConfig
from ferryline_broker.core.queue_entries import Dying, Leased, Opened, Purged, Settled, packed
from ferryline_broker.core.queue_table import QueueTable
from unit.core_pair import KEY, part
from unit.test_core_queue import QueuePair
from unit.test_queue_core import ALL_COMMITTED, EPOCH, LEASE_MS, World

# -- runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_snapshot", [False, True])
def test_a_run_that_was_given_back_keeps_its_order_on_the_next_primary(by_snapshot: bool) -> None:
    world = World(*"abcdef", ordering="partition")
    assert world.lease(4) == [0, 1, 2, 3]
    world.settle(NACK, 0, delay_ms=0)
    other = world.promoted(by_snapshot=by_snapshot)
    assert other.lease(2) == [0, 1]
    assert other.lease() == []


def test_nothing_overtakes_a_record_that_backs_off_on_the_next_primary() -> None:
    world = World(*"abcd", ordering="partition")
    world.lease()
    world.settle(NACK, 0, delay_ms=3_000)
    other = world.promoted()
    assert other.lease() == []
    other.tick(3_000)
    assert other.lease() == [0, 1, 2, 3]


def test_the_last_of_a_run_that_fails_waits_until_the_others_are_settled() -> None:
    world = World(*"abcd", ordering="partition")
    assert world.lease(3) == [0, 1, 2]
    world.settle(NACK, 2, delay_ms=0)
    assert world.lease(member="other") == [], "0 and 1 are with somebody"
    world.settle(ACK, 0)
    world.settle(ACK, 1)
    assert world.lease(member="other") == [2, 3]


def test_a_record_that_backs_off_stays_where_it_is_when_one_before_it_fails() -> None:
    world = World(*"abcd", ordering="partition")
    assert world.lease(3) == [0, 1, 2]
    world.settle(NACK, 2, delay_ms=5_000)
    world.settle(NACK, 1, delay_ms=0)
    assert world.queue.table.attempts([2]) == [1], "it had failed by itself"
    assert world.lease(member="other") == []
    world.settle(ACK, 0)
    assert world.lease(member="other") == [1], "2 backs off, and 3 stands behind it"
    world.settle(ACK, 1, member="other")
    world.tick(5_000)
    assert world.lease() == [2, 3]


def test_a_dying_record_of_a_run_is_not_given_out_again_when_one_before_it_fails() -> None:
    world = World(*"abcd", ordering="partition")
    assert world.lease(3) == [0, 1, 2]
    world.settle(REJECT, 2)
    world.settle(NACK, 0, delay_ms=0)
    move = world.queue.next_move()
    assert move is not None
    world.queue.moved(move.offset, move.sequence, True, world.now)
    assert world.lease() == [0, 1, 3]


def test_what_stands_before_a_parked_record_goes_on_and_what_stands_behind_it_waits() -> None:
    world = World(*"abcd", ordering="partition", on_dead="park")
    assert world.lease(3) == [0, 1, 2]
    world.settle(REJECT, 2)
    world.settle(NACK, 0, delay_ms=0)
    assert world.lease() == [0, 1]
    world.settle(ACK, 0)
    world.settle(ACK, 1)
    assert world.lease() == []
    world.queue.redrive(lambda offset: True, world.now)
    assert world.lease() == [2, 3]


def test_a_run_whose_lease_ends_while_the_window_is_read_again_blames_the_first_alone() -> None:
    world = World(*"abc", ordering="partition")
    world.lease()
    other = world.promoted()
    other.queue.restart(other.now)
    other.now += LEASE_MS
    other.queue.tick(other.policy, other.now, ALL_COMMITTED)
    other.fill()
    assert other.lease() == [0, 1, 2]
    assert other.queue.table.attempts([0, 1, 2]) == [2, 1, 1]


def test_a_record_that_was_due_late_takes_its_place_in_the_run() -> None:
    world = World(ordering="partition")
    world.add("a")
    world.add("b", due_ms=world.now + 500)
    world.add("c", "d")
    assert world.lease(2) == [0, 2]
    world.tick(500)
    world.settle(NACK, 0, delay_ms=0)
    assert world.lease() == [0, 1, 2, 3]


def test_a_late_ack_of_a_record_that_waits_in_line_is_not_forgotten() -> None:
    world = World(*"abc", ordering="partition")
    world.lease()
    receipt = world.identity(2)
    world.settle(NACK, 2, delay_ms=0)
    assert world.settle_as(receipt, ACK, 2) == ([], [])
    world.settle(ACK, 0)
    world.settle(ACK, 1)
    assert world.lease() == []
    assert world.queue.table.start == 3


class NarrowWorld(World):
    """With room for one record that is ready."""

    def _queue(self, table: QueueTable) -> Queue:
        return Queue(table, EPOCH, QueueConfig(heads=1), lambda offset: 1, self.now)


def test_a_full_window_is_read_on_until_every_record_with_a_past_is_seen() -> None:
    """A late record of a lane comes first in the log, another of the same lane is leased and lies beyond the window."""
    world = NarrowWorld()
    world.add("a", due_ms=world.now + 4_000)
    world.add(*["x"] * 20, "a")
    for _ in range(2):
        world.lease()
    assert sorted(world.queue.table.holder) == [1, 21]
    table = QueueTable("g", "key", 0)
    for entry in world.entries:
        table.apply(entry)
    world.now += 5_000
    world.queue = world._queue(table)
    assert world.lease() == [], "not before the window is read"
    assert world.lease() == []
    world.settle(ACK, 21)
    assert world.lease() == [0]


# -- time --------------------------------------------------------------------------------------------


def test_what_expires_does_so_after_a_fail_over_too() -> None:
    world = World()
    world.add("a", expires_ms=world.now + 6_000)
    world.lease()
    world.settle(NACK, 0, delay_ms=0)
    other = world.promoted()
    other.tick(1_000)
    assert other.lease() == []
    assert other.queue.table.is_settled(0)


# -- dead letters ------------------------------------------------------------------------------------


def test_a_copy_of_what_was_purged_does_not_hold_up_the_next_one() -> None:
    world = World(None, None, None)
    world.lease(1)
    world.settle(REJECT, 0)
    move = world.queue.next_move()
    assert move is not None
    entry = Purged("g", 2, 1)
    world.queue.table.apply(entry)
    world.queue.restart(world.now)
    world.fill()
    assert world.lease() == [2]
    world.settle(REJECT, 2)
    assert world.queue.next_move() is None, "one at a time"
    world.queue.moved(move.offset, move.sequence, True, world.now)
    following = world.queue.next_move()
    assert following is not None
    assert (following.offset, following.sequence) == (2, 1)


def test_the_successor_of_a_deleted_queue_copies_under_a_higher_producer_epoch() -> None:
    entries = [Opened("g", "key", 0, -1), Dying("g", 0, 1, 0, 0), ForgetEntry("g"), Opened("g", "key", 0, -1)]
    values = [(at, 0, encode_entry(entry)) for at, entry in enumerate(entries)]
    index = EpochIndex([(1, 0)])
    table = GroupTable.replay(values, index, 0, 10)
    assert (table.queues["g"].producer_epoch, table.queues["g"].next_sequence) == (1, 0)
    before = GroupTable.replay(values[:3], index, 0, 10)
    snapshot = encode_entry(before.snapshot(lambda offset: 1))
    again = GroupTable.replay([(3, 0, snapshot), values[3]], index, 0, 10)
    assert again.queues["g"].producer_epoch == 1


# -- retention ---------------------------------------------------------------------------------------


def test_a_snapshot_stands_on_a_replica_whose_log_begins_before_the_queue() -> None:
    """Retention has taken everything that the queue has settled, here and not yet there."""
    pair = QueuePair()
    pair.put(1, "a", "b", "c")
    lease = pair.lease(1)
    pair.settle(1, lease, ACK)
    core = pair.cores[1]
    start = core.high_watermark[RECORDS]
    assert core.primary is not None
    assert core.primary.groups is not None
    assert core.primary.groups.queues["g"].start == start
    core.replica.advance_start(RECORDS, start)
    core.replica.state_bytes = 1 << 30
    pair.ask(1, qe.KeepAsked, member="m", leases=[])
    cuts = [effect.offset for _, effect in pair.done if isinstance(effect, ev.AdvanceStart) and effect.log == STATE]
    assert cuts, "a snapshot was committed"
    values = [
        (record.offset, 0, record.value or b"")
        for header, raw in pair.disks[1].logs[STATE]
        if header.base_offset >= cuts[-1]
        for record in decode_batch(raw)
    ]
    table = GroupTable.replay(values, EpochIndex([(1, 0)]), 0, start)
    assert table.queues["g"].start == start, "everything was acknowledged"


def test_nothing_is_retained_away_before_a_new_primary_knows_its_queues() -> None:
    pair = QueuePair()
    pair.put(1, "a", "b")
    pair.lease(1)
    pair.hold_flush.add(1)
    pair.meta(part(2, 2, 2, (1, 2)))
    core = pair.cores[2]
    assert core.role == "primary"
    assert core.primary is not None
    assert not core.primary.ready
    assert core.retention_limit(pair.now) == core.log_start[RECORDS], KEY


def test_the_next_dead_letter_is_copied_only_when_the_end_of_the_one_before_is_committed() -> None:
    pair = QueuePair()
    pair.put(1, "a", "b", "c")
    lease = pair.lease(1)
    pair.settle(1, lease, REJECT)
    [first] = pair.effects(qe.MoveDead, 1)
    pair.hold_flush.add(2)
    pair.tell(1, qe.DeadMoved("g", first.offset, first.sequence))
    assert len(pair.effects(qe.MoveDead, 1)) == 1
    pair.hold_flush.clear()
    pair.send(2, ev.Flushed(STATE, pair.disks[2].end(STATE)))
    pair.run()
    assert [move.sequence for move in pair.effects(qe.MoveDead, 1)] == [0, 1]


def test_a_dead_letter_does_not_wait_for_those_that_died_after_it() -> None:
    pair = QueuePair()
    pair.put(1, "a", "b")
    lease = pair.lease(1)
    pair.hold_flush.add(2)
    pair.settle(1, lease, REJECT, lease.offsets[0])
    first_ends = pair.disks[2].end(STATE)
    pair.settle(1, lease, REJECT, lease.offsets[1])
    assert pair.effects(qe.MoveDead, 1) == []
    pair.tell(2, ev.Flushed(STATE, first_ends))
    assert [move.sequence for move in pair.effects(qe.MoveDead, 1)] == [0]


def test_what_is_leased_again_is_in_its_last_lease_only() -> None:
    """A record was leased, lost, and another one leased in its place; then retention took both, and a replay could not
    tell any more that the first lease was void. It stayed, ended, and attempts fell below 0 (seed 101187)."""
    table = QueueTable("g", "key", 0)
    table.apply(Leased("g", 5, 4, "lost", 500, [9], 5))
    table.apply(Leased("g", 13, 6, "kept", 500, packed([5, 9]), 13))
    assert [(one, sorted(lease.offsets)) for one, lease in table.leases.items()] == [((13, 6), [5, 9])]
    table.apply(Settled("g", "acked", packed([5, 9]), 13))
    assert (table.leases, table.holder, table.stories) == ({}, {}, {})
