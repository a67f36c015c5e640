"""Writing frames to a session: whole WebSocket messages, in order, straight to the transport.

aiohttp's writer would copy each frame twice and draw a mask for it. The mask of RFC 6455 keeps scripts in browsers from
forging other protocols' bytes through proxies that do not know WebSockets; inside TLS nobody but the broker sees the
bytes, so the mask here is zero and the batches leave as they are. Pings and the closing handshake stay with aiohttp,
which writes whole frames too.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ferryline.protocol.errors import ConnectionLost, FerrylineError
from ferryline.protocol.frames import masked_prefix

Buffer = bytes | bytearray | memoryview
HIGH_BYTES = 1024 * 1024  # unsent; above it frames wait in the backlog, below it a frame never waits
JOIN_BYTES_MAX = 64 * 1024  # copying less than this is cheaper than a TLS record of its own


class Outgoing:
    """The sending half of one session. ``failed(error)`` is called through the loop, once, when it cannot go on.

    Buffers must not change until they are written; a batch that is sealed anew was answered or its session has ended.
    """

    def __init__(self, url: str, transport: asyncio.Transport, protocol: Any, failed: Callable[[FerrylineError], None]):
        self.backlog: deque[list[Buffer]] = deque()
        self.draining: asyncio.Task[None] | None = None  # present while the transport holds us back
        self._url = url
        self._transport = transport
        self._protocol = protocol  # aiohttp's: it knows when the transport has had enough
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        transport.set_write_buffer_limits(high=HIGH_BYTES)

    def send(self, head: bytes, parts: Sequence[Buffer]) -> None:
        """Write one frame now if the transport takes it, else keep the order in a backlog."""
        size = len(head)
        for part in parts:
            size += len(part)
        frame: list[Buffer] = [masked_prefix(size) + head, *parts]
        if size <= JOIN_BYTES_MAX:
            frame = [b"".join(frame)]
        if self.draining is not None:
            self.backlog.append(frame)
            return
        self._put(frame)
        if self._protocol.writing_paused:
            self.draining = self._loop.create_task(self._drain())

    def close(self) -> None:
        """Drop what is not written."""
        self.backlog.clear()

    def _put(self, frame: list[Buffer]) -> None:
        if self._transport.is_closing():
            # Told through the loop: the caller has not yet noted what it sent.
            self._loop.call_soon(self._failed, ConnectionLost(f"{self._url}: the connection is closed"))
        elif len(frame) == 1:
            self._transport.write(frame[0])
        else:
            self._transport.writelines(frame)

    async def _drain(self) -> None:
        try:
            while True:
                await self._protocol._drain_helper()  # aiohttp offers no public wait for a raw transport
                while self.backlog and not self._protocol.writing_paused:
                    self._put(self.backlog.popleft())
                if not self.backlog and not self._protocol.writing_paused:
                    return
        except (OSError, RuntimeError) as error:
            self._failed(ConnectionLost(f"{self._url}: {error or type(error).__name__}"))
        finally:
            self.draining = None
