"""One queue against a naive model: lists and dicts say what must come of whatever receivers, time and fail-overs do.

The model knows three things of a record: what its last receiver was told, how often it has been leased, and how it
ended. From that it judges what the queue hands out; it does not know how the queue finds it.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ferryline.protocol.metadata import RetryPolicy
from ferryline.protocol.queue_messages import ACK, EXTEND, NACK, ORDER_KEY, ORDER_NONE, ORDER_PARTITION, REJECT, RELEASE
from ferryline_broker.core.queue import Queue
from ferryline_broker.core.queue_config import QueueConfig
from ferryline_broker.core.queue_entries import Purged, Settled, unpacked
from ferryline_broker.core.queue_events import MoveDead, Scanned, SettleItem
from ferryline_broker.core.queue_table import QueueTable
from tests.scanned import together
from unit.test_queue_core import ALL_COMMITTED

LEASE_MS = 1_000
ATTEMPTS = 3
MEMBERS = st.sampled_from(["one", "two"])
WORK = [(ACK, 0), (NACK, 0), (NACK, 400), (REJECT, 0), (RELEASE, 0), ("", 0)]
ACKED, EXPIRED, COPIED, PURGED = "acked", "expired", "copied", "purged"
LEASED, PARKED, DYING = "leased", "parked", "dying"


class Fact(msgspec.Struct):
    """What is known of one record. ``receipt`` and ``member``: of its last lease; `NO_RECEIPT` if that is void."""

    key: str | None
    due_ms: int = 0
    expires_ms: int = 0
    attempts: int = 0
    state: str = ""  # leased, parked or dying; "": it waits for its turn, or for time
    end: str = ""
    member: str = ""
    receipt: tuple[int, int] = (0, 0)
    until_ms: int = 0  # of the lease, or of the delay after it
    overtaken: bool = False  # it came late, or its start did: later ones of its lane may have gone first


NO_RECEIPT = (0, 0)


class Model:
    """Facts by offset; a gap is an offset without a record."""

    def __init__(self, ordering: str, start: int = 0) -> None:
        self.ordering = ordering
        self.facts: dict[int, Fact] = {}
        self.high = start

    def lane(self, offset: int) -> object:
        if self.ordering == ORDER_PARTITION:
            return "all"
        key = self.facts[offset].key
        return offset if key is None or self.ordering == ORDER_NONE else ("key", key)

    def alive(self) -> list[int]:
        return [offset for offset, fact in self.facts.items() if not fact.end]

    def leased(self) -> list[int]:
        return [offset for offset in self.alive() if self.facts[offset].state == LEASED]

    def lease(self, offset: int) -> list[int]:
        """All that is leased together with ``offset``."""
        return [o for o in self.leased() if self.facts[o].receipt == self.facts[offset].receipt]

    def in_front(self, offset: int, now_ms: int) -> list[int]:
        """Records of the same lane that must be terminal before this one is handed out."""
        lane = self.lane(offset)
        found = []
        for other in self.alive():
            fact = self.facts[other]
            if other == offset or self.lane(other) != lane:
                continue
            if fact.state or fact.until_ms > now_ms:  # with somebody, parked, dying, or backing off
                if other < offset or self.ordering == ORDER_KEY:
                    found.append(other)
            elif other < offset and fact.due_ms <= now_ms and not fact.overtaken:
                found.append(other)
        return found

    def take(self, offsets: list[int], receipt: tuple[int, int], member: str, until_ms: int) -> None:
        for offset in offsets:
            fact = self.facts[offset]
            fact.attempts += 1
            fact.state, fact.receipt, fact.member, fact.until_ms = LEASED, receipt, member, until_ms

    def finish(self, offset: int, end: str) -> None:
        fact = self.facts[offset]
        fact.state, fact.end, fact.receipt, fact.until_ms = "", end, NO_RECEIPT, 0

    def behind(self, offset: int) -> list[int]:
        """What was leased behind it in a run: given back when it fails."""
        return [o for o in self.leased() if o > offset] if self.ordering == ORDER_PARTITION else []

    def give_back(self, offsets: list[int]) -> None:
        for offset in offsets:
            fact = self.facts[offset]
            fact.attempts -= 1
            fact.state, fact.receipt, fact.until_ms = "", NO_RECEIPT, 0

    def fail(self, offset: int, until_ms: int, on_dead: str, *, dead: bool) -> None:
        self.give_back(self.behind(offset))
        fact = self.facts[offset]
        if dead:
            fact.state = PARKED if on_dead == "park" else DYING
            fact.until_ms = 0
        else:
            fact.state, fact.until_ms = "", until_ms


class QueueMachine(RuleBasedStateMachine):
    """The queue of one partition, its log, its entries, and a model of it."""

    ordering = ORDER_KEY

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000
        self.epoch = 1
        self.records: dict[int, Scanned] = {}
        self.entries: list[Any] = []
        self.move: MoveDead | None = None  # under way
        self.target: set[tuple[int, int]] = set()  # producer epochs and sequences of copies that arrived
        self.copies: dict[int, int] = {}  # offset -> how often it was copied to the dead letters
        self.held: tuple[dict[int, Fact], int, int] | None = None  # facts, entries and start as they were committed
        self.start = 0
        self.receipts_given: list[tuple[int, tuple[int, int]]] = []

    @initialize(on_dead=st.sampled_from(["skip", "park"]))
    def begin(self, on_dead: str) -> None:
        self.policy = RetryPolicy(attempts=ATTEMPTS, backoff_ms=0, on_dead=on_dead)
        self.model = Model(self.ordering)
        self.queue = self.made(QueueTable("g", self.ordering, 0))
        self.produce(["a", "a", "b", "a", None], 4, 0, 0, False)

    def made(self, table: QueueTable) -> Queue:
        return Queue(table, self.epoch, QueueConfig(heads=2, waiting=1_000), lambda offset: 1, self.now)

    def fill(self, pieces: int = 1_000) -> None:
        """Let the queue read as much as it wants, in small pieces; records are not always where a read begins."""
        while pieces and (wanted := self.queue.next_read(self.model.high)) is not None:
            start, below = wanted
            below = min(below, start + 2 + start % 3)
            records = [self.records[o] for o in range(start, below) if o in self.records]
            self.queue.scan(together(records) if start % 2 else records, below, self.now)
            pieces -= 1

    def took(self) -> None:
        """What an entry says happened without being asked for: records that expired."""
        for entry in self.queue.out:
            if isinstance(entry, Settled) and entry.why == EXPIRED:
                for offset in unpacked(entry.offsets):
                    assert 0 < self.model.facts[offset].expires_ms <= self.now
                    self.model.finish(offset, EXPIRED)
        self.entries += self.queue.out
        self.queue.out.clear()

    # -- producing ----------------------------------------------------------------------------------

    @rule(
        keys=st.lists(st.sampled_from(["a", "a", "b", None]), min_size=1, max_size=6),
        priority=st.sampled_from([4, 4, 4, 0, 9]),
        delay_ms=st.sampled_from([0, 0, 0, 700]),
        ttl_ms=st.sampled_from([0, 0, 0, 1_500]),
        gap=st.booleans(),
    )
    def produce(self, keys: list[str | None], priority: int, delay_ms: int, ttl_ms: int, gap: bool) -> None:
        self.model.high += gap  # a control record
        for key in keys:
            offset = self.model.high
            due = self.now + delay_ms if delay_ms else 0
            expires = self.now + ttl_ms if ttl_ms else 0
            self.records[offset] = Scanned(offset, key.encode() if key else None, priority, due, expires)
            self.model.facts[offset] = Fact(key, due, expires, overtaken=bool(due))
            self.model.high += 1
        self.fill()

    # -- receiving ----------------------------------------------------------------------------------

    @rule(member=MEMBERS, actions=st.lists(st.sampled_from(WORK), min_size=1, max_size=6))
    def work(self, member: str, actions: list[tuple[str, int]]) -> None:
        """The commonest of all: take some, and say of one after the other what became of it."""
        for action, delay_ms in actions:
            if not self.model.leased():
                self.lease(member, 3)
            leased = self.model.leased()
            if leased and action == ACK:
                assert self.settle(ACK, leased[:1], self.model.facts[leased[0]].member) == ([], [])
                self.model.finish(leased[0], ACKED)
            elif leased and action:
                self.say(action, leased[:1], delay_ms)
            else:
                self.lease(member, 1)

    @rule(member=MEMBERS, limit=st.integers(1, 6), pieces=st.sampled_from([0, 1, 1_000, 1_000]))
    def lease(self, member: str, limit: int, pieces: int = 1_000) -> None:
        self.fill(pieces)
        lease = self.queue.lease(member, LEASE_MS, limit, self.now)
        self.took()
        if lease is None:
            return
        offsets = sorted(lease.offsets)
        assert 0 < len(offsets) <= limit
        for at, offset in enumerate(offsets):
            fact = self.model.facts[offset]
            assert not fact.end, f"{offset} was {fact.end}"
            assert not fact.state, f"{offset} is {fact.state}"
            assert fact.due_ms <= self.now, "delayed"
            assert fact.until_ms <= self.now, "backing off"
            assert not 0 < fact.expires_ms <= self.now, "expired"
            blockers = [o for o in self.model.in_front(offset, self.now) if o not in offsets[:at]]
            assert not blockers, f"{offset} was handed out before {blockers}"
        if self.ordering == ORDER_KEY:
            lanes = [self.model.lane(offset) for offset in offsets]
            assert len(set(lanes)) == len(lanes), "two of a lane"
        self.model.take(offsets, lease.id, member, self.now + LEASE_MS)
        self.receipts_given += [(offset, lease.id) for offset in offsets]
        assert self.queue.table.attempts(offsets) == [self.model.facts[o].attempts for o in offsets]
        self.fill()

    def receipts(self) -> list[int]:
        """Offsets that some receipt is still good for."""
        return [o for o in self.model.alive() if self.model.facts[o].receipt != NO_RECEIPT]

    def chosen(self, data: Any, offsets: list[int]) -> list[int]:
        """Some offsets under one receipt."""
        first = data.draw(st.sampled_from(offsets))
        together = [o for o in offsets if self.model.facts[o].receipt == self.model.facts[first].receipt]
        return sorted(data.draw(st.lists(st.sampled_from(together), min_size=1, max_size=4, unique=True)))

    def settle(self, action: str, offsets: list[int], member: str, **fields: Any) -> tuple[list[int], list[int]]:
        receipt = self.model.facts[offsets[0]].receipt
        item = SettleItem(*receipt, action, offsets, **fields)
        told = self.queue.settle(item, member, self.policy, self.now)
        self.took()
        return told

    @precondition(lambda self: self.receipts())
    @rule(data=st.data())
    def ack(self, data: Any) -> None:
        """Also after the lease has ended, as long as nobody else got the record."""
        offsets = [o for o in self.receipts() if self.model.facts[o].state in (LEASED, "")]
        if not offsets:
            return
        chosen = self.chosen(data, offsets)
        assert self.settle(ACK, chosen, self.model.facts[chosen[0]].member) == ([], [])
        for offset in chosen:
            self.model.finish(offset, ACKED)

    @precondition(lambda self: self.model.leased())
    @rule(data=st.data(), action=st.sampled_from([NACK, REJECT, RELEASE, EXTEND]), delay_ms=st.sampled_from([0, 400]))
    def hand_back(self, data: Any, action: str, delay_ms: int) -> None:
        self.say(action, self.chosen(data, self.model.leased()), delay_ms)

    def say(self, action: str, chosen: list[int], delay_ms: int) -> None:
        member = self.model.facts[chosen[0]].member
        if action == EXTEND:
            together = self.model.lease(chosen[0])
            assert self.settle(action, chosen, member, delay_ms=2 * LEASE_MS) == ([], [])
            for offset in together:
                self.model.facts[offset].until_ms = self.now + 2 * LEASE_MS
            return
        assert self.settle(action, chosen, member, delay_ms=delay_ms, reason="no") == ([], [])
        if action == RELEASE:
            behind = self.model.behind(chosen[0])
            self.model.give_back(sorted({*chosen, *behind}))
            return
        for offset in chosen[:1] if self.ordering == ORDER_PARTITION else chosen:
            dead = action == REJECT or self.model.facts[offset].attempts >= ATTEMPTS
            self.model.fail(offset, self.now + delay_ms, self.policy.on_dead, dead=dead)

    @precondition(lambda self: self.outdated())
    @rule(data=st.data())
    def ack_under_an_old_receipt(self, data: Any) -> None:
        """It was given back, or leased again: nobody's ack under that receipt counts."""
        offset, receipt = data.draw(st.sampled_from(self.outdated()))
        told = self.queue.settle(SettleItem(*receipt, ACK, [offset]), "one", self.policy, self.now)
        self.took()
        assert told == (([], [offset]) if self.model.facts[offset].end else ([offset], []))

    def outdated(self) -> list[tuple[int, tuple[int, int]]]:
        return [(o, receipt) for o, receipt in self.receipts_given if self.model.facts[o].receipt != receipt]

    @precondition(lambda self: self.model.leased())
    @rule(data=st.data(), action=st.sampled_from([NACK, REJECT, RELEASE, EXTEND]))
    def of_somebody_else(self, data: Any, action: str) -> None:
        chosen = self.chosen(data, self.model.leased())
        assert self.settle(action, chosen, "nobody", delay_ms=0) == (chosen, [])

    @precondition(lambda self: any(fact.end == ACKED for fact in self.model.facts.values()))
    @rule(data=st.data())
    def ack_twice(self, data: Any) -> None:
        acked = [o for o, fact in self.model.facts.items() if fact.end == ACKED]
        offset = data.draw(st.sampled_from(acked))
        assert self.settle(ACK, [offset], "one") == ([], [offset])

    @rule(member=MEMBERS, data=st.data())
    def keep(self, member: str, data: Any) -> None:
        numbers = sorted({self.model.facts[o].receipt[1] for o in self.model.leased()})
        kept = set(data.draw(st.lists(st.sampled_from(numbers), unique=True))) if numbers else set()
        self.queue.keep(member, kept, self.now)
        self.took()
        lost = [o for o in self.model.leased() if self.model.facts[o].member == member]
        self.model.give_back([o for o in lost if self.model.facts[o].receipt[1] not in kept])

    @rule(by_ms=st.sampled_from([1, 300, 900, 2_500]))
    def time_passes(self, by_ms: int) -> None:
        self.now += by_ms
        ended = [o for o in self.model.leased() if self.model.facts[o].until_ms <= self.now]
        self.queue.tick(self.policy, self.now, ALL_COMMITTED)
        self.took()
        if self.ordering == ORDER_PARTITION:
            ended = ended[:1]  # of a run only the first is to blame
        for offset in ended:
            dead = self.model.facts[offset].attempts >= ATTEMPTS
            self.model.fail(offset, self.now, self.policy.on_dead, dead=dead)
        self.fill()

    # -- dead letters, operators --------------------------------------------------------------------

    @rule()
    def begin_copy(self) -> None:
        if self.move is None:
            self.held = None  # only what is committed is copied
            self.move = self.queue.next_move()
            if self.move is not None:
                assert self.model.facts[self.move.offset].state == DYING
                assert self.queue.next_move() is None, "one at a time"

    @precondition(lambda self: self.move is not None)
    @rule(done=st.sampled_from([True, True, False]))
    def end_copy(self, done: bool) -> None:
        """Done, or the target has forgotten the producer: not one whose last copy nobody has heard of."""
        move, self.move = self.move, None
        self.held = None
        done = done or (move.producer_epoch, move.sequence) in self.target
        if done:
            self.arrive(move)
            if self.model.facts[move.offset].state == DYING:  # not purged meanwhile
                self.model.finish(move.offset, COPIED)
        self.queue.moved(move.offset, move.sequence, done, self.now)
        self.took()

    @rule(done=st.booleans())
    def copy(self, done: bool) -> None:
        self.begin_copy()
        if self.move is not None:
            self.end_copy(done)

    def arrive(self, move: MoveDead) -> None:
        """The target takes each producer epoch and sequence once."""
        if (move.producer_epoch, move.sequence) not in self.target:
            self.target.add((move.producer_epoch, move.sequence))
            self.copies[move.offset] = self.copies.get(move.offset, 0) + 1

    @rule()
    def redrive(self) -> None:
        parked = [o for o in self.model.alive() if self.model.facts[o].state == PARKED]
        assert self.queue.redrive(lambda _: True, self.now) == parked
        self.took()
        for offset in parked:
            fact = self.model.facts[offset]
            fact.state, fact.attempts, fact.receipt, fact.until_ms = "", 0, NO_RECEIPT, 0

    @rule(really=st.sampled_from([False, False, False, False, True]))
    def purge(self, really: bool) -> None:
        if not really:
            return
        entry = Purged("g", self.model.high, 1)
        self.queue.table.apply(entry)
        self.queue.restart(self.now)
        self.entries.append(entry)
        for offset in self.model.alive():
            self.model.finish(offset, PURGED)

    # -- fail-over ----------------------------------------------------------------------------------

    @precondition(lambda self: self.held is None)
    @rule()
    def stall(self) -> None:
        """From here on nothing is committed, and so nothing is answered."""
        self.held = (deepcopy(self.model.facts), len(self.entries), self.queue.table.start)

    @rule(
        how=st.sampled_from(["entries", "snapshot", "lost"]),
        pieces=st.sampled_from([0, 1, 3, 1_000]),
        after_ms=st.sampled_from([0, 600, 5_000]),
        arrived=st.booleans(),
    )
    def promote(self, how: str, pieces: int, after_ms: int, arrived: bool) -> None:
        """The next primary has the entries, or a snapshot of them, and reads the records again."""
        before = self.told(self.queue.table)
        if self.move is not None and arrived:
            self.arrive(self.move)  # and nobody heard of it
        self.move = None
        if how == "snapshot":
            row = self.queue.table.row(lambda offset: 1 if offset >= 0 else -1)
            row = msgspec.msgpack.decode(msgspec.msgpack.encode(row), type=type(row))
            table = QueueTable.of_row(row, lambda offset, epoch: True, 0)
        elif how == "lost" and self.held is not None:
            facts, count, self.start = self.held
            for offset in self.model.facts:
                fresh = self.records[offset]
                fact = Fact(self.model.facts[offset].key, fresh.due_ms, fresh.expires_ms, overtaken=fresh.due_ms > 0)
                self.model.facts[offset] = facts.get(offset, fact)
            del self.entries[count:]
            self.receipts_given = []  # what was not committed, nobody was told
            table = self.replayed()
        else:
            table = self.replayed()
        assert (how == "lost" and self.held is not None) or self.told(table) == before
        assert all(table.is_settled(o) for o in range(table.start, self.start) if o in self.records)
        self.start = table.start
        self.held = None
        self.epoch += 1
        self.now += after_ms
        self.queue = self.made(table)
        self.fill(pieces)
        for offset in self.model.alive():
            fact = self.model.facts[offset]
            if fact.state == LEASED:
                fact.until_ms = self.now + LEASE_MS
            elif table.stories.get(offset) is not None:
                fact.until_ms = self.now + table.stories[offset].delay_ms

    def replayed(self) -> QueueTable:
        table = QueueTable("g", self.ordering, 0)
        for entry in self.entries:
            table.apply(entry)
        return table

    def told(self, table: QueueTable) -> dict[str, Any]:
        """Everything that a table says, offsets without a record left out: reading settles them, not entries."""
        table = deepcopy(table)
        for offset in range(table.start, self.model.high):
            if offset not in self.records:
                table.skip(offset, offset + 1)
        return told(table)

    # -- always -------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost_and_nothing_comes_back(self) -> None:
        table = self.queue.table
        for offset, fact in self.model.facts.items():
            assert table.is_settled(offset) == bool(fact.end), f"{offset}: {fact}"
        assert sorted(table.holder) == self.model.leased()
        assert table.start >= self.start
        assert all(offset >= table.start for offset in [*table.holder, *table.stories])
        assert all(count == 1 for count in self.copies.values())
        assert len(self.queue.window.ready) + self.queue.window.waiting >= 0
        self.start = table.start

    @invariant()
    def one_of_a_lane_is_out(self) -> None:
        runs: dict[object, set[tuple[int, int]]] = {}
        for offset in self.model.leased():
            runs.setdefault(self.model.lane(offset), set()).add(self.model.facts[offset].receipt)
        assert all(len(receipts) == 1 for receipts in runs.values()), runs
        if self.ordering == ORDER_KEY:
            lanes = [self.model.lane(offset) for offset in self.model.leased()]
            assert len(set(lanes)) == len(lanes), lanes

    def teardown(self) -> None:
        """Whoever goes on receiving and acknowledging ends everything that is not parked behind its lane."""
        if not hasattr(self, "model"):
            return
        self.redrive()
        for _ in range(2_000):
            self.copy(True)
            self.time_passes(2_500)
            self.lease("one", 6)
            leased = self.model.leased()
            if not leased and not self.model.alive():
                break
            for offset in leased:
                assert self.settle(ACK, [offset], "one") == ([], [])
                self.model.finish(offset, ACKED)
            self.redrive()
        assert not self.model.alive(), "a queue that stands still"
        assert self.queue.window.waiting == 0
        assert not self.queue.table.stories


def told(table: QueueTable) -> dict[str, Any]:
    """Everything that a table says."""
    leases = {key: (one.member, one.lease_ms, sorted(one.offsets)) for key, one in sorted(table.leases.items())}
    stories = {
        offset: (one.attempts, one.last, one.delay_ms, one.history, one.parked, one.dying)
        for offset in sorted(table.known())
        if (one := table.story(offset)) is not None
    }
    return {
        "start": table.start, "settled": list(table.settled), "leases": leases, "stories": stories,
        "next": (table.next_lease, table.producer_epoch, table.next_sequence),
    }  # fmt: skip


class KeyMachine(QueueMachine):
    ordering = ORDER_KEY


class PartitionMachine(QueueMachine):
    ordering = ORDER_PARTITION


class NoneMachine(QueueMachine):
    ordering = ORDER_NONE


LIMITS = settings(max_examples=80, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
TestByKey = KeyMachine.TestCase
TestByPartition = PartitionMachine.TestCase
TestWithoutOrder = NoneMachine.TestCase
for case in (TestByKey, TestByPartition, TestWithoutOrder):
    case.settings = LIMITS
