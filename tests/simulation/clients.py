"""Clients of the simulation: producers around the product's `ProducerCore`, members of groups, and plain readers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ferryline.core.producer import (
    BatchAnswered,
    BatchClosed,
    CompleteBatch,
    Effect,
    Event,
    FailBatch,
    ProducerCore,
    RefreshMetadata,
    RepartitionBatch,
    RouteChanged,
    SendBatch,
    SessionLost,
    TimePassed,
)
from ferryline.core.retry import Backoff
from ferryline.protocol.errors import ConnectionFailed, CorruptBatch, ErrorInfo, from_info
from ferryline.protocol.messages import GroupAssignment, GroupHeartbeat, GroupPartition
from ferryline.protocol.metadata import NO_BROKER, ClusterMetadata, MetadataAnswer
from ferryline.protocol.records import BatchHeader, check_crc, decode_batch, encode_batch, set_producer
from ferryline_broker.core.events import Key
from tests.simulation.engine import MS
from tests.simulation.history import FAIL, INFO, OK, Poll, Send
from tests.simulation.hosts import Alarm, Host
from tests.simulation.network import Session

if TYPE_CHECKING:
    from tests.simulation.world import World

UNSETTLED_MAX = 9  # batches: more than the window of five, so that some always wait for room


class Client:
    """Sessions on demand to any node, requests with answers, a copy of the metadata."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.engine = world.engine
        self.host = Host(world.engine, name, world.drift())
        self.host.begin_life()
        self.metadata = ClusterMetadata()
        self.sessions: dict[str, Session] = {}  # by name of the other host
        self.connecting: dict[str, list[tuple[int, Any]]] = {}  # frames that wait for the session
        self.requests: dict[int, tuple[str, Any]] = {}  # correlation -> (host name, context)
        self.correlation = 0
        self._refreshing = False

    # -- requests ----------------------------------------------------------------------------------

    def ask(self, target: Any, kind: str, *arguments: Any, context: Any) -> None:
        """Send a request to a node. `answered` or `unanswered` (sent or not) follows, unless this client ends."""
        self.correlation += 1
        number, name = self.correlation, target.host.name
        self.requests[number] = (name, context)
        frame = (kind, number, *arguments)
        session = self.sessions.get(name)
        if session is not None:
            self.world.network.send(session, self, frame)
        elif name in self.connecting:
            self.connecting[name].append((number, frame))
        else:
            self.connecting[name] = [(number, frame)]
            self.world.network.connect(self, target, "client", lambda why: self._connect_failed(name, why))

    def _connect_failed(self, name: str, _why: str) -> None:
        for number, _frame in self.connecting.pop(name, []):
            _, context = self.requests.pop(number)
            self.unanswered(context, sent=False)

    def session_opened(self, session: Session) -> None:
        name = session.peer(self).host.name
        self.sessions[name] = session
        for number, frame in self.connecting.pop(name, []):
            if number in self.requests:
                self.world.network.send(session, self, frame)

    def session_ended(self, session: Session) -> None:
        name = session.peer(self).host.name
        if self.sessions.get(name) is not session:
            return
        del self.sessions[name]
        lost = [(number, context) for number, (host, context) in self.requests.items() if host == name]
        for number, _ in lost:
            del self.requests[number]
        self.session_lost(name)
        for _, context in lost:
            self.unanswered(context, sent=True)

    def session_lost(self, name: str) -> None:
        """The session to host ``name`` ended; `unanswered` follows for what was under way on it."""

    def frame_received(self, _session: Session, frame: Any) -> None:
        name, context = self.requests.pop(frame[1], ("", None))
        if not name:
            return
        if context == "metadata":
            self._refreshing = False
            if self.metadata.apply(frame[2]):
                self.metadata_changed()
        else:
            self.answered(context, frame)

    def answered(self, context: Any, frame: Any) -> None:
        raise NotImplementedError

    def unanswered(self, context: Any, *, sent: bool) -> None:
        raise NotImplementedError

    # -- metadata ----------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Ask any node, now; at most one such request is under way."""
        if self._refreshing:
            return
        self._refreshing = True
        self.host.deliver_after(self.engine.between(1, 30) * MS, self._refresh)

    def _refresh(self) -> None:
        self.ask(self.world.any_node(), "metadata", context="metadata")
        self.host.deliver_after(1_500 * MS, self._refresh_over)

    def _refresh_over(self) -> None:
        self._refreshing = False

    def metadata_changed(self) -> None:
        """Something newer than before was learned."""

    def poll_metadata(self) -> None:
        self.refresh()
        self.host.deliver_after(self.engine.between(1_000, 3_000) * MS, self.poll_metadata)


class Batch:
    """A batch of an application: its sends, and the bytes as first encoded."""

    __slots__ = ("data", "number", "sends")

    def __init__(self, number: int, sends: list[Send]) -> None:
        self.number = number
        self.sends = sends
        self.data = encode_batch([(send.lane, send.value, []) for send in sends])


class Producer(Client):
    """An application that sends, and the driver of its `ProducerCore`."""

    def __init__(self, world: World, number: int, *, burst: int = 0) -> None:
        super().__init__(world, f"p{number}")
        self.burst = burst  # batches that it sends at once when it begins
        self.core = ProducerCore(self.engine.rng.getrandbits(63), request_timeout_ms=3_000, backoff=Backoff(20, 800))
        self.batches: dict[int, Batch] = {}
        self.sent = 0
        self.numbers = 0
        self.quiet = False
        self.alarm = Alarm(self.host, self.core.next_deadline_ms, lambda: self.event(TimePassed()))
        self.routed: set[Key] = set()  # partitions that the core has heard of

    def start(self) -> None:
        self.poll_metadata()
        self.host.deliver_after(self.engine.between(1, 100) * MS, self._produce)

    def _produce(self) -> None:
        if self.quiet:
            return
        gap_ms = self.world.weather.produce_gap_ms
        self.host.deliver_after(int(gap_ms * MS * 2 * self.engine.rng.random()) + 1, self._produce)
        topic = self.metadata.topic(self.world.topic)
        if topic is None or self.core.unsettled() >= UNSETTLED_MAX:
            return
        key = (topic.id, self.engine.between(0, topic.config.partitions - 1))
        for _ in range(1 + self.burst):
            self._batch(key)
        self.burst = 0

    def _batch(self, key: Key) -> None:
        sends = []
        for _ in range(self.engine.between(1, 3) if self.engine.chance(0.3) else 1):
            self.sent += 1
            value = b"%s.%d" % (self.host.name.encode(), self.sent)
            send = Send(self.host.name, self.sent, key, value, self.engine.now_us)
            if self.world.queues is not None:
                send.lane = self.world.queues.sent(value)
            self.world.history.send(send)
            sends.append(send)
        self._close(key, sends)

    def _close(self, key: Key, sends: list[Send]) -> None:
        self.numbers += 1
        self.batches[self.numbers] = Batch(self.numbers, sends)
        deadline_ms = self.host.now_ms() + self.engine.pick([4_000, 10_000, 25_000])
        self.event(BatchClosed(key, self.numbers, len(sends), deadline_ms))

    def event(self, event: Event) -> None:
        self.engine.note(self.host.name, event)
        for effect in self.core.handle(event, self.host.now_ms()):
            self._carry_out(effect)
        self.alarm.arm()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case SendBatch():
                self._send(effect)
            case CompleteBatch(_, number, base_offset):
                for at, send in enumerate(self.batches.pop(number).sends):
                    send.outcome, send.offset, send.ended_us = OK, base_offset + at, self.engine.now_us
                self.world.count("batches acknowledged")
            case FailBatch(_, number, error):
                for send in self.batches.pop(number).sends:
                    send.outcome = FAIL if error.definite else INFO
                    send.error, send.ended_us = str(error), self.engine.now_us
                self.world.count(f"batches failed {error.code}")
            case RepartitionBatch(_, number):
                self.world.count("batches repartitioned")
                self._repartition(self.batches.pop(number))
            case RefreshMetadata():
                self.refresh()

    def _repartition(self, batch: Batch) -> None:
        """Its records were surely not stored: route each again, as a new attempt of the application."""
        topic = self.metadata.topic(self.world.topic)
        if topic is None:
            for send in batch.sends:
                send.outcome, send.error, send.ended_us = FAIL, "the topic is gone", self.engine.now_us
            return
        for send in batch.sends:
            self.sent += 1
            send.key = (topic.id, self.engine.between(0, topic.config.partitions - 1))
            send.order = self.sent
            self._close(send.key, [send])

    def _send(self, effect: SendBatch) -> None:
        broker = self.world.broker_by_id(effect.broker)
        if broker is None:
            self.host.deliver_after(1, self._not_sent, effect)
            return
        topic = self.metadata.topics.get(effect.key[0])
        if topic is None:  # deleted; the core hears of it with the next RouteChanged
            self.host.deliver_after(1, self._not_sent, effect)
            return
        data = bytearray(self.batches[effect.batch].data)
        set_producer(data, effect.pid, effect.pepoch, effect.sequence)
        self.ask(
            broker, "produce", effect.key, topic.config.partitions, data, effect.timeout_ms, context=effect
        )  # fmt: skip

    def _not_sent(self, effect: SendBatch) -> None:
        self.event(BatchAnswered(effect.key, effect.batch, effect.attempt, error=ConnectionFailed("nothing was sent")))

    def session_lost(self, name: str) -> None:
        broker = self.world.broker_by_host(name)
        if broker is not None and broker.id:
            self.event(SessionLost(broker.id))

    def answered(self, context: Any, frame: Any) -> None:
        _, _, base_offset, epoch, error = frame
        failure = from_info(error) if error is not None else None
        self.event(BatchAnswered(context.key, context.batch, context.attempt, base_offset, epoch, failure))

    def unanswered(self, context: Any, *, sent: bool) -> None:
        if isinstance(context, SendBatch) and not sent:
            self._not_sent(context)

    def metadata_changed(self) -> None:
        partitions = self.metadata.partitions
        for key in [key for key in sorted(self.routed) if key not in partitions]:
            self.routed.discard(key)
            self.event(RouteChanged(key, NO_BROKER, 0, gone=True))
        for key, part in sorted(partitions.items()):
            self.routed.add(key)
            self.event(RouteChanged(key, part.primary, part.epoch))


class Reader(Client):
    """Reads every partition from its start, from primaries and secondaries (rule F7), without a group."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, f"r{number}")
        self.polls: dict[Key, Poll] = {}

    def start(self) -> None:
        self.poll_metadata()

    def metadata_changed(self) -> None:
        for key in sorted(self.metadata.partitions):
            if key not in self.polls:
                self.polls[key] = self.world.poll(self.host.name, key, 0)
                self._read(key)

    def _read(self, key: Key) -> None:
        part = self.metadata.partitions.get(key)
        if part is None:
            del self.polls[key]  # the topic is gone
            return
        secondary = self.engine.chance(0.5)
        target = self.world.broker_by_id(self.engine.pick(list(part.replicas)) if secondary else part.primary)
        if target is None:
            self._later(key)
            return
        self.ask(target, "read", key, self.polls[key].next, self.polls[key].epoch, secondary, 2_000, context=key)

    def _later(self, key: Key) -> None:
        self.host.deliver_after(self.engine.between(50, 500) * MS, self._read, key)

    def answered(self, context: Any, frame: Any) -> None:
        _, _, found, error = frame
        if error is not None:
            if error.code in ("LOG_TRUNCATED", "OFFSET_OUT_OF_RANGE"):
                self.world.checks.read_refused(self.host.name, context, self.polls[context].next, error)
                self.polls[context] = sought(self.world, self.polls[context], error)
            self.refresh()
            self._later(context)
            return
        before = self.polls[context].next
        take(self.world, self.polls[context], found)
        if found[1] and self.polls[context].next == before:
            self._later(context)  # it was rotten: perhaps another replica's copy is not
        else:
            self.host.deliver_after(self.engine.between(1, 20) * MS, self._read, context)

    def unanswered(self, context: Any, *, sent: bool) -> None:
        if context != "metadata":
            self.refresh()
            self._later(context)


def take(world: World, poll: Poll, found: tuple[bytes, list[Any]]) -> list[bytes]:
    """Records of one answer into a poll; returns their values. Each batch is compared with the truth at once."""
    data, headers = found
    values = []
    for at, header in headers:
        if world.rotted and is_rotten(data, at, header):
            world.count("rotten batches refused by readers")
            break
        world.checks.polled(poll.consumer, poll.key, header)
        if header.next_offset <= poll.next:
            continue
        if not header.is_control:
            for record in decode_batch(data[at : at + header.size], header):
                if record.offset >= poll.next:
                    poll.records.append((record.offset, record.value or b""))
                    values.append(record.value or b"")
        poll.next, poll.epoch = header.next_offset, header.epoch
    return values


def is_rotten(data: Any, at: int, header: BatchHeader) -> bool:
    """What the checksum says, which everybody who receives a batch looks at."""
    try:
        check_crc(data, header, at)
    except CorruptBatch:
        return True
    return False


def sought(world: World, poll: Poll, error: ErrorInfo) -> Poll:
    """What an application does that accepts a declared loss: read on from the safe offset, as a row of its own."""
    safe = error.details.get("safe_offset", -1)
    below = poll.next < error.details.get("log_start", 0)
    world.count("consumers overtaken by retention" if below else "consumers sent back by a declared loss")
    return world.poll(poll.consumer, poll.key, max(safe, error.details.get("log_start", 0), 0))


class Held:
    """A partition that a member holds. ``poll`` is None until its claim was answered."""

    __slots__ = ("busy", "claimed", "committed", "generation", "leaving", "poll", "reset", "token")

    def __init__(self, generation: int, token: bytes) -> None:
        self.generation = generation
        self.token = token
        self.claimed = False
        self.poll: Poll | None = None
        self.committed = -1
        self.busy = False
        self.leaving = False
        self.reset = False  # the next commit may go back

    def done(self, end: int) -> bool:
        """Everything below ``end`` was read, and the commit of it answered. Beyond it there were only lost records."""
        return self.committed == end and not self.busy


class Member(Client):
    """One member of a group: heartbeats, claims, reads, processes, commits after processing."""

    HEARTBEAT_MS = 250
    SESSION_MS = 1_200

    def __init__(self, world: World, group: str, number: int) -> None:
        super().__init__(world, f"m{number}")
        self.group = group
        self.held: dict[Key, Held] = {}
        self.sequence = 0
        self.heard = 0
        self.zombie_commits = world.engine.chance(0.3)  # goes on committing what it lost

    def start(self) -> None:
        self.poll_metadata()
        self._heartbeat()

    def stop(self) -> None:
        """Dies: no more heartbeats, no last commit."""
        self.host.end_life()
        self.world.network.host_died(self, silently=False)

    def _heartbeat(self) -> None:
        self.host.deliver_after(self.HEARTBEAT_MS * MS, self._heartbeat)
        self.sequence += 1
        owned = [
            GroupPartition(*key, held.generation, held.token)
            for key, held in sorted(self.held.items())
            if not held.leaving
        ]
        beat = GroupHeartbeat(
            self.group, self.host.name, [self.world.topic], owned, "", self.SESSION_MS, False, self.sequence
        )
        self.ask(self.world.coordinator_address(), "group", beat, context="heartbeat")

    def answered(self, context: Any, frame: Any) -> None:
        if context == "heartbeat":
            _, _, result, error = frame
            if error is not None and error.code == "UNKNOWN_MEMBER":
                self.held.clear()  # its session has ended: whatever it held is somebody else's now; it joins anew
            elif error is None and isinstance(result, GroupAssignment) and result.sequence > self.heard:
                self.heard = result.sequence
                self._assigned(result)
            return
        kind, key, held = context
        self.world.checks.group_heard(self.host.name, kind, frame)
        _, _, found, error = frame
        if self.held.get(key) is not held:
            return
        if error is not None:
            self._refused(kind, key, held, error)
        elif kind == "claim":
            held.claimed = True
            held.committed = found.offset
            held.poll = self.world.poll(f"{self.group}/{self.host.name}", key, max(found.offset, 0))
            held.poll.epoch = found.offset_epoch
            self._read(key, held)
        elif kind == "read":
            assert held.poll is not None
            self.world.processed(self.group, key, take(self.world, held.poll, found))
            self.host.deliver_after(self.engine.between(1, 60) * MS, self._go_on, key, held)
        elif kind == "commit":
            held.busy = held.reset = False
            if held.leaving:
                del self.held[key]

    def _go_on(self, key: Key, held: Held) -> None:
        if self.held.get(key) is not held or held.poll is None:
            return
        if not held.leaving:
            self._read(key, held)
        if not held.busy and (held.poll.next > held.committed or held.reset):
            self._commit(key, held)

    def _refused(self, kind: str, key: Key, held: Held, error: ErrorInfo) -> None:
        if error.code in ("STALE_MEMBER", "UNKNOWN_TOPIC"):
            if kind == "commit" and self.zombie_commits and self.engine.chance(0.7):
                held.busy = False
                self.host.deliver_after(300 * MS, self._commit, key, held)
                return
            del self.held[key]
            return
        self.refresh()
        if kind == "commit" and held.leaving and error.code == "OFFSET_OUT_OF_RANGE":
            del self.held[key]  # what it has read was declared lost: there is nothing to commit any more
            return
        if kind == "read" and error.code in ("LOG_TRUNCATED", "OFFSET_OUT_OF_RANGE"):
            assert held.poll is not None
            self.world.checks.read_refused(self.host.name, key, held.poll.next, error)
            held.poll = sought(self.world, held.poll, error)
            held.reset = True
        self._again(kind, key, held)

    def _again(self, kind: str, key: Key, held: Held) -> None:
        wait_us = self.engine.between(50, 400) * MS
        if kind == "claim":
            self.host.deliver_after(wait_us, self._claim, key, held)
        elif kind == "read":
            self.host.deliver_after(wait_us, self._go_on, key, held)
        else:
            held.busy = False
            self.host.deliver_after(wait_us, self._commit, key, held)

    def unanswered(self, context: Any, *, sent: bool) -> None:
        if isinstance(context, str):
            return
        kind, key, held = context
        if self.held.get(key) is held:
            self.refresh()
            self._again(kind, key, held)

    # -- what to hold ------------------------------------------------------------------------------

    def _assigned(self, answer: GroupAssignment) -> None:
        wanted = {(p.topic_id, p.partition): p for p in answer.assigned}
        for key, held in list(self.held.items()):
            if key not in wanted or wanted[key].generation != held.generation:
                self._give_up(key, held)
        for key, part in sorted(wanted.items()):
            if key not in self.held:
                held = self.held[key] = Held(part.generation, part.token)
                self._claim(key, held)

    def _give_up(self, key: Key, held: Held) -> None:
        """Finish, commit, then leave it out."""
        if held.leaving:
            return
        held.leaving = True
        if held.claimed and held.poll is not None and held.poll.next > held.committed and not held.busy:
            self._commit(key, held)
        elif not held.busy:
            del self.held[key]

    def _primary(self, key: Key) -> Any:
        part = self.metadata.partitions.get(key)
        return self.world.broker_by_id(part.primary) if part is not None and part.primary != NO_BROKER else None

    def _claim(self, key: Key, held: Held) -> None:
        if self.held.get(key) is not held or held.claimed:
            return
        primary = self._primary(key)
        if primary is None:
            self.refresh()
            self._again("claim", key, held)
            return
        self.ask(
            primary, "claim", key, self.group, self.host.name, held.generation, held.token, context=("claim", key, held)
        )

    def _read(self, key: Key, held: Held) -> None:
        primary = self._primary(key)
        if primary is None or held.poll is None:
            self.refresh()
            self._again("read", key, held)
            return
        self.ask(primary, "read", key, held.poll.next, held.poll.epoch, False, 1_000, context=("read", key, held))

    def _commit(self, key: Key, held: Held) -> None:
        if self.held.get(key) is not held or held.busy or held.poll is None:
            return
        primary = self._primary(key)
        held.busy = True
        if primary is None:
            self.refresh()
            self._again("commit", key, held)
            return
        held.committed = offset = held.poll.next
        if not held.reset and self.engine.chance(0.1):
            offset = max(0, offset - 2)  # an application that commits in disorder must not move the group back
        self.ask(
            primary, "commit", key, self.group, self.host.name, held.generation, offset, held.reset,
            context=("commit", key, held),
        )  # fmt: skip


def is_metadata(answer: object) -> bool:
    return isinstance(answer, MetadataAnswer)
