"""NodeStore: one directory, one broker; every restart is of the class it deserves."""

from __future__ import annotations

import multiprocessing
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from ferryline.protocol.errors import StorageFailed
from ferryline.protocol.messages import (
    LOG_OK,
    RESTART_CLEAN,
    RESTART_FOREIGN,
    RESTART_OS_CRASH,
    RESTART_PROCESS_CRASH,
)
from ferryline_broker.log.node_store import NodeStore, kernel_boot_id
from ferryline_broker.log.storage import Faults, FileStorage, MemoryStorage
from unit.log_builders import SMALL, TOPIC, append, contents, fill


def started(disk: MemoryStorage, boot: str = "boot-1", **options: str) -> NodeStore:
    return NodeStore.open(disk, boot_id=boot, **options)  # type: ignore[arg-type]


def confirmed(disk: MemoryStorage, boot: str = "boot-1") -> NodeStore:
    node = started(disk, boot)
    node.set_identity("cluster", 4)
    node.confirm_registered()
    return node


@pytest.fixture
def disk() -> MemoryStorage:
    return MemoryStorage()


def test_a_new_directory_is_foreign_to_the_cluster(disk: MemoryStorage) -> None:
    node = started(disk)
    assert (node.restart_class, node.incarnation, node.broker_id, node.cluster_id) == (RESTART_FOREIGN, 1, 0, "")
    assert len(node.storage_id) == 32


def test_a_clean_stop_is_clean_once(disk: MemoryStorage) -> None:
    node = confirmed(disk)
    node.mark_clean_stop()
    node.close()
    disk.lose_unsynced()
    node = started(disk, "boot-2")
    assert node.restart_class == RESTART_CLEAN
    disk.crash()
    assert started(disk, "boot-2").restart_class == RESTART_PROCESS_CRASH, "the marker is used up by the start"


def test_the_marker_is_gone_before_anything_else_happens(disk: MemoryStorage) -> None:
    node = confirmed(disk)
    node.mark_clean_stop()
    disk.crash()
    node = started(disk)
    assert node.restart_class == RESTART_CLEAN
    disk.lose_unsynced()
    assert not disk.exists("0/clean_stop")
    assert started(disk, "boot-2").restart_class == RESTART_OS_CRASH


def test_a_kill_on_the_same_boot_is_a_process_crash_and_on_another_an_os_crash(disk: MemoryStorage) -> None:
    confirmed(disk)
    disk.crash()
    assert confirmed(disk).restart_class == RESTART_PROCESS_CRASH
    disk.crash()
    assert started(disk, "boot-2").restart_class == RESTART_OS_CRASH


def test_a_lossy_class_is_sticky_until_a_registration_is_confirmed(disk: MemoryStorage) -> None:
    confirmed(disk)
    disk.crash()
    for boot in ("boot-2", "boot-2", "boot-2"):
        node = started(disk, boot)
        assert node.restart_class == RESTART_OS_CRASH
        assert node.lossy_pending == RESTART_OS_CRASH
        disk.crash()
    node = started(disk, "boot-2")
    node.confirm_registered()
    assert node.lossy_pending == ""
    disk.lose_unsynced()
    assert started(disk, "boot-2").restart_class == RESTART_PROCESS_CRASH


def test_even_a_clean_stop_does_not_wash_off_a_lossy_start(disk: MemoryStorage) -> None:
    confirmed(disk)
    disk.crash()
    node = started(disk, "boot-2")
    node.mark_clean_stop()
    node.close()
    assert started(disk, "boot-2").restart_class == RESTART_OS_CRASH


@pytest.mark.parametrize("lost", ["format", "node"])
def test_a_directory_that_lost_its_identity_is_foreign(disk: MemoryStorage, lost: str) -> None:
    node = confirmed(disk)
    before = node.storage_id
    disk.crash()
    disk.unlink(f"0/{lost}")
    node = started(disk)
    assert node.restart_class == RESTART_FOREIGN
    assert (node.storage_id == before) == (lost == "node")


def test_two_disks_put_together_are_foreign(disk: MemoryStorage) -> None:
    confirmed(disk)
    disk.crash()
    other = MemoryStorage()
    started(other, make_storage_id=lambda: "f" * 32)  # type: ignore[arg-type]
    disk.replace("0/format", other.contents("0/format"))
    assert started(disk).restart_class == RESTART_FOREIGN


def test_a_disk_that_the_broker_does_not_expect_is_foreign(disk: MemoryStorage) -> None:
    node = confirmed(disk)
    disk.crash()
    assert started(disk, expected_storage_id=node.storage_id).restart_class == RESTART_PROCESS_CRASH
    disk.crash()
    assert started(disk, expected_storage_id="other").restart_class == RESTART_FOREIGN


def test_every_start_is_a_new_incarnation_and_it_is_durable(disk: MemoryStorage) -> None:
    for wanted in range(1, 6):
        assert started(disk).incarnation == wanted
        disk.lose_unsynced()


def test_the_coordinator_epoch_and_identity_are_durable_and_never_change_back(disk: MemoryStorage) -> None:
    node = confirmed(disk)
    for epoch in (5, 3, 8):
        node.persist_coord_epoch(epoch)
    disk.lose_unsynced()
    node = started(disk)
    assert (node.seen_coord_epoch, node.cluster_id, node.broker_id) == (8, "cluster", 4)
    node.set_identity("cluster", 4)
    for cluster, broker in (("other", 4), ("cluster", 5)):
        with pytest.raises(StorageFailed, match="belongs to broker 4 of cluster cluster"):
            node.set_identity(cluster, broker)


def test_each_broker_takes_the_first_free_directory(disk: MemoryStorage) -> None:
    nodes = [started(disk) for _ in range(3)]
    assert [node.directory for node in nodes] == ["0", "1", "2"]
    assert len({node.storage_id for node in nodes}) == 3
    nodes[1].close()
    again = started(disk)
    assert again.directory == "1"
    assert again.storage_id == nodes[1].storage_id


def _lock_and_wait(root: str, ready: Event, done: Event) -> None:
    node = NodeStore.open(FileStorage(root))
    assert node.directory == "0"
    ready.set()
    done.wait(30)


def test_the_lock_holds_between_processes_and_ends_with_the_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_lock_and_wait, args=(str(tmp_path), ready, done))
    process.start()
    try:
        assert ready.wait(30)
        mine = NodeStore.open(FileStorage(str(tmp_path)))
        assert mine.directory == "1"
        process.kill()
        process.join(30)
        after = NodeStore.open(FileStorage(str(tmp_path)))
        assert after.directory == "0"
        assert after.incarnation == 2
        mine.close()
        after.close()
    finally:
        process.kill()
        process.join(30)


def test_the_kernel_names_its_boot() -> None:
    assert len(kernel_boot_id()) == 36
    assert kernel_boot_id() == kernel_boot_id()


def test_replicas_are_found_again_with_their_records(disk: MemoryStorage) -> None:
    node = confirmed(disk)
    store = node.open_replica(TOPIC, 3, SMALL)
    store.persist_epoch(1)
    sent = fill(store.records, 20)
    node.open_replica(TOPIC, 12, SMALL)
    disk.open("0/partitions/lost+found", create=True)
    disk.crash()
    node = started(disk)
    assert node.replicas_on_disk() == [(TOPIC, 12), (TOPIC, 3)]
    store = node.open_replica(TOPIC, 3, SMALL)
    assert contents(store.records) == sent
    assert node.replicas == {(TOPIC, 3): store}


def test_a_clean_stop_flushes_and_leaves_nothing_to_recover(disk: MemoryStorage) -> None:
    node = confirmed(disk)
    store = node.open_replica(TOPIC, 0, SMALL)
    store.persist_epoch(1)
    sent = fill(store.records, 20)
    store.write_checkpoint(40, 0)
    sent += fill(store.records, 1)
    node.mark_clean_stop()
    node.close()
    disk.lose_unsynced()
    node = started(disk, "boot-2")
    assert node.restart_class == RESTART_CLEAN
    store = node.open_replica(TOPIC, 0, SMALL)
    assert contents(store.records) == sent
    assert store.records.segments[-1].trusted_from == store.records.segments[-1].size


def test_no_marker_is_written_when_the_last_flush_fails(disk: MemoryStorage) -> None:
    node = confirmed(disk)
    store = node.open_replica(TOPIC, 0, SMALL)
    store.persist_epoch(1)
    fill(store.records, 3)
    disk.faults = Faults(sync_error=True)
    with pytest.raises(StorageFailed):
        node.mark_clean_stop()
    disk.crash()
    assert started(disk).restart_class == RESTART_PROCESS_CRASH


def test_a_deleted_replica_is_gone_at_once_and_its_files_bit_by_bit(disk: MemoryStorage) -> None:
    node = confirmed(disk)
    for partition in (0, 1):
        store = node.open_replica(TOPIC, partition, SMALL)
        store.persist_epoch(1)
        fill(store.records, 100)
        node.delete_replica(TOPIC, partition)
        node.delete_replica(TOPIC, partition)
    assert node.replicas_on_disk() == []
    disk.lose_unsynced()
    node = started(disk)
    assert node.replicas_on_disk() == []
    steps = 0
    while node.purge_step(2):
        steps += 1
    assert steps > 5
    assert disk.listdir("0/partitions") == []
    fresh = node.open_replica(TOPIC, 0, SMALL)
    assert (fresh.records.log_end, fresh.seen_epoch, fresh.recovery.log_state) == (0, 0, LOG_OK)


def test_a_quarantined_replica_begins_empty_and_takes_records_again(disk: MemoryStorage) -> None:
    node = confirmed(disk)
    store = node.open_replica(TOPIC, 0, SMALL)
    store.persist_epoch(1)
    fill(store.records, 10)
    store.mark_damaged("rot")
    node.replicas.pop((TOPIC, 0)).close()
    store = node.open_replica(TOPIC, 0, SMALL, quarantined="rot")
    assert (store.recovery.log_state, store.records.log_end, store.seen_epoch) == (LOG_OK, 0, 1)
    store.records.reset(90)
    append(store.records)
    node.delete_replica(TOPIC, 0)
    while node.purge_step():
        pass
    assert disk.listdir("0/partitions") == []


def test_the_whole_life_on_a_real_disk(tmp_path: Path) -> None:
    storage = FileStorage(str(tmp_path))
    node = NodeStore.open(storage)
    store = node.open_replica(TOPIC, 0, SMALL)
    store.persist_epoch(2)
    sent = fill(store.records, 60) + fill(store.records, 10, epoch=2)
    store.flush()
    store.write_checkpoint(100, 0)
    node.close()  # no clean stop: as after kill -9
    node = NodeStore.open(storage)
    assert node.restart_class == RESTART_FOREIGN, "never registered, so still sticky"
    node.confirm_registered()
    store = node.open_replica(TOPIC, 0, SMALL)
    assert contents(store.records) == sent
    assert store.records.truncate(100) == 99
    start = store.records.advance_start(50)
    assert contents(store.records) == [one for one in sent if start <= int.from_bytes(one[:8], "big") < 99]
    node.mark_clean_stop()
    node.close()
    node = NodeStore.open(storage)
    assert node.restart_class == RESTART_CLEAN
    store = node.open_replica(TOPIC, 0, SMALL)
    assert (store.records.log_start, store.records.log_end) == (start, 99)
    node.close()
    storage.close()
