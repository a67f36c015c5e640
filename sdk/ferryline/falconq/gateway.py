"""FalconQ's HTTP, in the clear and on the loopback only: routes, parameters, and errors as JSON. See docs/falconq.md.

``POST /topic/{t}/publish``                                    {"message", "priority": "high" | "low", "partition"}
``GET  /topic/{t}/consume?consumerID=&batch=&partition=&ack=``
``GET  /topic/{t}/peek?offset=&batch=&partition=``
``GET  /topics``, ``GET /topics/{t}/partitions``
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import msgspec
from aiohttp import web

from ferryline.falconq.consumers import BATCH_MAX, Consumers
from ferryline.falconq.files import PositionFiles
from ferryline.falconq.peeking import bounds, peeked
from ferryline.falconq.primaries import Primaries
from ferryline.falconq.shown import HIGH
from ferryline.protocol.errors import FerrylineError, Forbidden, InternalError, InvalidArgument, UnknownTopic
from ferryline.protocol.limits import HTTP_BODY_BYTES_MAX, OFFSET_MAX, check_name, check_range

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.producer import Producer
    from ferryline.protocol.metadata import TopicMeta

log = logging.getLogger("ferryline.falconq")

BATCH_DEFAULT = 10
REPLICATION = 2
_PEEK_S = 10.0
_WRITE_S = 30.0  # whoever does not read for so long has gone; others of this consumer wait meanwhile
_MISSING: Any = msgspec.UNSET
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Publish(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a publish. ``message`` may be any JSON."""

    message: Any = _MISSING
    priority: Literal["high", "low"] = "low"
    partition: int | None = None


def is_loopback(host: str) -> bool:
    """Whether a name or address, with or without a port, means this machine and no other."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


class Gateway:
    """The handlers. ``partitions``: of topics that a publish creates."""

    def __init__(self, client: Client, producer: Producer, files: PositionFiles, partitions: int) -> None:
        self._client = client
        self._producer = producer
        self._partitions = partitions
        self._consumers = Consumers(client, files)
        self._primaries = Primaries(client, min(client.timeout, _PEEK_S))

    def application(self) -> web.Application:
        app = web.Application(middlewares=[_answer_errors], client_max_size=HTTP_BODY_BYTES_MAX)
        app.router.add_routes(
            [
                web.post("/topic/{topic}/publish", self.publish),
                web.get("/topic/{topic}/consume", self.consume),
                web.get("/topic/{topic}/peek", self.peek),
                web.get("/topics", self.topics),
                web.get("/topics/{topic}/partitions", self.partitions),
            ]
        )
        return app

    # -- handlers -----------------------------------------------------------------------------------

    async def publish(self, request: web.Request) -> web.Response:
        """Append one message; 201 when it is on every in-sync replica's disk. The first one creates the topic."""
        asked = _body(await request.read())
        name = check_name(request.match_info["topic"])
        try:
            topic = await self._client.learn_topic(name)
        except UnknownTopic:
            topic = await self._create(name)
        partition = _within(topic, asked.partition)
        headers = HIGH if asked.priority == "high" else None
        stored = await self._producer.send(name, asked.message, headers=headers, partition=partition)
        shown = {"topic": stored.topic, "partition": stored.partition, "offset": stored.offset}
        return web.json_response(shown, status=201)

    async def consume(self, request: web.Request) -> web.StreamResponse:
        """The next messages of a consumer, high before low. The call says that its last answer was processed."""
        topic = await self._client.learn_topic(request.match_info["topic"])
        consumer = request.query.get("consumerID")
        if consumer is None:
            raise InvalidArgument("consumerID: missing", field="consumerID")
        check_name(consumer, "consumerID")
        batch = _number(request, "batch", BATCH_DEFAULT, 1, BATCH_MAX)
        partition = _within(topic, _number(request, "partition", None, 0, OFFSET_MAX))
        async with self._consumers.turn(topic, consumer, partition) as turn:
            repeated = await turn.next(batch, request.query.get("ack"))
            position = turn.position
            shown = {
                "topic": topic.name,
                "consumerID": consumer,
                "messages": position.messages,
                "ack": position.token or position.processed,
                "repeated": repeated,
            }
            response = web.json_response(shown)
            if await _write(request, response):
                turn.written()
        return response

    async def peek(self, request: web.Request) -> web.Response:
        """Messages from an offset on, in the order of the log; nobody's position moves."""
        topic = await self._client.learn_topic(request.match_info["topic"])
        offset = _number(request, "offset", 0, 0, OFFSET_MAX)
        batch = _number(request, "batch", BATCH_DEFAULT, 1, BATCH_MAX)
        partition = _within(topic, _number(request, "partition", None, 0, OFFSET_MAX))
        wanted = range(topic.config.partitions) if partition is None else range(partition, partition + 1)
        messages = await peeked(self._client, self._primaries, topic, wanted, offset, batch)
        return web.json_response({"topic": topic.name, "messages": messages})

    async def topics(self, _: web.Request) -> web.Response:
        """Names of all topics."""
        found = await self._client.admin.list_topics()
        return web.json_response({"topics": [topic.name for topic in found]})

    async def partitions(self, request: web.Request) -> web.Response:
        """Partitions of a topic: who leads each, and its messages are at offsets in [start, end)."""
        topic = await self._client.learn_topic(request.match_info["topic"])
        found = await bounds(self._client, topic, range(topic.config.partitions))
        shown = [
            {
                "partition": number,
                "primary": self._client.routing.route((topic.id, number)).broker,
                "start": start,
                "end": end,
            }
            for number, (start, end) in sorted(found.items())
        ]
        return web.json_response({"topic": topic.name, "partitions": shown})

    # -- inside -------------------------------------------------------------------------------------

    async def _create(self, name: str) -> TopicMeta:
        """Two publishers may do this at the same time: the second one finds the topic there."""
        brokers = [broker for broker in await self._client.admin.list_brokers() if not broker.fenced]
        replication = max(1, min(REPLICATION, len(brokers)))
        await self._client.admin.create_topic(
            name, exist_ok=True, partitions=self._partitions, replication=replication
        )  # fmt: skip
        return await self._client.learn_topic(name)


def _body(raw: bytes) -> _Publish:
    try:
        asked = msgspec.json.decode(raw, type=_Publish)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgument(f"body: {str(error)[:200]}", field="body") from None
    if asked.message is _MISSING:
        raise InvalidArgument(
            'message: missing; the body is {"message": ..., "priority": "high" or "low"}', field="message"
        )
    return asked


def _number(request: web.Request, name: str, default: Any, low: int, high: int) -> Any:
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise InvalidArgument(f"{name}: {text[:40]!r} is not a number in {low}..{high}", field=name)
    return check_range(int(text), name, low, high)


async def _write(request: web.Request, response: web.Response) -> bool:
    """Send the answer now. Returns whether its caller was there to the end, as far as can be seen from here."""
    try:
        async with asyncio.timeout(_WRITE_S):
            await response.prepare(request)
            await response.write_eof()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
    return request.transport is not None and not request.transport.is_closing()


def _within(topic: TopicMeta, partition: int | None) -> int | None:
    if partition is not None:
        check_range(partition, "partition", 0, topic.config.partitions - 1)
    return partition


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse who is not on this machine, and tell every failure as JSON."""
    error: FerrylineError
    status = None
    try:
        _check_origin(request)
        return await handler(request)
    except FerrylineError as raised:
        error = raised
    except web.HTTPException as http:
        if http.status < 400:
            raise
        error, status = InvalidArgument(f"{request.method} {request.path[:200]}: {http.reason}"), http.status
    except ConnectionResetError:
        error = InternalError("the caller was gone before it was answered")  # nobody hears this
    except Exception as unexpected:
        log.exception("%s %s", request.method, request.path)
        error = InternalError(f"{type(unexpected).__name__}; see the log of the gateway")
    body = {"code": error.code, "detail": error.message, "retriable": error.retriable, "definite": error.definite}
    if error.remedy:
        body["remedy"] = error.remedy
    return web.Response(
        status=error.http_status if status is None else status,
        body=json.dumps(body).encode(),
        content_type="application/problem+json",
    )


def _check_origin(request: web.Request) -> None:
    """A page in a browser of this machine can send requests here, too: not in the name of another site."""
    origin = request.headers.get("Origin")
    if not is_loopback(request.host) or (origin is not None and not is_loopback(urlsplit(origin).netloc)):
        raise Forbidden("host: this gateway answers requests to localhost only", field="host")
