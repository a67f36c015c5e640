"""Taking plain binary messages out of a WebSocket stream, however the bytes come, and leaving the rest alone."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferryline.protocol.incoming import SCRATCH_BYTES, Incoming

SIZE_MAX = 300_000
BINARY, TEXT, BEGINNING, CLOSE, PING, PONG = 0x82, 0x81, 0x02, 0x88, 0x89, 0x8A


def frame(first: int, payload: bytes, mask: bytes | None = None) -> bytes:
    bit, size = 0x80 if mask is not None else 0, len(payload)
    if size < 126:
        head = struct.pack("!BB", first, bit | size)
    elif size < 65536:
        head = struct.pack("!BBH", first, bit | 126, size)
    else:
        head = struct.pack("!BBQ", first, bit | 127, size)
    if mask is None:
        return head + payload
    return head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


class Stream:
    """One session that is read in pieces; ``heard`` is what came out, in order."""

    def __init__(self, *, masked: bool = False, trusted: bool = True, scratch: memoryview | None = None) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.incoming = Incoming(
            scratch if scratch is not None else memoryview(bytearray(SCRATCH_BYTES)),
            lambda data: self.heard.append(("message", bytes(data))),
            lambda data: self.heard.append(("other", data)),
            size_max=SIZE_MAX,
            masked=masked,
            trusted=trusted,
        )

    def feed(self, data: bytes) -> None:
        while data:
            room = self.incoming.room()
            count = min(len(room), len(data))
            assert count
            room[:count] = data[:count]
            self.incoming.arrived(count)
            data = data[count:]

    @property
    def messages(self) -> list[bytes]:
        return [data for kind, data in self.heard if kind == "message"]

    @property
    def others(self) -> bytes:
        return b"".join(data for kind, data in self.heard if kind == "other")


sizes = st.one_of(st.integers(0, 130), st.sampled_from([65535, 65536, SIZE_MAX]))
items = st.lists(st.tuples(st.sampled_from([BINARY, BINARY, PING, PONG]), sizes), max_size=6)


cuts_of_all_sizes = st.lists(st.one_of(st.integers(1, 20), st.integers(1_000, 70_000)), max_size=8)


@settings(deadline=None)
@given(items, cuts_of_all_sizes.map(lambda cuts: [*cuts, 50_000]), st.booleans(), st.booleans())
def test_messages_and_pings_come_out_whole_and_in_order_however_the_bytes_are_cut(
    wanted: list[tuple[int, int]], cuts: list[int], masked: bool, trusted: bool
) -> None:
    mask = bytes(4) if masked else None
    stream, sent, expected, at, turn = Stream(masked=masked, trusted=trusted), b"", [], 0, 0
    for first, size in wanted:
        payload = os.urandom(size if first == BINARY else min(size, 125))
        whole = frame(first, payload, mask)
        sent += whole
        expected.append(("message", payload) if first == BINARY else ("other", whole))
    while at < len(sent):
        stream.feed(sent[at : at + cuts[turn % len(cuts)]])
        at += cuts[turn % len(cuts)]
        turn += 1
    assert stream.heard == expected


@pytest.mark.parametrize(
    "odd",
    [
        frame(TEXT, b"text"),
        frame(BEGINNING, b"the first of several"),
        frame(0x00, b"a continuation of nothing"),
        frame(0xC2, b"a reserved bit"),
        frame(0x83, b"an opcode that is none"),
        frame(0x09, b"a ping in parts"),
        frame(PING, bytes(126)),
        frame(BINARY, b"masked", b"mask"),
        frame(BINARY, b"masked by zeros where no mask belongs", bytes(4)),
        struct.pack("!BBQ", BINARY, 127, SIZE_MAX + 1),
        struct.pack("!BBQ", BINARY, 127, 2**64 - 1),
    ],
)
@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_from_the_first_odd_frame_on_everything_is_left_to_the_other_reader(odd: bytes, piece: int) -> None:
    stream = Stream()
    before, after = frame(BINARY, b"before"), frame(BINARY, b"after") + os.urandom(50)
    sent = before + odd + after
    for at in range(0, len(sent), piece):
        stream.feed(sent[at : at + piece])
    assert stream.messages == [b"before"]
    assert stream.others == odd + after


def test_a_server_takes_a_mask_of_zeros_only() -> None:
    for mask in (None, b"\0\0\0\1"):
        stream = Stream(masked=True)
        odd = frame(BINARY, b"odd", mask)
        stream.feed(frame(BINARY, b"plain", bytes(4)) + odd)
        assert (stream.messages, stream.others) == ([b"plain"], odd)


def test_a_size_that_is_only_claimed_costs_no_memory() -> None:
    stream = Stream(masked=True, trusted=False)
    stream.feed(frame(BINARY, bytes(SIZE_MAX), bytes(4))[:100])
    assert len(stream.incoming.room()) <= 16 * 1024
    stream.feed(bytes(50_000))
    assert len(stream.incoming.room()) <= 2 * 50_100
    assert stream.heard == []


def test_sessions_that_share_a_scratch_buffer_do_not_mix() -> None:
    scratch = memoryview(bytearray(SCRATCH_BYTES))
    one, other = Stream(scratch=scratch), Stream(scratch=scratch)
    mine, yours = frame(BINARY, b"a" * 200), frame(PING, b"b" * 100)
    for at in range(0, 204, 3):
        one.feed(mine[at : at + 3])
        other.feed(yours[at : at + 3])
    assert one.messages == [b"a" * 200]
    assert other.others == yours


def test_what_was_handed_out_stays_as_it_is_when_more_arrives() -> None:
    kept: list[bytes | bytearray] = []
    incoming = Incoming(
        memoryview(bytearray(SCRATCH_BYTES)), kept.append, kept.append, size_max=SIZE_MAX, masked=False, trusted=True
    )
    for payload in (b"x" * 50, b"y" * 50, b"z" * 50):
        data = frame(BINARY, payload)
        incoming.room()[: len(data)] = data
        incoming.arrived(len(data))
    assert kept == [b"x" * 50, b"y" * 50, b"z" * 50]
