"""How the SDK and the services reach each other in a cluster of this kind: their own HTTP client, over `Network`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiohttp

from ferryline.client import Client
from ferryline.heartbeats import HeartbeatThread
from ferryline.protocol.errors import ConnectionFailed
from ferryline.tokens import TokenSource
from ferryline.transport import CONNECT_S, Connector
from ferryline_testing.lives import Life
from ferryline_testing.network import Network

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler


class NetworkConnector(aiohttp.BaseConnector):
    """Of aiohttp: connects over ``network`` as ``life``. No connection is kept for a second request, because the pool
    of aiohttp reads a clock of its own."""

    def __init__(self, network: Network, life: Life) -> None:
        super().__init__(force_close=True, limit=0)
        self._network, self._life = network, life

    async def _create_connection(self, req: Any, traces: Any, timeout: Any) -> ResponseHandler:
        try:
            async with asyncio.timeout(timeout.sock_connect):
                protocol = await self._network.connect(self._life, req.url.host, self._factory)
        except ConnectionRefusedError as error:
            raise aiohttp.ClientConnectorError(req.connection_key, error) from error
        made: ResponseHandler = protocol
        return made


class MemoryConnector(Connector):
    """Of the SDK: the same sessions over another network, without TLS."""

    def __init__(self, network: Network, life: Life, client: str) -> None:
        self.client = client
        self.connect_timeout = CONNECT_S
        self._network, self._life = network, life
        self._token = TokenSource("")
        self._http: aiohttp.ClientSession | None = None
        self._closed = False

    @property
    def http(self) -> aiohttp.ClientSession:
        if self._closed:
            raise ConnectionFailed("the client was closed")
        if self._http is None or self._http.closed:
            self._http = aiohttp.ClientSession(
                connector=NetworkConnector(self._network, self._life),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=None),
            )
        return self._http

    def sibling(self, client: str) -> Connector:
        return MemoryConnector(self._network, self._life, client)


class LoopHeartbeats(HeartbeatThread):
    """The heartbeats of group members as tasks of the one loop there is: a thread would live in real time.

    A handler that blocks the loop blocks its heartbeats too, and the watchdog for that is off: virtual time stands
    still while anything runs.
    """

    def __init__(self, client: Client) -> None:
        super().__init__(client)
        self._work: asyncio.Task[None] | None = None

    async def _start(self) -> None:
        if self._work is None:
            self._work = self._app_loop.create_task(self._main())
        await asyncio.wrap_future(self._started)

    async def close(self) -> None:
        if self._work is not None and self._stop is not None:
            self._stop.set()
            await asyncio.wait([self._work])

    def _call(self, function: Any, *args: Any) -> None:
        self._app_loop.call_soon(function, *args)

    async def _watch(self) -> None:
        return


def client_of(network: Network, life: Life, urls: list[str], *, timeout: float, name: str) -> Client:
    """A client of the SDK, not started. Everything above its connections is what production uses."""
    client = Client(
        urls, ca=None, token=None, timeout=timeout, name=name, connector=MemoryConnector(network, life, name)
    )
    client.heartbeats = LoopHeartbeats(client)
    return client
