"""The codec of record batches where the compiled one is missing: aiokafka's `aiokafka.record`, behind the same names.

Same bytes, same refusals: the tests of ``records.py`` run on both. What each name does is said in ``_codec.pyi``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any, cast

import msgspec
from aiokafka.record._crecords import DefaultRecordBatch, DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c
from msgspec.structs import force_setattr

CRC_KIND = "aiokafka"
_MAGIC = 2
_HEADER_BYTES = 61
_RECORD_BYTES_MIN = 7

Buffer = bytes | bytearray | memoryview
Pairs = list[tuple[str, bytes | None]]


def crc32c(data: Buffer, start: int = 0) -> int:
    """CRC32C of ``data``. ``start`` other than 0 is not for this codec."""
    assert start == 0, "only the compiled codec goes on from a sum"
    return cast(int, calc_crc32c(data))


def read_header(data: Buffer, at: int, kind: type) -> None:
    """Always "look yourself": there is nothing faster here."""


def walk(data: Buffer, verify: bool, kind: type) -> None:
    """Always "look yourself": there is nothing faster here."""


class Builder:
    """Encodes records into one batch as they come."""

    __slots__ = ("_builder", "_spent", "count")

    def __init__(self, bytes_max: int) -> None:
        self._builder = DefaultRecordBatchBuilder(_MAGIC, 0, False, -1, -1, -1, bytes_max)
        self._spent = False
        self.count = 0

    def append(self, timestamp_ms: int, key: bytes | None, value: bytes | None, headers: Pairs) -> bool:
        """Add one record. Returns False when the batch is full; a first record always fits."""
        if self._spent:
            raise ValueError("the builder is spent")
        if self._builder.append(self.count, timestamp_ms, key, value, headers) is None:
            return False
        self.count += 1
        return True

    def extend(self, rows: Sequence[tuple[int, bytes | None, bytes | None, Pairs]]) -> int:
        """Add records until the batch is full. Returns how many were added."""
        for taken, row in enumerate(rows):
            if not self.append(*row):
                return taken
        return len(rows)

    def size(self) -> int:
        """Bytes of the batch so far."""
        return cast(int, self._builder.size())

    def build(self, producer_id: int, producer_epoch: int, base_sequence: int) -> bytearray:
        """The encoded batch at base offset 0. The builder is spent afterwards."""
        if self._spent:
            raise ValueError("the builder is spent")
        self._spent = True
        self._builder.set_producer_state(producer_id, producer_epoch, base_sequence)
        return bytearray(self._builder.build())


def decode_records(batch: Buffer) -> list[Any]:
    """The records of one uncompressed batch. Raises ValueError."""
    raw = bytes(batch) if not isinstance(batch, bytes) else batch
    if len(raw) < _HEADER_BYTES:
        raise ValueError("a batch has a header")
    base, count = int.from_bytes(raw[:8], "big", signed=True), int.from_bytes(raw[57:61], "big", signed=True)
    if not 0 <= count <= (len(raw) - _HEADER_BYTES) // _RECORD_BYTES_MIN or not 0 <= base <= 2**63 - 1 - count:
        raise ValueError("more records than fit")
    try:
        records = list(DefaultRecordBatch(raw))
    except Exception as error:  # the codec raises several kinds; for us all mean the same
        raise ValueError(str(error)) from None
    if [record.offset for record in records] != list(range(base, base + count)):
        raise ValueError("offsets do not follow each other")
    return records


class MessageBase(msgspec.Struct, frozen=True, gc=False, eq=False):
    """What a message holds: its record, what it shares with others, and its parsed value once that was asked for."""

    _record: Any
    _source: Any
    _parsed: Any = msgspec.UNSET

    @property
    def offset(self) -> int:
        """Where it stands in its partition."""
        return self._record.offset  # type: ignore[no-any-return]

    @property
    def timestamp_ms(self) -> int:
        return self._record.timestamp  # type: ignore[no-any-return]

    @property
    def key(self) -> bytes | None:
        return self._record.key  # type: ignore[no-any-return]

    @property
    def raw(self) -> bytes | None:
        """The value as it was sent."""
        return self._record.value  # type: ignore[no-any-return]

    @property
    def value(self) -> Any:
        if self._parsed is msgspec.UNSET:
            force_setattr(self, "_parsed", self._parse())
        return self._parsed

    @property
    def _pairs(self) -> Pairs:
        return self._record.headers  # type: ignore[no-any-return]

    def _parse(self) -> Any:
        raise NotImplementedError


def without_gc(kind: type[Any]) -> type[Any]:
    """Nothing to do: msgspec has seen to it."""
    return kind


def decode_messages(batch: Buffer, kind: type[Any], source: object, plain: bool) -> list[Any]:
    """The records of one uncompressed batch as messages. Raises ValueError."""
    records = decode_records(batch)
    if plain:
        return list(map(kind, records, repeat(source), (record.value for record in records)))
    return list(map(kind, records, repeat(source)))
