"""What a producer refuses before anything is sent. Every refusal names the field and its limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ferryline.accumulator import Pairs, TopicBuffer
from ferryline.protocol.errors import InvalidArgument, RecordTooLarge, SerializationFailed, UnknownPartition
from ferryline.protocol.limits import HEADER_NAME_BYTES_MAX, HEADERS_MAX
from ferryline.serializers import Encoded, Serializer

HeadersLike = Mapping[str, str | bytes | None] | Sequence[tuple[str, str | bytes | None]]


def check_partition(buffer: TopicBuffer, partition: object) -> None:
    """Raises UnknownPartition unless the topic has that partition."""
    if isinstance(partition, bool) or not isinstance(partition, int) or not 0 <= partition < buffer.partitions:
        raise UnknownPartition(
            f"partition: {partition!r} is not in 0..{buffer.partitions - 1} of topic {buffer.name}", field="partition"
        )


def pairs_of(headers: HeadersLike) -> Pairs:
    """Headers as the codec wants them. Raises InvalidArgument, naming the header and the limit."""
    items = headers.items() if isinstance(headers, Mapping) else headers
    pairs: Pairs = []
    for name, value in items:
        if type(name) is not str or not name or len(name.encode()) > HEADER_NAME_BYTES_MAX:
            raise InvalidArgument(
                f"headers: a name is text of 1..{HEADER_NAME_BYTES_MAX} bytes, not {name!r:.80}", field="headers"
            )
        if type(value) is str:
            value = value.encode()
        elif value is not None and type(value) is not bytes:
            raise InvalidArgument(
                f"headers: {name} is {type(value).__name__}, none of bytes, str, None", field="headers"
            )
        pairs.append((name, value))
    if len(pairs) > HEADERS_MAX:
        raise InvalidArgument(f"headers: {len(pairs)} is over the limit of {HEADERS_MAX}", field="headers")
    return pairs


def too_large(buffer: TopicBuffer, value: bytes | None, key: bytes | None, size: int) -> RecordTooLarge:
    """The refusal of a record of ``size`` bytes, naming its largest part and the limit."""
    parts = {"value": len(value or b""), "key": len(key or b"")}
    parts["headers"] = size - sum(parts.values())
    field = max(parts, key=lambda name: parts[name])
    limit = buffer.max_record_bytes
    return RecordTooLarge(
        f"{field}: the record takes {size} bytes ({field} {parts[field]}), topic {buffer.name} allows {limit}",
        field=field,
        limit=limit,
        size=size,
    )


def checked_serializer(serializer: Serializer) -> Callable[[Any], Encoded]:
    """A user's serializer: what it raises, and what it returns wrongly, is SerializationFailed."""

    def encode_value(value: Any) -> Encoded:
        try:
            data, content_type = serializer.encode(value)
        except Exception as error:
            raise SerializationFailed(f"value: {str(error)[:300]}", field="value") from error
        if data is not None and type(data) is not bytes:
            raise SerializationFailed(f"value: the serializer returned {type(data).__name__}, not bytes", field="value")
        return data, content_type

    return encode_value
