"""Exchanges and bindings: where a record goes that names no topic, as AMQP 0-9-1 has it. Records of the coordinator.

An exchange holds its bindings. A binding leads to a topic or to another exchange, and says which records take it:

    direct     routing key equal to that of the binding
    topic      routing key, dotted words, matches the binding's pattern: ``*`` is one word, ``#`` is any number of words
    fanout     every record
    headers    the record has the binding's headers: all of them, or any

What none of its bindings takes goes to the exchange's alternate, if it has one. `routing` decides by these rules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from ferryline.protocol.errors import InvalidArgument
from ferryline.protocol.limits import check_name

DIRECT, TOPIC, FANOUT, HEADERS = "direct", "topic", "fanout", "headers"
EXCHANGE_TYPES = (DIRECT, TOPIC, FANOUT, HEADERS)
MATCH_ALL, MATCH_ANY = "all", "any"

ROUTING_KEY_BYTES_MAX = 255  # as in AMQP; bounds the words of a key, hence what matching may cost
BINDING_HEADERS_MAX = 20
BINDING_HEADER_BYTES_MAX = 255  # of a name, and of a value

# Headers that a published record carries, so that its reader knows the way it came.
HEADER_EXCHANGE = "fl-exchange"
HEADER_ROUTING_KEY = "fl-routing-key"


class BindingMeta(msgspec.Struct, array_like=True, frozen=True):
    """One way out of an exchange, to the topic or exchange ``target``. Two equal ones are the same binding.

    ``headers`` are sorted by name; a value of None asks only that the record has a header of that name. Make them with
    `binding_to`, which checks and sorts.
    """

    target: str
    to_exchange: bool = False
    routing_key: str = ""
    headers: tuple[tuple[str, str | None], ...] = ()
    match: str = MATCH_ALL  # of headers

    @property
    def id(self) -> str:
        """16 hex digits that name this binding among those of its exchange: made of its fields."""
        fields = [self.to_exchange, self.target, self.routing_key, self.headers, self.match]
        return hashlib.blake2b(msgspec.json.encode(fields), digest_size=8).hexdigest()


class ExchangeMeta(msgspec.Struct, array_like=True, frozen=True):
    """An exchange with its bindings. Names are one space of their own: a topic may have the same.

    ``alternate``: exchange that gets what no binding takes ("" for none). ``version`` rises with every change.
    """

    name: str
    type: str
    alternate: str = ""
    bindings: tuple[BindingMeta, ...] = ()
    version: int = 1


def binding_to(
    *,
    topic: str | None = None,
    exchange: str | None = None,
    routing_key: str = "",
    headers: Mapping[str, str | None] | None = None,
    match: str = MATCH_ALL,
) -> BindingMeta:
    """The binding that leads to a topic or to an exchange. Raises InvalidArgument or InvalidName, naming the field."""
    if (topic is None) == (exchange is None):
        raise InvalidArgument("topic, exchange: a binding leads to one of them; name either", field="topic")
    target = check_name(topic) if topic is not None else check_name(exchange, "exchange")
    if match not in (MATCH_ALL, MATCH_ANY):
        raise InvalidArgument(f"match: {match!r:.40} is neither 'all' nor 'any'", field="match")
    check_routing_key(routing_key)
    return BindingMeta(target, exchange is not None, routing_key, _sorted_headers(headers or {}), match)


def check_routing_key(key: object) -> str:
    """Return ``key`` if it may be a routing key or a pattern. Raises InvalidArgument naming the limit."""
    if not isinstance(key, str):
        raise InvalidArgument(f"routing_key: expected text, got {type(key).__name__}", field="routing_key")
    size = _encoded_size(key, "routing_key")
    if size > ROUTING_KEY_BYTES_MAX:
        raise InvalidArgument(
            f"routing_key: {size} bytes are over the limit of {ROUTING_KEY_BYTES_MAX}",
            field="routing_key",
            limit=ROUTING_KEY_BYTES_MAX,
        )
    return key


def _sorted_headers(headers: Mapping[str, str | None]) -> tuple[tuple[str, str | None], ...]:
    if len(headers) > BINDING_HEADERS_MAX:
        raise InvalidArgument(
            f"headers: {len(headers)} are over the limit of {BINDING_HEADERS_MAX}",
            field="headers",
            limit=BINDING_HEADERS_MAX,
        )
    for name, value in headers.items():
        if not isinstance(name, str) or not (value is None or isinstance(value, str)) or not name:
            raise InvalidArgument(
                f"headers: names are text and values text or None, not {name!r:.40}: {value!r:.40}", field="headers"
            )
        for text in (name, value or ""):
            if _encoded_size(text, "headers") > BINDING_HEADER_BYTES_MAX:
                raise InvalidArgument(
                    f"headers: {text[:40]!r}... is over the limit of {BINDING_HEADER_BYTES_MAX} bytes",
                    field="headers",
                    limit=BINDING_HEADER_BYTES_MAX,
                )
    return tuple(sorted(headers.items()))


def _encoded_size(text: str, field: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise InvalidArgument(f"{field}: {text[:40]!r} is no valid Unicode", field=field) from None
