"""A cluster with its clients, its weather and its nemesis: one run of one seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from ferryline.protocol.errors import ErrorInfo
from ferryline.protocol.messages import RECORDS, STATE
from ferryline.protocol.metadata import NO_BROKER
from ferryline.protocol.records import decode_batch
from ferryline_broker.core.events import Key
from ferryline_broker.core.partition import ReplicaConfig
from ferryline_broker.core.queue_config import QueueConfig
from ferryline_coordinator.core import events as ce
from ferryline_coordinator.core.config import CoreConfig
from tests.simulation.ambush import Ambushes
from tests.simulation.broker import Broker
from tests.simulation.checks import Checks
from tests.simulation.clients import Member, Producer, Reader
from tests.simulation.coordinator import Coordinator, Store, config_of
from tests.simulation.disks import Disk, FastDisk
from tests.simulation.engine import MS, Engine
from tests.simulation.faults import Faults
from tests.simulation.ghost import Copy, Truth, Violation
from tests.simulation.history import OPEN, History, Poll
from tests.simulation.members import SdkMember
from tests.simulation.network import Network
from tests.simulation.queueing import QueuePart
from tests.simulation.real_disk import RealDisk
from tests.simulation.settings import RATES, Config, Weather, draw
from tests.simulation.weather import profile_of, shape

TOPIC = "orders"
GROUP = "billing"
SETTLE_MS = 120_000  # virtual; after the last fault everything must be well again within this


class World:
    """`run` is the whole story: found, break, heal, check."""

    def __init__(
        self, config: Config, seed: int, *, real_log: bool = False, weather: Weather | None = None,
        core_config: CoreConfig | None = None, without: frozenset[str] = frozenset(), profile: str | None = None,
    ) -> None:  # fmt: skip
        """``profile`` of the weather (`weather.py`), None: the one that the seed draws. ``without``: names of faults of
        the tape (``s7``, ``a3``) and of rates of the weather that are left out."""
        self.config = config
        self.without = without
        self.engine = Engine(seed)
        drawn = draw(self.engine.rng, config, real_log=real_log)
        name = profile_of(seed) if profile is None else profile
        self.weather: Weather = weather or shape(drawn, name, seed)
        for rate in sorted(without & RATES):
            setattr(self.weather, rate, 0.0)
        self.calm = False
        self.rotted = False  # some batch on some disk, some time: receivers check what they get
        self.counts: Counter[str] = Counter()
        self.topic = TOPIC
        self.topic_id = f"{self.engine.rng.getrandbits(128):032x}"
        self.queues = QueuePart(self) if config.queues else None
        self.history = History()
        self.store = Store()
        self.network = Network(self.engine, self.weather)
        self.core_config = core_config or config_of(self.weather.fence_ms)
        self.replica_config = ReplicaConfig(
            fetch_bytes_max=2_000,
            fetch_wait_ms=self.weather.fetch_wait_ms,
            fetch_retry_ms=self.weather.fetch_wait_ms + 500,
            lag_max_ms=self.weather.lag_max_ms,
            flush_first_bytes=random.Random(f"flush first {seed}").choice((0, 400)),
            commit_stall_ms=2 * self.weather.lag_max_ms,
            alter_retry_ms=500,
            handover_ms=self.weather.handover_ms,
            snapshot_bytes=self.weather.snapshot_bytes,
            queue=self.queues.drawn.config if self.queues is not None else QueueConfig(),
        )
        self._truths: dict[Key, tuple[Truth, Truth]] = {}
        self._copies: dict[tuple[int, Key], tuple[Copy, Copy]] = {}
        self._ids: dict[int, Broker] = {}
        self.destroyed: set[int] = set()
        self._tokens = 0
        self.retained: dict[Key, int] = {}  # how far retention went anywhere: a later primary may begin below it
        self._recreating = False
        self._names = 0
        self.conflicts: list[str] = []
        self.checks = Checks(self)
        self.brokers: list[Broker] = []
        self.coordinator = Coordinator(self, "c0")
        self.coordinators = [self.coordinator]
        self.producers: list[Producer] = []
        self.members: list[Member] = []
        self.readers: list[Reader] = []
        self.faults = Faults(self)
        self.ambushes = Ambushes(self)

    # -- look-ups ----------------------------------------------------------------------------------

    def count(self, what: str) -> None:
        self.counts[what] += 1

    def drift(self) -> float:
        return (self.engine.rng.random() * 2 - 1) * self.weather.drift

    def token(self) -> int:
        self._tokens += 1
        return self._tokens

    def truth(self, key: Key) -> tuple[Truth, Truth]:
        found = self._truths.get(key)
        if found is None:
            found = self._truths[key] = (Truth(key, RECORDS), Truth(key, STATE))
        return found

    def copies(self, broker: Broker, key: Key) -> tuple[Copy, Copy]:
        found = self._copies.get((broker.number, key))
        if found is None:
            truths, name = self.truth(key), broker.host.name
            found = self._copies[broker.number, key] = (Copy(truths[RECORDS], name), Copy(truths[STATE], name))
        return found

    def all_copies(self) -> list[tuple[tuple[int, Key], tuple[Copy, Copy]]]:
        return list(self._copies.items())

    def broker_by_id(self, broker_id: int) -> Broker | None:
        return self._ids.get(broker_id)

    def broker_by_host(self, name: str) -> Broker | None:
        return next((broker for broker in self.brokers if broker.host.name == name), None)

    def joined(self, broker: Broker) -> None:
        self._ids[broker.id] = broker

    def coordinator_address(self) -> Coordinator:
        return self.ambushes.coordinator()

    def any_node(self) -> Any:
        nodes: list[Any] = [broker for broker in self.brokers if broker.at_work]
        return self.engine.pick([*nodes, self.coordinator])

    def stopped(self, broker: Broker, key: Key, reason: str) -> None:
        """A replica stopped itself. Failed storage may do that; contradicting logs never without a declared loss."""
        if not reason.startswith(("storage", "damaged")):
            raise Violation("no replica ever contradicts another", f"{broker} {key}: {reason}")

    def picture(self) -> str:
        """The cluster as it stands, for a failed run."""
        lines = [f"virtual {self.engine.now_ms} ms, cuts {sorted(self.network.cuts)}"]
        for broker_id, record in sorted(self.checks.brokers.items()):
            meta = record.meta
            lines.append(
                f"record of broker {broker_id}: epoch {meta.broker_epoch} fenced {meta.fenced} "
                f"stopping {meta.stopping} draining {meta.draining} incarnation {meta.incarnation}"
            )
        lines += [f"record {record.meta} frozen {record.frozen}" for _, record in sorted(self.checks.parts.items())]
        for broker in self.brokers:
            lines.append(f"{broker}: alive {broker.host.alive} paused {broker.host.paused}")
            for key, hosted in sorted(broker.parts.items()):
                core = hosted.core
                lines.append(f"  {key[1]}: {core.role} epoch {core.epoch} isr {core.isr} maximal "
                             f"{sorted(core.maximal_isr)} {core.stopped}")  # fmt: skip
            for (number, key), copies in self.all_copies():
                if number == broker.number:
                    lines += [f"    {key[1]}.{log}: {copy}" for log, copy in enumerate(copies)]
        return "\n".join(lines)

    # -- members -----------------------------------------------------------------------------------

    def poll(self, consumer: str, key: Key, offset: int) -> Poll:
        poll = Poll(consumer, key, offset)
        self.history.polls.append(poll)
        return poll

    def processed(self, group: str, key: Key, values: list[bytes]) -> None:
        seen = self.history.processed.setdefault((group, key), {})
        for value in values:
            seen[value] = seen.get(value, 0) + 1

    def add_producer(self, *, burst: int = 0) -> None:
        if len(self.producers) < 12:
            producer = Producer(self, len(self.producers), burst=burst)
            self.producers.append(producer)
            producer.start()

    def add_member(self) -> None:
        if self.weather.members == 0 or len(self.members) >= 5:
            return
        self._names += 1
        member = (SdkMember if self.engine.chance(0.6) else Member)(self, GROUP, self._names)
        self.members.append(member)
        member.start()

    def end_member(self) -> None:
        if len(self.members) > 1:
            self.members.pop(self.engine.between(0, len(self.members) - 1)).stop()

    def make_disk(self, number: int) -> Disk:
        name = f"storage-{number}-0"
        return RealDisk(name, self.weather) if self.weather.real_log else FastDisk(name, self.weather)

    def add_broker(self) -> Broker:
        broker = Broker(self, len(self.brokers))
        self.brokers.append(broker)
        return broker

    def replace_disk(self, broker: Broker, *, same_id: bool) -> None:
        old = broker.disk
        if not same_id and old.broker_id:
            self.destroyed.add(old.broker_id)
            del self._ids[old.broker_id]
        broker.disk = old.exchanged(same_id=same_id)
        self.checks.disk_changed(broker, lossy=same_id, empty=True)

    def replace_coordinator(self) -> None:
        self.coordinator = Coordinator(self, f"c{len(self.coordinators)}")
        self.coordinators.append(self.coordinator)
        self.coordinator.start()

    # -- commands ----------------------------------------------------------------------------------

    def command(
        self, event: Callable[[int], ce.Event], done: Callable[[Any, ErrorInfo | None], None] | None = None
    ) -> None:
        """An operator's command to the coordinator; without answer if it dies meanwhile."""
        coordinator = self.coordinator
        if coordinator.host.alive and not coordinator.host.paused:
            coordinator.event(event(coordinator.expect(done or (lambda _message, _error: None))))

    def _create_topic(self) -> None:
        if self.checks.parts:
            return
        settings = {
            "partitions": self.weather.partitions,
            "replication": self.config.replication,
            "min_isr": self.config.min_isr,
            "flush": self.config.flush,
        }
        topic_id = self.topic_id
        self.command(lambda reply: ce.TopicCreated(reply, TOPIC, topic_id, settings))
        self.engine.after(100 * MS, self._create_topic)

    def recreate_topic(self, topic_id: str, after_ms: int) -> None:
        """Delete the topic; a while later another one gets its name. Nothing of the old one may be seen in it."""
        if not self.checks.parts or self._recreating:
            return
        self._recreating = True
        self.topic_id = topic_id

        def again() -> None:
            self._recreating = False
            self.count("topics deleted, in time" if not self.checks.parts else "topics not deleted, or later")
            self._create_topic()
            self.engine.after(2_000 * MS, self._create_topic)  # the deletion may have waited for a slow disk

        self.command(lambda reply: ce.TopicDeleted(reply, TOPIC))
        self.engine.after(after_ms * MS, again)

    def grow(self) -> None:
        count = len(self.checks.parts)
        if 0 < count < 4:
            self.command(lambda reply: ce.PartitionsAdded(reply, TOPIC, count + 1, True))

    # -- the run -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Raises Violation, or AssertionError of a core, or SimulationStuck."""
        self.coordinator.start()
        for _ in range(self.weather.brokers):
            self.add_broker().start()
        self._create_topic()
        self.engine.run_until(30_000 * MS, self._founded)
        if not self._founded():
            raise Violation("liveness", "the topic was not created in 30 s without faults")
        for _ in range(self.weather.producers):
            self.add_producer()
        for _ in range(self.weather.members):
            self.add_member()
        self.readers.append(Reader(self, 0))
        self.readers[0].start()
        if self.queues is not None:
            self.queues.begin()
        self.faults.begin()
        self.engine.run_until(self.engine.now_us + self.weather.duration_ms * MS)
        self._heal()

    def _founded(self) -> bool:
        return any(record.meta.primary for record in self.checks.parts.values())

    def _heal(self) -> None:
        for producer in self.producers:
            producer.quiet = True
        self.faults.heal()
        if self.queues is not None:
            self.queues.heal()
        self.engine.note("world", "healed")
        self._settle()
        if self.weather.mischief.twins:
            self.ambushes.twins()
            self._settle()
        self._check_end()

    def _settle(self) -> None:
        """Until everything is as it should be; operators do what they would have to do."""
        until_us, settled = self.engine.now_us + SETTLE_MS * MS, 0
        while self.engine.now_us < until_us:
            if self.engine.run_until(min(until_us, self.engine.now_us + 500 * MS), None) or self._well() is None:
                break
            if self.queues is not None and (now_settled := self.queues.settled()) > settled:
                # A queue is drained record by record, and on a wild network each may wait for the primary's next tick.
                until_us, settled = self.engine.now_us + SETTLE_MS * MS, now_settled
            self.faults.restart_all()
            if not self._recreating:
                self._create_topic()
            self.recover()
            if self.queues is not None:
                self.queues.redrive()
            for broker_id, record in sorted(self.checks.brokers.items()):
                if record.meta.draining:  # the command that ended it met a dead coordinator
                    self.command(lambda reply, broker_id=broker_id: ce.DrainSet(reply, broker_id, False))
        trouble = self._well()
        if trouble is not None:
            raise Violation("D1.12 liveness after healing", trouble)

    def recover(self) -> None:
        """What an operator does: partitions that no candidate is left for are recovered, if possible without force."""
        for key, record in sorted(self.checks.parts.items()):
            part = record.meta
            if part.primary != NO_BROKER and not record.frozen:
                continue
            candidates = [b for b in (*part.isr, *part.elr) if b not in self.destroyed]
            if candidates and not record.frozen:
                continue  # it has to come back by itself
            force = any(broker_id in self.destroyed for broker_id in part.replicas)
            self.command(lambda reply, key=key, force=force: ce.RecoveryAsked(reply, TOPIC, key[1], force))

    def _well(self) -> str | None:
        """What is not yet as it should be, or None."""
        if not self.checks.parts or self._recreating:
            return "the topic is not there again"
        for broker in self.brokers:
            for key, hosted in broker.parts.items():
                if key not in self.checks.parts:
                    return f"{broker} still holds {key} of a deleted topic"
                if self.rotted and hosted.files.rotten() >= 0:
                    return f"{broker}: nobody has found the rot in {key}"
        for key, record in sorted(self.checks.parts.items()):
            part = record.meta
            if part.primary == NO_BROKER:
                return f"{part} has no primary"
            if set(part.isr) != set(part.replicas) or part.adding or part.removing:
                return f"{part}: not all replicas are in sync"
            if len(part.replicas) != self.config.replication:
                return f"{part}: not {self.config.replication} replicas"
            ends = []
            for broker_id in part.replicas:
                holder = self.broker_by_id(broker_id)
                if holder is None or key not in holder.parts:
                    return f"{part}: broker {broker_id} does not hold it"
                copies = self.copies(holder, key)
                ends.append([(copy.end, copy.watermark) for copy in copies])
                if any(copy.end != copy.watermark for copy in copies):
                    return f"{part}: {copies} not committed to the end"
            if any(end != ends[0] for end in ends):
                return f"{part}: replicas end at {ends}"
        for producer in self.producers:
            if producer.core.unsettled():
                return f"{producer.host.name} still has unsettled batches"
        return self._readers_done()

    def _readers_done(self) -> str | None:
        for key in self.checks.parts:
            end = self.truth(key)[RECORDS].end
            for reader in self.readers:
                poll = reader.polls.get(key)
                if poll is None or poll.next < end:
                    return f"{reader.host.name} has not read {key} to its end {end}"
            holders = [m.held[key] for m in self.members if key in m.held and m.held[key].claimed]
            if self.members and not (len(holders) == 1 and holders[0].done(end)):
                return f"group {GROUP}: {key} held {len(holders)} times, {[h.committed for h in holders]} of {end}"
        return self.queues.trouble() if self.queues is not None else None

    def _check_end(self) -> None:
        logs: dict[Key, list[tuple[str, list[tuple[int, bytes]]]]] = {}
        starts: dict[Key, int] = {}  # below them retention has taken something, perhaps not yet everywhere
        lost: dict[Key, list[tuple[int, int]]] = {}
        for key, record in sorted(self.checks.parts.items()):
            lost[key] = self.truth(key)[RECORDS].lost
            logs[key] = []
            hosts = [broker for broker in self.brokers if broker.id in record.meta.replicas]
            starts[key] = max(broker.parts[key].core.log_start[RECORDS] for broker in hosts)
            for broker_id in record.meta.replicas:
                broker = self.broker_by_id(broker_id)
                assert broker is not None
                end = broker.parts[key].core.high_watermark[RECORDS]
                logs[key].append((broker.host.name, self.read_all(broker, key, starts[key], end)))
        for send in self.history.sends.values():
            if send.outcome == OPEN:
                raise Violation("liveness", f"{send.value!r} was never answered")
        self.history.check(logs, lost, starts)
        if self.members:
            kept = {key: [found for found in logs[key][0][1] if self._is_due(key, found[0])] for key in logs}
            self.history.check_processed([GROUP], kept)
        if self.queues is not None:
            self.queues.check({key: replicas[0][1] for key, replicas in logs.items()})

    def _is_due(self, key: Key, offset: int) -> bool:
        """Every group must have processed the record there. Not if retention took it, and not if it came to light only
        by a recovery that gave up what groups had read at its offset: they go on behind it."""
        return offset >= self.retained.get(key, 0) and not self.truth(key)[RECORDS].was_brought(offset)

    def read_all(self, broker: Broker, key: Key, start: int, below: int) -> list[tuple[int, bytes]]:
        """(offset, value) of every record on the broker's disk from ``start`` to ``below``."""
        data, headers = broker.parts[key].files.read(RECORDS, start, below, 1 << 60)
        found = []
        for at, header in headers:
            if not header.is_control:
                for record in decode_batch(data[at : at + header.size], header):
                    if record.offset >= start:
                        found.append((record.offset, record.value or b""))
        return found
