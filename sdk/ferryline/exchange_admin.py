"""Administration of exchanges and bindings, a part of `Admin`. What exists is read from the cluster's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

from ferryline.calls import CoordinatorCalls
from ferryline.protocol.errors import ExchangeExists, UnknownExchange
from ferryline.protocol.exchanges import MATCH_ALL, ExchangeMeta, binding_to, check_routing_key
from ferryline.protocol.limits import check_name


class ExchangeAdmin(CoordinatorCalls):
    """Exchanges and bindings. A change returns when this client routes by it; other clients follow within a moment."""

    async def create_exchange(
        self,
        name: str,
        type: str,
        *,
        alternate: str | None = None,
        exist_ok: bool = False,
        timeout: float | None = None,
    ) -> ExchangeMeta:
        """Create an exchange without bindings. ``type``: "direct", "topic", "fanout" or "headers".

        ``alternate``: an exchange that gets what no binding takes. With ``exist_ok`` an exchange of the same type and
        alternate may be there. Raises ExchangeExists, InvalidArgument, UnknownExchange (of ``alternate``).
        """
        check_name(name, "exchange")
        body = {"name": name, "type": type, "alternate": alternate}
        try:
            await self._change("POST", "/v1/exchanges", body, timeout)
        except ExchangeExists as there:
            if not exist_ok or (there.details["type"], there.details["alternate"]) != (type, alternate or ""):
                raise
        await self._visible(lambda: name in self._client.routing.cluster.exchanges, timeout)
        return await self.describe_exchange(name, timeout=timeout)

    async def list_exchanges(self, *, timeout: float | None = None) -> list[ExchangeMeta]:
        """All exchanges with their bindings, by name."""
        await self._refresh(timeout)
        return sorted(self._client.routing.cluster.exchanges.values(), key=lambda exchange: exchange.name)

    async def describe_exchange(self, name: str, *, timeout: float | None = None) -> ExchangeMeta:
        """One exchange as it is now. Raises UnknownExchange."""
        check_name(name, "exchange")
        await self._refresh(timeout)
        exchange = self._client.routing.cluster.exchanges.get(name)
        if exchange is None:
            raise UnknownExchange(f"exchange: {name!r} does not exist", field="exchange", exchange=name)
        return exchange

    async def delete_exchange(self, name: str, *, timeout: float | None = None) -> None:
        """Delete an exchange, its bindings and those that lead to it. Raises UnknownExchange."""
        check_name(name, "exchange")
        await self._change("DELETE", f"/v1/exchanges/{quote(name)}", None, timeout)
        await self._visible(lambda: name not in self._client.routing.cluster.exchanges, timeout)

    async def bind(
        self,
        exchange: str,
        *,
        topic: str | None = None,
        to_exchange: str | None = None,
        routing_key: str = "",
        headers: Mapping[str, str | None] | None = None,
        match: str = MATCH_ALL,
        timeout: float | None = None,
    ) -> ExchangeMeta:
        """Bind a topic, or another exchange, to an exchange. A binding that is there already is left as it is.

        ``routing_key``: equal to that of the record (direct), or a pattern with ``*`` for a word and ``#`` for any
        number of words (topic). ``headers``: what a record must have, "all" or "any" of it as ``match`` says (headers);
        a value of None asks only that the header is there.

        Raises UnknownExchange, UnknownTopic, InvalidArgument, Conflict if records would go round in a circle.
        """
        check_name(exchange, "exchange")
        binding = binding_to(topic=topic, exchange=to_exchange, routing_key=routing_key, headers=headers, match=match)
        body = {
            "topic": topic,
            "exchange": to_exchange,
            "routing_key": routing_key,
            "headers": dict(binding.headers),
            "match": match,
        }
        answer = await self._change("POST", f"/v1/exchanges/{quote(exchange)}/bindings", body, timeout)
        return await self._as_of(exchange, answer["version"], timeout)

    async def unbind(
        self,
        exchange: str,
        *,
        topic: str | None = None,
        to_exchange: str | None = None,
        routing_key: str = "",
        headers: Mapping[str, str | None] | None = None,
        match: str = MATCH_ALL,
        timeout: float | None = None,
    ) -> ExchangeMeta:
        """Remove a binding, named by what it was made with. Raises UnknownExchange, NotFound."""
        check_name(exchange, "exchange")
        binding = binding_to(topic=topic, exchange=to_exchange, routing_key=routing_key, headers=headers, match=match)
        path = f"/v1/exchanges/{quote(exchange)}/bindings/{binding.id}"
        answer = await self._change("DELETE", path, None, timeout)
        return await self._as_of(exchange, answer["version"], timeout)

    async def topics_reached(
        self,
        exchange: str,
        routing_key: str = "",
        headers: Mapping[str, str | bytes | None] | None = None,
        *,
        timeout: float | None = None,
    ) -> list[str]:
        """The topics that a record published with these would reach now. Sends nothing. Raises UnknownExchange."""
        check_name(exchange, "exchange")
        check_routing_key(routing_key)
        await self._refresh(timeout)
        pairs = [(n, v.encode() if isinstance(v, str) else v) for n, v in (headers or {}).items()]
        return list(self._client.routing.table().route(exchange, routing_key, pairs))

    async def _as_of(self, name: str, version: int, timeout: float | None) -> ExchangeMeta:
        """The exchange once this client knows it in this version, or a later one."""
        cluster = self._client.routing.cluster
        await self._visible(
            lambda: (known := cluster.exchanges.get(name)) is not None and known.version >= version, timeout
        )
        return await self.describe_exchange(name, timeout=timeout)
