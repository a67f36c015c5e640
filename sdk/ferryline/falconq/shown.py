"""Records of a topic as FalconQ's JSON, and its two priorities in the place of ten."""

from __future__ import annotations

import base64
from typing import Any

import msgspec

from ferryline.protocol.queue_messages import HEADER_PRIORITY, PRIORITIES, PRIORITY_DEFAULT
from ferryline.protocol.records import DecodedRecord
from ferryline.serializers import CONTENT_TYPE, JSON

Headers = list[tuple[str, bytes | None]]
HIGH: Headers = [(HEADER_PRIORITY, b"9")]  # what "high" becomes; "low" is a record without priority, as everybody's


def level_of(headers: Headers) -> int:
    """The priority of a record as brokers see it."""
    level = PRIORITY_DEFAULT
    for name, value in headers:
        if name == HEADER_PRIORITY and value is not None:
            known = value.isdigit() and len(value) <= 2 and int(value) < PRIORITIES
            level = int(value) if known else PRIORITY_DEFAULT
    return level


def shown(partition: int, offset: int, record: DecodedRecord) -> dict[str, Any]:
    """One message of an answer."""
    return {
        "message": _message(record.value, record.headers),
        "priority": "high" if level_of(record.headers) > PRIORITY_DEFAULT else "low",
        "partition": partition,
        "offset": offset,
        "timestamp_ms": record.timestamp,
    }


def _message(value: bytes | None, headers: Headers) -> Any:
    """What was published: text, or JSON; bytes of other producers that are neither as ``{"base64": ...}``."""
    if value is None:
        return None
    if (CONTENT_TYPE, JSON) in headers:
        try:
            return msgspec.json.decode(value)
        except msgspec.DecodeError:
            pass  # not what it says
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}
