"""Faults that a test switches on in a broker: only when allowed, only while the file says so."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from ferryline.protocol.errors import StorageFailed, StorageFull
from ferryline_broker import faulty
from ferryline_broker.faulty import VARIABLE, FaultFile, FaultyStorage, open_storage
from ferryline_broker.log.files import FileStorage


class Clock:
    """Every look is far enough from the last one for the file to be read again."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def switch(path: Path, **switches: object) -> None:
    temp = path.with_suffix(".new")
    temp.write_text(json.dumps(switches))
    stamp = path.stat().st_mtime_ns + 1 if path.exists() else temp.stat().st_mtime_ns
    os.utime(temp, ns=(stamp, stamp))
    temp.rename(path)


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path / "faults.json"


def storage(tmp_path: Path, control: Path, *, lossy: bool = False) -> FaultyStorage:
    return FaultyStorage(str(tmp_path / "data"), FaultFile(str(control), Clock()), lossy=lossy)


@pytest.mark.parametrize(("name", "error"), [("ENOSPC", StorageFull), ("EIO", StorageFailed)])
def test_a_write_fails_while_it_is_told_to_and_leaves_its_beginning(
    tmp_path: Path, control: Path, name: str, error: type[Exception]
) -> None:
    disk = storage(tmp_path, control)
    file = disk.open("f", create=True)
    file.pwrite(b"before", 0)
    switch(control, write=name)
    with pytest.raises(error, match="injected"):
        file.pwrite(b"12345678", 6)
    assert file.pread(100, 0) == b"before1234"
    switch(control, write="")
    file.pwrite(b"12345678", 6)
    file.fdatasync()
    assert file.pread(100, 0) == b"before12345678"
    file.close()
    disk.close()


def test_a_sync_fails_and_small_files_with_it(tmp_path: Path, control: Path) -> None:
    disk = storage(tmp_path, control)
    file = disk.open("f", create=True)
    switch(control, sync="EIO")
    file.pwrite(b"x", 0)
    with pytest.raises(StorageFailed):
        file.fdatasync()
    with pytest.raises(StorageFailed):
        disk.write_small_atomic("small", b"x")
    control.unlink()
    disk.write_small_atomic("small", b"x")
    assert disk.read_small("small") == b"x"
    file.close()
    disk.close()


def test_unsynced_bytes_are_lost_only_on_the_lossy_disk(tmp_path: Path, control: Path) -> None:
    for lossy in (False, True):
        disk = storage(tmp_path, control, lossy=lossy)
        file = disk.open("f", create=True)
        file.pwrite(b"unsynced", 0)
        assert (tmp_path / "data" / "f").read_bytes() == (b"" if lossy else b"unsynced")
        disk.unlink("f")
        file.close()
        disk.close()


def test_a_torn_or_missing_file_of_switches_means_no_fault(control: Path) -> None:
    faults = FaultFile(str(control), Clock())
    assert not faults.now().write
    control.write_text('{"write": "EI')
    assert not faults.now().write
    switch(control, write="EIO")
    assert faults.now().write == "EIO"


def test_nothing_of_this_is_on_without_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("FERRYLINE_TEST_LOSSY_STORAGE", raising=False)
    disk, boot_id = open_storage(str(tmp_path))
    assert type(disk) is FileStorage
    assert boot_id is None


def test_it_is_refused_where_it_is_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "faults.json")
    monkeypatch.delenv("FERRYLINE_ALLOW_SABOTAGE", raising=False)
    with pytest.raises(ValueError, match="for proofs only"):
        open_storage(str(tmp_path))


def test_a_power_cut_counts_as_another_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, control: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(control))
    monkeypatch.setenv("FERRYLINE_ALLOW_SABOTAGE", "1")
    monkeypatch.setattr(faulty, "shift_clock", lambda _: None)
    monkeypatch.setenv("FERRYLINE_TEST_LOSSY_STORAGE", "1")
    (_, first), (_, second) = open_storage(str(tmp_path)), open_storage(str(tmp_path))
    assert isinstance(first, str)
    assert first != second
    monkeypatch.setenv("FERRYLINE_TEST_LOSSY_STORAGE", "0")
    assert open_storage(str(tmp_path))[1] is None


def test_the_wall_clock_is_off_by_what_the_switches_say(monkeypatch: pytest.MonkeyPatch, control: Path) -> None:
    real, real_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", real)  # put back after the test
    monkeypatch.setattr(time, "time_ns", real_ns)
    switch(control, wall_ms=86_400_000)
    faulty.shift_clock(FaultFile(str(control), Clock()))
    assert 86_399 < time.time() - real() <= 86_401
    assert 86_399e9 < time.time_ns() - real_ns() <= 86_401e9
