"""What a sender may ask of queues: priority, delay, time to live, an id. All of it travels in headers of the record."""

from __future__ import annotations

from time import time_ns

from ferryline.accumulator import Pairs
from ferryline.protocol.errors import InvalidArgument
from ferryline.protocol.queue_messages import (
    HEADER_DELIVER_AT,
    HEADER_EXPIRES_AT,
    HEADER_ID,
    HEADER_PRIORITY,
    PRIORITIES,
)
from ferryline.record_checks import HeadersLike, pairs_of

SECONDS_MAX = 365 * 86_400  # of delay and ttl: a year
ID_BYTES_MAX = 255


def delivery_headers(
    *, priority: int | None = None, delay: float | None = None, ttl: float | None = None, id: str | None = None
) -> Pairs:
    """The headers that say this, for `send_nowait` and `send_many`. Times count from now, by this machine's clock.

    Raises InvalidArgument, naming the field and its limits.
    """
    pairs: Pairs = []
    now_ms = time_ns() // 1_000_000
    if priority is not None:
        if type(priority) is not int or not 0 <= priority < PRIORITIES:
            raise InvalidArgument(f"priority: {priority!r} is not in 0..{PRIORITIES - 1}", field="priority")
        pairs.append((HEADER_PRIORITY, b"%d" % priority))
    if delay is not None:
        pairs.append((HEADER_DELIVER_AT, b"%d" % (now_ms + _in_ms(delay, "delay", 0.0))))
    if ttl is not None:
        if _in_ms(ttl, "ttl", 0.001) <= _in_ms(delay or 0.0, "delay", 0.0):
            raise InvalidArgument(f"ttl: {ttl:g} s end before the delay of {delay:g} s, so it would never be delivered",
                                  field="ttl")  # fmt: skip
        pairs.append((HEADER_EXPIRES_AT, b"%d" % (now_ms + _in_ms(ttl, "ttl", 0.001))))
    if id is not None:
        pairs.append((HEADER_ID, _id_bytes(id)))
    return pairs


def _id_bytes(id: object) -> bytes:
    data = id.encode(errors="surrogatepass") if type(id) is str else b""
    try:
        data.decode()
    except UnicodeDecodeError:  # half of a surrogate pair: no reader could tell what it was
        data = b""
    if not 0 < len(data) <= ID_BYTES_MAX:
        raise InvalidArgument(f"id: {id!r:.80} is not text of 1..{ID_BYTES_MAX} bytes", field="id")
    return data


def with_delivery(
    headers: HeadersLike | None, *, priority: int | None, delay: float | None, ttl: float | None, id: str | None
) -> Pairs:
    """``headers`` and those of the delivery options. Raises InvalidArgument, also when one of them stands there."""
    given = [] if headers is None else pairs_of(headers)
    asked = delivery_headers(priority=priority, delay=delay, ttl=ttl, id=id)
    names = {name for name, _ in given}
    for name, _ in asked:
        if name in names:
            raise InvalidArgument(f"headers: {name} stands there and is asked for by an argument, too", field="headers")
    return [*given, *asked]


def _in_ms(seconds: object, field: str, low: float) -> int:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not low <= seconds <= SECONDS_MAX:
        raise InvalidArgument(
            f"{field}: {seconds!r} is not a number of seconds in {low:g}..{SECONDS_MAX} (a year)",
            field=field,
            low=low,
            high=SECONDS_MAX,
        )
    return round(seconds * 1000)
