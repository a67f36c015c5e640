"""Exchanges and bindings: create, delete, bind, unbind. Every refusal names the field and its limits.

Bindings and alternates together make no cycle, and lead only to what exists: whatever is deleted takes along the
bindings that lead to it.
"""

from __future__ import annotations

from msgspec.structs import replace

from ferryline.protocol.errors import (
    Conflict,
    ExchangeExists,
    InvalidArgument,
    NotFound,
    Throttled,
    UnknownExchange,
    UnknownTopic,
)
from ferryline.protocol.exchanges import (
    DIRECT,
    EXCHANGE_TYPES,
    FANOUT,
    HEADERS,
    MATCH_ALL,
    MATCH_ANY,
    TOPIC,
    BindingMeta,
    ExchangeMeta,
)
from ferryline.protocol.limits import check_name
from ferryline_coordinator.core.change import Change
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.events import BindingAdded, BindingRemoved, ExchangeCreated, ExchangeDeleted
from ferryline_coordinator.core.records import encode_record, exchange_key
from ferryline_coordinator.core.tags import check_expected, exchange_tag


def check_binding(kind: str, binding: BindingMeta) -> None:
    """Refuse what an exchange of this type would not look at: the caller has another type in mind."""
    if kind in (FANOUT, HEADERS) and binding.routing_key:
        raise InvalidArgument(
            f"routing_key: {binding.routing_key[:64]!r}: a {kind} exchange looks at no routing key", field="routing_key"
        )
    if kind in (DIRECT, TOPIC, FANOUT) and binding.headers:
        raise InvalidArgument(f"headers: a {kind} exchange looks at no headers", field="headers")
    if kind in (DIRECT, TOPIC, FANOUT) and binding.match != MATCH_ALL:
        raise InvalidArgument(f"match: a {kind} exchange looks at no headers", field="match")
    if binding.match == MATCH_ANY and not binding.headers:
        raise InvalidArgument("headers: any of none never matches; name at least one", field="headers")


class Exchanges:
    """Carries out commands on exchanges. A refused one changes nothing."""

    def __init__(self, config: CoreConfig) -> None:
        self._config = config

    def create(self, change: Change, event: ExchangeCreated) -> None:
        name = check_name(event.name, "exchange")
        known = change.exchange(name)
        if known is not None:
            raise ExchangeExists(
                f"exchange {name} exists, of type {known.type}",
                exchange=name,
                type=known.type,
                alternate=known.alternate,
            )
        if event.type not in EXCHANGE_TYPES:
            raise InvalidArgument(f"type: {event.type[:40]!r} is none of {', '.join(EXCHANGE_TYPES)}", field="type")
        if event.alternate:
            self._existing(change, event.alternate, "alternate")
        if len(change.state.exchanges) >= self._config.exchanges_max:
            limit = self._config.exchanges_max
            raise Throttled(f"the cluster has {limit} exchanges", limit=limit)
        exchange = ExchangeMeta(name, event.type, event.alternate)
        self._put(change, exchange)
        change.reply(event.reply, exchange)

    def delete(self, change: Change, event: ExchangeDeleted) -> None:
        exchange = self._existing(change, event.name)
        check_expected(exchange_tag(exchange), event.expected)
        change.delete(exchange_key(exchange.name))
        self._forget(change, exchange.name, is_exchange=True)
        change.reply(event.reply, exchange)

    def bind(self, change: Change, event: BindingAdded) -> None:
        """A binding that is there already stays as it is: a lost answer is asked for again."""
        exchange, binding = self._existing(change, event.exchange), event.binding
        check_expected(exchange_tag(exchange), event.expected)
        check_binding(exchange.type, binding)
        if binding.to_exchange:
            target = self._existing(change, binding.target, "binding")
            self._refuse_cycle(change, exchange, target)
        elif change.topic(binding.target) is None:
            raise UnknownTopic(f"topic {binding.target} does not exist", topic=binding.target)
        if binding not in exchange.bindings:
            if len(exchange.bindings) >= self._config.bindings_max:
                limit = self._config.bindings_max
                raise Throttled(f"exchange {exchange.name} has {limit} bindings", limit=limit)
            exchange = replace(exchange, bindings=(*exchange.bindings, binding), version=exchange.version + 1)
            self._put(change, exchange)
        change.reply(event.reply, exchange)

    def unbind(self, change: Change, event: BindingRemoved) -> None:
        exchange = self._existing(change, event.exchange)
        check_expected(exchange_tag(exchange), event.expected)
        rest = tuple(binding for binding in exchange.bindings if binding.id != event.binding_id)
        if len(rest) == len(exchange.bindings):
            raise NotFound(
                f"exchange {exchange.name} has no binding {event.binding_id[:40]!r}",
                exchange=exchange.name,
                field="binding",
            )
        exchange = replace(exchange, bindings=rest, version=exchange.version + 1)
        change.put(exchange)
        change.reply(event.reply, exchange)

    def topic_deleted(self, change: Change, name: str) -> None:
        """The bindings to a topic go with it; a topic made again under its name is another one."""
        self._forget(change, name, is_exchange=False)

    # -- inside -------------------------------------------------------------------------------------

    def _existing(self, change: Change, name: str, field: str = "exchange") -> ExchangeMeta:
        exchange = change.exchange(check_name(name, field))
        if exchange is None:
            raise UnknownExchange(f"exchange {name} does not exist", exchange=name, field=field)
        return exchange

    def _forget(self, change: Change, name: str, *, is_exchange: bool) -> None:
        """Remove whatever leads to a topic or exchange. Costs time in proportion to all bindings: for rare commands."""
        for exchange in change.exchanges():
            rest = tuple(b for b in exchange.bindings if (b.target, b.to_exchange) != (name, is_exchange))
            alternate = "" if is_exchange and exchange.alternate == name else exchange.alternate
            if len(rest) != len(exchange.bindings) or alternate != exchange.alternate:
                change.put(replace(exchange, bindings=rest, alternate=alternate, version=exchange.version + 1))

    def _put(self, change: Change, exchange: ExchangeMeta) -> None:
        """Store one that has grown, unless all of them together would be more than one answer shall tell."""
        change.put(exchange)
        size, limit = sum(len(encode_record(record)) for record in change.exchanges()), self._config.exchange_bytes_max
        if size > limit:
            raise Throttled(f"all exchanges with their bindings would take {size} bytes, of {limit}", limit=limit)

    def _refuse_cycle(self, change: Change, source: ExchangeMeta, target: ExchangeMeta) -> None:
        came_from = {target.name: ""}
        ahead = [target.name]
        while ahead:
            name = ahead.pop()
            if name == source.name:
                way = [source.name]
                while name:
                    way.append(name)
                    name = came_from[name]
                # Found from the target on; told from the source on.
                raise Conflict(
                    f"exchange {target.name} leads back to {source.name}: {' -> '.join([way[0], *reversed(way[1:])])}",
                    field="exchange",
                )
            exchange = change.exchange(name)
            assert exchange is not None, name
            onward = [binding.target for binding in exchange.bindings if binding.to_exchange]
            for follower in [*onward, *([exchange.alternate] if exchange.alternate else [])]:
                if follower not in came_from:
                    came_from[follower] = name
                    ahead.append(follower)
