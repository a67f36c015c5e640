"""A coordinator core on a bench: brokers that only register, heartbeat, answer probes, catch up and hand over.

Every decision goes through encoding and a store of rows, so that `restart` shows what a real restart would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ferryline.protocol.errors import FerrylineError, StaleBrokerEpoch, from_info
from ferryline.protocol.frames import Kind
from ferryline.protocol.messages import (
    AlterIsr,
    AlterIsrResult,
    AlterIsrs,
    GroupHeartbeat,
    Heartbeat,
    HeartbeatOk,
    IsrMember,
    Register,
    RegisterOk,
    ReplicaReport,
    Resign,
    ResignEntry,
)
from ferryline.protocol.metadata import ClusterMetadata, MetadataAnswer, MetadataRequest, PartitionMeta, TopicMeta
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.coordinator import CoordinatorCore
from ferryline_coordinator.core.records import encode_record, record_key


class Halted(Exception):
    """The coordinator process ended after a commit, before its effects."""


class Broker:
    """One broker process life after another on one storage."""

    def __init__(self, broker_id: int) -> None:
        self.id = broker_id
        self.incarnation = 0
        self.epoch = 0
        self.session = 0
        self.up = False
        self.silent = False  # up, but its heartbeats and its answers to probes do not arrive
        self.want = "run"
        self.stop_allowed = False
        self.storage = f"s-{broker_id}"
        self.seen_coord_epoch = 0


class Bench:
    """``play(ms)`` lets time pass with heartbeats; with ``lively`` replicas also catch up and hand over."""

    def __init__(self, brokers: int = 3, config: CoreConfig | None = None, *, lively: bool = False) -> None:
        self.config = config or CoreConfig()
        self.rows: dict[str, bytes] = {}
        self.now = 1_000
        self.coord_epoch = 0
        self.lively = lively
        self.effects: list[ev.Effect] = []
        self.notes: list[ev.Note] = []
        self.brokers = {number: Broker(number) for number in range(1, brokers + 1)}
        self._numbers = 0
        self.answers: dict[int, Any] = {}
        self.halt: Callable[[ev.Decision], bool] | None = None  # stop after this commit, before its effects
        self.restart()
        self.send(ev.Founded("c" * 32, b"k" * 32))
        for number in self.brokers:
            self.start(number)

    # -- the core -----------------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        return self.core.state

    def restart(self) -> None:
        self.coord_epoch += 1
        self.core = CoordinatorCore(self.config)
        self.core.load(list(self.rows.items()), self.coord_epoch, self.now)
        for broker in self.brokers.values():
            broker.session = 0

    def number(self) -> int:
        self._numbers += 1
        return self._numbers

    def send(self, event: ev.Event) -> list[ev.Effect]:
        """One event, its commit and its effects; probes are answered at once."""
        decision = self.core.handle(event, self.now)
        self.core.apply(decision)
        for key in decision.deletes:
            del self.rows[key]
        for record in decision.puts:
            self.rows[record_key(record)] = encode_record(record)
        if self.halt is not None and decision.durable and self.halt(decision):
            self.halt = None
            raise Halted
        for effect in decision.effects:
            self._carry_out(effect)
        return list(decision.effects)

    def _carry_out(self, effect: ev.Effect) -> None:
        self.effects.append(effect)
        match effect:
            case ev.Reply(reply, message):
                assert reply not in self.answers
                self.answers[reply] = message
                if isinstance(message, RegisterOk):
                    broker = self.brokers[message.broker_id]
                    broker.epoch, broker.seen_coord_epoch = message.broker_epoch, message.coord_epoch
            case ev.Refuse(reply, error):
                assert reply not in self.answers
                self.answers[reply] = from_info(error)
            case ev.Probe(number, broker_id):
                broker = self.brokers.get(broker_id)
                if broker is None or not broker.silent:
                    alive = broker is not None and broker.up
                    self.send(ev.ProbeEnded(number, broker_id, alive))
            case ev.Note():
                self.notes.append(effect)
            case ev.Tell(broker_id, Kind.HANDOVER, message) if self.lively:
                entries = [ResignEntry(e.topic_id, e.partition, e.epoch) for e in message.entries]
                broker = self.brokers[broker_id]
                if broker.up:
                    self.ask(ev.ResignReceived, broker.session, Resign(broker_id, broker.epoch, entries))

    def ask(self, kind: Any, *fields: Any) -> Any:
        """Send an event with a fresh reply handle; return its answer, raise its refusal, None if it has none yet."""
        reply = self.number()
        self.send(kind(reply, *fields))
        answer = self.answers.get(reply)
        if isinstance(answer, FerrylineError):
            raise answer
        return answer

    # -- brokers ------------------------------------------------------------------------------------

    def connect(self, number: int) -> None:
        broker = self.brokers[number]
        broker.session = self.number()
        self.send(ev.SessionOpened(broker.session, number))

    def register(self, number: int, *, restart: str = "clean", **fields: Any) -> RegisterOk | None:
        """Open a session and register the present life."""
        broker = self.brokers[number]
        self.connect(number)
        url = f"https://b{number}:9443"
        message = Register(
            number, broker.storage, broker.incarnation, restart, url, url, broker.seen_coord_epoch, **fields
        )
        answer = self.ask(ev.RegisterReceived, broker.session, message)
        assert answer is None or isinstance(answer, RegisterOk)
        return answer

    def start(self, number: int, *, restart: str = "clean", **fields: Any) -> None:
        """A new life: register, then heartbeat until unfenced."""
        broker = self.brokers.setdefault(number, Broker(number))
        broker.up, broker.silent, broker.want, broker.stop_allowed = True, False, "run", False
        broker.incarnation += 1
        self.register(number, restart=restart, **fields)
        self.heartbeat(number)

    def heartbeat(self, number: int) -> HeartbeatOk:
        broker = self.brokers[number]
        revision = self.state.revision
        message = Heartbeat(number, broker.epoch, broker.incarnation, broker.want, self.coord_epoch, revision)
        answer = self.ask(ev.HeartbeatReceived, broker.session, message)
        assert isinstance(answer, HeartbeatOk)
        broker.stop_allowed = answer.stop_allowed
        return answer

    def kill(self, number: int) -> None:
        """kill -9: the session ends, connections are refused."""
        broker = self.brokers[number]
        broker.up = False
        self.send(ev.SessionClosed(broker.session, number))

    def play(self, ms: int) -> None:
        """Time passes in steps of 100 ms; brokers that are up heartbeat every 500."""
        end = self.now + ms
        while self.now < end:
            self.now += 100
            deadline = self.core.next_deadline_ms()
            if deadline is not None and deadline <= self.now:
                self.send(ev.Tick())
            if self.now % 500 == 0:
                for broker in list(self.brokers.values()):
                    if broker.up and not broker.silent:
                        self.turn(broker)
            if self.lively:
                self.catch_up()

    def turn(self, broker: Broker) -> None:
        """A heartbeat; a broker that the coordinator does not know (any more) registers."""
        if not broker.session:
            self.register(broker.id)
        try:
            self.heartbeat(broker.id)
        except StaleBrokerEpoch:
            self.register(broker.id)

    def catch_up(self) -> None:
        """Primaries take every live replica into the in-sync set."""
        for key in sorted(self.state.parts):
            part = self.state.parts[key].meta
            if part.primary and self.brokers[part.primary].up:
                able = [b for b in part.replicas if not self.state.brokers[b].meta.fenced]
                if set(able) - set(part.isr):
                    self.alter(part, sorted({*able, *part.isr}))

    # -- requests -----------------------------------------------------------------------------------

    def create(self, name: str, **settings: Any) -> TopicMeta:
        topic = self.ask(ev.TopicCreated, name, f"{name}-id", settings)
        assert isinstance(topic, TopicMeta)
        return topic

    def part(self, name: str = "t", partition: int = 0) -> PartitionMeta:
        record = self.state.part(f"{name}-id", partition)
        assert record is not None
        meta = record.meta
        assert isinstance(meta, PartitionMeta)
        return meta

    def alter(self, part: PartitionMeta, isr: list[int], **wrong: Any) -> AlterIsrResult:
        """Propose an in-sync set the way the primary of ``part`` would; ``wrong`` replaces fields."""
        primary = self.brokers[wrong.pop("as_broker", part.primary)]
        members = wrong.pop("members", None) or [IsrMember(b, self.state.brokers[b].meta.broker_epoch) for b in isr]
        fields: dict[str, Any] = {
            "topic_id": part.topic_id,
            "partition": part.partition,
            "broker_id": primary.id,
            "broker_epoch": primary.epoch,
            "coord_epoch": self.coord_epoch,
            "epoch": part.epoch,
            "version": part.version,
            "request_id": self.number(),
            "new_isr": members,
        }
        answer = self.ask(ev.AlterIsrsReceived, primary.session, AlterIsrs([AlterIsr(**{**fields, **wrong})]))
        result = answer.results[0]
        assert isinstance(result, AlterIsrResult)
        return result

    def report(self, part: PartitionMeta, end: int, *, tail: int = 1, state: str = "ok") -> ReplicaReport:
        return ReplicaReport(part.topic_id, part.partition, part.epoch, (end, 0), (tail, 0), (0, 0), state)

    def metadata(self, copy: ClusterMetadata | None = None, wait_ms: int = 0, broker_id: int = 0) -> MetadataAnswer:
        request = copy.request(wait_ms) if copy is not None else MetadataRequest()
        answer = self.ask(ev.MetadataAsked, request, broker_id)
        assert answer is None or isinstance(answer, MetadataAnswer)
        return answer  # type: ignore[return-value]

    def member(self, group: str, member: str, topics: list[str], **fields: Any) -> Any:
        return self.ask(ev.GroupHeartbeatReceived, GroupHeartbeat(group, member, topics, **fields))

    def noted(self, name: str) -> list[dict[str, Any]]:
        return [note.fields for note in self.notes if note.name == name]

    def spread(self) -> tuple[dict[int, int], dict[int, int]]:
        """Replicas and primaries per broker that may hold any."""
        usable = [b for b, r in self.state.brokers.items() if not (r.meta.fenced or r.meta.draining)]
        replicas, primaries = dict.fromkeys(usable, 0), dict.fromkeys(usable, 0)
        for record in self.state.parts.values():
            for broker_id in record.meta.replicas:
                if broker_id in replicas:
                    replicas[broker_id] += 1
            if record.meta.primary in primaries:
                primaries[record.meta.primary] += 1
        return replicas, primaries


def even(counts: dict[int, int]) -> bool:
    return not counts or max(counts.values()) - min(counts.values()) <= 1
