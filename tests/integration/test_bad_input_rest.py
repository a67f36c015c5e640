"""Nonsense over HTTPS and on raw sockets: documented errors, bounded cost, and a cluster that serves as before."""

from __future__ import annotations

import asyncio
import gzip
import json
import ssl
import time
from typing import Any

import pytest

import ferryline as fl
from ferryline.cli.tlsinfo import address
from ferryline.protocol import errors
from ferryline.protocol.records import HEADER_BYTES, encode_batch
from tests.integration.bad_input import PARTITIONS, TOPIC, Case, World, case
from tests.integration.wire import Rest

pytestmark = pytest.mark.process

TABLE: list[Case] = []
MALFORMED, ARGUMENT, NAME = "MALFORMED_REQUEST", "INVALID_ARGUMENT", "INVALID_NAME"


@pytest.mark.parametrize("row", TABLE, ids=str)
async def test_nonsense_gets_its_error_and_harms_nothing(world: World, row: Case) -> None:
    assert await row.act(world) in row.codes
    await world.still_serves()
    assert all(service.running for service in world.cluster.local.services.values())


def at_coordinator(name: str, codes: tuple[str, ...], method: str, path: str, body: Any = None, **options: Any) -> None:
    @case(TABLE, name, *codes)
    async def _(world: World) -> str:
        async with Rest(world.cluster.url, world.cluster.ca) as rest:
            return await rest.code(method, path, body, **options)


def at_broker(name: str, codes: tuple[str, ...], method: str, path: str, body: Any = None, **options: Any) -> None:
    @case(TABLE, name, *codes)
    async def _(world: World) -> str:
        async with Rest(world.urls[world.part().primary], world.cluster.ca) as rest:
            return await rest.code(method, path, body, **options)


# -- names -------------------------------------------------------------------------------------------

for bad in (
    "",
    ".",
    "..",
    "a/b",
    "../../etc/passwd",
    "a b",
    "a\nb",
    "a\x00b",
    "__reserved",
    "n" * 201,
    "ünïcödé",
    "\u0430dmin",  # a Cyrillic letter that looks like a Latin one
    "a\u202eb",
    "%2e%2e",
    "x;rm -rf",
):
    at_coordinator(f"topic name {bad[:20]!r}", (NAME,), "POST", "/v1/topics", {"name": bad})

at_coordinator("topic name that is a number", (ARGUMENT,), "POST", "/v1/topics", {"name": 7})
at_coordinator("no topic name", (ARGUMENT,), "POST", "/v1/topics", {})

# -- settings ----------------------------------------------------------------------------------------

for label, config in {
    "partitions 0": {"partitions": 0},
    "partitions -1": {"partitions": -1},
    "partitions over the limit": {"partitions": 10_001},
    "partitions as text": {"partitions": "3"},
    "partitions as a fraction": {"partitions": 1.5},
    "partitions of 2**80": {"partitions": 2**80},
    "partitions true": {"partitions": True},
    "replication 0": {"replication": 0},
    "replication over the limit": {"replication": 99},
    "min_isr over replication": {"min_isr": 3, "replication": 2},
    "min_isr 0": {"min_isr": 0},
    "flush of a kind that is not": {"flush": "perhaps"},
    "retention -2": {"retention_ms": -2},
    "a setting that does not exist": {"retention": 5},
    "max_record_bytes over the ceiling": {"max_record_bytes": 2**40},
    "segment_bytes 1": {"segment_bytes": 1},
}.items():
    at_coordinator(label, (ARGUMENT,), "POST", "/v1/topics", {"name": "settings", "config": config})

at_coordinator(
    "more copies than brokers",
    ("NOT_ENOUGH_REPLICAS", ARGUMENT),
    "POST",
    "/v1/topics",
    {"name": "r", "config": {"replication": 7}},
)
at_coordinator("a topic that exists", ("TOPIC_EXISTS",), "POST", "/v1/topics", {"name": TOPIC})
at_coordinator("deleting what is not there", ("UNKNOWN_TOPIC",), "DELETE", "/v1/topics/no-such-topic")
at_coordinator(
    "fewer partitions",
    (ARGUMENT, "CONFLICT"),
    "POST",
    f"/v1/topics/{TOPIC}/partitions",
    {"partitions": 1, "keys_move": True},
)
at_coordinator(
    "keys that move unasked", (ARGUMENT, "CONFLICT"), "POST", f"/v1/topics/{TOPIC}/partitions", {"partitions": 9}
)
at_coordinator("draining nobody", ("UNKNOWN_BROKER",), "POST", "/v1/brokers/99/drain", {})
at_coordinator("draining a word", (ARGUMENT,), "POST", "/v1/brokers/one/drain", {})
at_coordinator("forgetting a broker that works", ("CONFLICT", ARGUMENT), "DELETE", "/v1/brokers/1")
at_coordinator("a group that is not", ("UNKNOWN_GROUP",), "GET", "/v1/groups/nobody")
at_coordinator("a state that is not", (ARGUMENT,), "GET", "/v1/partitions?state=confused")

# -- JSON --------------------------------------------------------------------------------------------

for label, text in {
    "no JSON": "{",
    "nothing": "",
    "NaN": '{"name": "a", "config": {"partitions": NaN}}',
    "Infinity": '{"name": "a", "config": {"retention_ms": Infinity}}',
    "a list": "[]",
    "null": "null",
    "a number of a million digits": '{"name": "a", "config": {"partitions": ' + "9" * 1_000_000 + "}}",
    "a hundred thousand brackets": "[" * 100_000,
    "bytes that are no UTF-8": "\udcff",
    "a lone surrogate": '{"name": "\\ud800"}',
}.items():
    body = text.encode("utf-8", "surrogateescape")
    at_coordinator(f"JSON: {label}", (MALFORMED, ARGUMENT, NAME), "POST", "/v1/topics", body)

at_coordinator("a body of 9 MiB", (MALFORMED, "RECORD_TOO_LARGE"), "POST", "/v1/topics", b" " * (9 * 1024 * 1024))
at_coordinator("an address that is not", (MALFORMED, "NOT_FOUND"), "GET", "/v1/nothing")
at_coordinator("a method that is not", ("METHOD_NOT_ALLOWED",), "PUT", "/v1/topics", {})
at_coordinator("a compressed body", ("UNSUPPORTED_MEDIA_TYPE",), "POST", "/v1/topics", gzip.compress(b'{"name": "z"}'),
               headers={"Content-Encoding": "gzip"})  # fmt: skip
at_coordinator("joining with a token of nobody", ("BAD_CREDENTIALS", "FORBIDDEN", ARGUMENT), "POST", "/v1/join",
               {"token": "x" * 40, "csr": "x", "storage_id": "s" * 32, "internal_url": "https://a:1",
                "external_url": "https://a:1"})  # fmt: skip
at_coordinator("joining without a token", (ARGUMENT,), "POST", "/v1/join", {})
at_coordinator("a session without an upgrade", (MALFORMED,), "GET", "/v1/session")
at_broker("broker: a session without an upgrade", (MALFORMED,), "GET", "/v1/session")
at_broker(
    "broker: records of an unknown topic", ("UNKNOWN_TOPIC",), "POST", "/v1/topics/nowhere/records", {"records": []}
)
at_broker(
    "broker: a record that is a number", (ARGUMENT, MALFORMED), "POST", f"/v1/topics/{TOPIC}/records", {"records": [1]}
)
at_broker(
    "broker: unknown partition", ("UNKNOWN_PARTITION", ARGUMENT), "GET", f"/v1/topics/{TOPIC}/partitions/99/records"
)
at_broker("broker: offset -1", (ARGUMENT,), "GET", f"/v1/topics/{TOPIC}/partitions/0/records?offset=-1")
at_broker("broker: offset of letters", (ARGUMENT,), "GET", f"/v1/topics/{TOPIC}/partitions/0/records?offset=abc")
at_broker("broker: wait of a year", (ARGUMENT,), "GET", f"/v1/topics/{TOPIC}/partitions/0/records?wait_ms=31536000000")

# -- raw sockets -------------------------------------------------------------------------------------


async def _raw(world: World, data: bytes, *, wait_s: float = 3.0, step: int = 0) -> bytes:
    """Send bytes over TLS as they are (``step``: that many at a time, slowly), return what comes back."""
    host, port = address(world.cluster.url)
    context = ssl.create_default_context(cafile=str(world.cluster.ca))
    reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=host)
    try:
        for at in range(0, len(data), step or len(data)):
            writer.write(data[at : at + (step or len(data))])
            await writer.drain()
            if step:
                await asyncio.sleep(0.05)
        async with asyncio.timeout(wait_s):
            return await reader.read(65536)
    except (TimeoutError, OSError):
        return b""
    finally:
        writer.transport.abort()


def raw(name: str, data: bytes) -> None:
    """The server answers 4xx, or closes, or waits for the rest: never a 2xx and never a 5xx."""

    @case(TABLE, f"raw: {name}", "refused")
    async def _(world: World) -> str:
        answer = await _raw(world, data)
        if not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")):
            return "refused"
        return answer[:100].decode(errors="replace")


HOST = b"Host: localhost\r\n"
raw("a request cut in its header", b"GET /v1/topics HTTP/1.1\r\nHost: loc")
raw("a request cut in its body", b"POST /v1/topics HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\n{")
raw("two lengths", b"POST /v1/topics HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x")
raw(
    "a length and chunks",
    b"POST /v1/topics HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
)
raw("a negative length", b"POST /v1/topics HTTP/1.1\r\n" + HOST + b"Content-Length: -5\r\n\r\n")
raw("a header of 64 KiB", b"GET /v1/topics HTTP/1.1\r\n" + HOST + b"X: " + b"x" * 65536 + b"\r\n\r\n")
raw("an address of 64 KiB", b"GET /" + b"a" * 65536 + b" HTTP/1.1\r\n" + HOST + b"\r\n")
raw("bytes of chance", bytes(range(256)) * 8)
raw(
    "a WebSocket without its key",
    b"GET /v1/session HTTP/1.1\r\n" + HOST + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
)


@case(TABLE, "raw: plain HTTP on the TLS port", "refused")
async def _(world: World) -> str:
    reader, writer = await asyncio.open_connection(*address(world.cluster.url))
    try:
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(5):
            answer = await reader.read(1000)
    except (TimeoutError, OSError):
        answer = b""
    finally:
        writer.transport.abort()
    return "refused" if not answer.startswith(b"HTTP/1.1 2") else "served"


async def test_slow_senders_do_not_slow_others(world: World) -> None:
    """Forty connections that send a byte now and then; meanwhile a quick one is served as ever."""
    request = b"GET /v1/topics HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + b"y" * 60
    slow = [asyncio.create_task(_raw(world, request, wait_s=0.1, step=1)) for _ in range(40)]
    await asyncio.sleep(0.5)
    took: list[float] = []
    async with Rest(world.cluster.url, world.cluster.ca) as rest:
        for _ in range(20):
            started = time.monotonic()
            status, _ = await rest.call("GET", "/v1/topics")
            took.append(time.monotonic() - started)
            assert status == 200
    await asyncio.gather(*slow)
    assert sorted(took)[10] < 2.0, took
    assert max(took) < 20.0, took
    await world.still_serves()


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_a_codec_bomb_is_a_typed_error_for_its_reader_and_nothing_for_the_others(
    world: World, codec: str
) -> None:
    """A broker does not decode: a bomb is stored like any batch. Whoever reads it gets CORRUPT_BATCH, at bounded cost,
    and the records behind it after a seek."""
    async with fl.connect(world.cluster.urls, ca=world.cluster.ca) as client:
        name = f"bomb-{codec}"
        await client.admin.create_topic(name, partitions=1, replication=1, max_record_bytes=8 * 1024 * 1024)
        info = await client.admin.describe_topic(name)
        from tests.integration.wire import Wire

        async with await Wire.connect(world.urls[info.partitions[0].primary], world.cluster.ca) as wire:
            result = await wire.produce(info.id, 0, 1, _bomb(codec))
            assert result.error is None or (codec == "snappy" and result.error.code == "RECORD_TOO_LARGE"), result
        async with client.producer() as producer, client.consumer(name) as consumer:
            meta = await producer.send(name, b"behind")
            if result.error is None:
                with pytest.raises(errors.CorruptBatch):
                    await consumer.pull(10, 10.0)
                await consumer.seek(fl.TopicPartition(name, 0), meta.offset)
            found = []
            while not found:
                found = [message.raw for message in await consumer.pull(10, 5.0)]
            assert found == [b"behind"]
    await world.still_serves()


def _bomb(codec: str) -> bytes:
    """A batch whose records would take 256 MiB, in a few KiB."""
    import struct

    import cramjam
    from aiokafka.record.util import calc_crc32c

    zeros = bytes(256 * 1024 * 1024)
    packers: dict[str, Any] = {
        "gzip": lambda: gzip.compress(zeros, 1),
        "snappy": lambda: bytes(cramjam.snappy.compress_raw(zeros)),
        "lz4": lambda: bytes(cramjam.lz4.compress(zeros)),
        "zstd": lambda: bytes(cramjam.zstd.compress(zeros)),
    }
    packed = packers[codec]()
    head = bytearray(encode_batch([(None, b"x", [])])[:HEADER_BYTES])
    out = head + packed[: 9 * 1024 * 1024]
    struct.pack_into(">i", out, 8, len(out) - 12)
    struct.pack_into(">h", out, 21, {"gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}[codec])
    struct.pack_into(">I", out, 17, calc_crc32c(memoryview(out)[21:]))
    return bytes(out)


async def test_every_refusal_is_a_problem_that_names_field_and_limit(world: World) -> None:
    async with Rest(world.cluster.url, world.cluster.ca) as rest:
        status, body = await rest.call("POST", "/v1/topics", {"name": "x", "config": {"partitions": 10_001}})
    assert status == 400
    assert {"type", "title", "status", "detail", "code", "retriable", "definite", "request_id"} <= set(body)
    assert "partitions" in body["detail"]
    assert "10000" in body["detail"].replace(",", "").replace("_", "")
    assert json.dumps(body)
    assert PARTITIONS == 3
