"""The REST surface of exchanges and bindings. One short handler for each route, as in `rest`."""

from __future__ import annotations

from aiohttp import web

from ferryline.protocol.access import EXCHANGE, READ
from ferryline.protocol.errors import InvalidArgument, UnknownExchange
from ferryline.protocol.exchanges import ExchangeMeta, check_routing_key
from ferryline.protocol.limits import HEADERS_MAX, check_name
from ferryline.protocol.routing import RoutingTable
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.tags import exchange_tag
from ferryline_coordinator.driver import Driver
from ferryline_coordinator.models import Bind, CreateExchange
from ferryline_coordinator.rest import durable_state
from ferryline_coordinator.views import exchange_json
from ferryline_service.access.gate import CALLER
from ferryline_service.conditions import expected, tagged
from ferryline_service.errors import read_json
from ferryline_service.paging import page


class ExchangeRest:
    """Handlers by name of what they do; `routes` is the table of contents."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/exchanges", self.create_exchange),
            web.get("/v1/exchanges", self.list_exchanges),
            web.get("/v1/exchanges/{exchange}", self.get_exchange),
            web.delete("/v1/exchanges/{exchange}", self.delete_exchange),
            web.post("/v1/exchanges/{exchange}/bindings", self.add_binding),
            web.delete("/v1/exchanges/{exchange}/bindings/{binding}", self.remove_binding),
            web.get("/v1/exchanges/{exchange}/route", self.route_record),
        ]

    async def create_exchange(self, request: web.Request) -> web.Response:
        body = CreateExchange.model_validate(await read_json(request))
        alternate = body.alternate or ""
        exchange = await self._driver.ask(lambda reply: ev.ExchangeCreated(reply, body.name, body.type, alternate))
        return web.json_response(exchange_json(exchange), status=201)

    async def list_exchanges(self, request: web.Request) -> web.Response:
        """Those that the caller may read."""
        exchanges, caller = (await durable_state(self._driver)).exchanges, request[CALLER]
        known = [name for name in sorted(exchanges) if caller.may(READ, EXCHANGE, name)]
        names, following = page(request, "exchanges", known)
        shown = [exchange_json(exchanges[name]) for name in names]
        return web.json_response({"exchanges": shown, "next_cursor": following})

    async def get_exchange(self, request: web.Request) -> web.Response:
        """An exchange with its bindings."""
        name = check_name(request.match_info["exchange"], "exchange")
        exchange: ExchangeMeta | None = (await durable_state(self._driver)).exchanges.get(name)
        if exchange is None:
            raise UnknownExchange(f"exchange {name} does not exist", exchange=name)
        return tagged(request, exchange_json(exchange), exchange_tag(exchange))

    async def delete_exchange(self, request: web.Request) -> web.Response:
        """Deletes the bindings that lead to it, too."""
        name, seen = request.match_info["exchange"], expected(request)
        exchange = await self._driver.ask(lambda reply: ev.ExchangeDeleted(reply, name, seen))
        return web.json_response(exchange_json(exchange))

    async def add_binding(self, request: web.Request) -> web.Response:
        """Changes nothing if there is such a binding."""
        name, seen = request.match_info["exchange"], expected(request)
        binding = Bind.model_validate(await read_json(request)).binding()
        exchange = await self._driver.ask(lambda reply: ev.BindingAdded(reply, name, binding, seen))
        return tagged(request, {**exchange_json(exchange), "bound": binding.id}, exchange_tag(exchange), 201)

    async def remove_binding(self, request: web.Request) -> web.Response:
        name, binding_id, seen = request.match_info["exchange"], request.match_info["binding"], expected(request)
        exchange = await self._driver.ask(lambda reply: ev.BindingRemoved(reply, name, binding_id, seen))
        return tagged(request, exchange_json(exchange), exchange_tag(exchange))

    async def route_record(self, request: web.Request) -> web.Response:
        """Which topics a record with this routing key and these headers would reach."""
        state = await durable_state(self._driver)
        name = check_name(request.match_info["exchange"], "exchange")
        routing_key = check_routing_key(request.query.get("routing_key", ""))
        given = request.query.getall("header", [])
        if len(given) > HEADERS_MAX:
            raise InvalidArgument(f"header: {len(given)} are over the limit of {HEADERS_MAX}", field="header")
        headers = [(header.partition("=")[0], header.partition("=")[2].encode()) for header in given]
        topics = RoutingTable(state.exchanges).route(name, routing_key, headers)
        return web.json_response({"exchange": name, "routing_key": routing_key, "topics": list(topics)})
