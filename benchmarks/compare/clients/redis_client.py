"""redis-py with hiredis: pipelines of XADD, XREADGROUP with a COUNT, one XACK per batch, as documented.

A stream has no keys and no partitions: key and value are two fields of an entry, and everything goes to one stream.
"""

from __future__ import annotations

import asyncio

import redis
import redis.asyncio
from benchmarks.compare.clients import Adapter
from benchmarks.compare.spec import Spec, key_of

PIPELINE = 1_000
WINDOW = 50  # records on their way at a fixed rate, each on a connection of its own


class Redis(Adapter):
    blocking = True

    async def open_producer(self) -> None:
        host, port = self.spec.servers.split(":")
        self._redis = redis.Redis(host, int(port), socket_timeout=self.spec.timeout_s)
        self._redis.ping()
        # for a fixed rate: the blocking client would wait for each confirmation before it sends the next record
        self._async = redis.asyncio.Redis(host=host, port=int(port), socket_timeout=self.spec.timeout_s)
        self._waiting: set[asyncio.Future[object]] = set()

    async def send_all(self, first: int, count: int) -> None:
        topic, value = self.spec.topic, self.value
        for begin in range(first, first + count, PIPELINE):
            pipe = self._redis.pipeline(transaction=False)
            for number in range(begin, min(begin + PIPELINE, first + count)):
                pipe.execute_command("XADD", topic, "*", "k", key_of(number), "v", value)
            self.errors += sum(isinstance(one, Exception) for one in pipe.execute(raise_on_error=False))

    async def send_one(self, number: int) -> None:
        self._redis.execute_command("XADD", self.spec.topic, "*", "k", key_of(number), "v", self.value)

    async def send_soon(self, key: bytes, value: bytes) -> None:
        send = self._async.execute_command("XADD", self.spec.topic, "*", "k", key, "v", value)
        self._waiting.add(asyncio.ensure_future(send))
        if len(self._waiting) > WINDOW:
            await self._settle(asyncio.FIRST_COMPLETED)

    async def _settle(self, when: str) -> None:
        done, self._waiting = await asyncio.wait(self._waiting, return_when=when)
        self.errors += sum(one.exception() is not None for one in done)

    async def drain(self) -> None:
        if self._waiting:
            await self._settle(asyncio.ALL_COMPLETED)

    async def open_consumer(self) -> None:
        await self.open_producer()

    def _entries(self) -> list[tuple[bytes, list[bytes]]]:
        """The next entries for the group, acknowledged at once: raw answers, without a dict for each."""
        connection = self._redis
        found = connection.execute_command(
            "XREADGROUP", "GROUP", self.spec.group, "bench", "COUNT", self.spec.batch, "BLOCK", 200,
            "STREAMS", self.spec.topic, ">",
        )  # fmt: skip
        if not found:
            return []
        entries = found[0][1] if isinstance(found, list) else next(iter(found.values()))[0]
        connection.execute_command("XACK", self.spec.topic, self.spec.group, *(entry[0] for entry in entries))
        return list(entries)

    async def read(self) -> tuple[int, int]:
        size = 0
        entries = self._entries()
        for _, fields in entries:
            size += len(field_of(fields, 0)) + len(field_of(fields, 1))
        return len(entries), size

    async def read_values(self) -> list[bytes]:
        return [field_of(fields, 1) for _, fields in self._entries()]

    async def close(self) -> None:
        await self._async.aclose()
        self._redis.close()


def field_of(fields: object, which: int) -> bytes:
    """Key or value of an entry, whichever form this version of redis-py gives it."""
    if isinstance(fields, dict):
        return bytes(fields[(b"k", b"v")[which]])
    assert isinstance(fields, list)
    return bytes(fields[2 * which + 1])


def make(spec: Spec) -> Adapter:
    """The adapter for one role."""
    return Redis(spec)
