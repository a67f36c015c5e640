"""The client: one connection to a cluster, shared by its producers and consumers."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from ferryline.connections import Connections, MetadataWatch
from ferryline.core.metadata import Routing
from ferryline.protocol.errors import ClientClosed, InvalidArgument, UnknownTopic
from ferryline.protocol.limits import check_name
from ferryline.protocol.metadata import TopicMeta
from ferryline.tokens import TokenLike
from ferryline.transport import Connector, check_url

if TYPE_CHECKING:
    from ferryline.admin import Admin
    from ferryline.consumer import Consumer
    from ferryline.dead_letters import DeadLetters
    from ferryline.heartbeats import HeartbeatThread
    from ferryline.message import Described
    from ferryline.producer import Producer
    from ferryline.queue_admin import Queue
    from ferryline.queues.receiver import Receiver
    from ferryline.record_checks import HeadersLike
    from ferryline.requesting import Requester

log = logging.getLogger("ferryline.client")

V = TypeVar("V")


class _Closable(Protocol):
    async def close(self) -> None: ...


def connect(
    urls: str | Sequence[str] | None = None,
    *,
    ca: str | os.PathLike[str] | None = None,
    token: TokenLike | None = None,
    timeout: float = 30.0,
    name: str = "",
) -> Client:
    """A client for a cluster; nothing is sent before ``async with`` or ``await client.start()``.

    ``urls``: one or several, of coordinators or brokers, also separated by commas; default FERRYLINE_URL, else the
    context that the command line uses (`ferryline context`), with its CA and token, else the cluster of `ferryline up`.
    ``ca``: path of the CA's certificate, default FERRYLINE_CA, else what the system trusts. ``token``: a text, or a
    function (async or not) that gives one and is called again when it is due or was refused; default FERRYLINE_TOKEN,
    else what `ferryline login` keeps for these addresses, "" for none. ``timeout``: seconds that a call without a
    deadline of its own may take. ``name`` is for the logs of the services.

    Raises InvalidArgument for a bad URL or CA, BadCredentials if what `ferryline login` kept cannot be read.
    """
    if urls is None:
        urls, ca, token = _of_context(ca, token)
    if isinstance(urls, str):
        urls = [url.strip() for url in urls.split(",") if url.strip()]
    if not urls:
        raise InvalidArgument("urls: at least one is needed", field="urls")
    if not 0 < timeout <= 3600:
        raise InvalidArgument(f"timeout: {timeout} s is outside (0, 3600]", field="timeout")
    ca_path = os.fspath(ca) if ca is not None else os.environ.get("FERRYLINE_CA") or None
    checked = [check_url(url) for url in urls]
    if token is None:
        from ferryline.login.credentials import login_token

        token = os.environ.get("FERRYLINE_TOKEN") or login_token(checked)
    return Client(
        checked,
        ca=ca_path,
        token=token,
        timeout=timeout,
        name=name,
    )


def _of_context(
    ca: str | os.PathLike[str] | None, token: TokenLike | None
) -> tuple[list[str], str | os.PathLike[str] | None, TokenLike | None]:
    """URLs, CA and token as the command line would take them; what is given here goes first."""
    from ferryline.cli.settings import UsageError, load

    try:
        settings = load({})
    except UsageError as error:
        raise InvalidArgument(f"urls: none were given, and the settings are wrong: {error}", field="urls") from None
    return (
        list(settings.url),
        ca if ca is not None else settings.ca,
        token if token is not None else settings.token or None,
    )


class Client:
    """One connection to a cluster. Made by `connect`; use it with ``async with``. For one event loop."""

    def __init__(
        self,
        urls: list[str],
        *,
        ca: str | None,
        token: TokenLike | None,
        timeout: float,
        name: str,
        connector: Connector | None = None,
    ) -> None:
        """Use `connect`. ``connector``: in place of one made of ``ca`` and ``token``."""
        self.urls = urls
        self.ca = ca
        self.token = token
        self.timeout = timeout
        self.name = name or f"ferryline-py/{os.getpid()}"
        self.routing = Routing()
        self.connector = connector or Connector(ca=ca, token=token, client=self.name)
        self.connections = Connections(self.connector, self.routing)
        self.watch = MetadataWatch(self.connections, urls, seed=secrets.randbits(63))
        self.closables: list[_Closable] = []  # producers and consumers, closed with the client
        self.heartbeats: HeartbeatThread | None = None  # started by the first member of a group, or receiver
        self.silent: dict[str, float] = {}  # coordinators that did not answer -> when to ask again
        self._requester: Requester | None = None
        self._closed = False

    async def __aenter__(self) -> Client:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Learn the cluster from the first address that answers. Raises ConnectionFailed when none does in time."""
        if self._closed:
            raise ClientClosed("the client is closed")
        self.watch.start()
        await self.watch.ready(timeout=self.timeout)

    async def close(self) -> None:
        """Close producers and consumers (they finish what they can), then every connection."""
        if self._closed:
            return
        requester, self._requester = self._requester, None
        if requester is not None:
            await requester.close()
        self._closed = True
        try:
            if self.closables:
                results = await asyncio.gather(*(item.close() for item in self.closables), return_exceptions=True)
                for result in results:
                    if isinstance(result, Exception):
                        log.warning("closing: %s", result)
        finally:
            if self.heartbeats is not None:
                await self.heartbeats.close()
            await self.watch.close()
            await self.connections.close()
            await self.connector.close()

    # -- parts -------------------------------------------------------------------------------------

    def producer(self, **options: Any) -> Producer:
        """A producer; options as of `Producer`."""
        from ferryline.producer import Producer

        return Producer(self, **options)

    @overload
    def consumer(self, topics: str | Sequence[str], *, value: type[V], **options: Any) -> Consumer[V]: ...

    @overload
    def consumer(self, topics: str | Sequence[str], **options: Any) -> Consumer[bytes]: ...

    def consumer(self, topics: str | Sequence[str], **options: Any) -> Consumer[Any]:
        """A consumer of one or several topics; options as of `Consumer`."""
        from ferryline.consumer import Consumer

        return Consumer(self, topics, **options)

    @overload
    def receiver(self, topic: str, *, group: str, value: type[V], **options: Any) -> Receiver[V]: ...

    @overload
    def receiver(self, topic: str, *, group: str, **options: Any) -> Receiver[bytes]: ...

    def receiver(self, topic: str, *, group: str, **options: Any) -> Receiver[Any]:
        """A receiver, which reads a topic as a queue; options as of `Receiver`."""
        from ferryline.queues.receiver import Receiver

        return Receiver(self, topic, group=group, **options)

    def queue(self, topic: str, group: str) -> Queue:
        """One queue group of a topic, as a whole: how much waits and why; pause, redrive, purge."""
        from ferryline.queue_admin import Queue

        return Queue(self, topic, group)

    def dead_letters(self, topic: str) -> DeadLetters:
        """What queues of a topic gave up: look at it, and send it back."""
        from ferryline.dead_letters import DeadLetters

        return DeadLetters(self, topic)

    @property
    def admin(self) -> Admin:
        """Topics, groups and brokers: what the coordinator decides."""
        from ferryline.admin import Admin

        return Admin(self)

    # -- request and reply -------------------------------------------------------------------------

    async def request(
        self,
        target: str,
        payload: Any,
        *,
        reply: Any = bytes,
        routing_key: str | None = None,
        key: str | bytes | None = None,
        headers: HeadersLike | None = None,
        timeout: float = 30.0,
    ) -> Any:
        """Send a record and wait for the reply to it. Returns the reply's value, as a ``reply`` (a type).

        ``target`` is a topic, or an exchange when a ``routing_key`` is given ("" for one that looks at none). The first
        request makes a topic for replies to this client; it is deleted when the client closes.

        Raises what `send` raises, Unroutable, and RequestTimedOut after ``timeout`` seconds: then the request may
        have been worked on all the same.
        """
        return await self._requests().request(
            target, payload, reply=reply, routing_key=routing_key, key=key, headers=headers, timeout=timeout
        )

    async def reply(self, message: Described, value: Any, *, headers: HeadersLike | None = None) -> bool:
        """Answer a request. False: whoever asked is gone. Raises InvalidArgument if the message asks for no reply."""
        return await self._requests().reply(message, value, headers)

    def _requests(self) -> Requester:
        if self._closed:
            raise ClientClosed("the client is closed")
        if self._requester is None:
            from ferryline.requesting import Requester

            self._requester = Requester(self)
        return self._requester

    # -- topics ------------------------------------------------------------------------------------

    async def learn_topic(self, name: str, *, timeout: float | None = None) -> TopicMeta:
        """The metadata of a topic, fetched if it is not known. Raises UnknownTopic if nobody knows it."""
        check_name(name)
        meta = self.routing.topic(name)
        if meta is None:
            limit = self.timeout if timeout is None else timeout
            await self.watch.ready(timeout=limit)
            meta = self.routing.topic(name)
            if meta is None:
                await self.watch.ask(timeout=limit, known=lambda: self.routing.topic(name) is not None)
                meta = self.routing.topic(name)
        if meta is None:
            raise UnknownTopic(f"topic: {name!r} does not exist", field="topic", topic=name)
        return meta
