"""redis-py with hiredis: XREADGROUP with a COUNT, then an XACK for each entry in one pipeline; or one XACK for all.

Every XACK is answered, in the durability of the server.
"""

from __future__ import annotations

from typing import Any

import redis
from benchmarks.compare.clients.redis_client import field_of
from benchmarks.compare.receivers import STEP_S, Handler, Receiving
from benchmarks.compare.spec import Spec

COUNT = 2_000  # with 500 it is up to a sixth slower, with 5,000 no faster


class Redis(Receiving):
    async def connect(self) -> None:
        host, port = self.spec.servers.split(":")
        self._redis = redis.Redis(host, int(port), socket_timeout=self.spec.timeout_s)
        self._redis.ping()

    async def subscribe(self) -> None:
        """Every XREADGROUP names its consumer."""

    async def step(self) -> None:
        topic, group = self.spec.topic, self.spec.group
        found: Any = self._redis.execute_command(
            "XREADGROUP", "GROUP", group, "bench", "COUNT", COUNT, "BLOCK", int(STEP_S * 1000), "STREAMS", topic, ">"
        )
        if not found:
            return
        entries = found[0][1] if isinstance(found, list) else next(iter(found.values()))[0]
        for _, fields in entries:
            self.handler.record(field_of(fields, 0), field_of(fields, 1))
        if not self.spec.one_by_one:
            self._redis.execute_command("XACK", topic, group, *(entry[0] for entry in entries))
            return
        pipe = self._redis.pipeline(transaction=False)
        for entry in entries:
            pipe.execute_command("XACK", topic, group, entry[0])
        self.errors += sum(one != 1 for one in pipe.execute(raise_on_error=False))

    async def settled(self) -> None:
        """Each was answered."""

    async def close(self) -> None:
        self._redis.close()


def make(spec: Spec, handler: Handler) -> Receiving:
    """The receiver for one measurement."""
    return Redis(spec, handler)
