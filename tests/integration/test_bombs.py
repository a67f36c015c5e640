"""Things that grow when they are unpacked: batches, bodies, frames. Bounded time and memory, a definite error, and
nobody else notices."""

from __future__ import annotations

import asyncio
import gzip
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import cramjam
import pytest
from aiokafka.record.util import calc_crc32c

import ferryline as fl
from ferryline.protocol import errors
from ferryline.protocol.records import CODECS, HEADER_BYTES, encode_batch
from tests.integration.bad_input import World
from tests.integration.wire import Rest, Wire

pytestmark = pytest.mark.process

MIB = 1024 * 1024
# Of a broker, over all bombs: one costs up to twice BATCH_DECODED_BYTES_MAX for a moment, and a service keeps up to
# 512 MiB of freed heap (`programs.tune_process`). All of them unpacked would be more than 3 GiB.
GROWTH_BYTES = 640 * MIB
READER_BYTES = 1024 * MIB  # of address space for a process that decodes every bomb; the largest holds 1 GiB unpacked
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 1),
    "snappy": lambda data: bytes(cramjam.snappy.compress_raw(data)),
    "lz4": lambda data: bytes(cramjam.lz4.compress(data)),
    "zstd": lambda data: bytes(cramjam.zstd.compress(data)),
}


def framed(codec: str, packed: bytes, *, count: int = 1) -> bytes:
    """A batch with a valid header and checksum around whatever ``packed`` is."""
    head = bytearray(encode_batch([(None, b"x", [])])[:HEADER_BYTES])
    out = head + packed[: 7 * MIB]
    struct.pack_into(">i", out, 8, len(out) - 12)
    struct.pack_into(">h", out, 21, CODECS[codec])
    struct.pack_into(">i", out, 23, count - 1)
    struct.pack_into(">i", out, 57, count)
    struct.pack_into(">I", out, 17, calc_crc32c(bytes(out[21:])))
    return bytes(out)


def lying(codec: str) -> bytes:
    """A stream that announces far more than it holds."""
    small = PACK[codec](b"\0" * 100)
    if codec == "snappy":
        return b"\xff\xff\xff\xff\x0f" + small[1:]  # 4 GiB, as a varint
    if codec == "zstd":
        return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**62) + small[6:]
    if codec == "lz4":
        return b"\x04\x22\x4d\x18\x68\x70" + struct.pack("<Q", 2**62) + b"\x00" + small[7:]
    return small[:-4] + struct.pack("<I", 2**32 - 1)


def members(codec: str) -> bytes:
    """Thousands of streams one behind the other."""
    return PACK[codec](bytes(64 * 1024)) * 5_000


SHAPES: dict[str, Callable[[str], bytes]] = {
    "256 MiB of zeros": lambda codec: framed(codec, PACK[codec](bytes(256 * MIB))),
    "just over the limit": lambda codec: framed(codec, PACK[codec](bytes(65 * MIB))),
    "packed twice": lambda codec: framed(codec, PACK[codec](PACK[codec](bytes(64 * MIB)))),
    "announcing more than it holds": lambda codec: framed(codec, lying(codec)),
    "cut in the middle": lambda codec: framed(codec, PACK[codec](bytes(range(256)) * 4096)[:2000]),
    "of two thousand million records": lambda codec: framed(codec, PACK[codec](b"\0" * 100), count=2**31 - 1),
    "of a record of 2 GiB": lambda codec: framed(codec, PACK[codec](b"\xfe\xff\xff\xff\x0f" + b"\0" * 100)),
    "of many streams": lambda codec: framed(codec, members(codec)),
}
BOMBS = [(codec, shape) for codec in PACK for shape in SHAPES]
ENCODINGS = {
    "gzip": gzip.compress(bytes(64 * MIB)),
    "deflate": zlib.compress(bytes(64 * MIB)),
    "br": bytes(cramjam.brotli.compress(bytes(16 * MIB))),
    "zstd": bytes(cramjam.zstd.compress(bytes(64 * MIB))),
    "gzip, gzip": gzip.compress(gzip.compress(bytes(64 * MIB))),
    "x-gzip": gzip.compress(bytes(64 * MIB)),
    "identity, gzip": gzip.compress(bytes(64 * MIB)),
}


def peaks(world: World) -> dict[str, int]:
    """The most memory that each service has ever had, in bytes."""
    found = {}
    for name, service in world.cluster.local.services.items():
        assert service.process is not None
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        found[name] = int(line.split()[1]) * 1024
    return found


def test_the_table_is_as_long_as_promised() -> None:
    assert len(BOMBS) + len(ENCODINGS) >= 30


async def test_stored_bombs_hurt_neither_the_broker_nor_its_other_readers(world: World) -> None:
    """Each bomb in a topic of its own, with a good record behind it: read over REST, leased from a queue, consumed."""
    before = peaks(world)
    async with fl.connect(world.cluster.urls, ca=world.cluster.ca) as client:
        for number, (codec, shape) in enumerate(BOMBS):
            where = f"{codec}, {shape}"
            name = f"bomb-{number}"
            await client.admin.create_topic(name, partitions=1, replication=1, max_record_bytes=8 * MIB)
            info = await client.admin.describe_topic(name)
            url = world.urls[info.partitions[0].primary]
            async with await Wire.connect(url, world.cluster.ca) as wire:
                result = await wire.produce(info.id, 0, 1, SHAPES[shape](codec))
            if result.error is not None:
                assert result.error.code in ("RECORD_TOO_LARGE", "CORRUPT_BATCH", "INVALID_ARGUMENT"), where
                continue
            async with client.producer() as producer, client.consumer(name) as consumer:
                meta = await producer.send(name, b"behind")
                with pytest.raises(errors.CorruptBatch):
                    await consumer.pull(10, 10.0)
                await consumer.seek(fl.TopicPartition(name, 0), meta.offset)
                assert [message.raw for message in await consumer.pull(10, 10.0)] == [b"behind"], where
            async with Rest(url, world.cluster.ca) as rest:
                status, body = await rest.call("GET", f"/v1/topics/{name}/partitions/0/records")
                assert (status, body["code"]) == (400, "CORRUPT_BATCH"), (where, body)
                status, body = await rest.call("POST", f"/v1/queues/{name}/g/receive", {"wait_ms": 2000, "member": "m"})
                assert status == 200, (where, body)
                assert [record["value"] for record in body["records"]] == ["behind"], (where, body)
    after = peaks(world)
    assert {name: grown for name in after if (grown := after[name] - before[name]) > GROWTH_BYTES} == {}
    assert all(service.running for service in world.cluster.local.services.values())
    await world.still_serves()


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_a_packed_body_is_not_unpacked(world: World, encoding: str) -> None:
    before = peaks(world)
    for url, path in (
        (world.cluster.url, "/v1/topics"),
        (world.urls[world.part().primary], "/v1/topics/victim/records"),
    ):
        async with Rest(url, world.cluster.ca) as rest:
            status, body = await rest.call("POST", path, ENCODINGS[encoding], headers={"Content-Encoding": encoding})
        assert (status, body["code"], body["definite"]) == (415, "UNSUPPORTED_MEDIA_TYPE", True), body
    after = peaks(world)
    assert max(after[name] - before[name] for name in after) < 32 * MIB


async def test_sessions_do_not_agree_to_compression(world: World) -> None:
    """A compressed message of a session would be unpacked before anybody could look at its size."""
    import ssl

    import aiohttp

    context = ssl.create_default_context(cafile=str(world.cluster.ca))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as http:
        for url in (world.cluster.url, world.urls[world.part().primary]):
            async with asyncio.timeout(10), http.ws_connect(f"{url}/v1/session", compress=15) as ws:
                assert not ws.compress


_READER = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({READER_BYTES}, {READER_BYTES}))
from ferryline.protocol.errors import CorruptBatch
from ferryline.protocol.records import decode_batch
data = sys.stdin.buffer.read()
try:
    print("decoded", sum(len(record.value) for record in decode_batch(data)))
except CorruptBatch:
    print("refused")
"""


def read_with_little_memory(data: bytes) -> str:
    """In a process of its own, because a limit on memory cannot be taken back."""
    reader = [sys.executable, "-c", _READER]
    done = subprocess.run(reader, input=data, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()[-300:]
    return done.stdout.decode().strip()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_reader_with_little_memory_refuses_them_all(shape: str) -> None:
    for codec in PACK:
        assert read_with_little_memory(SHAPES[shape](codec)) == "refused", codec


@pytest.mark.parametrize("codec", PACK)
def test_the_same_reader_reads_what_is_just_within_the_limits(codec: str) -> None:
    """Otherwise everything could be refused, or nothing for the reason that is meant."""
    value = random.Random(1).randbytes(MIB // 16) * 15  # packed to less than a record may be, and no bomb
    batch = bytes(encode_batch([(b"k", value, [])] * (60 * MIB // len(value)), codec=codec))
    assert read_with_little_memory(batch) == f"decoded {60 * MIB // len(value) * len(value)}"
