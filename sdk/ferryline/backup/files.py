"""A backup on disk: a folder with a manifest, and the bytes of logs as brokers have them, in files of some size.

    manifest.json                         written last: what it names is complete, and nothing else counts
    progress.json                         how far a run has come that has not ended: the next one goes on from there
    <topic id>-<partition>/records-<base>-<run>.batches
    <topic id>-<partition>/state-<base>-<run>.batches

``<base>`` is the offset of the first batch. A file may grow beyond what the manifest says of it: a later run appends to
the last one, and until that run has ended the manifest still describes the backup before it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ferryline.protocol.errors import CorruptBatch
from ferryline.protocol.records import BatchHeader, split_batches

FORMAT = 1
FILE_BYTES = 64 * 1024 * 1024
PIECE_BYTES = 4 * 1024 * 1024
MANIFEST, PROGRESS = "manifest.json", "progress.json"
LOGS = ("records", "state")


class BackupError(Exception):
    """What is in the folder cannot be used; the message says what and where."""


class FileEntry(msgspec.Struct, frozen=True):
    """The first ``size`` bytes of a file, and their SHA-256. ``base``: offset of the first batch in it."""

    name: str
    base: int
    size: int
    sha256: str


class LogEntry(msgspec.Struct, frozen=True):
    """Batches from ``start`` to ``end``, half open. ``epoch_before``: of the record before ``start``, -1: there was
    none. ``epoch``: of the last batch, -1 without any."""

    start: int
    end: int
    epoch_before: int
    epoch: int
    files: tuple[FileEntry, ...] = ()

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


class PartitionEntry(msgspec.Struct, frozen=True):
    """Both logs of one partition, up to its mark."""

    topic: str
    topic_id: str
    partition: int
    records: LogEntry
    state: LogEntry

    @property
    def folder(self) -> str:
        return f"{self.topic_id}-{self.partition}"

    @property
    def epoch(self) -> int:
        """No batch of either log has a higher one."""
        return max(self.records.epoch, self.state.epoch, self.records.epoch_before, self.state.epoch_before, 0)

    def log(self, name: str) -> LogEntry:
        return self.records if name == LOGS[0] else self.state


class Manifest(msgspec.Struct, frozen=True):
    """A backup; not complete while ``ended`` is empty. ``records``: of the coordinator, by key, base64. Times are UTC,
    ISO 8601."""

    format: int
    run: int
    cluster_id: str
    feature_level: int
    started: str
    ended: str
    records: dict[str, str]
    partitions: tuple[PartitionEntry, ...]

    @property
    def size(self) -> int:
        return sum(part.records.size + part.state.size for part in self.partitions)

    def files(self) -> set[str]:
        """Paths below the folder."""
        return {
            f"{part.folder}/{file.name}"
            for part in self.partitions
            for log in (part.records, part.state)
            for file in log.files
        }


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest | None:
    """The newest complete backup; None if there is none yet. Raises BackupError for one that is damaged."""
    path = folder / name
    try:
        raw = json.loads(path.read_bytes())
        told = raw.pop("checksum")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError) as error:
        raise BackupError(f"{path}: not a manifest: {error!r}") from None
    if raw.get("format") != FORMAT:
        raise BackupError(f"{path}: format {raw.get('format')!r}; this release reads {FORMAT}")
    if told != _digest(raw):
        raise BackupError(f"{path}: does not match its checksum")
    try:
        return msgspec.convert(raw, Manifest)
    except msgspec.ValidationError as error:
        raise BackupError(f"{path}: {error}") from None


def write_manifest(folder: Path, manifest: Manifest, name: str = MANIFEST) -> None:
    """From now on the folder holds this backup; durable when it returns."""
    raw = msgspec.to_builtins(manifest)
    write_durably(folder / name, json.dumps({**raw, "checksum": _digest(raw)}, indent=1).encode())


def _digest(raw: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """Replace ``path`` as one step. It may hold digests of keys: for its owner only."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Names in it are durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pieces(path: Path, size: int, at: int = 0) -> Iterator[tuple[bytes, list[tuple[int, BatchHeader]]]]:
    """Whole batches of a file, about PIECE_BYTES at a time, checked. Raises BackupError, naming the place."""
    with path.open("rb") as file:
        file.seek(at)
        rest = b""
        while at + len(rest) < size:
            more = file.read(min(PIECE_BYTES, size - at - len(rest)))
            if not more:
                raise BackupError(f"{path}: ends at {at + len(rest)}, not at {size}")
            data = rest + more
            whole = whole_batches(data)
            rest = data[whole:]
            if not whole:
                continue
            try:
                headers = split_batches(memoryview(data)[:whole])
            except CorruptBatch as error:
                raise BackupError(f"{path}: damaged after byte {at}: {error.message}") from None
            yield data[:whole], headers
            at += whole
        if rest:
            raise BackupError(f"{path}: the last batch, at byte {at}, is cut off")


def whole_batches(data: bytes) -> int:
    """How many bytes of ``data`` are whole batches, by their lengths alone."""
    at = 0
    while at + 12 <= len(data):
        size = 12 + int.from_bytes(data[at + 8 : at + 12], "big", signed=True)
        if size < 61:
            return len(data)  # nonsense: whoever checks the bytes says so
        if at + size > len(data):
            break
        at += size
    return at


class LogWriter:
    """One log of one partition, as it is being taken. `end` is the next offset."""

    def __init__(self, folder: Path, log: str, run: int, known: LogEntry | None, file_bytes: int = FILE_BYTES) -> None:
        """``known``: what a complete backup has of it; continued where it ends."""
        self._folder, self._log, self._run, self._file_bytes = folder, log, run, file_bytes
        self.start = self.end = known.start if known is not None else 0
        self.epoch_before, self.epoch = (known.epoch_before, known.epoch) if known is not None else (-1, -1)
        self.last = b""  # the last batch, to see whether a cluster still has it
        self._done: list[FileEntry] = []
        self._name, self._base, self._size = "", 0, 0
        self._hash = hashlib.sha256()
        if known is not None:
            self._take_over(known)

    def begin(self, start: int, epoch_before: int) -> None:
        """Forget what was there, and go on from ``start``."""
        self.start = self.end = start
        self.epoch_before, self.epoch, self.last = epoch_before, epoch_before, b""
        self._done, self._name, self._size = [], "", 0

    def append(self, data: bytes, headers: list[tuple[int, BatchHeader]]) -> None:
        """Whole batches that continue the log, in the page cache when this returns. Raises BackupError."""
        for _, header in headers:
            if header.base_offset != self.end or header.epoch < self.epoch:
                raise BackupError(f"{self._folder}: batch at {header.base_offset} does not follow {self.end}")
            self.end, self.epoch = header.next_offset, header.epoch
        if not self._name or self._size >= self._file_bytes:
            self._next_file(headers[0][1].base_offset)
        with self._path.open("r+b" if self._path.exists() else "wb") as file:
            file.seek(self._size)
            file.truncate()  # of what a run that was interrupted left
            file.write(data)
        self._size += len(data)
        self._hash.update(data)
        self.last = bytes(data[headers[-1][0] :])

    def seal(self) -> LogEntry:
        """What there is by now; durable when this returns."""
        files = list(self._done)
        if self._name:
            self._sync()
            files.append(FileEntry(self._name, self._base, self._size, self._hash.hexdigest()))
        return LogEntry(self.start, self.end, self.epoch_before, self.epoch, tuple(files))

    # -- inside -------------------------------------------------------------------------------------

    @property
    def _path(self) -> Path:
        return self._folder / self._name

    def _next_file(self, base: int) -> None:
        if self._name:
            self._sync()
            self._done.append(FileEntry(self._name, self._base, self._size, self._hash.hexdigest()))
        self._name, self._base, self._size = f"{self._log}-{base:020d}-{self._run}.batches", base, 0
        self._hash = hashlib.sha256()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _sync(self) -> None:
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
        sync_folder(self._folder)

    def _take_over(self, known: LogEntry) -> None:
        """Go on behind the last file of ``known``, reading that one again for its hash."""
        if not known.files:
            self.end = known.end
            return
        *self._done, last = known.files
        self._name, self._base, self._size = last.name, last.base, last.size
        for data, headers in pieces(self._path, last.size):
            self._hash.update(data)
            self.last = data[headers[-1][0] :]
        if self._hash.hexdigest() != last.sha256:
            raise BackupError(f"{self._path}: does not match its checksum; take a new backup into another folder")
        self.end = known.end


def verify(folder: Path, manifest: Manifest) -> Iterator[int]:
    """Read everything again: bytes of each piece that was checked. Raises BackupError for the first that is wrong."""
    for part in manifest.partitions:
        for name in LOGS:
            yield from _verify_log(folder / part.folder, part.log(name))


def _verify_log(folder: Path, log: LogEntry) -> Iterator[int]:
    end, epoch = log.start, log.epoch_before
    for file in log.files:
        digest = hashlib.sha256()
        try:
            for data, headers in pieces(folder / file.name, file.size):
                digest.update(data)
                for _, header in headers:
                    if header.base_offset != end or header.epoch < epoch:
                        raise BackupError(f"{folder / file.name}: batch at {header.base_offset} does not follow {end}")
                    end, epoch = header.next_offset, header.epoch
                yield len(data)
        except OSError as error:
            raise BackupError(f"{folder / file.name}: {error.strerror}") from None
        if digest.hexdigest() != file.sha256:
            raise BackupError(f"{folder / file.name}: does not match its checksum")
    if end != log.end:
        raise BackupError(f"{folder}: the log ends at {end}, not at {log.end}")
