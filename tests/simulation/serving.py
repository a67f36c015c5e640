"""The shell of a simulated broker: requests of clients in, answers of the cores out.

It makes the same checks, in the same order, as the broker's own handlers (`produce.py`, `fetch.py`, `view.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ferryline.protocol.errors import (
    BY_CODE,
    ErrorInfo,
    FerrylineError,
    Forbidden,
    InternalError,
    NotPrimary,
    PrimaryNotAvailable,
    StalePartitioning,
    UnknownPartition,
    UnknownTopic,
)
from ferryline.protocol.messages import RECORDS, STATE
from ferryline.protocol.metadata import NO_BROKER
from ferryline.protocol.records import check_crc, read_header
from ferryline_broker.core import events as ev
from ferryline_broker.core.events import Key
from ferryline_broker.core.partition import PartitionCore
from ferryline_broker.core.queue_events import MoveDead, ReadWindow, WakeReceivers
from ferryline_service.claims import claim_token_valid
from tests.simulation.engine import MS
from tests.simulation.network import Session
from tests.simulation.queue_shell import FRAMES, QueueAnswer, QueueQuestion, QueueShell

if TYPE_CHECKING:
    from tests.simulation.broker import Broker
    from tests.simulation.replicas import Hosted

READ_BYTES_MAX = 4096


class Waiter:
    """Who waits for a token, and what the checks must know about the question."""

    __slots__ = ("asked_us", "correlation", "event", "key", "session", "state_end")

    def __init__(self, session: Session | None, correlation: int, key: Key, event: ev.Event, asked_us: int) -> None:
        self.session = session
        self.correlation = correlation
        self.key = key
        self.event = event
        self.asked_us = asked_us
        self.state_end = -1  # of the state log: behind the entry of this question, or as it was if there is none


class Read:
    """A parked read."""

    __slots__ = ("correlation", "done", "key", "offset", "offset_epoch", "proven", "proving", "secondary", "session")

    def __init__(self, session: Session, correlation: int, key: Key, offset: int, epoch: int, secondary: bool) -> None:
        self.session, self.correlation, self.key = session, correlation, key
        self.offset, self.offset_epoch, self.secondary = offset, epoch, secondary
        self.done = False
        self.proving = self.proven = False  # that this broker is still the primary: needed for some refusals


def info_of(refuse: ev.Refuse) -> ErrorInfo:
    """A core's refusal as it travels."""
    cls = BY_CODE.get(refuse.code, InternalError)
    details = {"primary": refuse.primary, "epoch": refuse.epoch} if refuse.primary else {}
    return ErrorInfo(refuse.code, refuse.message, cls.retriable, cls.definite, details)


class Serving:
    """Waiters and parked reads of one process life."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.world = broker.world
        self.waiters: dict[int, Waiter] = {}
        self.reads: dict[Key, list[Read]] = {}
        self.proofs: dict[int, Read] = {}  # token of a barrier -> the read that waits for it
        self.queues = QueueShell(self, self.world.queues) if self.world.queues is not None else None

    def clear(self) -> None:
        self.waiters.clear()
        self.proofs.clear()
        self.reads.clear()
        if self.world.queues is not None:
            self.queues = QueueShell(self, self.world.queues)

    def session_ended(self, session: Session) -> None:
        for reads in self.reads.values():
            reads[:] = [read for read in reads if read.session is not session]
        if self.queues is not None:
            self.queues.session_ended(session)

    def frame_received(self, session: Session, frame: Any) -> None:
        kind, correlation = frame[0], frame[1]
        try:
            if kind == "produce":
                self._produce(session, *frame[1:])
            elif kind == "read":
                self._read(session, *frame[1:])
            elif kind == "metadata":
                self._answer(session, ("cluster", correlation, self.broker.node.metadata.answer()))
            elif kind in FRAMES and self.queues is not None:
                self.queues.frame_received(session, *frame)
            else:
                self._group(session, *frame)
        except FerrylineError as error:
            answer = {"produce": "produced", "read": "records"}.get(kind, "group")
            nothing = (-1, 0) if kind == "produce" else (None,)
            self._answer(session, (answer, correlation, *nothing, error.info()))

    def _answer(self, session: Session | None, frame: Any) -> None:
        assert session is not None
        self.world.network.send(session, self.broker, frame)

    def not_here(self, key: Key) -> FerrylineError:
        metadata = self.broker.node.metadata
        if key[0] not in metadata.topics:
            return UnknownTopic("not known here")
        part = metadata.partition(*key)
        if part is None:
            return UnknownPartition("no such partition")
        if part.primary == NO_BROKER:
            return PrimaryNotAvailable("no primary", epoch=part.epoch)
        return NotPrimary("elsewhere", primary=part.primary, epoch=part.epoch)

    def ask(self, session: Session | None, correlation: int, key: Key, event: Any) -> None:
        waiter = Waiter(session, correlation, key, event, self.world.engine.now_us)
        self.waiters[event.token] = waiter
        waiter.state_end = self.broker.parts[key].core.log_end[STATE]
        replicas = self.broker.replicas
        replicas.asking = waiter
        replicas.feed(key, event)
        replicas.asking = None

    # -- produce -----------------------------------------------------------------------------------

    def _produce(
        self, session: Session, correlation: int, key: Key, partitions: int, data: bytearray, timeout_ms: int
    ) -> None:
        topic = self.broker.node.metadata.topics.get(key[0])
        if topic is None:
            raise UnknownTopic("not known here")
        if topic.config.partitions != partitions:
            raise StalePartitioning("another count", partitions=topic.config.partitions)
        if key not in self.broker.parts:
            raise self.not_here(key)
        header = read_header(data)
        check_crc(data, header)
        event = ev.Produced(self.world.token(), bytearray(data), header, timeout_ms)
        self.ask(session, correlation, key, event)

    # -- groups ------------------------------------------------------------------------------------

    def _group(self, session: Session, kind: str, correlation: int, key: Key, group: str, *rest: Any) -> None:
        if key not in self.broker.parts:
            raise self.not_here(key)
        token = self.world.token()
        event: ev.Event
        if kind == "claim":
            member, generation, mac = rest
            if not claim_token_valid(mac, self.broker.claim_key, group, *key, member, generation):
                raise Forbidden("claim token")
            event = ev.Claimed(token, group, member, generation, 5_000)
        elif kind == "commit":
            member, generation, offset, reset = rest
            event = ev.CommitAsked(token, group, member, generation, offset, "", reset, 5_000)
        else:
            event = ev.CommittedAsked(token, group, 5_000)
        self.ask(session, correlation, key, event)

    def answer(self, key: Key, core: PartitionCore, effect: ev.Effect) -> None:
        """Carry out AnswerProduce, AnswerGroup, AnswerBarrier and Refuse."""
        token: int = effect.token  # type: ignore[attr-defined]
        waiter = self.waiters.pop(token, None)
        assert waiter is not None, f"{self.broker}: token {token} is answered twice or unknown: {effect!r}"
        checks = self.world.checks
        if token in self.proofs:
            self._proved(self.proofs.pop(token), effect)
        elif isinstance(effect, ev.AnswerProduce):
            checks.produce_answered(self.broker, key, core, waiter, effect)
            self._answer(waiter.session, ("produced", waiter.correlation, effect.base_offset, effect.epoch, None))
        elif isinstance(effect, ev.AnswerGroup):
            checks.group_answered(self.broker, key, core, waiter, effect)
            self._answer(waiter.session, ("group", waiter.correlation, effect.state, None))
        elif isinstance(effect, QueueAnswer):
            assert self.queues is not None
            self.queues.answered(key, core, waiter, effect)
        elif isinstance(effect, ev.Refuse):
            self.world.count(f"refused {effect.code}")
            checks.refused(core, waiter, effect)
            info = info_of(effect)
            if isinstance(waiter.event, QueueQuestion):
                assert self.queues is not None
                self.queues.refused(waiter, token, info)
                return
            if isinstance(waiter.event, ev.Produced):
                self._answer(waiter.session, ("produced", waiter.correlation, -1, 0, info))
            else:
                self._answer(waiter.session, ("group", waiter.correlation, None, info))

    # -- reads -------------------------------------------------------------------------------------

    def _read(
        self, session: Session, correlation: int, key: Key, offset: int, epoch: int, secondary: bool, wait_ms: int
    ) -> None:
        if key not in self.broker.parts:
            raise self.not_here(key)
        read = Read(session, correlation, key, offset, epoch, secondary)
        if not self._serve(read):
            self.reads.setdefault(key, []).append(read)
            self.broker.host.deliver_after(wait_ms * MS, self._expire, read)

    def _prove(self, read: Read) -> None:
        if not read.proving:
            read.proving = True
            self.broker.host.deliver_after(1, self._ask_barrier, read)

    def _ask_barrier(self, read: Read) -> None:
        if read.key in self.broker.parts:
            event = ev.BarrierAsked(self.world.token(), 5_000)
            self.proofs[event.token] = read
            self.ask(read.session, read.correlation, read.key, event)

    def _proved(self, read: Read, effect: ev.Effect) -> None:
        """The barrier was committed, so this is the primary; or nobody can say."""
        waiting = self.reads.get(read.key, [])
        if read.done or read not in waiting:
            return
        read.proven = isinstance(effect, ev.AnswerBarrier)
        if isinstance(effect, ev.Refuse):
            read.done = True
            self._answer(read.session, ("records", read.correlation, None, info_of(effect)))
        if read.done or self._serve(read):
            waiting.remove(read)

    def _expire(self, read: Read) -> None:
        waiting = self.reads.get(read.key, [])
        if not read.done and read in waiting:
            waiting.remove(read)
            read.done = True
            self._answer(read.session, ("records", read.correlation, (b"", []), None))

    def wake(self, key: Key) -> None:
        waiting = self.reads.get(key)
        if waiting:
            self.reads[key] = [read for read in waiting if not self._serve(read)]

    def role_changed(self, key: Key) -> None:
        if self.queues is not None:
            self.queues.role_changed(key)

    def queue_effect(self, key: Key, hosted: Hosted, effect: ev.Effect) -> None:
        """Carry out ReadWindow, WakeReceivers and MoveDead."""
        assert self.queues is not None
        match effect:
            case ReadWindow():
                self.queues.read_window(key, hosted, effect)
            case WakeReceivers():
                self.queues.wake(key)
            case MoveDead():
                self.queues.move(key, hosted, effect)

    def drop(self, key: Key) -> None:
        if self.queues is not None:
            self.queues.drop(key)
        for read in self.reads.pop(key, []):
            gone = ev.Refuse(0, "NOT_PRIMARY", "this broker does not hold the partition any more")
            self._answer(read.session, ("records", read.correlation, None, info_of(gone)))
            read.done = True
        for token, waiter in list(self.waiters.items()):
            if waiter.key == key:
                del self.waiters[token]
                if self.proofs.pop(token, None) is not None:
                    continue
                refusal = ev.Refuse(token, "NOT_PRIMARY", "this broker does not hold the partition any more")
                if isinstance(waiter.event, QueueQuestion):
                    assert self.queues is not None
                    self.queues.refused(waiter, token, info_of(refusal))
                    continue
                kind = "produced" if isinstance(waiter.event, ev.Produced) else "group"
                nothing = (-1, 0) if kind == "produced" else (None,)
                self._answer(waiter.session, (kind, waiter.correlation, *nothing, info_of(refusal)))

    def _serve(self, read: Read) -> bool:
        """Answer if there is anything to say."""
        hosted = self.broker.parts.get(read.key)
        if hosted is None:
            return True
        verdict = hosted.core.check_read(read.offset, read.offset_epoch, read.secondary)
        if verdict.unproven and not read.proven:
            self._prove(read)
            return False
        if verdict.code:
            cls = BY_CODE.get(verdict.code, InternalError)
            details = {"safe_offset": verdict.safe_offset, "log_start": hosted.core.log_start[RECORDS]}
            error = ErrorInfo(verdict.code, verdict.message, cls.retriable, cls.definite, details)
            self._answer(read.session, ("records", read.correlation, None, error))
        elif read.offset < verdict.below:
            data, headers = hosted.files.read(RECORDS, read.offset, verdict.below, READ_BYTES_MAX)
            if not headers:
                return False
            self._answer(read.session, ("records", read.correlation, (data, headers), None))
        else:
            return False
        read.done = True
        return True
