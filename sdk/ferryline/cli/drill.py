"""A drill: keyed records through a cluster that loses a broker half way, and an account of every one of them.

`ferryline demo` runs one; the kill campaign of the tests runs many. One producer, several consumers in one group that
commit after processing. At half of the records a fault is made; at the end what was broken comes back. Then the whole
log is read once more by a fresh consumer, so that a record counts as kept only if consumers got it *and* it is stored.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ferryline.cli.checker import Gaps, Ledger, Verdict
from ferryline.protocol.errors import BufferFull, FerrylineError

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.consumer import Consumer
    from ferryline.message import Message
    from ferryline.producer import Producer

TOPIC, GROUP = "drill", "drill"
YIELD_EVERY = 200  # records between two turns of the loop: acknowledgements and consumers go on meanwhile
DRAIN_S = 30.0  # how long consumers may take for what is left once everything was sent
RECOVERY_S = 60.0


class Patient(Protocol):
    """The cluster, as far as a drill touches it."""

    @property
    def urls(self) -> list[str]: ...
    @property
    def ca(self) -> Path: ...
    @property
    def brokers(self) -> list[str]: ...
    def name_of(self, broker_id: int) -> str: ...
    async def kill(self, name: str) -> None: ...
    async def kill_all(self) -> None: ...
    async def terminate(self, name: str, timeout_s: float = 15.0) -> int | None: ...
    async def start(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What a drill does. ``fault``: kill, terminate, kill-all or none."""

    records: int = 300_000
    keys: int = 5_000
    partitions: int = 12
    replication: int = 2
    min_isr: int = 1
    consumers: int = 4
    value_bytes: int = 100
    rate: float = 0.0  # records a second; 0 is as fast as it goes
    fault: str = "kill"
    seed: int = 0


@dataclass(frozen=True)
class Account:
    """How it went. Times in seconds; rates in records a second."""

    verdict: Verdict
    stored: Verdict  # the same question asked of the log itself
    seconds: float
    send_rate: float
    failover_s: float  # longest gap between acknowledgements of a partition, from the fault on
    failover_by_key_s: float  # the same by key; larger where keys are rarely sent
    healed_s: float | None  # from the return of the broker until every partition has all its copies; None: never
    rebalanced_duplicates: int
    in_flight_at_fault: int  # delivered and not yet committed
    killed: str
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        return max(self.verdict.lost, self.stored.lost)

    @property
    def out_of_order(self) -> int:
        return max(self.verdict.out_of_order, self.stored.out_of_order)

    @property
    def good(self) -> bool:
        return self.verdict.good and self.stored.good

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "verdict": self.verdict.as_dict(),
            "stored": self.stored.as_dict(),
            "lost": self.lost,
            "out_of_order": self.out_of_order,
            "good": self.good,
        }


Progress = Callable[[str, int, int, int], None]  # (what is going on, sent, acknowledged, received)


class Drill:
    """One run. `run` may be called once."""

    def __init__(self, plan: Plan, patient: Patient, progress: Progress | None = None) -> None:
        self.plan = plan
        self._patient = patient
        self._progress = progress or (lambda *_: None)
        self._ledger = Ledger(plan.keys)
        self._stored = self._ledger.second_reader()
        self._by_partition = Gaps(plan.partitions)
        self._by_key = Gaps(plan.keys)
        self._errors: dict[str, int] = {}
        self._chance = random.Random(plan.seed)
        self._uncommitted = 0
        self._in_flight_at_fault = 0
        self._killed = ""
        self._phase = "starting"
        self._pad = b"." * max(0, plan.value_bytes - 24)

    async def run(self) -> Account:
        """Send, break, mend, drain, judge. Raises what the client raises when the cluster cannot be used at all."""
        import ferryline as fl

        plan = self.plan
        connect = partial(fl.connect, self._patient.urls, ca=self._patient.ca)
        async with connect() as client, connect() as reading:
            await client.admin.create_topic(
                TOPIC, partitions=plan.partitions, replication=plan.replication, min_isr=plan.min_isr
            )
            await self._healed(client, RECOVERY_S)
            tasks = [asyncio.create_task(self._consume(reading)) for _ in range(plan.consumers)]
            ticker = asyncio.create_task(self._tick())
            try:
                started = time.perf_counter()
                async with client.producer(linger=0.005) as producer:
                    await self._send_all(client, producer)
                    await producer.flush()
                seconds = time.perf_counter() - started
                healed_s = await self._mend(client)
                await self._drain(tasks)
            finally:
                for task in (*tasks, ticker):
                    task.cancel()
                ended = await asyncio.gather(*tasks, return_exceptions=True)
            for result in ended:
                if isinstance(result, Exception):
                    self._count(result)
            await self._read_log(client)
        return Account(
            self._ledger.verdict(),
            self._stored.verdict(),
            seconds,
            self._ledger.acknowledged / seconds,
            self._by_partition.worst(),
            self._by_key.worst(),
            healed_s,
            self._ledger.verdict().redelivered,
            self._in_flight_at_fault,
            self._killed,
            dict(sorted(self._errors.items())),
        )

    # -- sending -------------------------------------------------------------------------------------

    async def _send_all(self, client: Client, producer: Producer) -> None:
        plan, ledger = self.plan, self._ledger
        half = plan.records // 2
        draw = self._chance.randrange
        fault: asyncio.Task[None] | None = None
        started = time.perf_counter()
        self._phase = "sending"
        for number in range(plan.records):
            if number == half and plan.fault != "none":
                fault = asyncio.create_task(self._break(client))
            key = draw(plan.keys)
            n = ledger.next_n(key)
            value = b"%d:%d:%s" % (key, n, self._pad)
            future = await self._send(producer, b"key-%d" % key, value)
            if future is not None:
                future.add_done_callback(partial(self._settled, key, n))
            if not number % YIELD_EVERY:
                await asyncio.sleep(self._pause(number, started))
        if fault is not None:
            await fault

    def _pause(self, number: int, started: float) -> float:
        if not self.plan.rate:
            return 0.0
        return max(0.0, started + number / self.plan.rate - time.perf_counter())

    async def _send(self, producer: Producer, key: bytes, value: bytes) -> Any:
        """Hand over one record, waiting for room. None: refused for certain, and noted."""
        while True:
            try:
                return producer.send_nowait(TOPIC, value, key)
            except BufferFull:
                await asyncio.sleep(0.002)

    def _settled(self, key: int, n: int, future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            meta = future.result()
            now = time.perf_counter()
            self._ledger.acked(key, n, meta.offset)
            self._by_partition.acknowledged(meta.partition, now)
            self._by_key.acknowledged(key, now)
            return
        self._count(error)
        if isinstance(error, FerrylineError) and error.definite:
            self._ledger.refused_for_certain(key, n)

    def _count(self, error: BaseException) -> None:
        name = error.code if isinstance(error, FerrylineError) else type(error).__name__
        self._errors[name] = self._errors.get(name, 0) + 1

    # -- receiving -----------------------------------------------------------------------------------

    async def _consume(self, client: Client) -> None:
        """Receive, note, commit; after a typed error, as an application would, go on with a new consumer."""
        while True:
            try:
                async with client.consumer(TOPIC, group=GROUP) as consumer:
                    async for batch in consumer.batches(max_records=2_000, max_wait=0.1):
                        self._note(self._ledger, batch)
                        self._uncommitted += len(batch)
                        try:
                            await consumer.commit()
                        finally:
                            self._uncommitted -= len(batch)
            except FerrylineError as error:
                self._count(error)
                await asyncio.sleep(0.2)

    @staticmethod
    def _note(ledger: Ledger, batch: list[Message[Any]]) -> None:
        received = ledger.received
        for message in batch:
            raw = message.raw or b""
            try:
                key, n, _ = raw.split(b":", 2)
                received(int(key), int(n), message.offset)
            except ValueError:
                ledger.stranger(f"{message.partition}@{message.offset}: {raw[:40]!r}")

    async def _drain(self, tasks: list[asyncio.Task[None]]) -> None:
        """Wait until every acknowledged record was received, or nothing more comes."""
        self._phase = "receiving"
        end = time.monotonic() + DRAIN_S
        while time.monotonic() < end and self._ledger.missing():
            if all(task.done() for task in tasks):
                return
            await asyncio.sleep(0.1)

    async def _read_log(self, client: Client) -> None:
        """Everything that is stored, partition by partition, by a reader that was not there when it happened."""
        self._phase = "reading the log"
        async with client.consumer(TOPIC, start="start") as consumer:
            await self._read_to_the_end(consumer)

    async def _read_to_the_end(self, consumer: Consumer[Any]) -> None:
        end = time.monotonic() + DRAIN_S
        while time.monotonic() < end:
            batch = await consumer.fetch(max_records=10_000, max_wait=0.5)
            self._note(self._stored, batch)
            if not batch and not any((await consumer.lag()).values()):
                return

    # -- breaking and mending ------------------------------------------------------------------------

    async def _break(self, client: Client) -> None:
        self._in_flight_at_fault = self._uncommitted
        if self.plan.fault == "kill-all":
            self._killed = "all processes"
            self._mark()
            await self._patient.kill_all()
            await self._patient.start()
            return
        primaries = [part.primary for part in await self._partitions(client) if part.primary]
        busiest = max(sorted(set(primaries)), key=primaries.count)
        self._killed = self._patient.name_of(busiest)
        self._mark()
        if self.plan.fault == "terminate":
            await self._patient.terminate(self._killed)
        else:
            await self._patient.kill(self._killed)

    def _mark(self) -> None:
        self._phase = f"{self._killed} is gone"
        now = time.perf_counter()
        self._by_partition.start(now)
        self._by_key.start(now)

    async def _mend(self, client: Client) -> float | None:
        """Bring back what is down; seconds until every partition has all its copies again, None if it never had."""
        self._phase = f"{self._killed} returns"
        started = time.perf_counter()
        await self._patient.start()
        return time.perf_counter() - started if await self._healed(client, RECOVERY_S) else None

    async def _healed(self, client: Client, within_s: float) -> bool:
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            parts = await self._partitions(client)
            if len(parts) == self.plan.partitions and all(
                part.primary and len(part.isr) >= self.plan.replication for part in parts
            ):
                return True
            await asyncio.sleep(0.05)
        return False

    async def _partitions(self, client: Client) -> list[Any]:
        """The topic's partitions as the client knows them now."""
        return list((await client.admin.describe_topic(TOPIC)).partitions)

    async def _tick(self) -> None:
        while True:
            ledger = self._ledger
            self._progress(self._phase, ledger.sent, ledger.acknowledged, ledger.deliveries)
            await asyncio.sleep(0.1)


async def run_drill(plan: Plan, patient: Patient, progress: Progress | None = None) -> Account:
    """Run one drill against a cluster that is up."""
    return await Drill(plan, patient, progress).run()


Runner = Callable[[Plan, Patient], Awaitable[Account]]
