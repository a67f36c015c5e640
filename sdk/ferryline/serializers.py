"""From values to bytes and back, by type.

====================  ====================================  ===========================
type                  bytes                                 ``content-type`` header
====================  ====================================  ===========================
bytes, bytearray      as they are                           none
None                  no value (a tombstone)                none
str                   UTF-8                                 text/plain; charset=utf-8
msgspec.Struct        JSON                                  application/json
dataclass             JSON                                  application/json
pydantic model        JSON (``model_dump_json``)            application/json
dict, list, numbers   JSON                                  application/json
====================  ====================================  ===========================

JSON of msgspec: datetime, UUID, Decimal, enum and bytes (base64) included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from ferryline.protocol.errors import SerializationFailed

CONTENT_TYPE = "content-type"
JSON = b"application/json"
TEXT = b"text/plain; charset=utf-8"

Encoded = tuple[bytes | None, bytes | None]  # (data, content type)
Decoder = Callable[[bytes | None], Any]

_json = msgspec.json.Encoder()
_encoders: dict[type, Callable[[Any], Encoded]] = {}
_PLAIN_JSON = (dict, list, tuple, int, float, bool)


class Serializer(Protocol):
    """What a producer or consumer can be given instead of a type: ``encode`` and ``decode`` of one value."""

    def encode(self, value: Any) -> Encoded:
        """(bytes, content type or None) of a value."""
        ...

    def decode(self, data: bytes | None) -> Any:
        """The value of the bytes; None for a record without value."""
        ...


def encode(value: Any) -> Encoded:
    """Bytes and content type of a value. Raises SerializationFailed, naming the type and the reason."""
    kind = type(value)
    encoder = _encoders.get(kind)
    if encoder is None:
        encoder = _encoders[kind] = _encoder_for(value)
    try:
        return encoder(value)
    except SerializationFailed:
        raise
    except Exception as error:
        raise SerializationFailed(
            f"value: {kind.__name__} does not serialize: {str(error)[:300]}", field="value"
        ) from error


def _encoder_for(value: Any) -> Callable[[Any], Encoded]:
    if value is None:
        return lambda _: (None, None)
    if isinstance(value, bytes):
        return lambda v: (bytes(v), None)
    if isinstance(value, (bytearray, memoryview)):
        return lambda v: (bytes(v), None)
    if isinstance(value, str):
        return lambda v: (v.encode(), TEXT)
    if hasattr(type(value), "model_dump_json"):
        return lambda v: (v.model_dump_json().encode(), JSON)
    if isinstance(value, msgspec.Struct) or dataclasses.is_dataclass(value) or isinstance(value, _PLAIN_JSON):
        return lambda v: (_json.encode(v), JSON)
    raise SerializationFailed(
        f"value: {type(value).__name__} is none of bytes, str, None, msgspec.Struct, dataclass, pydantic model, dict, "
        "list, number; pass serializer=",
        field="value",
    )


def decoder_for(kind: Any) -> Decoder | None:
    """How to turn the bytes of a record into a ``kind``; None when bytes are wanted as they are.

    ``kind`` may be a type, a typing construct that msgspec understands (``list[Order]``), or a Serializer.
    """
    if kind is None or kind is bytes:
        return None
    if kind is str:
        return _decode_text
    if hasattr(kind, "decode") and hasattr(kind, "encode") and not isinstance(kind, type):
        return _checked(kind.decode, type(kind).__name__)
    if hasattr(kind, "model_validate_json"):
        validate = kind.model_validate_json
        return _checked(lambda data: None if data is None else validate(data), kind.__name__)
    decoder = msgspec.json.Decoder(kind if kind is not dict else dict[str, Any])
    name = getattr(kind, "__name__", str(kind))
    return _checked(lambda data: None if data is None else decoder.decode(data), name)


def _decode_text(data: bytes | None) -> str | None:
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise SerializationFailed(f"value is not UTF-8: {error}") from error


def _checked(decode: Callable[[bytes | None], Any], name: str) -> Decoder:
    def checked(data: bytes | None) -> Any:
        try:
            return decode(data)
        except Exception as error:
            raise SerializationFailed(f"value does not parse as {name}: {str(error)[:300]}") from error

    return checked
