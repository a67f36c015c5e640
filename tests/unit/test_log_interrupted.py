"""Stop at every single operation on the disk, in every way a machine can stop, and look at what a restart finds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from ferryline.protocol.errors import FerrylineError
from ferryline.protocol.messages import LOG_DAMAGED, LOG_OK
from ferryline.protocol.records import read_header
from ferryline_broker.log.envelope import SlotFile
from ferryline_broker.log.model import LogConfig, LogHooks
from ferryline_broker.log.node_store import NodeStore
from ferryline_broker.log.partition_log import PartitionLog
from ferryline_broker.log.recovery import LogStart
from ferryline_broker.log.replica_store import ReplicaStore, quarantine
from ferryline_broker.log.steps import drained
from ferryline_broker.log.storage import Faults, MemoryStorage, SimulatedStop
from ferryline_broker.log.together import Together
from unit.log_builders import TOPIC, ManualClock, append, contents

CONFIG = LogConfig(segment_bytes=600, segment_ms=-1, retention_ms=-1)
STOPS = ["crash", "lost", "torn-1", "torn-2", "torn-3", "torn-4"]
HOLES = [f"holes-{number}" for number in range(30)]  # pages arrive in any order, or torn


@dataclass
class Story:
    """What must be, and what may be, on disk at this moment of a replica's life."""

    store: ReplicaStore | None = None
    epoch: int = 0  # seen_epoch is at least this ...
    epoch_may: int = 0  # ... and at most this
    sure: list[bytes] = field(default_factory=list)  # records that are there, whatever happens
    may: list[bytes] = field(default_factory=list)  # records that may be there: `sure` is a prefix
    starts: set[int] = field(default_factory=lambda: {0})
    resetting: int = -1
    snapshot: dict[int, bytes] = field(default_factory=dict)

    @property
    def log(self) -> PartitionLog:
        assert self.store is not None
        return self.store.records

    def open(self, disk: MemoryStorage) -> None:
        self.store = ReplicaStore.open(disk, "", TOPIC, 0, CONFIG, wall_ms=ManualClock())
        self.store.snapshot_producers = lambda: b"table of %d" % self.log.log_end

    def raise_epoch(self, epoch: int) -> None:
        assert self.store is not None
        self.epoch_may = epoch
        self.store.persist_epoch(epoch)
        self.epoch = epoch

    def append(self, count: int = 1) -> None:
        for _ in range(count):
            end = self.log.log_end
            # known before the call: an append may roll the segment, which flushes what was there before
            self.may.append(b"")
            self.may[-1] = append(self.log, epoch=self.epoch)
            assert read_header(self.may[-1]).base_offset == end

    def flush(self) -> None:
        self.log.flush()
        self.sure = list(self.may)

    def checkpoint(self) -> None:
        assert self.store is not None
        self.store.write_checkpoint(self.log.flushed_end, 0)

    def truncate(self, offset: int) -> None:
        kept = [one for one in self.may if read_header(one).next_offset <= offset]
        self.sure = self.sure[: len(kept)]
        self.log.truncate(offset)
        self.sure, self.may = list(kept), list(kept)

    def advance(self, offset: int) -> None:
        goal = max(s.next_offset for s in self.log.segments if s.next_offset <= offset)
        self.starts = {self.log.log_start, goal}
        self.flush()
        assert self.log.advance_start(offset) == goal
        self.starts = {goal}

    def reset(self, offset: int) -> None:
        self.resetting = offset
        self.log.reset(offset)
        self.resetting, self.sure, self.may, self.starts = -1, [], [], {offset}

    def check(self, store: ReplicaStore) -> None:
        log = store.records
        assert store.recovery.log_state == LOG_OK, store.recovery
        assert self.epoch <= store.seen_epoch <= self.epoch_may
        assert log.log_start <= store.high_watermarks[0] <= log.log_end
        offset, table = store.producer_snapshot()
        assert table == (b"table of %d" % offset if table else b"")
        headers = list(store.headers_since_snapshot())
        assert [h.base_offset for h in headers] == list(range(offset, log.log_end, 3))
        found = contents(log)
        if self.resetting >= 0 and log.log_start == self.resetting and not found:
            return
        assert log.log_start in self.starts
        sure = [one for one in self.sure if read_header(one).base_offset >= log.log_start]
        may = [one for one in self.may if not one or read_header(one).base_offset >= log.log_start]
        if may and not may[-1] and len(found) >= len(may):  # the append during which it stopped has arrived
            assert found[: len(may) - 1] == may[:-1]
            return
        assert found == may[: len(found)]
        assert len(found) >= (0 if self.resetting >= 0 else len(sure)), "what was flushed is gone"


def life(story: Story, disk: MemoryStorage) -> None:
    """A replica's life with everything in it. Segments hold about six batches."""
    story.open(disk)
    story.raise_epoch(1)
    story.append(3)
    story.flush()
    story.checkpoint()
    story.append(5)
    story.flush()
    story.append(10)
    story.flush()
    story.checkpoint()
    story.raise_epoch(2)
    story.append(2)
    story.truncate(story.log.log_end - 4)
    story.append(1)
    story.flush()
    story.truncate(20)
    story.append(8)
    story.flush()
    story.checkpoint()
    story.append(2)
    story.advance(30)
    story.append(1)
    story.flush()
    story.checkpoint()
    story.reset(1000)
    story.append(2)
    story.flush()
    story.checkpoint()
    story.reset(10)
    story.raise_epoch(3)
    story.append(7)
    story.flush()


def stop(disk: MemoryStorage, how: str) -> None:
    if how == "crash":
        disk.crash()
    elif how == "lost":
        disk.lose_unsynced()
    else:
        disk.power_cut(random.Random(how), holes=how in HOLES)


def operations(run: Callable[[MemoryStorage], None], disk: MemoryStorage) -> int:
    disk.faults = Faults(stop_after=1_000_000)
    run(disk)
    left = disk.faults.stop_after
    assert left is not None
    disk.crash()
    return 1_000_000 - left


@pytest.mark.parametrize("how", STOPS)
def test_a_replica_stopped_at_any_operation_keeps_what_was_flushed_and_invents_nothing(how: str) -> None:
    count = operations(lambda disk: life(Story(), disk), MemoryStorage())
    assert count > 150
    for at in range(count):
        disk, story = MemoryStorage(), Story()
        disk.faults = Faults(stop_after=at)
        with pytest.raises(SimulatedStop):
            life(story, disk)
        stop(disk, how)
        store = ReplicaStore.open(disk, "", TOPIC, 0, CONFIG)
        story.check(store)
        # and it goes on from there as any log does
        store.persist_epoch(9)
        append(store.records, epoch=9)
        store.flush()
        kept = contents(store.records)
        disk.lose_unsynced()
        assert contents(ReplicaStore.open(disk, "", TOPIC, 0, CONFIG).records) == kept


@pytest.mark.parametrize("how", STOPS)
def test_a_restart_stopped_at_any_operation_is_as_good_as_none(how: str) -> None:
    """Recovery itself changes the disk: it cuts, syncs and seals. Stop it everywhere too."""
    base = MemoryStorage()
    story = Story()
    life(story, base)
    story.append(3)
    base.power_cut(random.Random(7))
    count = operations(lambda disk: story.open(disk) or None, base.copy())
    for at in range(count):
        disk = base.copy()
        disk.faults = Faults(stop_after=at)
        with pytest.raises(SimulatedStop):
            ReplicaStore.open(disk, "", TOPIC, 0, CONFIG)
        stop(disk, how)
        store = ReplicaStore.open(disk, "", TOPIC, 0, CONFIG)
        story.check(store)


def opened_together(disk: MemoryStorage) -> ReplicaStore:
    """As a broker opens its replicas: syncs put off to the end."""
    together = Together(disk)
    store = drained(ReplicaStore.recover(disk, "", TOPIC, 0, CONFIG, wall_ms=ManualClock(), together=together))
    together.settle()
    return store


@pytest.mark.parametrize("how", ["lost", "torn-1", "torn-2", "torn-3"])
def test_a_start_that_syncs_once_survives_a_power_cut_at_any_operation(how: str) -> None:
    """The process dies, then the machine during the start: what was synced before is found, what is found then stays.

    The dead process leaves names and bytes in the page cache that no sync has covered.
    """
    count = operations(lambda disk: life(Story(), disk), MemoryStorage())
    steps = 0
    for at in range(0, count, 4):

        def crashed(at: int = at) -> tuple[MemoryStorage, Story]:
            disk, story = MemoryStorage(), Story()
            disk.faults = Faults(stop_after=at)
            with pytest.raises(SimulatedStop):
                life(story, disk)
            disk.crash()
            return disk, story

        during = operations(lambda disk: opened_together(disk) and None, crashed()[0])
        for cut in range(during + 1):
            disk, story = crashed()
            disk.faults = Faults(stop_after=cut)
            whole = None
            try:
                whole = opened_together(disk)
                shown = contents(whole.records), whole.seen_epoch
            except SimulatedStop:
                steps += 1
            stop(disk, how)
            store = opened_together(disk)
            story.check(store)
            if whole is not None:
                assert (contents(store.records), store.seen_epoch) == shown, "what a start showed is gone"
    assert steps > 300


def test_a_power_cut_with_holes_is_told_or_harmless_at_every_operation() -> None:
    """Pages may arrive in any order: then a log may be damaged, but it never serves wrong bytes or hides a loss."""
    count = operations(lambda disk: life(Story(), disk), MemoryStorage())
    damaged = 0
    for at in range(0, count):
        for seed in range(3):
            disk, story = MemoryStorage(), Story()
            disk.faults = Faults(stop_after=at)
            with pytest.raises(SimulatedStop):
                life(story, disk)
            disk.power_cut(random.Random(f"{at}-{seed}"), holes=True)
            store = ReplicaStore.open(disk, "", TOPIC, 0, CONFIG)
            if store.recovery.log_state == LOG_DAMAGED:
                damaged += 1
            else:
                story.check(store)
    assert damaged < count, "small appends lie within a page, so holes are rare"


@pytest.mark.parametrize("checkpointed", [True, False])
def test_quarantine_stopped_anywhere_never_leaves_a_half_emptied_replica_that_calls_itself_good(
    checkpointed: bool,
) -> None:
    base, story = MemoryStorage(), Story()
    if checkpointed:
        life(story, base)
    else:
        story.open(base)
        story.raise_epoch(3)
        story.append(2)
        story.flush()
    base.crash()
    records = f"partitions/{TOPIC}-0/records/{story.log.segments[0].base:020d}.log"
    count = operations(lambda disk: quarantine(disk, "", TOPIC, 0, "bit rot"), base.copy())
    for at in range(count):
        for how in STOPS:
            disk = base.copy()
            disk.faults = Faults(stop_after=at)
            with pytest.raises(SimulatedStop):
                quarantine(disk, "", TOPIC, 0, "bit rot")
            stop(disk, how)
            store = ReplicaStore.open(disk, "", TOPIC, 0, CONFIG)
            whole = len(disk.listdir(f"partitions/{TOPIC}-0/damaged-1")) >= 2 and not contents(store.records)
            assert store.recovery.log_state == LOG_DAMAGED or whole or disk.exists(records)
            assert store.seen_epoch == 3


def test_a_slot_file_stopped_at_any_operation_holds_the_old_or_the_new_value() -> None:
    def write(disk: MemoryStorage, done: list[int]) -> None:
        file = SlotFile(disk, "slots", b"TEST")
        for value in range(1, 8):
            if value % 3 == 0:
                file.store_twice(LogStart(value))
            else:
                file.store(LogStart(value))
            done.append(value)

    count = operations(lambda disk: write(disk, []), MemoryStorage())
    for at, how in itertools.product(range(count), STOPS + HOLES):
        disk = MemoryStorage()
        done: list[int] = []
        disk.faults = Faults(stop_after=at)
        with pytest.raises(SimulatedStop):
            write(disk, done)
        stop(disk, how)
        found = SlotFile(disk, "slots", b"TEST").load(LogStart)
        last = done[-1] if done else 0
        assert (found.offset if found else 0) in (last, last + 1), (at, how)


def test_never_are_both_slots_waiting_for_a_sync() -> None:
    """Else a power cut could tear the one and lose the other."""
    disk = MemoryStorage()
    file = SlotFile(disk, "slots", b"TEST")
    waiting: list[int] = []

    def slots(path: str) -> None:
        waiting.append(len({position // 4096 for position, _ in disk._inode(path).queue}))

    disk.faults = Faults(on_sync=slots)
    for value in range(1, 9):
        if value % 3:
            file.store(LogStart(value), sync=value % 2 == 0)
        else:
            file.store_twice(LogStart(value))
    assert set(waiting) == {1}


@pytest.mark.parametrize("how", STOPS + HOLES[:10])
def test_a_power_cut_takes_a_slot_file_back_to_what_was_synced_and_no_further(how: str) -> None:
    for stores in range(1, 16):
        disk = MemoryStorage()
        file = SlotFile(disk, "slots", b"TEST")
        for value in range(1, stores + 1):
            file.store(LogStart(value), sync=value % 5 == 0)
        stop(disk, how)
        found = SlotFile(disk, "slots", b"TEST").load(LogStart)
        assert stores // 5 * 5 <= (found.offset if found else 0) <= stores, (stores, how)


@pytest.mark.parametrize("how", STOPS)
def test_a_small_file_stopped_at_any_operation_is_old_or_new(how: str) -> None:
    for at in range(6):
        disk = MemoryStorage()
        disk.write_small_atomic("f", b"old")
        disk.faults = Faults(stop_after=at)
        try:
            disk.write_small_atomic("f", b"new contents")
        except SimulatedStop:
            pass
        stop(disk, how)
        assert disk.read_small("f") in (b"old", b"new contents")


@pytest.mark.parametrize("how", STOPS)
def test_a_node_stopped_at_any_operation_never_reuses_an_incarnation(how: str) -> None:
    heard: list[int] = []

    def two_lives(disk: MemoryStorage) -> None:
        for _ in range(2):
            node = NodeStore.open(disk, boot_id="b", make_storage_id=lambda: "s" * 32)
            assert node.incarnation not in heard, "an incarnation is one process life"
            heard.append(node.incarnation)
            node.persist_coord_epoch(node.incarnation)
            node.set_identity("c", 1)
            node.confirm_registered()
            node.mark_clean_stop()
            node.close()

    count = operations(two_lives, MemoryStorage())
    for at in range(count):
        disk = MemoryStorage()
        heard.clear()
        disk.faults = Faults(stop_after=at)
        with pytest.raises(SimulatedStop):
            two_lives(disk)
        stop(disk, how)
        node = NodeStore.open(disk, boot_id="c" if how != "crash" else "b", make_storage_id=lambda: "s" * 32)
        assert node.incarnation not in heard
        assert node.seen_coord_epoch >= max([0, *heard[:-1]])


def test_disk_errors_at_any_operation_never_lose_what_was_flushed() -> None:
    """EIO instead of a stop: the log fails loudly, and a restart finds everything that was flushed."""
    for fault in (Faults(write_error=True), Faults(sync_error=True), Faults(space_left=0)):
        for after in range(0, 60, 2):
            disk, story = MemoryStorage(), Story()
            story.open(disk)
            story.raise_epoch(1)
            try:
                for step in range(60):
                    if step == after:
                        disk.faults = replace(fault)
                    story.append()
                    if step % 3 == 0:
                        story.flush()
                        story.checkpoint()
            except FerrylineError:
                pass
            disk.power_cut(random.Random(after))
            story.check(ReplicaStore.open(disk, "", TOPIC, 0, CONFIG))


def test_a_checkpoint_is_lowered_before_a_cut_or_the_cut_would_look_like_loss() -> None:
    """The order matters: with the hook switched off, the same stop makes a sound log look damaged."""
    for careful in (True, False):
        disk = MemoryStorage()
        log = PartitionLog.open(disk, "log", CONFIG)
        for _ in range(4):
            append(log)
        log.flush()
        kept = [log.checkpoint(0)]
        if careful:
            log._hooks = LogHooks(before_cut=lambda checkpoint, state, kept=kept: kept.append(checkpoint))
        log.truncate(6)
        disk.crash()
        state = PartitionLog.open(disk, "log", CONFIG, checkpoint=kept[-1]).log_state
        assert state == (LOG_OK if careful else LOG_DAMAGED)
