"""A backup on disk: what is written is read again, and whatever is wrong with it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ferryline.backup.files import (
    FORMAT,
    MANIFEST,
    BackupError,
    LogEntry,
    LogWriter,
    Manifest,
    PartitionEntry,
    read_manifest,
    verify,
    write_manifest,
)
from ferryline.protocol.records import encode_batch, split_batches

TOPIC = "a" * 32


def batches(start: int, count: int, *, epoch: int = 1, size: int = 100) -> bytes:
    """``count`` batches of three records each, back to back from ``start`` on."""
    rows = [(b"k", b"v" * size, [])] * 3
    return b"".join(bytes(encode_batch(rows, base_offset=start + 3 * n, epoch=epoch)) for n in range(count))


def append(writer: LogWriter, data: bytes) -> None:
    writer.append(data, split_batches(data))


def written(folder: Path, *, file_bytes: int = 1_000) -> tuple[Manifest, LogWriter]:
    """A backup of one partition whose records take several files, with an empty state log."""
    writer = LogWriter(folder / f"{TOPIC}-0", "records", 1, None, file_bytes)
    writer.begin(30, 2)
    append(writer, batches(30, 4, epoch=2))
    append(writer, batches(42, 4, epoch=5))
    manifest = manifest_of(writer)
    write_manifest(folder, manifest)
    return manifest, writer


def manifest_of(writer: LogWriter, run: int = 1) -> Manifest:
    part = PartitionEntry("orders", TOPIC, 0, writer.seal(), LogEntry(0, 0, -1, -1))
    return Manifest(FORMAT, run, "c" * 32, 1, "then", "now", {"topic/x": "AA=="}, (part,))


def test_a_backup_is_read_as_it_was_written(tmp_path: Path) -> None:
    manifest, _ = written(tmp_path)
    assert read_manifest(tmp_path) == manifest
    part = manifest.partitions[0]
    assert (part.records.start, part.records.end, part.records.epoch_before, part.epoch) == (30, 54, 2, 5)
    assert len(part.records.files) == 2
    assert sum(verify(tmp_path, manifest)) == manifest.size


def test_a_folder_without_a_backup_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    manifest, _ = written(tmp_path)
    text = (tmp_path / MANIFEST).read_text()
    for wrong in (text.replace('"end": 54', '"end": 51'), text[:-20], "{}", text.replace('"format": 1', '"format": 9')):
        (tmp_path / MANIFEST).write_text(wrong)
        with pytest.raises(BackupError, match=MANIFEST):
            read_manifest(tmp_path)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


def test_every_byte_is_under_a_checksum(tmp_path: Path) -> None:
    manifest, _ = written(tmp_path)
    path = tmp_path / manifest.partitions[0].folder / manifest.partitions[0].records.files[0].name
    good = path.read_bytes()
    for at in range(0, len(good), 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        with pytest.raises(BackupError, match=path.name):
            list(verify(tmp_path, manifest))
    path.write_bytes(good[:-1])
    with pytest.raises(BackupError, match="ends at"):
        list(verify(tmp_path, manifest))
    path.unlink()
    with pytest.raises(BackupError, match="No such file"):
        list(verify(tmp_path, manifest))


def test_a_later_run_appends_and_the_backup_before_it_stays_good(tmp_path: Path) -> None:
    before, _ = written(tmp_path)
    writer = LogWriter(tmp_path / f"{TOPIC}-0", "records", 2, before.partitions[0].records, 10_000)
    assert writer.end == 54
    assert split_batches(writer.last)[0][1].next_offset == 54
    append(writer, batches(54, 2, epoch=5))
    after = manifest_of(writer, 2)
    assert sum(verify(tmp_path, before)) == before.size  # until the manifest is replaced, it is what counts
    assert sum(verify(tmp_path, after)) == after.size > before.size
    assert [file.name for file in after.partitions[0].records.files] == [
        file.name for file in before.partitions[0].records.files
    ]


def test_what_an_interrupted_run_left_is_cut_off(tmp_path: Path) -> None:
    before, writer = written(tmp_path, file_bytes=10_000)
    append(writer, batches(54, 1, epoch=9))  # interrupted: no manifest knows of it
    again = LogWriter(tmp_path / f"{TOPIC}-0", "records", 2, before.partitions[0].records)
    append(again, batches(54, 3, epoch=5))
    after = manifest_of(again, 2)
    assert sum(verify(tmp_path, after)) == after.size
    assert after.partitions[0].records.end == 63


def test_a_damaged_file_is_not_continued(tmp_path: Path) -> None:
    before, _ = written(tmp_path)
    path = tmp_path / before.partitions[0].folder / before.partitions[0].records.files[-1].name
    path.write_bytes(path.read_bytes().replace(b"vvvv", b"wwww", 1))
    with pytest.raises(BackupError, match=path.name):
        LogWriter(tmp_path / f"{TOPIC}-0", "records", 2, before.partitions[0].records)


def test_a_gap_and_a_fall_of_epochs_are_refused(tmp_path: Path) -> None:
    _, writer = written(tmp_path)
    with pytest.raises(BackupError, match="does not follow 54"):
        append(writer, batches(57, 1, epoch=5))
    with pytest.raises(BackupError, match="does not follow 54"):
        append(writer, batches(54, 1, epoch=4))


def test_a_backup_is_for_its_owner_only(tmp_path: Path) -> None:
    written(tmp_path)
    assert (tmp_path / MANIFEST).stat().st_mode & 0o077 == 0
    assert (tmp_path / f"{TOPIC}-0").stat().st_mode & 0o077 == 0
    assert json.loads((tmp_path / MANIFEST).read_text())["records"] == {"topic/x": "AA=="}
