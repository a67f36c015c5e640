"""A network between processes on one machine that can be cut, slowed and broken, without root: a TCP proxy.

It runs as a process of its own, ``python -m ferryline.cli.chaos.proxy``, takes one command a line as JSON on stdin,
answers each with one line, and ends with its stdin. Every link is a port in front of one node; who comes in at it is
either fixed (clients) or found by the process that owns the other end of the connection (Linux: /proc). With thousands
of connections on a machine that costs ten milliseconds; so it is looked up when a rule or command asks for it, for all
at once: a proxy that is busy with names lets handshakes run out of time, and all who try again make it worse.

Cut means held, as a network that drops packets looks to TCP: nothing arrives, nothing is refused, and what was sent
arrives after the cut unless the connection was given up. Even the end of a connection is not told through a cut.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, cast

import msgspec

UNKNOWN = "unknown"
ANY = "*"
_BUFFER_MAX = 1024 * 1024  # of bytes held back in one direction; beyond, the sender feels it


class Rule(msgspec.Struct, frozen=True):
    """What happens to bytes from ``source`` to ``target``; ``*`` is everybody."""

    source: str
    target: str
    cut: bool = False
    delay_ms: int = 0


class Link(msgspec.Struct, frozen=True):
    """A port in front of ``target`` at ``target_port``. ``source`` is who comes in, "" to look at the processes."""

    target: str
    port: int
    target_port: int
    source: str = ""


class Command(msgspec.Struct):
    """One line of stdin; what is missing stays as it was."""

    links: list[Link] = []
    pids: dict[str, int] | None = None
    rules: list[Rule] | None = None
    reset: tuple[str, str] | None = None  # break the connections between these two after some more bytes
    half_open: tuple[str, str] | None = None  # end one side of their connections, and do not tell the other


def touches(pair: tuple[str, str], one: str, other: str) -> bool:
    """Whether ``pair``, whose names may be ``*``, means a connection between these two."""

    def fits(name: str, asked: str) -> bool:
        return asked in (ANY, name)

    return (fits(one, pair[0]) and fits(other, pair[1])) or (fits(one, pair[1]) and fits(other, pair[0]))


class Weather:
    """The rules in force, looked up by direction."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []

    def set(self, rules: Iterable[Rule]) -> None:
        self._rules = list(rules)

    @property
    def fair(self) -> bool:
        """Nothing is held or slowed, whoever it comes from."""
        return not self._rules

    def of(self, source: str, target: str) -> tuple[bool, float]:
        """(cut, delay in seconds) for bytes from ``source`` to ``target``."""
        cut, delay_ms = False, 0
        for rule in self._rules:
            if rule.source in (ANY, source) and rule.target in (ANY, target):
                cut = cut or rule.cut
                delay_ms = max(delay_ms, rule.delay_ms)
        return cut, delay_ms / 1000


class _Side(asyncio.Protocol):
    """One end of a connection: reads here, writes at ``other``. ``direction`` is that of what it reads."""

    def __init__(self, connection: Connection, direction: tuple[str, str]) -> None:
        self.connection = connection
        self.direction = direction
        self.transport: asyncio.Transport | None = None
        self.other: _Side
        self.ended = False
        self.break_after = -1  # bytes until the connection is broken; -1: never
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._waiting_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._full = False  # the other end takes no more for now

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self.connection.made(self)

    def data_received(self, data: bytes) -> None:
        if self.break_after >= 0:
            data = data[: self.break_after]
            self.break_after -= len(data)
        cut, delay_s = self.connection.network.weather.of(*self.direction)
        if cut or delay_s or self._waiting or not self.connection.joined:
            self._waiting.append((self.connection.network.loop.time() + delay_s, data))
            self._waiting_bytes += len(data)
            self.look()
        else:
            self._pass(data)
        if self.break_after == 0:
            self.connection.abort()

    def _pass(self, data: bytes) -> None:
        transport = self.other.transport
        if transport is not None and not self.other.ended:
            transport.write(data)

    def look(self) -> None:
        """Pass on what may go now, and come back for the rest; hold the reader back while there is much of it."""
        network = self.connection.network
        cut, _ = network.weather.of(*self.direction)
        now = network.loop.time()
        while self._waiting and not cut and self.connection.joined and self._waiting[0][0] <= now:
            _, data = self._waiting.popleft()
            self._waiting_bytes -= len(data)
            self._pass(data)
        if self._waiting and not cut and self.connection.joined and self._timer is None:
            self._timer = network.loop.call_at(self._waiting[0][0], self._due)
        self._flow()
        if self.ended and not self._waiting and not cut:
            self.other.close()

    def _due(self) -> None:
        self._timer = None
        self.look()

    def _flow(self) -> None:
        if self.transport is None or self.ended or self.transport.is_closing():
            return
        if self._full or self._waiting_bytes > _BUFFER_MAX:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        self.other._full = True
        self.other._flow()

    def resume_writing(self) -> None:
        self.other._full = False
        self.other._flow()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        self.connection.lost(self)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        self._waiting.clear()
        if self.transport is not None:
            self.transport.abort()


class Connection:
    """Both ends of one connection through a link."""

    def __init__(self, network: Network, link: Link) -> None:
        self.network = network
        self.link = link
        self.source = link.source or UNKNOWN
        self.peer: tuple[str, int] | None = None  # the other end of a connection whose source nobody has looked up
        self.joined = False
        self._muted = False
        self.near = _Side(self, (self.source, link.target))
        self.far = _Side(self, (link.target, self.source))
        self.near.other, self.far.other = self.far, self.near
        self._joining: asyncio.Task[None] | None = None

    def made(self, side: _Side) -> None:
        if side is self.near:
            assert side.transport is not None
            self.network.connections.add(self)
            if not self.link.source:
                self.peer = side.transport.get_extra_info("peername")
                if not self.network.weather.fair:
                    self.network.identify()
            self._joining = self.network.loop.create_task(self._join())

    def comes_from(self, source: str) -> None:
        """It is known now."""
        self.peer, self.source = None, source
        self.near.direction, self.far.direction = (source, self.link.target), (self.link.target, source)

    async def _join(self) -> None:
        """Connect to the target, once a packet could go there and one could come back."""
        weather = self.network.weather
        while weather.of(*self.near.direction)[0] or weather.of(*self.far.direction)[0]:
            await self.network.changed.wait()
            if self.near.ended:
                return
        await asyncio.sleep(weather.of(*self.near.direction)[1])
        try:
            await self.network.loop.create_connection(lambda: self.far, "127.0.0.1", self.link.target_port)
        except OSError:
            self.abort()
            return
        self.joined = True
        self.near.look()
        self.far.look()
        if self.near.ended and not self._muted:
            self.near.look()

    def lost(self, side: _Side) -> None:
        if self._muted:
            if self.near.ended and self.far.ended:
                self.network.connections.discard(self)
            return
        side.look()
        if self.near.ended and (self.far.ended or not self.joined):
            if self._joining is not None and not self.joined:
                self._joining.cancel()
            self.network.connections.discard(self)

    def look(self) -> None:
        if not self._muted:
            self.near.look()
            self.far.look()

    def between(self, pair: tuple[str, str]) -> bool:
        return touches(pair, self.source, self.link.target)

    def abort(self) -> None:
        self.near.abort()
        self.far.abort()
        self.network.connections.discard(self)

    def mute(self) -> None:
        """The far end goes, the near end hears nothing of it: it stays until its own side gives it up."""
        self._muted = True
        self.far.abort()
        if not self.joined:
            self.abort()


class Network:
    """All links and connections of one proxy process."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.weather = Weather()
        self.connections: set[Connection] = set()
        self.changed = asyncio.Event()
        self._pids: dict[str, int] = {}
        self._servers: list[asyncio.Server] = []

    async def obey(self, command: Command) -> None:
        """Carry out one command. Raises OSError when a port of a link is taken."""
        for link in command.links:
            await self._listen(link)
        if command.pids is not None:
            self._pids = command.pids
        if command.rules is not None:
            self.weather.set(command.rules)
            if command.rules:
                self.identify()
            changed, self.changed = self.changed, asyncio.Event()
            changed.set()
            for connection in list(self.connections):
                connection.look()
        if command.reset is not None or command.half_open is not None:
            self.identify()
        for connection in list(self.connections):
            if command.reset is not None and connection.between(command.reset):
                connection.near.break_after = connection.far.break_after = 700
            if command.half_open is not None and connection.between(command.half_open):
                connection.mute()

    async def _listen(self, link: Link) -> None:
        server = await self.loop.create_server(lambda: Connection(self, link).near, "127.0.0.1", link.port)
        self._servers.append(server)

    def identify(self) -> None:
        """Find out who is at the other end of every connection that came from somewhere unknown."""
        asked = {connection.peer: connection for connection in self.connections if connection.peer is not None}
        if not asked:
            return
        inodes = {inode: asked[address] for address, inode in socket_inodes(set(asked)).items()}
        for name, pid in self._pids.items():
            for inode in inodes.keys() & sockets_of(pid):
                inodes.pop(inode).comes_from(name)
        for connection in asked.values():
            connection.peer = None  # of nobody we know, or gone already

    def close(self) -> None:
        """Stop listening and break every connection."""
        for server in self._servers:
            server.close()
        for connection in list(self.connections):
            connection.abort()


def socket_inodes(addresses: set[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """The inodes of the TCP sockets of this machine with these local IPv4 addresses, but for those that are gone."""
    wanted = {
        f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}": (host, port)
        for host, port in addresses
    }
    found = {}
    try:
        with open("/proc/net/tcp") as table:
            for line in table:
                fields = line.split(None, 10)
                if fields[1] in wanted:
                    found[wanted[fields[1]]] = int(fields[9])
    except OSError:
        pass
    return found


def sockets_of(pid: int) -> set[int]:
    """Inodes of the sockets among the descriptors of a process. Empty when it cannot be known."""
    found = set()
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                with suppress(OSError):
                    link = os.readlink(entry.path)
                    if link.startswith("socket:["):
                        found.add(int(link[8:-1]))
    except OSError:
        pass
    return found


async def serve() -> None:
    """Obey stdin until it ends."""
    loop = asyncio.get_running_loop()
    network = Network(loop)
    reader = asyncio.StreamReader(limit=2**20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        answer: dict[str, Any] = {"ok": True}
        try:
            await network.obey(msgspec.json.decode(line, type=Command))
        except (msgspec.DecodeError, OSError) as error:
            answer = {"ok": False, "error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    network.close()


def main() -> None:
    """Run until stdin ends."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(serve())
    else:
        uvloop.run(serve())


if __name__ == "__main__":
    main()
