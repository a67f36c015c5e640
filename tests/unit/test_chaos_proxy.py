"""The fault proxy on loopback: what passes, what is held, what breaks, and who is who."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from ferryline.cli.chaos.network import Network as Remote
from ferryline.cli.chaos.proxy import Command, Link, Network, Rule, socket_inodes, sockets_of, touches
from ferryline.cli.processes import free_port
from tests.polling import poll

HELD_S = 0.15  # long enough that bytes on loopback would have come
WITHIN_S = 30.0


@dataclass
class Echo:
    """A server that sends back what it gets, and remembers its connections."""

    port: int = 0
    connections: list[asyncio.StreamWriter] = field(default_factory=list)
    received: bytearray = field(default_factory=bytearray)
    ended: int = 0
    silent: bool = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer)
        try:
            while data := await reader.read(65536):
                self.received += data
                if not self.silent:
                    writer.write(data)
                    await writer.drain()
        except OSError:
            pass
        finally:
            self.ended += 1
            writer.transport.abort()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    made = Echo()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    yield made
    server.close()
    for writer in made.connections:
        writer.transport.abort()
    await poll(lambda: made.ended == len(made.connections), what="the server's connections end")
    await asyncio.sleep(0)


@pytest.fixture
async def network() -> AsyncIterator[Network]:
    made = Network(asyncio.get_running_loop())
    yield made
    made.close()
    await asyncio.sleep(0.01)


async def link(network: Network, echo: Echo, *, source: str = "client") -> int:
    """A port in front of the server, as node ``server``."""
    port = free_port(set())
    await network.obey(Command(links=[Link("server", port, echo.port, source)]))
    return port


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
    writer.write(data)
    return await asyncio.wait_for(reader.readexactly(len(data)), WITHIN_S)


async def nothing_comes(reader: asyncio.StreamReader) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), HELD_S)


def cut(source: str, target: str) -> Rule:
    return Rule(source, target, cut=True)


async def test_bytes_pass_both_ways_and_the_end_of_a_connection_too(network: Network, echo: Echo) -> None:
    reader, writer = await connect(await link(network, echo))
    assert await ask(reader, writer, b"x" * 300_000) == b"x" * 300_000
    writer.close()
    await poll(lambda: echo.ended == 1 and not network.connections)


async def test_a_cut_holds_bytes_and_passes_them_on_when_it_is_mended(network: Network, echo: Echo) -> None:
    reader, writer = await connect(await link(network, echo))
    await ask(reader, writer, b"before")
    await network.obey(Command(rules=[cut("*", "server"), cut("server", "*")]))
    writer.write(b"during")
    await nothing_comes(reader)
    assert bytes(echo.received) == b"before"
    await network.obey(Command(rules=[]))
    assert await asyncio.wait_for(reader.readexactly(6), WITHIN_S) == b"during"
    writer.close()


async def test_a_one_way_cut_lets_the_other_way_through(network: Network, echo: Echo) -> None:
    reader, writer = await connect(await link(network, echo))
    await ask(reader, writer, b"before")
    await network.obey(Command(rules=[cut("server", "client")]))
    writer.write(b"question")
    await poll(lambda: bytes(echo.received) == b"beforequestion")
    await nothing_comes(reader)
    await network.obey(Command(rules=[]))
    assert await asyncio.wait_for(reader.readexactly(8), WITHIN_S) == b"question"
    writer.close()


async def test_a_cut_between_others_changes_nothing(network: Network, echo: Echo) -> None:
    reader, writer = await connect(await link(network, echo))
    await network.obey(Command(rules=[cut("broker-1", "server"), cut("server", "broker-1")]))
    assert await ask(reader, writer, b"hello") == b"hello"
    writer.close()


async def test_a_new_connection_waits_while_its_link_is_cut(network: Network, echo: Echo) -> None:
    port = await link(network, echo)
    await network.obey(Command(rules=[cut("server", "client")]))
    reader, writer = await connect(port)
    writer.write(b"hello")
    await nothing_comes(reader)
    assert not echo.connections
    await network.obey(Command(rules=[]))
    assert await asyncio.wait_for(reader.readexactly(5), WITHIN_S) == b"hello"
    writer.close()


async def test_the_end_of_a_connection_is_not_told_through_a_cut(network: Network, echo: Echo) -> None:
    reader, writer = await connect(await link(network, echo))
    await ask(reader, writer, b"hello")
    await network.obey(Command(rules=[cut("client", "server")]))
    writer.transport.abort()
    await asyncio.sleep(HELD_S)
    assert echo.ended == 0
    await network.obey(Command(rules=[]))
    await poll(lambda: echo.ended == 1)


async def test_a_delay_keeps_the_order_and_lasts_as_long_as_it_says(network: Network, echo: Echo) -> None:
    reader, writer = await connect(await link(network, echo))
    await ask(reader, writer, b"hello")
    await network.obey(Command(rules=[Rule("client", "server", delay_ms=200)]))
    started = time.monotonic()
    for number in range(20):
        writer.write(b"%02d" % number)
        await asyncio.sleep(0.001)
    expected = b"".join(b"%02d" % number for number in range(20))
    assert await asyncio.wait_for(reader.readexactly(40), WITHIN_S) == expected
    assert time.monotonic() - started >= 0.2
    writer.close()


async def test_a_reset_breaks_a_connection_in_the_middle_of_a_body(network: Network, echo: Echo) -> None:
    reader, writer = await connect(await link(network, echo))
    await ask(reader, writer, b"hello")
    await network.obey(Command(reset=("server", "*")))
    writer.write(b"x" * 100_000)
    await poll(lambda: echo.ended == 1)
    assert 5 <= len(echo.received) < 100_000
    with pytest.raises((OSError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(100_000), WITHIN_S)
    writer.close()


async def test_a_half_open_connection_is_gone_on_one_side_only(network: Network, echo: Echo) -> None:
    reader, writer = await connect(await link(network, echo))
    await ask(reader, writer, b"hello")
    await network.obey(Command(half_open=("client", "server")))
    await poll(lambda: echo.ended == 1)
    writer.write(b"anybody there?")
    await nothing_comes(reader)
    writer.transport.abort()
    await poll(lambda: not network.connections)


async def test_a_dead_target_ends_the_connection(network: Network) -> None:
    reader, writer = await connect(await link(network, Echo(port=free_port(set()))))
    writer.write(b"hello")
    with pytest.raises((OSError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(5), WITHIN_S)
    writer.close()


async def test_a_reader_that_does_not_read_stops_the_sender(network: Network, echo: Echo) -> None:
    """Held bytes are bounded: the proxy must not take a cluster's whole traffic into memory."""
    echo.silent = True
    _, writer = await connect(await link(network, echo))
    await network.obey(Command(rules=[cut("client", "server")]))
    writer.write(b"x" * 64 * 1024 * 1024)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(writer.drain(), 0.5)
    writer.transport.abort()
    await asyncio.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says which process owns a socket")
async def test_who_comes_in_is_found_by_the_process_that_owns_the_socket(network: Network, echo: Echo) -> None:
    port = await link(network, echo, source="")
    await network.obey(Command(pids={"stranger": 1, "broker-7": os.getpid()}))
    reader, writer = await connect(port)
    await ask(reader, writer, b"hello")
    assert [connection.source for connection in network.connections] == ["unknown"], "nobody has asked so far"
    here = writer.get_extra_info("sockname")
    inodes = socket_inodes({here, ("127.0.0.1", 1)})
    assert set(inodes) == {here}
    assert inodes[here] in sockets_of(os.getpid())
    assert inodes[here] not in sockets_of(1)
    await network.obey(Command(rules=[cut("broker-7", "server")]))
    assert [connection.source for connection in network.connections] == ["broker-7"]
    writer.write(b"held")
    await nothing_comes(reader)
    other_reader, other = await connect(port)  # while somebody is cut off, everybody who comes is looked at
    other.write(b"held, too")
    await nothing_comes(other_reader)
    assert [connection.source for connection in network.connections] == ["broker-7", "broker-7"]
    writer.transport.abort()
    other.transport.abort()
    await network.obey(Command(rules=[]))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says which process owns a socket")
async def test_a_connection_of_somebody_unknown_can_be_broken_by_name(network: Network, echo: Echo) -> None:
    port = await link(network, echo, source="")
    await network.obey(Command(pids={"broker-7": os.getpid()}))
    reader, writer = await connect(port)
    await ask(reader, writer, b"hello")
    await network.obey(Command(half_open=("server", "broker-7")))
    writer.write(b"nobody hears this")
    await nothing_comes(reader)
    writer.transport.abort()


def test_a_pair_of_names_means_a_connection_in_either_direction() -> None:
    assert touches(("a", "b"), "b", "a")
    assert touches(("a", "*"), "c", "a")
    assert not touches(("a", "b"), "a", "c")


async def test_the_proxy_as_a_process_obeys_and_counts_overlapping_cuts(echo: Echo) -> None:
    remote, port = Remote(), free_port(set())
    try:
        await remote.start([Link("server", port, echo.port, "client")])
        reader, writer = await connect(port)
        assert await ask(reader, writer, b"hello") == b"hello"
        await remote.add(cut("client", "server"))
        await remote.add(cut("client", "server"))
        await remote.remove(cut("client", "server"))
        writer.write(b"still held")
        await nothing_comes(reader)
        await remote.remove(cut("client", "server"))
        assert await asyncio.wait_for(reader.readexactly(10), WITHIN_S) == b"still held"
        writer.close()
    finally:
        remote.close()
