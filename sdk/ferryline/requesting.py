"""Request and reply: who asks sends a record and waits for the one that answers it.

Replies come to a topic that the client makes for itself at its first request and deletes when it closes. A request
carries the topic's name and an id of its own; the reply carries the id back. Records otherwise: a request may be read
from the log or from a queue, by any number of repliers, and is kept, retried and dead-lettered like any record.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ferryline.message import Described, Message
from ferryline.options import check_seconds
from ferryline.protocol.errors import (
    ClientClosed,
    FerrylineError,
    InvalidArgument,
    RequestTimedOut,
    Throttled,
    UnknownTopic,
)
from ferryline.record_checks import HeadersLike, pairs_of
from ferryline.serializers import decoder_for

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.consumer import Consumer

log = logging.getLogger("ferryline.requesting")

HEADER_REPLY_TO = "fl-reply-to"  # topic that the reply is wanted in
HEADER_CORRELATION_ID = "fl-correlation-id"  # of the request; the reply has the same

WAITING_MAX = 10_000  # requests of one client without an answer
_RETENTION_MS = 3_600_000  # nobody reads a reply later than its request's timeout
_CLOSE_S = 5.0


class Requester:
    """The requests of one client, and its replies to others. Starts at the first use."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._producer = client.producer(linger=0.0)
        self._inbox: asyncio.Task[_Inbox] | None = None  # being opened, or open
        self._waiting: dict[str, asyncio.Future[Message[bytes]]] = {}

    async def request(
        self,
        target: str,
        payload: Any,
        *,
        reply: Any,
        routing_key: str | None,
        key: str | bytes | None,
        headers: HeadersLike | None,
        timeout: float,
    ) -> Any:
        """As `Client.request` says."""
        check_seconds(timeout, "timeout", 0.001, 86_400.0)
        decode = decoder_for(reply)
        asked = [] if headers is None else pairs_of(headers)
        if len(self._waiting) >= WAITING_MAX:
            raise Throttled(f"{WAITING_MAX} requests of this client wait for a reply", limit=WAITING_MAX)
        number = secrets.token_hex(16)
        waiter = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                asked.append((HEADER_REPLY_TO, (await self._reply_topic()).encode()))
                asked.append((HEADER_CORRELATION_ID, number.encode()))
                if routing_key is None:
                    await self._producer.send(target, payload, key, asked)
                else:
                    await self._producer.publish(target, payload, routing_key, asked, key=key, mandatory=True)
                message = await waiter
        except TimeoutError:
            raise RequestTimedOut(f"{target}: no reply within {timeout:g} s", target=target) from None
        finally:
            del self._waiting[number]
        return message.raw if decode is None else decode(message.raw)

    async def reply(self, message: Described, value: Any, headers: HeadersLike | None) -> bool:
        """As `Client.reply` says."""
        topic, number = message.headers.text(HEADER_REPLY_TO), message.headers.get(HEADER_CORRELATION_ID)
        if not topic or number is None:
            raise InvalidArgument("message: it asks for no reply", field="message")
        pairs = [*([] if headers is None else pairs_of(headers)), (HEADER_CORRELATION_ID, number)]
        await self._producer.start()
        try:
            await self._producer.send(topic, value, headers=pairs)
        except UnknownTopic:
            return False
        return True

    async def close(self) -> None:
        """Fail whoever waits, and delete the topic of replies. The client still runs."""
        inbox, self._inbox = self._inbox, None
        self._fail(ClientClosed("the client is closed"))
        if inbox is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_S):
                await (await inbox).close()
        except (FerrylineError, TimeoutError) as error:
            inbox.cancel()
            log.warning("the topic of replies may be left over: %s", error or type(error).__name__)

    # -- inside ------------------------------------------------------------------------------------

    async def _reply_topic(self) -> str:
        """The topic that replies come to; it is read from its end on before anybody is asked."""
        if self._inbox is None or (self._inbox.done() and (self._inbox.cancelled() or self._inbox.exception())):
            self._inbox = asyncio.get_running_loop().create_task(self._open())
        # Not cancelled with the request that came first: others wait for it, too, and the topic would be left over.
        return (await asyncio.shield(self._inbox)).topic

    async def _open(self) -> _Inbox:
        await self._producer.start()
        topic = f"reply.{secrets.token_hex(8)}"
        copies = min(2, len(self._client.routing.live_brokers()) or 1)
        await self._client.admin.create_topic(
            topic, partitions=1, replication=copies, flush="replicated", retention_ms=_RETENTION_MS
        )
        consumer = self._client.consumer(topic, start="end")
        await consumer.start()
        return _Inbox(self._client, topic, consumer, self._arrived, self._ended)

    def _arrived(self, message: Message[bytes]) -> None:
        waiter = self._waiting.get(message.headers.text(HEADER_CORRELATION_ID))
        if waiter is not None and not waiter.done():
            waiter.set_result(message)

    def _ended(self, error: FerrylineError) -> None:
        """Somebody deleted the topic: the next request makes another one."""
        self._inbox = None
        self._fail(error)

    def _fail(self, error: FerrylineError) -> None:
        for waiter in self._waiting.values():
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()  # its request may still be on the way out, and never look


class _Inbox:
    """A topic of replies and the task that reads it."""

    def __init__(
        self,
        client: Client,
        topic: str,
        consumer: Consumer[bytes],
        arrived: Callable[[Message[bytes]], None],
        ended: Callable[[FerrylineError], None],
    ) -> None:
        self.topic = topic
        self._client = client
        self._consumer = consumer
        self._arrived = arrived
        self._ended = ended
        self._task = asyncio.get_running_loop().create_task(self._read())

    async def close(self) -> None:
        await self._consumer.close()
        await asyncio.wait([self._task])
        await self._client.admin.delete_topic(self.topic, timeout=_CLOSE_S)

    async def _read(self) -> None:
        try:
            async for message in self._consumer:
                self._arrived(message)
        except FerrylineError as error:
            self._ended(error)
            await self._consumer.close()
