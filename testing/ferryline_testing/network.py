"""The network of a cluster without sockets: byte streams between processes, as asyncio transports.

Only TCP and TLS are replaced. HTTP, WebSockets, pings, frames, back-pressure and the ends of connections are those of
production, and who a node is stands in the certificate that its streams show.

Each chunk takes a time drawn from the seed, for each direction between two processes by itself: what happens elsewhere
changes nothing. Chunks keep their order. While a pair is cut off, what was sent waits, as TCP would send it again.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any

from ferryline_testing.lives import Life

Factory = Callable[[], asyncio.BaseProtocol]
_SOCKET_BYTES = 256 * 1024  # in flight: what the kernels of both sides would take before a writer has to wait
_PORT = 443


class _Chunk:
    __slots__ = ("parts", "size", "written_s")

    def __init__(self, written_s: float) -> None:
        self.written_s = written_s
        self.parts: list[bytes] = []
        self.size = 0


class _Opening:
    """Goes before all chunks, in the same queue: nothing may arrive before whoever is to read it is there."""

    __slots__ = ("factory",)

    def __init__(self, factory: Factory) -> None:
        self.factory = factory


class _Ending:
    """``broken``: a reset instead of an orderly end."""

    __slots__ = ("broken",)

    def __init__(self, broken: bool) -> None:
        self.broken = broken


class Stream(asyncio.Transport):
    """One side of one connection."""

    def __init__(self, network: Network, life: Life, peer_life: Life, context: Context) -> None:
        peer = (peer_life.name, _PORT)
        super().__init__({"peername": peer, "sockname": (life.name, _PORT), "peercert": peer_life.certificate()})
        self.life, self.peer_life = life, peer_life
        self.peer: Stream
        self._network, self._context = network, context
        self._protocol: asyncio.BaseProtocol = asyncio.Protocol()
        self._coming: deque[_Opening | _Chunk | _Ending] = deque()
        self._due = 0  # how many of them have arrived and wait to be read
        self._unread = 0  # bytes of ours that the other side has not taken
        self._high, self._low = 64 * 1024, 16 * 1024
        self._writing_paused = self._reading_paused = self._closing = self._over = False

    # -- asyncio.Transport --------------------------------------------------------------------------

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def is_closing(self) -> bool:
        return self._closing

    def is_reading(self) -> bool:
        return not (self._reading_paused or self._closing)

    def pause_reading(self) -> None:
        self._reading_paused = True

    def resume_reading(self) -> None:
        if self._reading_paused:
            self._reading_paused = False
            self._network.loop.call_soon(self._read, context=self._context)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = high if high is not None else 64 * 1024
        self._low = low if low is not None else self._high // 4

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def get_write_buffer_size(self) -> int:
        return max(0, self._unread - _SOCKET_BYTES)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or not data:
            return
        peer, now = self.peer, self._network.loop.time()
        last = peer._coming[-1] if peer._coming else None
        if isinstance(last, _Chunk) and last.written_s == now and peer._due < len(peer._coming):
            chunk = last
        else:
            chunk = _Chunk(now)
            peer._expect(chunk)
        chunk.parts.append(bytes(data))
        chunk.size += len(data)
        self._unread += len(data)
        if self.get_write_buffer_size() > self._high and not self._writing_paused:
            self._writing_paused = True
            self._protocol.pause_writing()

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        self._close(_Ending(broken=False), None)

    def abort(self) -> None:
        self._close(_Ending(broken=True), None)

    # -- inside -------------------------------------------------------------------------------------

    def _close(self, ending: _Ending, error: Exception | None) -> None:
        if self._closing:
            return
        self._closing = True
        self.peer._expect(ending)
        self._network.loop.call_soon(self._lost, error, context=self._context)

    def end_with(self, error: Exception) -> None:
        """This side's process is gone; the other side hears of a reset."""
        self._close(_Ending(broken=True), error)

    def _lost(self, error: Exception | None) -> None:
        if self._over:
            return
        self._over = self._closing = True
        self._coming.clear()
        self._network.forget(self)
        self._protocol.connection_lost(error)

    def _expect(self, what: _Opening | _Chunk | _Ending) -> None:
        if self._over:
            return
        network = self._network
        self._coming.append(what)
        network.loop.call_later(network.latency_s(self.peer_life, self.life), self._arrive, context=self._context)

    def _arrive(self) -> None:
        """One more of what comes: the first that has not arrived, whichever the timer was for."""
        self._due = min(self._due + 1, len(self._coming))
        self._read()

    def again(self) -> None:
        """The pair was cut off, and is no more: what waits is sent once more."""
        if self._due:
            after_s = self._network.latency_s(self.peer_life, self.life)
            self._network.loop.call_later(after_s, self._read, context=self._context)

    def _read(self) -> None:
        while self._due and not (self._reading_paused or self._over):
            if self._network.cut_off(self.peer_life.name, self.life.name):
                return
            first = self._coming[0]
            if isinstance(first, _Opening):
                self._coming.popleft()
                self._due -= 1
                self._protocol = first.factory()
                self._protocol.connection_made(self)
                continue
            if isinstance(first, _Ending):
                self._coming.popleft()
                self._due -= 1
                self._other_side_ended(first)
                return
            if self._closing:
                return
            data = b"".join(first.parts) if len(first.parts) > 1 else first.parts[0]
            taken = self._hand_over(data)
            self.peer._taken(taken)
            if taken < len(data):
                first.parts[:] = [data[taken:]]
                continue
            if self._coming:  # else the connection ended while its data was taken
                self._coming.popleft()
                self._due -= 1

    def _hand_over(self, data: bytes) -> int:
        """Returns how much was taken before the reader had enough."""
        protocol = self._protocol
        if not isinstance(protocol, asyncio.BufferedProtocol):
            assert isinstance(protocol, asyncio.Protocol)
            protocol.data_received(data)
            return len(data)
        room = memoryview(protocol.get_buffer(len(data)))
        count = min(len(room), len(data))
        room[:count] = data[:count]
        room.release()
        protocol.buffer_updated(count)
        return count

    def _taken(self, count: int) -> None:
        self._unread -= count
        if self._writing_paused and self.get_write_buffer_size() <= self._low and not self._over:
            self._writing_paused = False
            self._context.run(self._protocol.resume_writing)

    def _other_side_ended(self, ending: _Ending) -> None:
        if self._over:
            return
        if ending.broken:
            self._close(_Ending(broken=True), ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"))
            return
        protocol = self._protocol
        assert isinstance(protocol, asyncio.Protocol | asyncio.BufferedProtocol)
        if not self._closing and not protocol.eof_received():
            self.close()


class Network:
    """Who listens under which name, and which pairs are cut off. ``latency_s``: the least and the most."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seed: int, latency_ms: tuple[float, float]) -> None:
        self.loop = loop
        self._seed, self._range_s = seed, (latency_ms[0] / 1000, latency_ms[1] / 1000)
        self._chances: dict[tuple[str, str], random.Random] = {}
        self._listeners: dict[str, tuple[Life, Factory, Context]] = {}
        self._streams: dict[Stream, None] = {}
        self._cut: set[tuple[str, str]] = set()  # (from, to)
        self._healed: list[asyncio.Future[None]] = []

    def latency_s(self, sender: Life, receiver: Life) -> float:
        """Of the next chunk."""
        pair = (sender.name, receiver.name)
        chance = self._chances.get(pair)
        if chance is None:
            chance = self._chances[pair] = random.Random(f"{self._seed}/{pair[0]}>{pair[1]}")
        return chance.uniform(*self._range_s)

    @property
    def moving(self) -> bool:
        """Is anything on its way? What waits for a paused process, or at a cut, is not."""
        return any(
            stream._coming and not stream.life.paused and (stream.peer_life.name, stream.life.name) not in self._cut
            for stream in self._streams
        )

    def listen(self, life: Life, factory: Factory) -> None:
        """From now on ``https://<name>`` leads to this process. Call it in the context of the life."""
        self._listeners[life.name] = (life, factory, life.context())

    async def connect(self, life: Life, name: str, factory: Factory) -> Any:
        """A protocol of ``factory``, connected. Raises ConnectionRefusedError; waits while the pair is cut off."""
        while self.cut_off(life.name, name) or self.cut_off(name, life.name):
            healed = self.loop.create_future()
            self._healed.append(healed)
            await healed
        listener = self._listeners.get(name)
        there = listener[0] if listener is not None else Life(name)
        await asyncio.sleep(self.latency_s(life, there) + self.latency_s(there, life))
        listener = self._listeners.get(name)
        if life.dead or listener is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens at {name}")
        there, accept, context = listener
        near = Stream(self, life, there, life.context())
        far = Stream(self, there, life, context.copy())
        near.peer, far.peer = far, near
        self._streams[near] = self._streams[far] = None
        far._expect(_Opening(accept))
        near._protocol = protocol = factory()
        protocol.connection_made(near)
        return protocol

    def forget(self, stream: Stream) -> None:
        self._streams.pop(stream, None)

    # -- faults -------------------------------------------------------------------------------------

    def cut_off(self, sender: str, receiver: str) -> bool:
        return (sender, receiver) in self._cut

    @property
    def parted(self) -> bool:
        return bool(self._cut)

    def part(self, sender: str, receiver: str) -> None:
        """Nothing gets from one to the other any more."""
        self._cut.add((sender, receiver))

    def heal(self) -> None:
        """Everybody reaches everybody again."""
        self._cut.clear()
        for stream in list(self._streams):
            stream.again()
        healed, self._healed = self._healed, []
        for waiting in healed:
            if not waiting.done():
                waiting.set_result(None)

    def process_ended(self, life: Life) -> None:
        """Connections are reset, and new ones refused."""
        if life.name in self._listeners and self._listeners[life.name][0] is life:
            del self._listeners[life.name]
        for stream in [stream for stream in self._streams if stream.life is life]:
            stream.end_with(ConnectionAbortedError(errno.ECONNABORTED, "this process was killed"))
