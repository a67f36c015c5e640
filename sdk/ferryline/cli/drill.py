"""A drill: keyed records through a cluster that loses a broker half way, and an account of every one of them.

`ferryline demo` runs one; the kill campaign of the tests runs many. One producer, several consumers in one group that
commit after processing. At half of the records a fault is made; at the end what was broken comes back. Then the whole
log is read once more by a fresh consumer, so that a record counts as kept only if consumers got it *and* it is stored.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ferryline.cli.checker import Verdict
from ferryline.cli.traffic import Traffic, count, keys_by_victim
from ferryline.protocol.errors import FerrylineError
from ferryline.protocol.partitioner import partition_of

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.producer import Producer
    from ferryline.protocol.metadata import PartitionMeta

TOPIC, GROUP = "drill", "drill"
YIELD_EVERY = 200  # records between two turns of the loop: acknowledgements and consumers go on meanwhile
START_S = 30.0
STALL_S = 0.5  # well below the 3 s after which a silent broker is fenced


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
    async def pause(self, name: str) -> None: ...
    async def resume(self, name: str) -> None: ...
    async def terminate(self, name: str, timeout_s: float = 15.0) -> int | None: ...
    async def start(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What a drill does. The victim of the fault is primary of the most keys.

    ``fault``: kill; terminate; kill-all; none; or kill-ahead: the other brokers are stopped (SIGSTOP) for half a
    second, then the victim is killed, then the others go on. A primary that acknowledges only what its secondaries have
    acknowledges nothing in that time; one that does not wait for them is ahead of them when it dies.
    """

    records: int = 300_000
    keys: int = 5_000
    victim_share: float | None = None  # choose keys so that this share of them is hit; None: as they fall
    partitions: int = 12
    replication: int = 2
    min_isr: int = 1
    consumers: int = 4
    value_bytes: int = 100
    rate: float = 0.0  # records a second; 0 is as fast as it goes
    fault: str = "kill"
    seed: int = 0
    delivery_s: float = 30.0  # a record not acknowledged by then is given up, and the drill goes on
    recovery_s: float = 30.0  # how long to wait for every copy to be back


@dataclass(frozen=True)
class Account:
    """How it went. Times in seconds; rates in records a second."""

    verdict: Verdict  # as the group's consumers saw it
    stored: Verdict  # as the logs have it
    seconds: float
    send_rate: float
    failover_s: float  # longest gap between acknowledgements of a partition, from the fault on
    healed_s: float | None  # from the return of the broker until every partition has all its copies; None: never
    in_flight_at_fault: int  # delivered and not yet committed
    killed: str
    send_errors: dict[str, int] = field(default_factory=dict)
    read_errors: dict[str, int] = field(default_factory=dict)

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
        self._traffic = Traffic(TOPIC, [], plan.partitions, group=GROUP)
        self._in_flight_at_fault = 0
        self._killed = ""
        self._phase = "starting"

    async def run(self) -> Account:
        """Send, break, mend, drain, judge. Raises what the client raises when the cluster cannot be used at all."""
        import ferryline as fl

        plan = self.plan
        connect = partial(fl.connect, self._patient.urls, ca=self._patient.ca)
        async with connect() as client, connect() as reading:
            await client.admin.create_topic(
                TOPIC, partitions=plan.partitions, replication=plan.replication, min_isr=plan.min_isr
            )
            await healed(client, TOPIC, plan.partitions, plan.replication, START_S)
            traffic = self._traffic = self._make_traffic(client)
            tasks = [asyncio.create_task(traffic.consume(reading)) for _ in range(plan.consumers)]
            ticker = asyncio.create_task(self._tick())
            try:
                started = time.perf_counter()
                async with client.producer(linger=0.005, delivery_timeout=plan.delivery_s) as producer:
                    await self._send_all(client, producer)
                    await producer.flush()
                seconds = time.perf_counter() - started
                healed_s = await self._mend(client)
                self._phase = "receiving the rest"
                await traffic.drain()
            finally:
                for task in (*tasks, ticker):
                    task.cancel()
                ended = await asyncio.gather(*tasks, return_exceptions=True)
            for result in ended:
                if isinstance(result, Exception):
                    count(traffic.read_errors, result)
            self._phase = "reading the log"
            try:
                await traffic.read_log(client)
            except FerrylineError as error:  # what cannot be read counts as lost
                count(traffic.read_errors, error)
        return Account(
            traffic.ledger.verdict(),
            traffic.stored.verdict(),
            seconds,
            traffic.ledger.acknowledged / seconds,
            traffic.by_partition.worst(),
            healed_s,
            self._in_flight_at_fault,
            self._killed,
            dict(sorted(traffic.send_errors.items())),
            dict(sorted(traffic.read_errors.items())),
        )

    def _make_traffic(self, client: Client) -> Traffic:
        plan = self.plan
        keys = [b"key-%d" % number for number in range(plan.keys)]
        if plan.victim_share is not None:
            parts = partitions_of(client, TOPIC)
            victim = Counter(part.primary for part in parts).most_common(1)[0][0]
            hit = {part.partition for part in parts if part.primary == victim}
            keys = keys_by_victim(plan.keys, plan.victim_share, plan.partitions, hit)
        return Traffic(TOPIC, keys, plan.partitions, group=GROUP, value_bytes=plan.value_bytes)

    async def _send_all(self, client: Client, producer: Producer) -> None:
        plan, send = self.plan, self._traffic.send
        draw = random.Random(plan.seed).randrange
        half = plan.records // 2
        fault: asyncio.Task[None] | None = None
        started = time.perf_counter()
        self._phase = "sending"
        for number in range(plan.records):
            if number == half and plan.fault != "none":
                fault = asyncio.create_task(self._break(client))
            await send(producer, draw(plan.keys))
            if not number % YIELD_EVERY:
                due = started + number / plan.rate if plan.rate else 0.0
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
        if fault is not None:
            await fault

    # -- breaking and mending ------------------------------------------------------------------------

    async def _break(self, client: Client) -> None:
        self._in_flight_at_fault = self._traffic.uncommitted
        if self.plan.fault == "kill-all":
            self._mark("everything")
            await self._patient.kill_all()
            await self._patient.start()
            return
        primaries = {part.partition: part.primary for part in partitions_of(client, TOPIC)}
        hits = Counter(primaries[partition_of(key, self.plan.partitions)] for key in self._traffic.keys)
        victim = max(sorted(set(hits) - {0}), key=hits.__getitem__)
        self._mark(self._patient.name_of(victim))
        if self.plan.fault == "terminate":
            await self._patient.terminate(self._killed)
        elif self.plan.fault == "kill-ahead":
            await self._kill_ahead()
        else:
            await self._patient.kill(self._killed)

    async def _kill_ahead(self) -> None:
        others = [name for name in self._patient.brokers if name != self._killed]
        try:
            for name in others:
                await self._patient.pause(name)
            await asyncio.sleep(STALL_S)
            await self._patient.kill(self._killed)
        finally:
            for name in others:
                await self._patient.resume(name)

    def _mark(self, killed: str) -> None:
        self._killed = killed
        self._phase = f"{killed} is gone"
        self._traffic.mark()

    async def _mend(self, client: Client) -> float | None:
        """Bring back what is down; seconds until every partition has all its copies again, None if it never had."""
        self._phase = f"{self._killed} returns"
        started = time.perf_counter()
        await self._patient.start()
        done = await healed(client, TOPIC, self.plan.partitions, self.plan.replication, self.plan.recovery_s)
        return time.perf_counter() - started if done else None

    async def _tick(self) -> None:
        while True:
            ledger = self._traffic.ledger
            self._progress(self._phase, ledger.sent, ledger.acknowledged, ledger.deliveries)
            await asyncio.sleep(0.1)


def partitions_of(client: Client, topic: str) -> list[PartitionMeta]:
    """The topic's partitions as the client knows them now."""
    meta = client.routing.topic(topic)
    return client.routing.cluster.partitions_of(meta.id) if meta is not None else []


async def healed(client: Client, topic: str, partitions: int, replication: int, within_s: float) -> bool:
    """Wait until every partition has a primary and all its copies in sync."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        parts = partitions_of(client, topic)
        if len(parts) == partitions and all(part.primary and len(part.isr) >= replication for part in parts):
            return True
        await asyncio.sleep(0.05)
    return False


async def run_drill(plan: Plan, patient: Patient, progress: Progress | None = None) -> Account:
    """Run one drill against a cluster that is up."""
    return await Drill(plan, patient, progress).run()
