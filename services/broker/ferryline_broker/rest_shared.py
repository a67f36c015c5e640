"""What the broker's REST handlers share: bytes in JSON, numbers in queries, the refusal that names the primary."""

from __future__ import annotations

import base64
import binascii

from aiohttp import web

from ferryline.protocol.errors import FerrylineError, InvalidArgument, NotPrimary
from ferryline.protocol.limits import check_range
from ferryline_broker.core.events import Key
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.view import ClusterView

Bytes64 = dict[str, str]


def shown_bytes(value: bytes | None) -> str | Bytes64 | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}


def raw_bytes(value: str | Bytes64 | None, field: str) -> bytes | None:
    """What ``value`` stands for. Raises InvalidArgument, naming ``field``."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError:
            raise InvalidArgument(f"{field}: not valid UTF-8", field=field) from None
    if set(value) != {"base64"}:
        raise InvalidArgument(f'{field}: expected text or {{"base64": "..."}}', field=field)
    try:
        return base64.b64decode(value["base64"], validate=True)
    except (binascii.Error, ValueError):
        raise InvalidArgument(f"{field}.base64: not base64", field=field) from None


def query_int(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    text = request.query.get(name)
    return default if text is None else whole(text, name, low, high)


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
    error = view.not_here(topic_id, partition)
    if isinstance(error, NotPrimary):
        broker = view.broker(error.details.get("primary", 0))
        if broker is not None:
            error.details["primary_url"] = broker.external
    return error
