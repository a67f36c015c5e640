"""Ends connections whose other side takes its time: a request that never gets whole, an answer that nobody reads.

aiohttp waits for the first request of a connection, for the rest of a body and for a reader without any limit, so a few
thousand sockets that send a byte now and then would hold their buffers for ever. Sessions look after themselves: they
have pings, a limit for HELLO and one for unread bytes.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from ferryline_service.logs import get_logger

LOOK_S = 2.0
REQUEST_S = 15.0  # from connecting to the whole head of the first request; a TLS handshake may take some of it
IDLE_S = 75.0  # between two requests: longer than a pooling client keeps a connection that it does not use
UNREAD_S = 30.0  # without a byte taken by the other side
_log = get_logger()


@dataclass
class _Seen:
    """What a connection looked like at ``since``: as long as it does, it makes no progress."""

    requests: int
    unsent: int
    waiting: bool
    since: float


class SlowConnections:
    """Looks at the connections of a server now and then. `start` once it listens, `close` before it stops."""

    def __init__(
        self, runner: web.AppRunner, *, request_s: float = REQUEST_S, idle_s: float = IDLE_S, unread_s: float = UNREAD_S
    ) -> None:
        self.ended = 0
        self._runner = runner
        self._request_s, self._idle_s, self._unread_s = request_s, idle_s, unread_s
        self._seen: dict[Any, _Seen] = {}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._look_s = min(LOOK_S, request_s / 2)

    def start(self) -> None:
        self._timer = self._loop.call_later(self._look_s, self._look)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = self._loop.call_later(self._look_s, self._look)
        server = self._runner.server
        if server is None:
            return
        now, before, self._seen = self._loop.time(), self._seen, {}
        ended = 0
        for connection in server.connections:
            transport = connection.transport
            if transport is None or transport.is_closing():
                continue
            # aiohttp has no public way to these two; tests of this file fail if they change.
            requests, waiting = connection._request_count, connection._waiter is not None
            unsent = transport.get_write_buffer_size()
            seen = before.get(connection)
            if seen is None or (seen.requests, seen.unsent, seen.waiting) != (requests, unsent, waiting):
                seen = _Seen(requests, unsent, waiting, now)
            self._seen[connection] = seen
            if now - seen.since > self._patience(seen):
                ended += 1
                transport.abort()
        if ended:
            self.ended += ended
            _log.info("slow connections ended", count=ended, all_together=self.ended)

    def _patience(self, seen: _Seen) -> float:
        if seen.unsent:
            return self._unread_s
        if not seen.waiting:
            return float("inf")  # a request is being worked on: long polls and sessions have limits of their own
        return self._idle_s if seen.requests else self._request_s
