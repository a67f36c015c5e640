"""One run of `ferryline chaos`: load, faults by the plan, heal, drain, read every copy, judge."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ferryline.cli.chaos.audit import Audit, repair
from ferryline.cli.chaos.copies import CopyReader
from ferryline.cli.chaos.queueing import RETRY, Queueing
from ferryline.cli.chaos.record import Recorder, now_us
from ferryline.cli.chaos.schedule import DAMAGE, DRAIN, Phase, Plan, Step
from ferryline.cli.chaos.traffic import Topic, Traffic, queue_topic, topics_for
from ferryline.cli.processes import ProcessFailed
from ferryline.proof.checker import check
from ferryline.proof.findings import Verdict
from ferryline.proof.history import Op, read_history
from ferryline.protocol.errors import FerrylineError

if TYPE_CHECKING:
    from ferryline.client import Client

TICK_S = 0.25
# What a log must not say. Refusals and lost connections are the daily bread of a run and stand there at will.
BROKEN = re.compile(rb"invariant|the core failed|Traceback \(most recent call last\)")
# What the event loop itself says when a peer breaks off in a handshake: nobody waits for that future any more; and when
# what came in last asks for an answer on a transport that was closed a moment ago.
NOISE = re.compile(
    rb"Traceback \(most recent call last\):\n(?:  .*\n)*?  File \"uvloop/sslproto.*\n"
    rb"(?:  .*\n)*(?:ConnectionResetError|RuntimeError: unable to perform operation on <TCPTransport closed=True).*\n"
)


class Bed(Protocol):
    """What a run needs of a cluster: `ProcessBed`, or the containers of a compose project."""

    counts: Counter[str]
    surprises: list[str]
    admin: Client | None

    @property
    def urls(self) -> list[str]: ...

    @property
    def ca(self) -> str: ...

    async def begin(self, step: Step) -> None: ...

    async def end(self, step: Step) -> None: ...

    async def heal(self, within_s: float) -> None: ...

    def logs(self) -> dict[str, bytes]:
        """What each service wrote to stderr."""
        ...


@dataclass(frozen=True)
class Load:
    """How much is sent, and how long the end may take."""

    rate: float = 3_000.0
    value_bytes: int = 100
    partitions: int = 4
    producers: int = 3
    members: int = 3
    delivery_s: float = 30.0
    heal_s: float = 120.0


@dataclass
class Account:
    """What became of a run."""

    seconds: float
    acked: int
    refused: int
    unknown: int
    polled: int
    copies_read: int
    receipts: int
    longest_gap_s: float
    longest_gap_in: str  # the phase in which it ended
    elections: int
    takeovers: int  # by another coordinator, or by the same one in a new term
    faults: dict[str, int]
    verdict: Verdict | None
    trouble: list[str] = field(default_factory=list)  # anomalies that no history shows
    send_errors: dict[str, int] = field(default_factory=dict)
    read_errors: dict[str, int] = field(default_factory=dict)
    queue: dict[str, int] = field(default_factory=dict)  # what receivers were given, and what they said of it

    @property
    def anomalies(self) -> int:
        found = sum(self.verdict.errors.values()) if self.verdict is not None else 0
        return found + len(self.trouble)

    @property
    def good(self) -> bool:
        """Every promise was kept, and the cluster came back by itself."""
        return self.verdict is not None and not self.anomalies

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {name: value for name, value in self.__dict__.items() if name != "verdict"}
        verdict = self.verdict.as_dict() if self.verdict is not None else None
        return {**found, "verdict": verdict, "anomalies": self.anomalies, "good": self.good}


@dataclass(frozen=True)
class Now:
    """Progress: what is going on at this moment."""

    phase: str
    number: int
    phases: int
    acked: int
    refused: int
    unknown: int
    faults: int
    longest_gap_s: float


Tell = Callable[[Now], None]


class Campaign:
    """One run against a bed that is up. `run` may be called once."""

    def __init__(self, plan: Plan, load: Load, bed: Bed, history: Path, tell: Tell | None = None) -> None:
        self.plan = plan
        self._load = load
        self._bed = bed
        self._history = history
        self._tell = tell or (lambda _: None)
        self._phase = ("starting", 0)
        self._gap = (0, "")  # the longest without any acknowledgement, and the phase it ended in
        self._trouble: list[str] = []
        self._copies_read = 0
        self._elections = 0
        self._takeovers = 0
        self._receipts = 0
        self._recorder: Recorder
        self._traffic: Traffic
        self._queue: Queueing

    def _connect(self) -> Client:
        import ferryline as fl

        return fl.connect(self._bed.urls, ca=self._bed.ca, timeout=20.0)

    async def run(self) -> Account:
        """Break the cluster by the plan and judge. Raises what the client raises if the cluster is of no use at all."""
        load, started = self._load, time.monotonic()
        queue = queue_topic(len(self.plan.brokers))
        topics = [*topics_for(len(self.plan.brokers), load.partitions), queue]
        with Recorder(self._history) as self._recorder:
            async with self._connect() as admin:
                self._bed.admin = admin
                for topic in topics:
                    await admin.admin.create_topic(
                        topic.name,
                        partitions=topic.partitions,
                        replication=topic.replication,
                        min_isr=topic.min_isr,
                        retry=RETRY if topic is queue else None,
                    )
                if not await self._whole(admin, topics, load.heal_s):
                    raise ProcessFailed("the cluster was not whole before anything was done to it")
                epoch = admin.routing.cluster.coord_epoch
                self._traffic = Traffic(
                    self._connect,
                    self._recorder,
                    topics,
                    rate=load.rate,
                    value_bytes=load.value_bytes,
                    producers=load.producers,
                    members=load.members,
                    delivery_s=load.delivery_s,
                )
                path = self._history.with_name("queue.jsonl")
                self._queue = Queueing(self._connect, queue.name, queue.partitions, self.plan.seed, path)
                self._traffic.on_stored = self._queue.stored
                ticker = asyncio.create_task(self._tick())
                try:
                    await self._traffic.start()
                    await self._queue.start()
                    for number, phase in enumerate(self.plan.phases, 1):
                        self._phase = (phase.name, number)
                        await self._run_phase(phase, admin, topics)
                finally:
                    await self._queue.stop()
                    await self._traffic.stop()
                    ticker.cancel()
                    self._bed.admin = None
                self._takeovers = admin.routing.cluster.coord_epoch - epoch
                self._elections = sum(part.epoch for part in admin.routing.cluster.partitions.values())
            await self._read_copies(topics)
        self._phase = ("judging", len(self.plan.phases))
        self._show()
        self._look_at_logs()
        verdict = await asyncio.to_thread(judge, self._history)
        self._trouble += await asyncio.to_thread(self._queue.judge)
        return self._account(verdict, time.monotonic() - started)

    # -- breaking ------------------------------------------------------------------------------------

    async def _run_phase(self, phase: Phase, admin: Client, topics: Sequence[Topic]) -> None:
        if phase.name == DRAIN:
            await self._drain(admin, topics)
            return
        end = time.monotonic() + phase.seconds
        await asyncio.gather(*(self._run_step(step) for step in phase.steps))
        await asyncio.sleep(max(0.0, end - time.monotonic()))
        if any(step.kind in DAMAGE for step in phase.steps):
            await self._mend(admin, topics, "damage")  # the next fault must find good copies again

    async def _run_step(self, step: Step) -> None:
        await asyncio.sleep(step.at_s)
        note = f"{step.kind} {step.target}" + (f" and {step.other}" if step.other else "")
        t0 = now_us()
        try:
            await self._bed.begin(step)
            await asyncio.sleep(step.for_s)
        except ProcessFailed as error:
            self._trouble.append(f"{note}: {error}")
        finally:
            try:
                await self._bed.end(step)
            except ProcessFailed as error:
                self._trouble.append(f"end of {note}: {error}")
        self._recorder.fault(note, t0)

    # -- the end -------------------------------------------------------------------------------------

    async def _mend(self, admin: Client, topics: Sequence[Topic], after: str) -> None:
        try:
            await self._bed.heal(self._load.heal_s)
        except ProcessFailed as error:
            self._trouble.append(f"after {after}: {error}")
        if not await self._whole(admin, topics, self._load.heal_s):
            self._trouble.append(f"after {after}: not whole within {self._load.heal_s:g} s: {ill(admin, topics)}")

    async def _drain(self, admin: Client, topics: Sequence[Topic]) -> None:
        await self._mend(admin, topics, "all faults")
        self._phase = ("draining", len(self.plan.phases))
        try:
            await self._traffic.finish_sending(self._load.delivery_s + 30.0)
        except TimeoutError:
            self._trouble.append("producers did not settle what they had sent")
        except (FerrylineError, ExceptionGroup) as error:
            self._trouble.append(f"a producer ended: {error!r}")
        if not await self._traffic.drained(self._load.heal_s):
            self._trouble.append(f"the group is still {self._traffic.behind():,} records behind")
        if left := await self._queue.drained(admin, self._load.heal_s):
            self._trouble.append(left)

    async def _read_copies(self, topics: Sequence[Topic]) -> None:
        self._phase = ("reading every copy", len(self.plan.phases))
        self._show()
        async with self._connect() as client:
            # Copies of a cluster that did not heal are read as far as they can be, for what they tell.
            within_s = 20.0 if self._trouble else self._load.heal_s + self._recorder.acked / 20_000
            if DAMAGE & set(self.plan.faults) and not self._trouble:
                await self._find_harm(client, topics)
            await self._queue.read_letters(client)
            reader = CopyReader(client, self._recorder, within_s)
            await reader.read_all(topics, self._traffic.highest)
            self._copies_read = reader.records
            self._trouble += reader.trouble
            if not self._trouble:
                audit = await self._audit(client, topics)
                self._receipts = audit.receipts
                self._trouble += audit.trouble

    async def _find_harm(self, client: Client, topics: Sequence[Topic]) -> None:
        """Bits turned over in a log that nobody reads are found by who looks: `ferryline verify` does, and mends."""
        found = await self._audit(client, topics)
        if found.trouble:
            self._bed.counts["harm found by verify"] += len(found.trouble)
            told = await repair(self._bed.urls, self._bed.ca)
            if not await self._whole(client, topics, self._load.heal_s):
                self._trouble.append(f"not whole after a repair: {told[-1000:]}")

    async def _audit(self, client: Client, topics: Sequence[Topic]) -> Audit:
        """Copies and receipts compared on disk."""
        self._phase = ("comparing copies and receipts", len(self.plan.phases))
        self._show()
        audit = Audit(client)
        await audit.run([topic.name for topic in topics], self._traffic.receipts)
        return audit

    @staticmethod
    async def _whole(client: Client, topics: Sequence[Topic], within_s: float) -> bool:
        """Wait until every partition has a primary and all its copies in sync."""
        end = time.monotonic() + within_s
        while ill(client, topics):
            if time.monotonic() > end:
                return False
            await asyncio.sleep(0.05)
        return True

    def _look_at_logs(self) -> None:
        for name, log in sorted(self._bed.logs().items()):
            self._trouble += [f"log of {name}: {line}" for line in broken(log)[:3]]

    def _account(self, verdict: Verdict | None, seconds: float) -> Account:
        recorder = self._recorder
        return Account(
            round(seconds, 1),
            recorder.acked,
            recorder.refused,
            recorder.unknown,
            recorder.polled,
            self._copies_read,
            self._receipts,
            round(recorder.longest_gap_us / 1e6, 2),
            self._gap[1],
            self._elections,
            self._takeovers,
            dict(sorted(self._bed.counts.items())),
            verdict,
            [*self._trouble, *self._bed.surprises],
            dict(self._traffic.send_errors),
            {**self._traffic.read_errors, **{f"queue {code}": n for code, n in self._queue.errors.items()}},
            dict(sorted(self._queue.counts.items())),
        )

    # -- progress ------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            self._show()
            await asyncio.sleep(TICK_S)

    def _show(self) -> None:
        recorder, (name, number) = self._recorder, self._phase
        gap_us = recorder.longest_gap_us
        if gap_us > self._gap[0]:
            self._gap = (gap_us, name)
        faults = sum(self._bed.counts.values())
        phases = len(self.plan.phases)
        self._tell(Now(name, number, phases, recorder.acked, recorder.refused, recorder.unknown, faults, gap_us / 1e6))


def ill(client: Client, topics: Iterable[Topic]) -> list[str]:
    """Partitions without primary, or with copies that are not in sync or more than there should be."""
    found = []
    for topic in topics:
        meta = client.routing.topic(topic.name)
        parts = client.routing.cluster.partitions_of(meta.id) if meta is not None else []
        if len(parts) != topic.partitions:
            found.append(f"{topic.name}: {len(parts)} of {topic.partitions} partitions are known")
        for part in parts:
            if not part.primary or set(part.isr) != set(part.replicas) or len(part.replicas) != topic.replication:
                told = f"primary {part.primary or 'none'}, in sync {list(part.isr)} of {list(part.replicas)}"
                found.append(f"{topic.name}/{part.partition}: {told}")
    return found


def broken(log: bytes) -> list[str]:
    """What a log says that it must never say, with the lines that follow."""
    lines = NOISE.sub(b"", log).decode(errors="replace").splitlines()
    return ["\n".join(lines[at : at + 12])[:1500] for at, line in enumerate(lines) if BROKEN.search(line.encode())]


def judge(history: Path) -> Verdict:
    """The checker's verdict on one history."""

    def lines() -> Iterator[Op]:
        with history.open("rb") as file:
            yield from read_history(file, os.fspath(history))

    return check(lines)
