"""What the broker's REST handlers share: bytes in JSON, numbers in queries, the refusal that names the primary."""

from __future__ import annotations

import base64
import binascii

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from ferryline.protocol.errors import FerrylineError, InvalidArgument, NotPrimary
from ferryline.protocol.limits import check_range
from ferryline_broker.core.events import Key
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.view import ClusterView

Bytes64 = dict[str, str]


class Base64(BaseModel):
    """Bytes that are no text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    base64: str = Field(pattern=r"^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$")


def shown_bytes(value: bytes | None) -> str | Bytes64 | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}


def raw_bytes(value: str | Base64 | None, field: str) -> bytes | None:
    """What ``value`` stands for. Raises InvalidArgument, naming ``field``."""
    if value is None:
        return None
    try:
        return value.encode() if isinstance(value, str) else base64.b64decode(value.base64, validate=True)
    except UnicodeEncodeError:
        raise InvalidArgument(f"{field}: not valid UTF-8", field=field) from None
    except (binascii.Error, ValueError):
        raise InvalidArgument(f"{field}.base64: not base64", field=field) from None


def query_int(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    text = request.query.get(name)
    return default if text is None else whole(text, name, low, high)


def query_flag(request: web.Request, name: str) -> bool:
    """Raises InvalidArgument for anything but true, false, 1 and 0."""
    text = request.query.get(name, "false")
    if text not in ("true", "false", "1", "0"):
        raise InvalidArgument(f"{name}: {text[:40]!r} is neither true nor false", field=name)
    return text in ("true", "1")


def whole(text: str, name: str, low: int, high: int) -> int:
    """An integer in [low, high]. Raises InvalidArgument, naming it and its limits."""
    try:
        value = int(text) if len(text) <= 20 and text.isascii() else None
    except ValueError:
        value = None
    if value is None:
        raise InvalidArgument(f"{name}: {text[:40]!r} is not an integer", field=name)
    return check_range(value, name, low, high)


def leads(driver: PartitionDriver, key: Key) -> bool:
    hosted = driver.replicas.get(key)
    return hosted is not None and not hosted.broken and hosted.core.primary is not None


def elsewhere(view: ClusterView, topic_id: str, partition: int) -> FerrylineError:
    """The refusal that names the primary and where it is."""
    return with_address(view, view.not_here(topic_id, partition))


def with_address(view: ClusterView, error: FerrylineError) -> FerrylineError:
    """The same error; if it names a primary, with its address."""
    if isinstance(error, NotPrimary):
        broker = view.broker(error.details.get("primary", 0))
        if broker is not None:
            error.details["primary_url"] = broker.external
    return error
