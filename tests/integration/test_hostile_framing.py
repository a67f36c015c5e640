"""Smuggled requests and broken framing on raw TLS sockets, at a coordinator and a broker.

Each attack carries a second request inside what the first one should own: the creation of a topic whose name nobody
else uses. What must never happen: that topic exists, a 5xx, a hang, or another client that notices. Most attacks must
also be refused; a few are odd and allowed, and then the topic must still not exist.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from ferryline.cli.tlsinfo import address
from tests.integration.bad_input import World
from tests.integration.wire import Rest

pytestmark = pytest.mark.process

PATIENCE_S = 0.4  # a server that has answered or wants more is not waited for any longer
HANG_S = 20.0
HOST = b"Host: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"
_numbers = itertools.count(1)
Build = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Attack:
    """``build`` gets the request to smuggle. ``allowed``: status codes beside 4xx that an honest server may give."""

    name: str
    build: Build
    allowed: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name


ATTACKS: list[Attack] = []


def attack(name: str, build: Build, *allowed: int) -> None:
    assert name not in {known.name for known in ATTACKS}, name
    ATTACKS.append(Attack(name, build, allowed))


def post(head: bytes, body: bytes) -> bytes:
    return b"POST /v1/topics HTTP/1.1\r\n" + HOST + JSON + head + b"\r\n" + body


def get(head: bytes = b"", line: bytes = b"GET /healthz HTTP/1.1") -> bytes:
    return line + b"\r\n" + HOST + head + b"\r\n"


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


# -- two ways to say how long a body is --------------------------------------------------------------

TE = b"Transfer-Encoding: chunked\r\n"
for label, head in {
    "CL.TE": b"Content-Length: 5\r\n" + TE,
    "TE.CL": TE + b"Content-Length: 5\r\n",
    "CL.TE, CL of zero": b"Content-Length: 0\r\n" + TE,
    "TE.CL, TE in capitals": b"TRANSFER-ENCODING: CHUNKED\r\nContent-Length: 5\r\n",
}.items():
    attack(label, lambda smuggled, head=head: post(head, b"0\r\n\r\n" + smuggled))  # type: ignore[misc]

for label, encoding in {
    "of a name that is none": b"Transfer-Encoding: xchunked\r\n",
    "with a space before the colon": b"Transfer-Encoding : chunked\r\n",
    "with a tab in it": b"Transfer-Encoding:\tchunked\r\n",
    "with a vertical tab": b"Transfer-Encoding: \x0bchunked\r\n",
    "folded": b"Transfer-Encoding:\r\n chunked\r\n",
    "in quotes": b'Transfer-Encoding: "chunked"\r\n',
    "twice, the second odd": TE + b"Transfer-Encoding: x\r\n",
    "twice, both chunked": TE + TE,
    "identity, then chunked": b"Transfer-Encoding: identity, chunked\r\n",
    "chunked, then identity": b"Transfer-Encoding: chunked, identity\r\n",
    "gzip, then chunked": b"Transfer-Encoding: gzip, chunked\r\n",
    "with a line feed inside": b"Transfer-Encoding: chun\nked\r\n",
    "with a NUL behind": b"Transfer-Encoding: chunked\x00\r\n",
    "hidden behind a bare CR": b"X: y\rTransfer-Encoding: chunked\r\n",
    "hidden behind a bare LF": b"X: y\nTransfer-Encoding: chunked\r\n",
}.items():
    attack(
        f"an encoding {label}, beside a length",
        lambda smuggled, encoding=encoding: post(  # type: ignore[misc]
            b"Content-Length: 5\r\n" + encoding, b"0\r\n\r\n" + smuggled
        ),
    )

for label, length in {
    "twice, different": b"Content-Length: 2\r\nContent-Length: 40\r\n",
    "twice, in one line": b"Content-Length: 2, 40\r\n",
    "with a plus": b"Content-Length: +2\r\n",
    "negative": b"Content-Length: -2\r\n",
    "in hex": b"Content-Length: 0x2\r\n",
    "with an underscore": b"Content-Length: 1_0\r\n",
    "as a fraction": b"Content-Length: 2.0\r\n",
    "of letters": b"Content-Length: two\r\n",
    "that is empty": b"Content-Length:\r\n",
    "of 2**64 + 2": b"Content-Length: 18446744073709551618\r\n",
    "of a thousand digits": b"Content-Length: " + b"9" * 1000 + b"\r\n",
    "in Arabic digits": "Content-Length: \u0662\r\n".encode(),
    "folded": b"Content-Length:\r\n 2\r\n",
    "with a space before the colon": b"Content-Length : 2\r\n",
    "with a NUL in the name": b"Content\x00-Length: 2\r\n",
}.items():
    attack(f"a length {label}", lambda smuggled, length=length: post(length, b"{}" + smuggled))  # type: ignore[misc]

# -- chunks -------------------------------------------------------------------------------------------

for label, chunks in {
    "of a negative size": b"-1\r\n{}\r\n0\r\n\r\n",
    "of a size with 0x": b"0x2\r\n{}\r\n0\r\n\r\n",
    "of a size with a plus": b"+2\r\n{}\r\n0\r\n\r\n",
    "of a size with an underscore": b"0_2\r\n{}\r\n0\r\n\r\n",
    "of a size over 2**64": b"1" + b"0" * 16 + b"2\r\n{}\r\n0\r\n\r\n",
    "of no size": b"\r\n{}\r\n0\r\n\r\n",
    "of a size that is no number": b"zz\r\n{}\r\n0\r\n\r\n",
    "ended by a line feed": b"2\n{}\n0\n\n",
    "longer than announced": b"2\r\n{}{}\r\n0\r\n\r\n",
    "with a line feed in its extension": b"2;a\nb\r\n{}\r\n0\r\n\r\n",
    "with an extension of 64 KiB": b"2;" + b"a" * 65536 + b"\r\n{}\r\n0\r\n\r\n",
    "with trailers that set a length": b"2\r\n{}\r\n0\r\nContent-Length: 50\r\n\r\n",
    "with a trailer of 64 KiB": b"2\r\n{}\r\n0\r\nX: " + b"a" * 65536 + b"\r\n\r\n",
    "that never end": b"2\r\n{}\r\n",
}.items():
    # Whoever reads a chunked body to its end may take the second request for one of its own: pipelined, and no
    # attack. So here it is part of the body, or stands behind what is broken.
    attack(f"a chunk {label}", lambda smuggled, chunks=chunks: post(TE, chunks))  # type: ignore[misc]

# -- request lines and headers ------------------------------------------------------------------------

for label, line in {
    "HTTP/0.9": b"GET /v1/topics",
    "HTTP/1.2.3": b"GET /v1/topics HTTP/1.2.3",
    "HTTP/9.9": b"GET /v1/topics HTTP/9.9",
    "no version number": b"GET /v1/topics HTTP/",
    "a tab": b"GET\t/v1/topics\tHTTP/1.1",
    "a NUL in the path": b"GET /v1/topics\x00 HTTP/1.1",
    "a bare CR in the path": b"GET /v1/to\rpics HTTP/1.1",
    "a method with a NUL": b"GE\x00T /v1/topics HTTP/1.1",
    "a method of 10,000 letters": b"G" * 10_000 + b" /v1/topics HTTP/1.1",
    "a method nobody knows": b"SMUGGLE /v1/topics HTTP/1.1",
    "CONNECT": b"CONNECT 127.0.0.1:22 HTTP/1.1",
    "TRACE": b"TRACE /v1/topics HTTP/1.1",
    "a path of 100 KiB": b"GET /" + b"a" * 102_400 + b" HTTP/1.1",
    "a query of 100 KiB": b"GET /v1/topics?a=" + b"a" * 102_400 + b" HTTP/1.1",
}.items():
    attack(f"a request line with {label}", lambda smuggled, line=line: get(line=line) + smuggled[:0])  # type: ignore[misc]

for label, head in {
    "without a name": b": x\r\n",
    "without a colon": b"nonsense\r\n",
    "with a space in its name": b"X Y: z\r\n",
    "with a NUL in its value": b"X: a\x00b\r\n",
    "with a bare CR in its value": b"X: a\rb\r\n",
    "of 64 KiB": b"X: " + b"x" * 65536 + b"\r\n",
    "with a name of 64 KiB": b"X" * 65536 + b": x\r\n",
    "that is the thousandth": b"".join(b"X-%d: x\r\n" % number for number in range(1000)),
    "with letters that are no ASCII in its name": "X-\u00fc: x\r\n".encode(),
}.items():
    attack(f"a header {label}", lambda smuggled, head=head: get(head))  # type: ignore[misc]

attack("a request line with two spaces", lambda _: get(line=b"GET  /v1/topics HTTP/1.1"), 200)
attack("an absolute address of somebody else", lambda _: get(line=b"GET http://evil.invalid/v1/topics HTTP/1.1"), 200)
attack("an asterisk", lambda _: get(line=b"OPTIONS * HTTP/1.1"))
attack("HTTP/2's preface", lambda _: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
attack(
    "an upgrade to h2c",
    lambda _: get(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n"),
    200,
)
attack("a body on a GET", lambda smuggled: get(b"Content-Length: %d\r\n" % len(smuggled)) + smuggled, 200)
attack("an expectation of nonsense", lambda _: post(b"Expect: nonsense\r\nContent-Length: 2\r\n", b"{}"))
attack("100-continue without a body", lambda _: post(b"Expect: 100-continue\r\nContent-Length: 99\r\n", b""), 100)
attack("bytes of chance", lambda _: bytes(range(256)) * 16)
attack("nothing but line ends", lambda _: b"\r\n" * 5000)

# -- WebSockets ---------------------------------------------------------------------------------------

UPGRADE = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
SESSION = b"GET /v1/session HTTP/1.1"
for label, head in {
    "without a key": UPGRADE,
    "with a key of three bytes": UPGRADE + b"Sec-WebSocket-Key: YWJj\r\n",
    "of another version": UPGRADE.replace(b"13", b"99") + KEY,
    "without a version": b"Upgrade: websocket\r\nConnection: Upgrade\r\n" + KEY,
    "to another protocol": UPGRADE.replace(b"websocket", b"smuggle") + KEY,
}.items():
    attack(f"a session {label}", lambda smuggled, head=head: get(head, SESSION) + smuggled[:0])  # type: ignore[misc]

for label, frame in {
    "unmasked": b"\x82\x04abcd",
    "with a reserved bit (compressed)": b"\xc2\x84\0\0\0\0abcd",
    "with an opcode that is none": b"\x83\x84\0\0\0\0abcd",
    "that is a ping in pieces": b"\x09\x84\0\0\0\0abcd",
    "that is a ping of 200 bytes": b"\x89\xfe\x00\xc8\0\0\0\0" + b"a" * 200,
    "of a length of 2**63": b"\x82\xff\x80\0\0\0\0\0\0\0\0\0\0\0",
    "of a length of 2**62": b"\x82\xff\x40\0\0\0\0\0\0\0\0\0\0\0",
    "that continues nothing": b"\x80\x84\0\0\0\0abcd",
    "of text that is no UTF-8": b"\x81\x82\0\0\0\0\xff\xff",
    "that closes with code 1": b"\x88\x82\0\0\0\0\x00\x01",
    "that closes with one byte": b"\x88\x81\0\0\0\0\x00",
    "that never ends, in 10,000 pieces": b"\x02\x81\0\0\0\0a" + b"\x00\x81\0\0\0\0a" * 10_000,
    "that is an HTTP request": b"POST /v1/topics HTTP/1.1\r\n\r\n",
}.items():
    attack(
        f"a frame {label}",
        lambda smuggled, frame=frame: get(UPGRADE + KEY, SESSION) + frame + smuggled,  # type: ignore[misc]
        101,
    )


def test_the_table_is_as_long_as_promised() -> None:
    assert len(ATTACKS) >= 60


async def answers(world: World, url: str, data: bytes, patience_s: float = PATIENCE_S) -> bytes:
    """Whatever comes back until the server closes or has nothing more to say. A server that hangs fails the test."""
    host, port = address(url)
    context = ssl.create_default_context(cafile=str(world.cluster.ca))
    reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=host)
    found = b""
    try:
        async with asyncio.timeout(HANG_S):
            writer.write(data)
            try:
                await writer.drain()
                while True:
                    async with asyncio.timeout(patience_s):
                        chunk = await reader.read(65536)
                    if not chunk:
                        return found
                    found += chunk
            except (TimeoutError, OSError):
                return found
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("where", ["coordinator", "broker"])
async def test_no_attack_gets_a_second_request_through(world: World, where: str) -> None:
    """All of them in one test: what is asked is that the service still stands after every single one."""
    coordinator = world.cluster.url
    url = coordinator if where == "coordinator" else world.urls[world.part().primary]
    wrong: list[str] = []
    for row in ATTACKS:
        name = f"smuggled-{next(_numbers)}"
        body = b'{"name": "%s", "config": {"partitions": 1, "replication": 1}}' % name.encode()
        smuggled = post(b"Content-Length: %d\r\n" % len(body), body)
        began = time.monotonic()
        found = await answers(world, url, row.build(smuggled))
        took = time.monotonic() - began
        for status in map(int, re.findall(rb"HTTP/1\.[01] (\d{3}) ", found)):
            if not 400 <= status < 500 and status not in row.allowed:
                wrong.append(f"{row}: answered {status}: {found[:200]!r}")
        if took > HANG_S:
            wrong.append(f"{row}: took {took:.0f} s")
        async with Rest(coordinator, world.cluster.ca) as rest:
            if (await rest.call("GET", f"/v1/topics/{name}"))[0] != 404:
                wrong.append(f"{row}: the smuggled request was carried out")
    assert not wrong, "\n".join(wrong)
    await world.still_serves()
    assert all(service.running for service in world.cluster.local.services.values())


async def test_the_request_that_is_smuggled_works_when_it_is_sent_openly(world: World) -> None:
    """Otherwise the test above could not fail."""
    body = b'{"name": "openly", "config": {"partitions": 1, "replication": 1}}'
    request = post(b"Connection: close\r\nContent-Length: %d\r\n" % len(body), body)
    found = await answers(world, world.cluster.url, request, patience_s=HANG_S)
    assert b"HTTP/1.1 201" in found


@pytest.mark.parametrize("path", ["/healthz", "/nowhere", "/v1/topics"])
async def test_no_answer_says_what_wrote_it_or_lets_a_browser_use_it(world: World, path: str) -> None:
    for url in (world.cluster.url, world.urls[world.part().primary]):
        found = await answers(world, url, get(line=f"GET {path} HTTP/1.1".encode()))
        head = found.partition(b"\r\n\r\n")[0].lower()
        assert b"aiohttp" not in head
        assert b"python" not in head
        for header in (b"strict-transport-security: ", b"content-security-policy: default-src 'none'", b"nosniff"):
            assert header in head
