"""Receivers of queues behind one small interface: each record is handled, then acknowledged, as its library advises."""

from __future__ import annotations

import asyncio
import importlib
from abc import ABC, abstractmethod
from contextlib import suppress
from time import monotonic_ns

from benchmarks.compare.spec import KEY_BYTES, Spec, sent_ns

# name of a client -> module of its receiver
RECEIVERS = {
    "ferryline": "benchmarks.compare.receivers.ferryline_receiver",
    "aio-pika": "benchmarks.compare.receivers.aio_pika_receiver",
    "pika": "benchmarks.compare.receivers.pika_receiver",
    "nats-py": "benchmarks.compare.receivers.nats_receiver",
    "redis-py": "benchmarks.compare.receivers.redis_receiver",
}
PREFETCH = 500  # records that may be here unacknowledged, where a server has such a limit
STEP_S = 0.5


class Handler:
    """What is done with each record, the same for all: its number is crossed off, its time stamp looked at."""

    def __init__(self, total: int, *, stamps: bool = False) -> None:
        self._handled = bytearray(total)
        self._stamps = stamps
        self.distinct = self.repeated = self.size = 0
        self.times_ns: list[int] = []

    def record(self, key: bytes, value: bytes) -> None:
        number = int(key)
        if self._handled[number]:
            self.repeated += 1
            return
        self._handled[number] = 1
        self.distinct += 1
        self.size += len(value)
        if self._stamps and (sent := sent_ns(value)):
            self.times_ns.append(monotonic_ns() - sent)

    def body(self, body: bytes) -> None:
        """A record of a client without keys."""
        self.record(body[:KEY_BYTES], body[KEY_BYTES:])


class Receiving(ABC):
    """One receiver of the queue ``spec.topic``, in the group ``spec.group`` where there are groups."""

    def __init__(self, spec: Spec, handler: Handler) -> None:
        self.spec = spec
        self.handler = handler
        self.errors = 0

    @abstractmethod
    async def connect(self) -> None:
        """Connect; nothing is received yet."""

    @abstractmethod
    async def subscribe(self) -> None: ...

    @abstractmethod
    async def step(self) -> None:
        """Records that come within `STEP_S` seconds: handled, and the acknowledgement of each on its way."""

    @abstractmethod
    async def settled(self) -> None:
        """Wait until the server has all acknowledgements; where it answers them, what failed is in ``errors``."""

    @abstractmethod
    async def close(self) -> None: ...


class Pushed(Receiving):
    """A receiver whose server calls back with each record; the callback sets ``came``."""

    def __init__(self, spec: Spec, handler: Handler) -> None:
        super().__init__(spec, handler)
        self.came = asyncio.Event()

    async def step(self) -> None:
        self.came.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.came.wait(), STEP_S)


def receiving(spec: Spec, handler: Handler) -> Receiving:
    """The receiver of ``spec.client``. Raises ImportError when the library is not installed."""
    module = importlib.import_module(RECEIVERS[spec.client])
    made: Receiving = module.make(spec, handler)
    return made
