"""Sessions of this broker at other brokers, as a client with the certificate of a node: to produce there.

A session of the role broker carries replication and nothing else, so these are separate ones. Each is opened when it
is first needed, shared by whoever has something to send, and kept; there are at most SESSIONS_MAX.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp

from ferryline.protocol.errors import ConnectionFailed, ConnectionLost, PrimaryNotAvailable
from ferryline.protocol.frames import Frame
from ferryline.protocol.messages import ROLE_CLIENT, Hello, Message
from ferryline_broker.core.events import Bytes
from ferryline_broker.core.node import NodeCore
from ferryline_service.node import NodeConnection
from ferryline_service.tls import TlsFiles

SESSIONS_MAX = 16  # above it the one that was idle for longest is closed
_CONNECT_TIMEOUT_S = 2.0


class NodeSessions:
    """`request` opens what it needs. Used from the loop's thread only."""

    def __init__(self, node: NodeCore, http: aiohttp.ClientSession, tls: TlsFiles) -> None:
        self._node = node
        self._http = http
        self._tls = tls
        self._open: dict[int, NodeConnection] = {}  # by broker, the longest unused first
        self._opening: dict[int, asyncio.Task[NodeConnection]] = {}
        self._users: dict[NodeConnection, int] = {}  # requests on their way
        self._loop = asyncio.get_running_loop()
        self._closed = False

    async def request(
        self, broker_id: int, kind: int, header: Message, parts: Sequence[Bytes] = (), *, timeout_s: float
    ) -> Frame:
        """Ask a broker. Raises what it refuses with, or the errors of `NodeConnection`; after ConnectionLost and
        RequestTimedOut the request may have been carried out."""
        connection = await self._session(broker_id)
        self._users[connection] = self._users.get(connection, 0) + 1
        try:
            return await connection.request(kind, header, parts, timeout_s=timeout_s)
        finally:
            self._users[connection] -= 1
            if not self._users[connection]:
                del self._users[connection]

    async def _session(self, broker_id: int) -> NodeConnection:
        broker = self._node.metadata.brokers.get(broker_id)
        if broker is None:
            raise PrimaryNotAvailable(f"broker {broker_id} is not known", broker=broker_id)
        known = self._open.pop(broker_id, None)
        if known is not None and not known.closed and known.url == broker.internal:
            self._open[broker_id] = known  # now the latest used
            return known
        if known is not None:
            known.abort()  # it ended, or the broker is elsewhere now
        opening = self._opening.get(broker_id)
        if opening is None:
            opening = self._opening[broker_id] = self._loop.create_task(self._connect(broker_id, broker.internal))
            opening.add_done_callback(lambda task: self._opened(broker_id, task))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            if opening.cancelled():  # `close` came in between
                raise ConnectionLost("this broker is stopping") from None
            raise

    async def _connect(self, broker_id: int, url: str) -> NodeConnection:
        if self._closed:
            raise ConnectionFailed("this broker is stopping")
        node = self._node
        hello = Hello(role=ROLE_CLIENT, cluster_id=node.metadata.cluster_id, client=f"broker-{node.broker_id}")
        return await NodeConnection.connect(
            self._http,
            url,
            hello=hello,
            tls=self._tls.client,
            expect=f"broker-{broker_id}",
            timeout_s=_CONNECT_TIMEOUT_S,
        )

    def _opened(self, broker_id: int, task: asyncio.Task[NodeConnection]) -> None:
        self._opening.pop(broker_id, None)
        if task.cancelled() or task.exception() is not None:
            return  # whoever waits is told
        self._open[broker_id] = task.result()
        idle = [known for known, connection in self._open.items() if connection not in self._users]
        for known in idle[: max(0, len(self._open) - SESSIONS_MAX)]:
            if known != broker_id:
                self._open.pop(known).abort()

    def close(self) -> None:
        """End all sessions; whoever waits for an answer gets ConnectionLost."""
        self._closed = True
        for task in list(self._opening.values()):
            task.cancel()
        connections, self._open = self._open, {}
        for connection in connections.values():
            connection.abort()
