"""Streams in memory: order, back-pressure, cuts, and how connections end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from ferryline_testing.lives import Life
from ferryline_testing.network import Network, Stream
from ferryline_testing.virtual_time import VirtualTime


class Side(asyncio.Protocol):
    """Notes what it hears."""

    def __init__(self) -> None:
        self.stream: Stream
        self.got = bytearray()
        self.ended: list[Exception | None] = []
        self.paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, Stream)
        self.stream = transport

    def data_received(self, data: bytes) -> None:
        self.got += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.append(exc)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False


class Sipping(Side, asyncio.BufferedProtocol):
    """Takes 10 bytes at a time, and wants to rest after the first sip."""

    def get_buffer(self, sizehint: int) -> memoryview:
        self.sip = bytearray(10)
        return memoryview(self.sip)

    def buffer_updated(self, nbytes: int) -> None:
        self.got += self.sip[:nbytes]
        if len(self.got) == 10:
            self.stream.pause_reading()


class Pair:
    """A client and a server, connected."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.client, self.server = Life("client"), Life("broker-1", role="broker-1")
        self.server.cluster_id = "c"
        self.clock = VirtualTime(self.loop, self.client)
        self.clock.begin()
        self.network = Network(self.loop, 1, (1.0, 2.0))
        self.far = Side()
        self.network.listen(self.server, lambda: self.far)
        self.near = self.connect()

    def connect(self) -> Side:
        side: Side = self.loop.run_until_complete(self.network.connect(self.client, "broker-1", Side))
        return side

    def run(self, seconds: float = 1.0) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.clock.end()
    made.loop.close()


def test_bytes_arrive_in_order_after_a_while(pair: Pair) -> None:
    began = pair.clock.now_s
    for number in range(50):
        pair.near.stream.write(b"%d " % number)
        pair.run(0.0005)
    pair.run()
    assert bytes(pair.far.got) == b"".join(b"%d " % number for number in range(50))
    pair.far.got.clear()
    pair.near.stream.writelines([b"a", b"b"])
    pair.run(0.0009)
    assert not pair.far.got
    pair.run(0.0012)
    assert pair.far.got == b"ab"
    assert pair.clock.now_s > began


def test_a_stream_shows_who_is_at_its_other_end(pair: Pair) -> None:
    pair.run()
    assert pair.near.stream.get_extra_info("peercert") == {"subjectAltName": (("DNS", "broker-1.c"),)}
    assert pair.far.stream.get_extra_info("peercert") is None
    assert pair.far.stream.get_extra_info("peername")[0] == "client"


def test_whoever_does_not_read_holds_the_writer_back(pair: Pair) -> None:
    pair.run()
    pair.far.stream.pause_reading()
    pair.near.stream.write(b"x" * 1_000_000)
    pair.run()
    assert pair.near.paused
    assert not pair.far.got
    assert pair.near.stream.get_write_buffer_size() > 64 * 1024
    pair.far.stream.resume_reading()
    pair.run()
    assert len(pair.far.got) == 1_000_000
    assert not pair.near.paused
    assert pair.near.stream.get_write_buffer_size() == 0


def test_a_reader_that_rests_in_the_middle_of_a_chunk_loses_nothing(pair: Pair) -> None:
    pair.far = Sipping()
    near = pair.connect()
    near.stream.write(b"0123456789abcdefghijKLM")
    pair.run()
    assert pair.far.got == b"0123456789"
    pair.far.stream.resume_reading()
    pair.run()
    assert pair.far.got == b"0123456789abcdefghijKLM"


def test_what_is_sent_before_the_end_arrives_before_it(pair: Pair) -> None:
    pair.near.stream.write(b"last words")
    pair.near.stream.close()
    pair.near.stream.write(b"too late")
    pair.run()
    assert pair.far.got == b"last words"
    assert pair.far.ended == pair.near.ended == [None]
    assert not pair.network.moving


def test_an_abort_is_a_reset_for_the_other_side(pair: Pair) -> None:
    pair.run()
    pair.near.stream.abort()
    pair.near.stream.abort()
    pair.run()
    assert pair.near.ended == [None]
    assert isinstance(pair.far.ended[0], ConnectionResetError)


def test_what_is_sent_into_a_cut_arrives_when_it_heals(pair: Pair) -> None:
    pair.run()
    pair.network.part("client", "broker-1")
    pair.near.stream.write(b"one")
    pair.run(60)
    pair.near.stream.write(b"two")
    pair.far.stream.write(b"back")
    pair.run(60)
    assert pair.far.got == b""
    assert pair.near.got == b"back", "the other way is open"
    assert not pair.network.moving
    pair.network.heal()
    pair.run()
    assert pair.far.got == b"onetwo"


def test_a_connection_into_a_cut_waits(pair: Pair) -> None:
    pair.network.part("broker-1", "client")
    waiting = pair.loop.create_task(pair.network.connect(pair.client, "broker-1", Side))
    pair.run(60)
    assert not waiting.done()
    pair.network.heal()
    pair.run()
    assert isinstance(waiting.result(), Side)


def test_a_process_that_ended_resets_and_refuses(pair: Pair) -> None:
    pair.run()
    pair.network.process_ended(pair.server)
    pair.run()
    assert isinstance(pair.near.ended[0], ConnectionResetError)
    assert isinstance(pair.far.ended[0], ConnectionAbortedError)
    with pytest.raises(ConnectionRefusedError, match="nobody listens at broker-1"):
        pair.connect()


def test_a_process_that_ended_connects_to_nobody(pair: Pair) -> None:
    pair.client.ended_s = pair.clock.now_s
    with pytest.raises(ConnectionRefusedError):
        pair.connect()


def test_a_paused_process_takes_what_came_when_it_goes_on(pair: Pair) -> None:
    pair.run()
    pair.server.paused = pair.clock.holding = True
    pair.near.stream.write(b"hello")
    pair.run(30)
    assert not pair.far.got
    assert not pair.network.moving
    pair.server.paused = False
    pair.clock.resume(pair.server)
    pair.run(0.001)
    assert pair.far.got == b"hello"


def test_latencies_of_one_pair_do_not_hang_on_another(pair: Pair) -> None:
    other = Network(pair.loop, 1, (1.0, 2.0))
    third = Life("broker-2")
    alone = [other.latency_s(pair.client, pair.server) for _ in range(5)]
    mixed = Network(pair.loop, 1, (1.0, 2.0))
    beside = []
    for _ in range(5):
        mixed.latency_s(pair.client, third)
        beside.append(mixed.latency_s(pair.client, pair.server))
    assert alone == beside
    assert all(0.001 <= latency <= 0.002 for latency in alone)
    assert alone != [Network(pair.loop, 2, (1.0, 2.0)).latency_s(pair.client, pair.server) for _ in range(5)]
