"""nats-py: a pull consumer with explicit acknowledgements, which nobody answers; pushed where latency counts."""

from __future__ import annotations

from typing import Any

import nats
import nats.errors
from benchmarks.compare.receivers import PREFETCH, STEP_S, Handler, Receiving
from benchmarks.compare.spec import Spec
from nats.js.api import AckPolicy, ConsumerConfig


class Nats(Receiving):
    async def connect(self) -> None:
        self._client = await nats.connect(self.spec.servers.split(","))
        self._stream = self._client.jetstream(timeout=30)

    async def subscribe(self) -> None:
        if self.spec.throughput:
            self._pull = await self._stream.pull_subscribe_bind(consumer=self.spec.group, stream=self.spec.topic)
            return
        # for latency: the server pushes, nobody asks first
        config = ConsumerConfig(ack_policy=AckPolicy.EXPLICIT, max_ack_pending=PREFETCH)
        subjects, name = f"{self.spec.topic}.*", f"{self.spec.group}-pushed"
        self._push = await self._stream.subscribe(
            subjects, stream=self.spec.topic, durable=name, manual_ack=True, config=config
        )

    async def step(self) -> None:
        try:
            found = await (self._pull.fetch(PREFETCH, timeout=STEP_S) if self.spec.throughput else self._pushed())
        except (TimeoutError, nats.errors.TimeoutError):
            return
        for message in found:
            self.handler.body(message.data)
            await message.ack()

    async def _pushed(self) -> list[Any]:
        found = [await self._push.next_msg(timeout=STEP_S)]
        while self._push.pending_msgs:
            found.append(await self._push.next_msg(timeout=STEP_S))
        return found

    async def settled(self) -> None:
        await self._client.flush(30)

    async def close(self) -> None:
        await self._client.close()


def make(spec: Spec, handler: Handler) -> Receiving:
    """The receiver for one measurement."""
    return Nats(spec, handler)
