"""Frames: how requests and answers travel on a session (one WebSocket, binary, uncompressed).

One WebSocket message is one frame, little endian::

    kind u8 | flags u8 | reserved u16 | correlation u32 | header_length u32 | header | payload

``header`` is a msgspec struct in MessagePack (`messages.py`); ``payload`` is record batches, untouched. An answer
carries the kind and correlation of its request with FLAG_ANSWER; an error answer adds FLAG_ERROR and its header is an
ErrorInfo. FLAG_MORE says that further answers to this correlation follow. Kinds without an answer use correlation 0.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any, TypeVar

import msgspec

from ferryline.protocol.errors import FerrylineError, MalformedRequest
from ferryline.protocol.limits import FRAME_BYTES_MAX, FRAME_HEADER_BYTES_MAX

PREFIX = struct.Struct("<BBHII")
FLAG_ANSWER = 0x01
FLAG_ERROR = 0x02
FLAG_MORE = 0x04

_SHORT = struct.Struct("!BBI").pack
_MEDIUM = struct.Struct("!BBHI").pack
_LONG = struct.Struct("!BBQI").pack
_BINARY, _MASKED = 0x82, 0x80  # FIN + binary

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[type, msgspec.msgpack.Decoder[Any]] = {}
T = TypeVar("T")


class Kind(IntEnum):
    """What a frame asks for. Numbers are forever; a retired one is never used again."""

    HELLO = 1
    # client -> broker
    PRODUCE = 10
    FETCH = 11
    OFFSETS = 12
    CLAIM = 13
    COMMIT = 14
    COMMITTED = 15
    # anyone -> broker or coordinator
    METADATA = 16
    # receivers of queues -> broker
    RECEIVE = 17
    SETTLE = 18
    KEEP = 19
    QUEUE = 20
    # secondary <-> primary; streams, no correlation
    REPLICA_FETCH = 30
    REPLICA_DATA = 31
    REPLICA_PROGRESS = 32
    # broker -> coordinator
    REGISTER = 40
    HEARTBEAT = 41
    ALTER_ISR = 42
    RESIGN = 43
    REPORT = 44
    # coordinator -> broker; no answer
    HANDOVER = 45
    # broker -> coordinator
    ENSURE_TOPIC = 46
    # coordinator -> broker; no answer
    ACCESS = 47
    # broker -> coordinator
    STORED = 48
    # client -> coordinator
    GROUP_HEARTBEAT = 50


class Frame(msgspec.Struct, gc=False):
    """One received frame. ``header`` is still encoded; ``payload`` is a view into the message."""

    kind: int
    flags: int
    correlation: int
    header: memoryview
    payload: memoryview

    @property
    def is_answer(self) -> bool:
        return bool(self.flags & FLAG_ANSWER)

    @property
    def is_error(self) -> bool:
        return bool(self.flags & FLAG_ERROR)


def encode_frame(
    kind: int, correlation: int, header: Any, payload: bytes | bytearray | memoryview | None = None, *, flags: int = 0
) -> bytes:
    """One frame as bytes. To send several batches, join them once: ``b"".join`` is the only copy."""
    encoded = _encoder.encode(header)
    prefix = PREFIX.pack(kind, flags, 0, correlation, len(encoded))
    return b"".join((prefix, encoded, payload)) if payload is not None else prefix + encoded


def encode_frame_parts(
    kind: int, correlation: int, header: Any, parts: list[bytes | bytearray | memoryview], *, flags: int = 0
) -> bytes:
    encoded = _encoder.encode(header)
    return b"".join([PREFIX.pack(kind, flags, 0, correlation, len(encoded)), encoded, *parts])


def encode_error(kind: int, correlation: int, error: FerrylineError) -> bytes:
    return encode_frame(kind, correlation, error.info(), flags=FLAG_ANSWER | FLAG_ERROR)


def decode_frame(message: bytes | bytearray) -> Frame:
    """Split a message into prefix, header and payload. Raises MalformedRequest, naming the field, on nonsense."""
    if len(message) < PREFIX.size:
        raise MalformedRequest(f"frame: {len(message)} bytes is shorter than the {PREFIX.size}-byte prefix")
    if len(message) > FRAME_BYTES_MAX:
        raise MalformedRequest(f"frame: {len(message)} bytes is over the limit of {FRAME_BYTES_MAX}")
    kind, flags, _, correlation, header_length = PREFIX.unpack_from(message)
    end = PREFIX.size + header_length
    if header_length > FRAME_HEADER_BYTES_MAX or end > len(message):
        raise MalformedRequest(f"header_length: {header_length} does not fit a frame of {len(message)} bytes")
    view = memoryview(message)
    return Frame(kind, flags, correlation, view[PREFIX.size : end], view[end:])


def decode_header(header: bytes | memoryview, kind: type[T]) -> T:
    """The typed header of a frame. Raises MalformedRequest with the path of the wrong field."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        return decoder.decode(header)  # type: ignore[no-any-return]
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MalformedRequest(f"{kind.__name__}: {str(error)[:300]}") from None


def encode_value(value: Any) -> bytes:
    """MessagePack of a struct outside a frame: state entries, store records, checkpoints."""
    return _encoder.encode(value)


def masked_prefix(size: int) -> bytes:
    """Head of a client's binary WebSocket frame that carries ``size`` bytes under a mask of zeros."""
    if size < 126:
        return _SHORT(_BINARY, _MASKED | size, 0)
    if size < 65536:
        return _MEDIUM(_BINARY, _MASKED | 126, size, 0)
    return _LONG(_BINARY, _MASKED | 127, size, 0)
