"""Small durable records of the broker: a versioned, checked envelope, and a file of two slots that replaces in place.

Envelope, big endian: ``magic 4s | version u16 | reserved u16 | sequence u64 | length u32 | crc32 u32 | MessagePack``.
The CRC covers everything but itself. Bodies are MessagePack arrays: later releases append fields with defaults.

A slot file is two envelopes at positions 0 and 4096. A store goes to the slot that does not hold the newest record, so
a torn store leaves the record before it. One pwrite and one fdatasync, against two fsyncs and a rename for a new file:
a broker does this once a second for every active replica.
"""

from __future__ import annotations

import struct
import zlib
from typing import TypeVar

import msgspec

from ferryline.protocol.errors import FerrylineError, StorageFailed, StorageFull
from ferryline_broker.log.interface import FileHandle, Storage, parent_of
from ferryline_broker.log.together import Together

_HEAD = struct.Struct(">4sHHQI")
_CRC = struct.Struct(">I")
_FRONT = _HEAD.size + _CRC.size
VERSION = 1
SLOT_BYTES = 4096  # apart by a page: a torn write of one slot cannot reach the other

_UNKNOWN, _NOTHING = -1, -2  # which slot is durable: it may be either; there is no record at all

T = TypeVar("T", bound=msgspec.Struct)
_encoder = msgspec.msgpack.Encoder()


def pack(magic: bytes, body: msgspec.Struct, sequence: int = 0) -> bytes:
    payload = _encoder.encode(body)
    head = _HEAD.pack(magic, VERSION, 0, sequence, len(payload))
    return head + _CRC.pack(zlib.crc32(payload, zlib.crc32(head))) + payload


def unpack(magic: bytes, data: bytes, kind: type[T]) -> tuple[int, T] | None:
    """(sequence, body), or None when the bytes are not a whole, undamaged envelope of this kind.

    Raises StorageFailed for a version that this release does not know: an older release must not guess.
    """
    if len(data) < _FRONT:
        return None
    found, version, _, sequence, length = _HEAD.unpack_from(data)
    payload = data[_FRONT : _FRONT + length]
    if found != magic or len(payload) != length:
        return None
    if zlib.crc32(payload, zlib.crc32(data[: _HEAD.size])) != _CRC.unpack_from(data, _HEAD.size)[0]:
        return None
    if version != VERSION:
        raise StorageFailed(f"{magic.decode()}: format version {version} is not {VERSION}; written by a later release")
    try:
        return sequence, msgspec.msgpack.decode(payload, type=kind)
    except msgspec.MsgspecError:
        return None


def envelope_bytes(data: bytes, start: int) -> int:
    """Size of the envelope that begins at ``start``."""
    return _FRONT + int(_HEAD.unpack_from(data, start)[4])


class SlotFile:
    """One small struct, replaced in place and durably.

    Invariant: a store never goes to the slot that holds the newest durable record. After a failed store the file is
    failed: later stores raise, because nobody knows what the medium holds.
    """

    __slots__ = ("_at", "_failed", "_file", "_magic", "_safe", "_sequence", "_unsynced", "path")

    def __init__(self, storage: Storage, path: str, magic: bytes, together: Together | None = None) -> None:
        self.path = path
        self._magic = magic
        self._file: FileHandle = storage.open(path, create=True)
        if together is None:
            storage.fsync_dir(parent_of(path))  # also for one that exists: its maker may have died before this
        elif not together.settled:
            together.directory(parent_of(path))
        self._file.set_idle(True)
        self._sequence = 0
        self._at = 1  # slot of the newest record; an empty file begins with slot 0
        self._safe = _UNKNOWN  # slot of the newest record known to be durable
        self._failed = False
        self._unsynced = False  # the newest record may not be on the medium yet

    def load(self, kind: type[T], together: Together | None = None) -> T | None:
        """The newest undamaged record, None if there is none. It is durable when this returns, or when ``together`` is
        settled.

        So its bytes are written again where they stand: a process that died between its write and its sync leaves a
        record that is only in the page cache, and whoever reads it now will act on it.
        """
        data = self._file.pread(2 * SLOT_BYTES, 0)
        best: tuple[int, T] | None = None
        for slot in (0, 1):
            found = unpack(self._magic, data[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES], kind)
            if found is not None and (best is None or found[0] > best[0]):
                best, self._at = found, slot
        if best is None:
            self._safe = _NOTHING
            return None
        self._sequence = best[0]
        if together is not None and together.settled:
            self._safe = self._at
            return best[1]
        start = self._at * SLOT_BYTES
        self._write(data[start : start + envelope_bytes(data, start)], self._at)
        if together is None:
            self.sync()
        else:
            together.file(self)
        return best[1]

    def store(self, body: msgspec.Struct, *, sync: bool = True) -> None:
        """Replace the record; durable when this returns unless ``sync`` is False."""
        if self._failed:
            raise StorageFailed(f"{self.path}: an earlier write failed")
        data = pack(self._magic, body, self._sequence + 1)
        assert len(data) <= SLOT_BYTES, f"{self.path}: {len(data)} bytes do not fit into a slot"
        if self._unsynced and self._safe == _UNKNOWN:
            self.sync()  # otherwise a power cut now could tear this slot while the other never arrived
        if self._safe == _NOTHING:
            self._write(data, 0)  # as long as nothing is durable, one slot is torn at most
        else:
            self._write(data, 1 - (self._safe if self._safe >= 0 else self._at))
        self._sequence += 1
        if sync:
            self.sync()

    def _write(self, data: bytes, slot: int) -> None:
        try:
            self._file.pwrite(data, slot * SLOT_BYTES)
        except StorageFull:
            # That slot may be torn: what counts is the other one, and the next store writes this one again.
            if slot == self._at and self._safe >= 0:
                self._at, self._unsynced = self._safe, False
            raise
        except FerrylineError:
            self._failed = True
            raise
        self._at = slot
        self._unsynced = True

    def sync(self) -> None:
        """The newest record is durable when this returns."""
        if self._failed:
            raise StorageFailed(f"{self.path}: an earlier write failed")
        if self._unsynced:
            try:
                self._file.fdatasync()
            except FerrylineError:
                self._failed = True
                raise
            self.synced_by_group()

    def synced_by_group(self) -> None:
        """`Storage.sync_all` has made the newest record durable."""
        self._unsynced = False
        self._safe = self._at

    def store_twice(self, body: msgspec.Struct) -> None:
        """Put the record into both slots: rot of the newest slot cannot bring back an older value."""
        self.store(body)
        self.store(body, sync=False)

    def close(self) -> None:
        self._file.close()
