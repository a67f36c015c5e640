"""The fast path's question: does this broker still answer? A fresh TLS connection and GET /healthz, within a bound."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from urllib.parse import urlsplit

import aiohttp

from ferryline_coordinator.core.events import Probe, ProbeEnded

_REFUSAL_S = 0.3


async def refuses(url: str) -> bool:
    """Whether every address of the host refuses connections on that port: no process listens. Silence is no refusal."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    try:
        infos = await loop.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in infos:
            with socket.socket(family, kind, protocol) as connection:
                connection.setblocking(False)
                try:
                    async with asyncio.timeout(_REFUSAL_S):
                        await loop.sock_connect(connection, address)
                except ConnectionRefusedError:
                    continue
                return False
    except (OSError, TimeoutError):
        return False
    return bool(infos)


class Prober:
    """Runs probes as tasks; each ends in one `ProbeEnded`."""

    def __init__(
        self,
        tls: ssl.SSLContext | None,
        report: Callable[[ProbeEnded], None],
        connector: aiohttp.BaseConnector | None = None,
    ) -> None:
        self._tls = tls
        self._report = report
        self._tasks: set[asyncio.Task[None]] = set()
        # A kept connection would answer for a process that does not take new ones.
        self._http = aiohttp.ClientSession(
            connector=connector or aiohttp.TCPConnector(force_close=True, limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    def start(self, probe: Probe) -> None:
        if self._http.closed:
            return
        task = asyncio.get_running_loop().create_task(self._run(probe))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, probe: Probe) -> None:
        self._report(ProbeEnded(probe.probe, probe.broker_id, await self._alive(probe)))

    async def _alive(self, probe: Probe) -> bool:
        url = f"{probe.internal.rstrip('/')}/healthz"
        try:
            async with (
                asyncio.timeout(probe.timeout_ms / 1000),
                self._http.get(url, ssl=self._tls if self._tls is not None else True) as response,
            ):
                told = await response.json(content_type=None)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return False
        # Another process may have taken over its port.
        return response.status == 200 and isinstance(told, dict) and told.get("broker_id") == probe.broker_id

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._http.close()
