"""The coordinator's core alone, in this process, with far more brokers and partitions than this machine could run.

What is measured is the processor time of one decision (`handle` and `apply`: so long the coordinator's loop is held),
the size of what it commits and tells, and memory. The store's commit is measured in seconds of the clock.
No network and no broker: those parts of a large cluster run on other machines.
"""

from __future__ import annotations

import asyncio
import gc
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.scale.sampling import usage

from ferryline.protocol.frames import encode_value
from ferryline.protocol.messages import Heartbeat, Register
from ferryline.protocol.metadata import MetadataRequest
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.coordinator import CoordinatorCore
from ferryline_coordinator.core.records import encode_record, record_key
from ferryline_coordinator.store.sqlite import SqliteStore

CONFIG = CoreConfig(partitions_max=10**8, topics_max=10**6, brokers_max=10**4)


class Bench:
    """A core and its records; `do` feeds one event and keeps what it took."""

    def __init__(self) -> None:
        self.core = CoordinatorCore(CONFIG)
        self.core.load([], 1, 1_000)
        self.now = 1_000
        self.records: dict[str, bytes] = {}
        self.reply = 0
        self.do(ev.Founded("c" * 32, b"k" * 32))

    def do(self, event: ev.Event) -> tuple[ev.Decision, float]:
        """The decision, and the seconds of `handle` and `apply`."""
        began = time.process_time()
        decision = self.core.handle(event, self.now)
        self.core.apply(decision)
        return decision, time.process_time() - began

    def ask(self, make: Callable[[int], ev.Event]) -> tuple[ev.Decision, float]:
        """The same for an event that wants an answer. Raises AssertionError when it is refused."""
        self.reply += 1
        decision, took = self.do(make(self.reply))
        refused = [effect for effect in decision.effects if isinstance(effect, ev.Refuse)]
        assert not refused, refused
        return decision, took

    def heartbeat(self, broker: int) -> float:
        """One heartbeat of a broker that has applied everything."""
        state = self.core.state
        meta = state.brokers[broker].meta
        message = Heartbeat(broker, meta.broker_epoch, 1, "run", self.core.coord_epoch, state.revision, False)
        return self.ask(lambda reply: ev.HeartbeatReceived(reply, broker, message))[1]


def measure(brokers: int, partitions: int, *, replication: int = 3, store: bool = True) -> dict[str, Any]:
    """One cluster of that size: seconds, bytes, memory."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)  # as the services do
    empty = usage_here()
    bench = Bench()
    for number in range(1, brokers + 1):
        url = f"https://broker-{number}.example:9443"
        bench.ask(lambda reply, n=number, u=url: ev.BrokerAdmitted(reply, f"{n:032x}", u, u))
        bench.do(ev.SessionOpened(number, number))
        register = Register(number, f"{number:032x}", 1, "foreign", url, url, 1)
        bench.ask(lambda reply, n=number, r=register: ev.RegisterReceived(reply, n, r))
        bench.heartbeat(number)
    found: dict[str, Any] = {"brokers": brokers, "partitions": partitions, "replication": replication}
    creates = []
    size = min(10_000, partitions)
    for number in range(partitions // size):
        settings = {"partitions": size, "replication": replication}
        _, took = bench.ask(lambda reply, n=number, s=settings: ev.TopicCreated(reply, f"t{n}", f"{n:032x}", s))
        creates.append(took)
    found["create_topic"] = {"partitions": size, "first_s": round(creates[0], 4), "last_s": round(creates[-1], 4)}
    gc.collect()
    found["bytes_per_partition"] = round((usage_here() - empty) / partitions)
    beats = sorted(bench.heartbeat(1 + number % brokers) for number in range(200))
    found["heartbeat_s"] = round(beats[100], 7)
    found["look_at_placement_s"] = round(settle(bench), 4)
    found.update(metadata(bench))
    found["fence"] = fence(bench, store=store)
    return found


def usage_here() -> int:
    """Resident bytes of this process."""
    return usage(os.getpid()).rss


def settle(bench: Bench) -> float:
    """Time passes until placement has been looked at; the longest decision."""
    worst = 0.0
    for _ in range(4):
        bench.now += 1_000
        for broker in sorted(bench.core.state.brokers):
            worst = max(worst, bench.heartbeat(broker))
        worst = max(worst, bench.do(ev.Tick())[1])
    return worst


def metadata(bench: Bench) -> dict[str, Any]:
    """The whole picture as one answer."""
    began = time.process_time()
    decision = bench.core.handle(ev.MetadataAsked(10**9, MetadataRequest()), bench.now)
    answered = time.process_time() - began
    began = time.process_time()
    size = len(encode_value(decision.effects[0].message))  # type: ignore[attr-defined]
    return {
        "full_metadata": {
            "bytes": size,
            "answer_s": round(answered, 4),
            "encode_s": round(time.process_time() - began, 4),
        }
    }


def fence(bench: Bench, *, store: bool) -> dict[str, Any]:
    """One broker dies: its probe fails, and in one decision its primaries go to others."""
    state = bench.core.state
    victim = 1
    held = len(state.held[victim])
    led = sum(state.parts[key].meta.primary == victim for key in state.held[victim])
    waiting = ev.MetadataAsked(
        10**9 + 1,
        MetadataRequest(state.cluster.cluster_id, 1, state.revision, 30_000),
        2,  # type: ignore[union-attr]
    )
    bench.core.handle(waiting, bench.now)
    decision, closed_s = bench.do(ev.SessionClosed(victim, victim))
    probes = [effect for effect in decision.effects if isinstance(effect, ev.Probe)]
    took, last = [], decision
    for probe in sorted(probes, key=lambda probe: probe.broker_id == victim):
        last, seconds = bench.do(ev.ProbeEnded(probe.probe, probe.broker_id, probe.broker_id != victim))
        took.append(seconds)
    answers = [e for e in last.effects if isinstance(e, ev.Reply) and e.reply == 10**9 + 1]
    began = time.process_time()
    puts = {record_key(record): encode_record(record) for record in last.puts}
    encoded = time.process_time() - began
    found = {
        "replicas": held,
        "primaries": led,
        "session_closed_s": round(closed_s, 4),
        "decision_s": round(took[-1], 4),
        "records": len(puts),
        "record_bytes": sum(len(key) + len(value) for key, value in puts.items()),
        "encode_s": round(encoded, 4),
        "told_bytes": len(encode_value(answers[0].message)) if answers else 0,
    }
    if store:
        found["sqlite"] = asyncio.run(commit(puts))
    return found


async def commit(puts: dict[str, bytes]) -> dict[str, Any]:
    """The same records in one commit of the SQLite store: first all new, then all changed."""
    with tempfile.TemporaryDirectory(prefix="ferryline-scale-") as folder:
        store = SqliteStore(Path(folder))
        await store.campaign()
        began = time.perf_counter()
        first = await store.commit(puts, [], [(key, 0) for key in puts])
        new = time.perf_counter() - began
        began = time.perf_counter()
        await store.commit(puts, [], [(key, first.revision) for key in puts])
        changed = time.perf_counter() - began
        loaded = time.perf_counter()
        await store.load(0)
        loaded = time.perf_counter() - loaded
        size = sum(entry.stat().st_size for entry in os.scandir(folder))
        await store.close()
    return {"new_s": round(new, 4), "changed_s": round(changed, 4), "load_s": round(loaded, 4), "file_bytes": size}
