"""The storage interface: both implementations keep the same promises, and the one in memory breaks as a disk does."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ferryline.protocol.errors import StorageFailed, StorageFull
from ferryline_broker.log.interface import translated
from ferryline_broker.log.storage import Faults, FileStorage, MemoryStorage, SimulatedStop, Storage


@pytest.fixture(params=["file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return FileStorage(str(tmp_path / "root")) if request.param == "file" else MemoryStorage()


def test_what_is_written_is_read_back_at_any_position(storage: Storage) -> None:
    file = storage.open("a", create=True)
    file.pwrite(b"hello", 0)
    file.pwrite(memoryview(b"world"), 5)
    file.pwrite(bytearray(b"J"), 0)
    assert file.pread(100, 0) == b"Jelloworld"
    assert file.pread(3, 8) == b"ld"
    assert file.pread(3, 100) == b""
    assert file.size() == 10
    file.truncate(4)
    assert file.pread(100, 0) == b"Jell"
    file.pwrite(b"x", 6)
    assert file.pread(100, 0) == b"Jell\0\0x"


def test_a_missing_file_is_an_error_unless_it_may_be_created(storage: Storage) -> None:
    with pytest.raises(StorageFailed, match="open nope"):
        storage.open("nope")
    assert not storage.exists("nope")
    assert storage.read_small("nope") is None
    storage.open("nope", create=True)
    assert storage.exists("nope")


def test_directories_list_sorted_and_a_missing_one_is_empty(storage: Storage) -> None:
    storage.mkdirs("x/y/z")
    storage.mkdirs("x/y/z")
    for name in ("b", "c", "a"):
        storage.open(f"x/y/{name}", create=True)
    assert storage.listdir("x/y") == ["a", "b", "c", "z"]
    assert storage.listdir("nowhere") == []
    assert storage.is_dir("x/y/z")
    assert not storage.is_dir("x/y/a")
    storage.rmdir("x/y/z")
    storage.rmdir("x/y/z")
    assert storage.listdir("x/y") == ["a", "b", "c"]


def test_rename_moves_files_and_whole_directories(storage: Storage) -> None:
    storage.mkdirs("from/sub")
    storage.mkdirs("to")
    storage.open("from/sub/f", create=True).pwrite(b"1", 0)
    storage.rename("from/sub", "to/sub")
    assert storage.read_small("to/sub/f") == b"1"
    assert storage.listdir("from") == []
    storage.open("to/g", create=True).pwrite(b"2", 0)
    storage.rename("to/g", "to/sub/f")
    assert storage.read_small("to/sub/f") == b"2"
    storage.unlink("to/sub/f")
    storage.unlink("to/sub/f")
    assert storage.listdir("to/sub") == []


def test_small_files_are_replaced_whole_and_leave_no_temporary_behind(storage: Storage) -> None:
    storage.mkdirs("d")
    storage.write_small_atomic("d/f", b"one")
    storage.write_small_atomic("d/f", b"two!")
    assert storage.read_small("d/f") == b"two!"
    assert storage.listdir("d") == ["f"]


def test_a_lock_has_one_holder(storage: Storage) -> None:
    lock = storage.try_lock("lock")
    assert lock is not None
    assert storage.try_lock("lock") is None
    lock.release()
    again = storage.try_lock("lock")
    assert again is not None
    again.release()


def test_a_closed_or_idle_file_behaves(storage: Storage) -> None:
    file = storage.open("a", create=True)
    file.pwrite(b"abc", 0)
    file.set_idle(True)
    assert file.pread(3, 0) == b"abc"
    file.set_idle(False)
    file.pwrite(b"d", 3)
    assert file.pread(9, 0) == b"abcd"
    free, total = storage.usage()
    assert 0 < free <= total
    file.close()


def test_idle_files_share_a_bounded_number_of_descriptors(tmp_path: Path) -> None:
    storage = FileStorage(str(tmp_path), idle_files_max=3)

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    files = []
    for number in range(20):
        file = storage.open(f"{number}", create=True)
        file.pwrite(b"%d" % number, 0)
        file.set_idle(True)
        files.append(file)
    assert descriptors() <= before + 3
    for number, file in enumerate(files):
        assert file.pread(2, 0) == b"%d" % number
    assert descriptors() <= before + 3
    for file in files:
        file.close()
    assert descriptors() == before
    with pytest.raises(StorageFailed, match="closed"):
        files[0].pread(1, 0)
    storage.close()


def test_paths_cannot_leave_the_root(tmp_path: Path) -> None:
    storage = FileStorage(str(tmp_path / "root"))
    for path in ("../x", "/etc/passwd", "a/../../b"):
        with pytest.raises(StorageFailed, match="leaves the storage root"):
            storage.open(path, create=True)
    storage.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_apart_from_a_broken_one(number: int) -> None:
    assert isinstance(translated(OSError(number, "full"), "write"), StorageFull)
    assert isinstance(translated(OSError(errno.EIO, "broken"), "write"), StorageFailed)


def test_sync_all_makes_contents_and_names_durable() -> None:
    disk = MemoryStorage()
    disk.mkdirs("d")
    disk.open("d/f", create=True).pwrite(b"abc", 0)
    assert disk.sync_all()
    disk.lose_unsynced()
    assert disk.contents("d/f") == b"abc"


def test_a_process_crash_keeps_everything_and_ends_its_handles_and_locks() -> None:
    disk = MemoryStorage()
    file = disk.open("f", create=True)
    file.pwrite(b"abc", 0)
    assert disk.try_lock("lock") is not None
    disk.crash()
    assert disk.contents("f") == b"abc"
    for use in (lambda: file.pread(1, 0), lambda: file.pwrite(b"x", 0), file.fdatasync, lambda: file.truncate(0)):
        with pytest.raises(StorageFailed, match="has ended"):
            use()
    assert disk.try_lock("lock") is not None


def test_a_power_cut_keeps_what_was_synced_and_at_most_a_prefix_of_the_rest() -> None:
    tails = set()
    for seed in range(200):
        disk = MemoryStorage()
        file = disk.open("f", create=True)
        disk.fsync_dir("")
        file.pwrite(b"synced", 0)
        file.fdatasync()
        file.pwrite(b"-more-", 6)
        file.pwrite(b"data", 12)
        disk.power_cut(random.Random(seed))
        found = disk.contents("f")
        assert found.startswith(b"synced")
        assert b"synced-more-data".startswith(found)
        tails.add(len(found))
    assert len(tails) > 5, "a torn write can end at any byte"


def test_a_power_cut_with_holes_can_lose_an_early_page_and_keep_a_later_one() -> None:
    seen_hole = False
    for seed in range(100):
        disk = MemoryStorage()
        file = disk.open("f", create=True)
        disk.fsync_dir("")
        file.pwrite(b"a" * 4096 + b"b" * 4096 + b"c" * 4096, 0)
        disk.power_cut(random.Random(seed), holes=True)
        found = disk.contents("f")
        seen_hole = seen_hole or (found[:1] == b"\0" and b"b" in found)
    assert seen_hole


def test_names_need_a_sync_of_their_directory() -> None:
    disk = MemoryStorage()
    disk.mkdirs("d")
    disk.open("d/f", create=True).fdatasync()
    disk.lose_unsynced()
    assert disk.listdir("d") == []
    disk.open("d/f", create=True).fdatasync()
    disk.fsync_dir("d")
    disk.rename("d/f", "d/g")
    disk.lose_unsynced()
    assert disk.listdir("d") == ["f"]
    disk.unlink("d/f")
    disk.lose_unsynced()
    assert disk.listdir("d") == ["f"]


def test_a_rename_across_directories_never_loses_the_file() -> None:
    for seed in range(50):
        disk = MemoryStorage()
        disk.mkdirs("a")
        disk.mkdirs("b")
        disk.open("a/f", create=True)
        disk.fsync_dir("a")
        disk.rename("a/f", "b/f")
        disk.power_cut(random.Random(seed))
        assert disk.exists("a/f") != disk.exists("b/f")


def test_a_failed_sync_loses_the_data_and_the_next_one_lies() -> None:
    disk = MemoryStorage()
    file = disk.open("f", create=True)
    disk.fsync_dir("")
    file.pwrite(b"abc", 0)
    disk.faults = Faults(sync_error=True)
    with pytest.raises(StorageFailed, match="Input/output error"):
        file.fdatasync()
    disk.faults = Faults()
    file.fdatasync()
    assert file.pread(3, 0) == b"abc"
    disk.lose_unsynced()
    assert disk.contents("f") == b""


def test_faults_fire_where_they_match() -> None:
    disk = MemoryStorage()
    one, two = disk.open("one", create=True), disk.open("two", create=True)
    disk.faults = Faults(write_error=True, match="one")
    two.pwrite(b"ok", 0)
    with pytest.raises(StorageFailed):
        one.pwrite(b"no", 0)
    disk.faults = Faults(read_error=True, match="two")
    assert one.pread(1, 0) == b""
    with pytest.raises(StorageFailed):
        two.pread(1, 0)
    disk.faults = Faults(space_left=3)
    with pytest.raises(StorageFull):
        one.pwrite(b"12345", 0)
    assert disk.contents("one") == b"123"
    assert disk.usage()[0] == 0


def test_a_simulated_stop_comes_before_the_chosen_operation() -> None:
    disk = MemoryStorage()
    file = disk.open("f", create=True)
    disk.faults = Faults(stop_after=2)
    file.pwrite(b"1", 0)
    file.pwrite(b"2", 1)
    with pytest.raises(SimulatedStop):
        file.pwrite(b"3", 2)
    assert disk.contents("f") == b"12"


@pytest.mark.parametrize("make", [MemoryStorage])
def test_a_copied_disk_is_independent(make: Callable[[], MemoryStorage]) -> None:
    disk = make()
    disk.mkdirs("d")
    file = disk.open("d/f", create=True)
    file.pwrite(b"abc", 0)
    twin = disk.copy()
    file.pwrite(b"xyz", 0)
    assert twin.contents("d/f") == b"abc"
    twin.flip("d/f", 0, 1)
    assert twin.contents("d/f") == b"cbc"
    twin.replace("d/f", b"new")
    assert twin.contents("d/f") == b"new"
