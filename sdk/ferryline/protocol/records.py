"""Record batches: Kafka RecordBatch v2, the same bytes on the wire, on disk and in every answer.

The bytes of records are made and read by a codec (`_codec.py`): compiled, or aiokafka's where that one is missing. Both
make the same bytes and refuse the same ones. Layout, big endian::

    base_offset i64 | batch_length i32 | epoch i32 | magic i8 = 2 | crc u32 | attributes i16
    | last_offset_delta i32 | base_timestamp i64 | max_timestamp i64 | producer_id i64
    | producer_epoch i16 | base_sequence i32 | record_count i32 | records ...

``crc`` (CRC32C) covers everything from ``attributes`` on. ``base_offset`` and ``epoch`` lie outside it, so
the primary stamps them without touching the rest (`stamp`). A broker reads the 61-byte header, checks the
CRC and never decodes records; only clients, and tools, call `decode_batch`.

Hostile bytes raise CorruptBatch: never another exception, never more memory than
BATCH_DECODED_BYTES_MAX.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import cramjam
import msgspec

from ferryline.protocol import _codec
from ferryline.protocol.errors import CorruptBatch, InvalidArgument
from ferryline.protocol.limits import BATCH_DECODED_BYTES_MAX, BATCH_RATIO_MAX, BATCH_RECORDS_MAX

HEADER = struct.Struct(">qiibIhiqqqhii")
HEADER_BYTES = 61
LENGTH_PREFIX_BYTES = 12  # base_offset and batch_length: what batch_length does not count
_CRC_FROM = 21
MAGIC = 2

CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
_CODEC_NAMES = {number: name for name, number in CODECS.items()}
_CODEC_MASK = 0x07
_CONTROL_FLAG = 0x20

NO_PRODUCER = -1
crc32c = _codec.crc32c
M = TypeVar("M", bound=_codec.MessageBase)
Headers = Sequence[tuple[str, bytes | None]]


class BatchHeader(msgspec.Struct, frozen=True, gc=False):
    """The fixed part of one batch. ``size`` counts all its bytes, header included."""

    base_offset: int
    size: int
    epoch: int
    crc: int
    attributes: int
    last_offset_delta: int
    base_timestamp: int
    max_timestamp: int
    producer_id: int
    producer_epoch: int
    base_sequence: int
    record_count: int

    @property
    def next_offset(self) -> int:
        return self.base_offset + self.last_offset_delta + 1

    @property
    def is_control(self) -> bool:
        return bool(self.attributes & _CONTROL_FLAG)

    @property
    def codec(self) -> str:
        return _CODEC_NAMES.get(self.attributes & _CODEC_MASK, "unknown")


class DecodedRecord(Protocol):
    """What `decode_batch` yields (a compiled class of the codec)."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]


def read_header(data: bytes | bytearray | memoryview, at: int = 0) -> BatchHeader:
    """The header at ``at``. Checks magic and every count and length that the header alone can prove wrong.

    Does not check the CRC and does not require the body to be present.
    """
    found = _codec.read_header(data, at, BatchHeader)
    if found is not None:
        return found
    try:
        (base, length, epoch, magic, crc, attributes, last_delta, base_ts, max_ts, pid, pepoch, seq, count) = (
            HEADER.unpack_from(data, at)
        )
    except struct.error:
        raise CorruptBatch(f"a batch header takes {HEADER_BYTES} bytes, got {max(0, len(data) - at)}") from None
    if magic != MAGIC:
        raise CorruptBatch(f"magic: {magic} is not {MAGIC}")
    if length < HEADER_BYTES - LENGTH_PREFIX_BYTES:
        raise CorruptBatch(f"batch_length: {length} is below {HEADER_BYTES - LENGTH_PREFIX_BYTES}")
    if count < 0 or count > BATCH_RECORDS_MAX or last_delta != count - 1:
        raise CorruptBatch(f"record_count {count} and last_offset_delta {last_delta} do not fit together")
    if count == 0:
        raise CorruptBatch("record_count: 0; an empty batch has no offset")
    if base < 0 or (attributes & _CODEC_MASK) not in _CODEC_NAMES:
        raise CorruptBatch(f"base_offset {base} or attributes {attributes:#x} out of range")
    return BatchHeader(
        base, length + LENGTH_PREFIX_BYTES, epoch, crc, attributes, last_delta, base_ts, max_ts, pid, pepoch, seq, count
    )


def check_crc(data: bytes | bytearray | memoryview, header: BatchHeader, at: int = 0) -> None:
    """Raise CorruptBatch unless the whole batch is present at ``at`` and its CRC holds."""
    view = memoryview(data)[at + _CRC_FROM : at + header.size]
    if len(view) != header.size - _CRC_FROM:
        raise CorruptBatch(f"batch of {header.size} bytes is cut off after {len(view) + _CRC_FROM}")
    if crc32c(view) != header.crc:
        raise CorruptBatch(f"crc: batch at offset {header.base_offset} does not match its CRC32C")


def split_batches(data: bytes | bytearray | memoryview, *, verify: bool = True) -> list[tuple[int, BatchHeader]]:
    """Positions and headers of the batches that lie back to back in ``data``; trailing bytes are an error."""
    walked = _codec.walk(data, verify, BatchHeader)
    if walked is not None:
        return walked
    found: list[tuple[int, BatchHeader]] = []
    at, end = 0, len(data)
    while at < end:
        header = read_header(data, at)
        if at + header.size > end:
            raise CorruptBatch(f"batch of {header.size} bytes is cut off after {end - at}")
        if verify:
            check_crc(data, header, at)
        found.append((at, header))
        at += header.size
    return found


def stamp(data: bytearray, base_offset: int, epoch: int, at: int = 0) -> None:
    """Write base offset and epoch into a batch, in place. Both lie outside the CRC."""
    struct.pack_into(">q", data, at, base_offset)
    struct.pack_into(">i", data, at + LENGTH_PREFIX_BYTES, epoch)


class BatchBuilder(_codec.Builder):
    """Collects records into one batch and encodes it once.

    ``append`` and ``extend`` take no more when the batch has reached ``bytes_max``; a first record always fits, so a
    large record travels alone. Timestamps are ms since the Unix epoch.
    """

    __slots__ = ("_compression",)

    def __init__(self, bytes_max: int, codec: str = "none") -> None:
        if codec not in CODECS:
            raise InvalidArgument(f"compression: {codec!r} is not one of {', '.join(CODECS)}", field="compression")
        super().__init__(bytes_max)
        self._compression = codec

    def build(self, producer_id: int = NO_PRODUCER, producer_epoch: int = -1, base_sequence: int = -1) -> bytearray:
        """The encoded batch at base offset 0. The builder is spent afterwards."""
        data = super().build(producer_id, producer_epoch, base_sequence)
        return _compress(data, self._compression) if self._compression != "none" else data


def encode_batch(
    records: Sequence[tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]],
    *,
    timestamp_ms: int = 0,
    base_offset: int = 0,
    epoch: int = -1,
    codec: str = "none",
    producer: tuple[int, int, int] = (NO_PRODUCER, -1, -1),
    control: bool = False,
) -> bytearray:
    """One batch of (key, value, headers) records: for state entries, control records, tools and tests."""
    builder = BatchBuilder(2**30, codec)
    builder.extend([(timestamp_ms, key, value, headers) for key, value, headers in records])
    data = builder.build(*producer)
    if control:
        attributes = struct.unpack_from(">h", data, _CRC_FROM)[0] | _CONTROL_FLAG
        struct.pack_into(">h", data, _CRC_FROM, attributes)
        _seal(data)
    stamp(data, base_offset, epoch)
    return data


def epoch_start_batch(base_offset: int, epoch: int, broker_id: int) -> bytearray:
    """The control record that a new primary appends first (rule L1): it marks where its epoch begins."""
    return encode_batch([(b"epoch-start", b"%d" % broker_id, [])], base_offset=base_offset, epoch=epoch, control=True)


def set_producer(data: bytearray, producer_id: int, producer_epoch: int, base_sequence: int) -> None:
    """Give an encoded batch another producer identity (after the epoch was bumped) and seal it again."""
    struct.pack_into(">qhi", data, 43, producer_id, producer_epoch, base_sequence)
    _seal(data)


def _seal(data: bytearray) -> None:
    struct.pack_into(">I", data, 17, crc32c(memoryview(data)[_CRC_FROM:]))


def _compress(data: bytearray, codec: str) -> bytearray:
    payload = bytes(memoryview(data)[HEADER_BYTES:])
    if codec == "gzip":
        packer = zlib.compressobj(wbits=31)
        packed = packer.compress(payload) + packer.flush()
    elif codec == "snappy":
        packed = bytes(cramjam.snappy.compress_raw(payload))
    elif codec == "lz4":
        packed = bytes(cramjam.lz4.compress(payload))
    else:
        packed = bytes(cramjam.zstd.compress(payload))
    if len(payload) > max(65536, len(packed) * BATCH_RATIO_MAX):
        return data  # would look like a bomb to `decode_batch`; such data is cheap to send twice as it is
    out = data[:HEADER_BYTES] + packed
    attributes = struct.unpack_from(">h", out, _CRC_FROM)[0] | CODECS[codec]
    struct.pack_into(">i", out, 8, len(out) - LENGTH_PREFIX_BYTES)
    struct.pack_into(">h", out, _CRC_FROM, attributes)
    _seal(out)
    return out


def decode_batch(data: bytes | bytearray | memoryview, header: BatchHeader | None = None) -> Iterator[DecodedRecord]:
    """Records of the single batch in ``data``, in order. Control batches decode like any other: skip them by header.

    The CRC is *not* checked here (`check_crc`). Decompression stops at the smaller of BATCH_DECODED_BYTES_MAX and
    BATCH_RATIO_MAX times the packed size. Raises CorruptBatch before the first record, if at all.
    """
    if header is None:
        header = read_header(data)
    try:
        return iter(_codec.decode_records(_unpacked(data, header)))
    except ValueError:
        raise _undecodable(header) from None


def decode_messages(
    data: bytes | bytearray | memoryview, header: BatchHeader, kind: type[M], source: object, *, plain: bool
) -> list[M]:
    """`decode_batch`, but straight into messages of a consumer: ``kind(...)`` with ``source`` for each record.

    ``plain``: values are handed out as they are, without ``kind._parse``.
    """
    try:
        return _codec.decode_messages(_unpacked(data, header), kind, source, plain)
    except ValueError:
        raise _undecodable(header) from None


def _undecodable(header: BatchHeader) -> CorruptBatch:
    return CorruptBatch(f"records of the batch at offset {header.base_offset} do not decode")


def _unpacked(data: bytes | bytearray | memoryview, header: BatchHeader) -> bytes | bytearray | memoryview:
    """The batch without compression and without what lies behind it."""
    if len(data) < header.size:
        raise CorruptBatch(f"batch of {header.size} bytes is cut off after {len(data)}")
    codec = header.attributes & _CODEC_MASK
    if not codec:
        return data if len(data) == header.size else memoryview(data)[: header.size]
    payload = _decompress(bytes(memoryview(data)[HEADER_BYTES : header.size]), _CODEC_NAMES[codec])
    head = bytearray(memoryview(data)[:HEADER_BYTES])
    struct.pack_into(">i", head, 8, HEADER_BYTES - LENGTH_PREFIX_BYTES + len(payload))
    struct.pack_into(">h", head, _CRC_FROM, header.attributes & ~_CODEC_MASK)
    return bytes(head) + payload


def _decompress(packed: bytes, codec: str) -> bytes:
    limit = min(BATCH_DECODED_BYTES_MAX, max(65536, len(packed) * BATCH_RATIO_MAX))
    try:
        if codec == "gzip":
            unpacker = zlib.decompressobj(wbits=31)
            out = unpacker.decompress(packed, limit + 1)
            if len(out) > limit or not unpacker.eof or unpacker.unused_data:
                raise CorruptBatch(f"gzip payload is torn, has trailing members or exceeds {limit} bytes")
            return out
        return _decompress_block(packed, codec, limit)
    except CorruptBatch:
        raise
    except Exception as error:
        raise CorruptBatch(f"{codec} payload does not decompress: {str(error)[:200]}") from None


def _decompress_block(packed: bytes, codec: str, limit: int) -> bytes:
    if codec == "snappy":
        size = int(cramjam.snappy.decompress_raw_len(packed))  # declared in front, so checked before allocating
        if size > limit:
            raise CorruptBatch(f"snappy payload declares {size} bytes, limit {limit}")
        return bytes(cramjam.snappy.decompress_raw(packed))
    module = cramjam.lz4 if codec == "lz4" else cramjam.zstd
    # Grow the fixed output step by step: cramjam stops when it is full, so a bomb costs at most the limit.
    room = min(limit, max(65536, len(packed) * 4))
    while True:
        out = bytearray(room)
        try:
            written = module.decompress_into(packed, out)
        except Exception:
            if room >= limit:
                raise CorruptBatch(f"{codec} payload is corrupt or exceeds {limit} bytes") from None
            room = min(limit, room * 4)
            continue
        if written > room:
            raise CorruptBatch(f"{codec} payload exceeds {limit} bytes")
        if written == room and room < limit:  # may have been cut off exactly at the end
            room = min(limit, room * 4)
            continue
        return bytes(out[:written])
