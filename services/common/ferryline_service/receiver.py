"""What a session receives, handed on in the pass of the loop in which it was read, and without copies of large frames.

aiohttp's reader copies each byte three times more, and what it has read waits in a queue for a task to wake up. This
protocol stands before aiohttp's on the transport of a session: plain binary messages go to the session, all else, the
end of the connection included, to aiohttp (`ferryline.protocol.incoming`). The SDK has the same
(`ferryline.receiver`), less a server's part.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from typing import Any, cast

from aiohttp import WSMessage, WSMsgType

from ferryline.protocol.incoming import SCRATCH_BYTES, Incoming

NOTE_S = 0.25  # aiohttp hears this often that the other side lives, or it would ping and miss the answer
_local = threading.local()


def _scratch() -> memoryview:
    """Of this thread, which has one loop."""
    try:
        return _local.scratch  # type: ignore[no-any-return]
    except AttributeError:
        _local.scratch = memoryview(bytearray(SCRATCH_BYTES))
        return _local.scratch  # type: ignore[no-any-return]


class Receiver(asyncio.BufferedProtocol):
    """Stands on ``transport``. ``server``: before the upgrade is answered, else right after it.

    Until `begin` messages go to aiohttp's queue, so that ``ws.receive()`` finds them. A server calls `upgraded` as soon
    as ``ws`` is prepared; what comes before that, early frames included, is aiohttp's, and so is all that follows them.
    """

    def __init__(self, transport: asyncio.Transport, ws: Any, *, size_max: int, server: bool) -> None:
        self.direct = False
        self._aiohttp = cast(Any, transport.get_protocol())
        self._ws = ws
        self._loop = asyncio.get_running_loop()
        self._noted = math.inf if server else 0.0  # a WebSocket that is not prepared has no heart yet
        self._message: Callable[[bytes | bytearray], None] = self.queue
        self._incoming = Incoming(
            _scratch(), self._take, self._pass, size_max=size_max, masked=server, trusted=not server
        )
        self._passed = server and bool(self._aiohttp._message_tail)
        if server:
            self._incoming.leave()
        transport.set_protocol(self)

    def upgraded(self) -> None:
        """Frames begin with the next byte, unless some have come already."""
        self._noted = 0.0
        if not self._passed:
            self._incoming.enter()

    def begin(self, message: Callable[[bytes | bytearray], None]) -> None:
        """From now on ``message`` gets what arrives; it must not raise."""
        if not self._ws._reader._buffer:  # else it would overtake what waits there
            self._message = message
            self.direct = True

    def queue(self, data: bytes | bytearray) -> None:
        """Leave a message to ``ws.receive()``."""
        self._ws._reader.feed_data(WSMessage(WSMsgType.BINARY, data, ""), len(data))

    def _take(self, data: bytes | bytearray) -> None:
        self._message(data)

    def _pass(self, data: bytes) -> None:
        self._passed = True
        self._aiohttp.data_received(data)

    # -- asyncio.BufferedProtocol -------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._incoming.room()

    def buffer_updated(self, nbytes: int) -> None:
        now = self._loop.time()
        if now - self._noted > NOTE_S:
            self._noted = now
            self._ws._on_data_received()
        self._incoming.arrived(nbytes)

    def connection_lost(self, exc: Exception | None) -> None:
        self._aiohttp.connection_lost(exc)

    def eof_received(self) -> bool | None:
        return self._aiohttp.eof_received()  # type: ignore[no-any-return]

    def pause_writing(self) -> None:
        self._aiohttp.pause_writing()

    def resume_writing(self) -> None:
        self._aiohttp.resume_writing()
