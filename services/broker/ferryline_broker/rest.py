"""REST on a broker: metadata, and records that come from people with curl.

``GET  /v1/metadata?revision=``
``POST /v1/topics/{topic}/records``          {"records": [{"key", "value", "headers", "partition"}, ...]}
``POST /v1/exchanges/{exchange}/publish``    {"records": [{"routing_key", "key", "value", "headers"}, ...], "mandatory"}

Keys and values are UTF-8 text, or ``{"base64": "..."}``. Any broker takes them; what belongs to others it forwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from ferryline.protocol.access import TOPIC, WRITE
from ferryline.protocol.errors import FerrylineError, InvalidArgument, Unroutable
from ferryline.protocol.exchanges import HEADER_EXCHANGE, HEADER_ROUTING_KEY, check_routing_key
from ferryline.protocol.limits import HEADER_NAME_BYTES_MAX, OFFSET_MAX, check_name, check_range
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.partitioner import partition_of
from ferryline.protocol.routing import RoutingTable
from ferryline_broker.appending import Appended, Appender, Encoded, Placed, shown
from ferryline_broker.rest_models import PublishIn, RecordIn, RecordsIn
from ferryline_broker.rest_shared import query_int, raw_bytes
from ferryline_broker.view import ClusterView
from ferryline_service.access.caller import UNCHECKED
from ferryline_service.access.gate import CALLER
from ferryline_service.access.quotas import Quotas
from ferryline_service.errors import read_json

COPIES_MAX = 100_000  # of records of one request, over all topics that they reach
COPIED_BYTES_MAX = 64 * 1024 * 1024  # of those: a fan-out of a thousand would make gigabytes of one request


class RestApi:
    """Handlers of the routes above; records go through the same cores as those of sessions."""

    def __init__(self, view: ClusterView, appender: Appender, quotas: Quotas | None = None) -> None:
        self._view = view
        self._quotas = quotas or Quotas()
        self._appender = appender
        self._routing = RoutingTable(view.metadata.exchanges)

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/metadata", self.metadata),
            web.post("/v1/topics/{topic}/records", self.append),
            web.post("/v1/exchanges/{exchange}/publish", self.publish),
        ]

    # -- handlers -----------------------------------------------------------------------------------

    async def metadata(self, request: web.Request) -> web.Response:
        """What this broker knows of the cluster; nothing but the revision if that is known already."""
        known = query_int(request, "revision", -1, -1, OFFSET_MAX)
        answer = self._view.metadata.answer()
        fields: dict[str, Any] = {name: getattr(answer, name) for name in answer.__struct_fields__}
        if known >= answer.revision:
            fields.update(full=False, brokers=[], topics=[], partitions=[])
        shown = {name: _plain(value) for name, value in fields.items()}
        return web.Response(body=msgspec.json.encode(shown), content_type="application/json")

    async def append(self, request: web.Request) -> web.Response:
        """Append records; those of partitions that another broker leads are forwarded to it, once."""
        topic = self._view.topic_named(request.match_info["topic"])
        asked = RecordsIn.model_validate(await read_json(request))
        placed: list[Placed] = []
        for index, record in enumerate(asked.records):
            encoded = _encoded(record, index)
            placed.append(Placed(topic, self._partition(topic, record.partition, encoded[0], index), encoded))
        outcomes = await self._append(request, placed)
        failed = [outcome for outcome in outcomes if isinstance(outcome, FerrylineError)]
        if failed and len({one.partition for one in placed}) == 1:
            raise failed[0]
        results = [
            {"partition": one.partition, **shown(outcome)} for one, outcome in zip(placed, outcomes, strict=True)
        ]
        return web.json_response({"results": results}, status=207 if failed else 200)

    async def publish(self, request: web.Request) -> web.Response:
        """Publish records to an exchange: each goes to the topics that its bindings name."""
        exchange = check_name(request.match_info["exchange"], "exchange")
        asked = PublishIn.model_validate(await read_json(request))
        caller = request.get(CALLER, UNCHECKED)
        placed: list[Placed] = []
        owners: list[int] = []  # which record each of them is a copy of
        size = 0
        for index, record in enumerate(asked.records):
            key, value, headers = _encoded(record, index)
            headers = [pair for pair in headers if pair[0] not in (HEADER_EXCHANGE, HEADER_ROUTING_KEY)]
            topics = self._routed(exchange, check_routing_key(record.routing_key), headers)
            if not topics and asked.mandatory:
                raise Unroutable(f"records.{index}: exchange {exchange}: no binding takes it", exchange=exchange)
            headers += [(HEADER_EXCHANGE, exchange.encode()), (HEADER_ROUTING_KEY, record.routing_key.encode())]
            size += len(topics) * _size((key, value, headers))
            if len(placed) + len(topics) > COPIES_MAX or size > COPIED_BYTES_MAX:
                raise InvalidArgument(
                    f"records: those up to {index} make over {COPIES_MAX} copies or {COPIED_BYTES_MAX} bytes of them;"
                    " publish fewer at once",
                    field="records",
                )
            for topic in topics:
                caller.check(WRITE, TOPIC, topic.name)
                placed.append(Placed(topic, self._partition(topic, None, key, index), (key, value, headers)))
                owners.append(index)
        outcomes = await self._append(request, placed)
        results: list[dict[str, Any]] = [{"topics": {}} for _ in asked.records]
        for owner, one, outcome in zip(owners, placed, outcomes, strict=True):
            results[owner]["topics"][one.topic.name] = {"partition": one.partition, **shown(outcome)}
        failed = any(isinstance(outcome, FerrylineError) for outcome in outcomes)
        return web.json_response({"results": results}, status=207 if failed else 200)

    # -- inside -------------------------------------------------------------------------------------

    async def _append(self, request: web.Request, placed: list[Placed]) -> list[Appended | FerrylineError]:
        """Raises QuotaExceeded, with nothing appended. What is forwarded is paid for here: nodes have no quota."""
        caller = request.get(CALLER, UNCHECKED)
        if not caller.limited:
            return await self._appender.append(placed)
        sizes = [_size(one.record) for one in placed]
        self._quotas.spend(caller, records=len(sizes), bytes=sum(sizes))
        try:
            outcomes = await self._appender.append(placed)
        except FerrylineError:  # nothing was appended
            self._quotas.give_back(caller, records=len(sizes), bytes=sum(sizes))
            raise
        failed = [size for size, one in zip(sizes, outcomes, strict=True) if getattr(one, "definite", False)]
        self._quotas.give_back(caller, records=len(failed), bytes=sum(failed))
        return outcomes

    def _partition(self, topic: TopicMeta, wanted: int | None, key: bytes | None, index: int) -> int:
        count = topic.config.partitions
        if wanted is not None:
            return check_range(wanted, f"records.{index}.partition", 0, count - 1)
        return self._appender.spread(topic, index) if key is None else partition_of(key, count)

    def _routed(self, exchange: str, routing_key: str, headers: list[tuple[str, bytes | None]]) -> list[TopicMeta]:
        """The topics that a record reaches. Raises UnknownExchange."""
        exchanges = self._view.metadata.exchanges
        if self._routing.exchanges is not exchanges:
            self._routing = RoutingTable(exchanges, self._routing)
        found = (self._view.metadata.topic(name) for name in self._routing.route(exchange, routing_key, headers))
        return [topic for topic in found if topic is not None]


def _encoded(record: RecordIn, index: int) -> Encoded:
    headers: list[tuple[str, bytes | None]] = []
    for name, value in record.headers.items():
        if len(name.encode(errors="replace")) > HEADER_NAME_BYTES_MAX:
            raise InvalidArgument(f"records.{index}.headers: name over {HEADER_NAME_BYTES_MAX} bytes", field="headers")
        headers.append((name, raw_bytes(value, f"records.{index}.headers.{name[:40]}")))
    return raw_bytes(record.key, f"records.{index}.key"), raw_bytes(record.value, f"records.{index}.value"), headers


def _size(record: Encoded) -> int:
    key, value, headers = record
    return len(key or b"") + len(value or b"") + sum(len(name) + len(content or b"") for name, content in headers)


def _plain(value: Any) -> Any:
    """Structs as objects with names: people read this."""
    if isinstance(value, msgspec.Struct):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return value
