"""Queues in the shell of a simulated broker: RECEIVE, SETTLE and KEEP in, answers out; windows, wakes and dead letters.

It does what `queue_frames.py`, `queue_records.py` and `dead_letters.py` do, in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ferryline.protocol.errors import StorageFailed
from ferryline.protocol.messages import RECORDS
from ferryline.protocol.queue_messages import RELEASE
from ferryline.protocol.records import decode_batch
from ferryline_broker.core.events import Key
from ferryline_broker.core.partition import PartitionCore
from ferryline_broker.core.queue_events import (
    DONE,
    UNKNOWN_PRODUCER,
    AnswerLease,
    AnswerQueue,
    AnswerSettle,
    DeadMoved,
    KeepAsked,
    LeaseAsked,
    MoveDead,
    QueueAsked,
    ReadWindow,
    Scanned,
    ScannedBatch,
    SettleAsked,
    SettleItem,
    WindowRead,
)
from tests.scanned import together
from tests.simulation.clients import is_rotten
from tests.simulation.engine import MS
from tests.simulation.network import Session
from tests.simulation.queueing import FORGOTTEN, QUEUE, QueuePart

if TYPE_CHECKING:
    from tests.simulation.replicas import Hosted
    from tests.simulation.serving import Serving, Waiter

TIMEOUT_MS = 5_000
ROTTEN = b"\0rotten"
FRAMES = frozenset({"receive", "settle", "keep", "redrive"})
QueueAnswer = AnswerLease | AnswerSettle | AnswerQueue
QueueQuestion = LeaseAsked | SettleAsked | KeepAsked | QueueAsked


class Parked:
    """A receiver that waits. ``asking``: the core has been asked for it, and has not answered."""

    __slots__ = ("ask", "asking", "correlation", "done", "expired", "key", "session")

    def __init__(self, session: Session, correlation: int, key: Key, ask: tuple[str, str, int, int]) -> None:
        self.session, self.correlation, self.key = session, correlation, key
        self.ask = ask  # member, ordering, lease_ms, records_max
        self.asking = self.expired = self.done = False


class QueueShell:
    """Who waits for records at one process life of a broker, and which dead letters are on their way."""

    def __init__(self, serving: Serving, part: QueuePart) -> None:
        self.serving = serving
        self.broker = serving.broker
        self.world = serving.world
        self.part = part
        self.parked: dict[Key, list[Parked]] = {}
        self.asked: dict[int, Parked] = {}  # token of a LeaseAsked
        self.moves: dict[Key, MoveDead] = {}

    # -- frames ------------------------------------------------------------------------------------

    def frame_received(self, session: Session, kind: str, correlation: int, key: Key, *rest: Any) -> None:
        if key not in self.broker.parts:
            raise self.serving.not_here(key)
        token = self.world.token()
        if kind == "receive":
            member, ordering, lease_ms, limit, wait_ms = rest
            parked = Parked(session, correlation, key, (member, ordering, lease_ms, limit))
            self.parked.setdefault(key, []).append(parked)
            hosted = self.broker.parts.get(key)
            if hosted is None or not hosted.core.queue_waited_for(QUEUE, ordering, self.broker.now_ms()):
                self._lease(parked)
            self.broker.host.deliver_after(wait_ms * MS, self._expire, parked)
        elif kind == "settle":
            member, item = rest
            event = SettleAsked(token, QUEUE, member, [SettleItem(*item)], TIMEOUT_MS, self.part.chance(0.5))
            self.serving.ask(session, correlation, key, event)
        elif kind == "keep":
            member, leases = rest
            self.serving.ask(session, correlation, key, KeepAsked(token, QUEUE, member, leases, TIMEOUT_MS))
        else:
            self.serving.ask(session, correlation, key, QueueAsked(token, QUEUE, "redrive", timeout_ms=TIMEOUT_MS))

    def _lease(self, parked: Parked) -> None:
        token = self.world.token()
        self.asked[token] = parked
        parked.asking = True
        member, ordering, lease_ms, limit = parked.ask
        stands = token % 2 == 0  # a word that may be false: whoever waits may have gone
        event = LeaseAsked(
            token, QUEUE, member, ordering, "start", lease_ms, limit, 1 << 20, TIMEOUT_MS, stands=stands
        )  # fmt: skip
        self.serving.ask(parked.session, parked.correlation, parked.key, event)

    def answered(self, key: Key, core: PartitionCore, waiter: Waiter, effect: QueueAnswer) -> None:
        if isinstance(effect, AnswerLease):
            if effect.offsets:
                self.world.checks.queues.answered(self.broker, key, core, waiter, effect)
            self._leased(core, self.asked.pop(effect.token), effect)
            return
        self.world.checks.queues.answered(self.broker, key, core, waiter, effect)
        found: Any = None
        if isinstance(effect, AnswerSettle):
            found = (effect.stale[0], effect.settled[0]) if effect.stale else ([], [])
        self._answer(waiter.session, ("settled", waiter.correlation, found, None))

    def refused(self, waiter: Waiter, token: int, error: Any) -> None:
        parked = self.asked.pop(token, None)
        if parked is None:
            self._answer(waiter.session, ("settled", waiter.correlation, None, error))
        elif not parked.done:
            self._finish(parked, None, error)

    def _answer(self, session: Session | None, frame: Any) -> None:
        if session is not None:
            self.world.network.send(session, self.broker, frame)

    def _finish(self, parked: Parked, found: Any, error: Any) -> None:
        parked.done = True
        waiting = self.parked.get(parked.key, [])
        if parked in waiting:
            waiting.remove(parked)
        self._answer(parked.session, ("leased", parked.correlation, found, error))

    # -- leases ------------------------------------------------------------------------------------

    def _leased(self, core: PartitionCore, parked: Parked, lease: AnswerLease) -> None:
        parked.asking = False
        if not lease.offsets:
            if parked.expired and not parked.done:
                self._finish(parked, None, None)
        elif parked.done or not parked.session.up[parked.session.side(self.broker)]:
            self.world.count("leases given back")
            item = SettleItem(lease.epoch, lease.lease, RELEASE, lease.offsets)
            self.broker.host.deliver_after(1, self._give_back, parked, item)
        else:
            hosted = self.broker.parts[parked.key]
            assert core.primary is not None
            assert core.primary.groups is not None
            self.part.gave_out(parked.key, core.primary.groups.queues[QUEUE].start)
            found = [(offset, self._value(hosted, offset)) for offset in lease.offsets]
            if ROTTEN in [value for _, value in found]:  # nothing of it is handed out; the scrubber finds it
                self._finish(parked, None, None)
            else:
                self._finish(parked, (lease, [(offset, value) for offset, value in found if value is not None]), None)

    def _give_back(self, parked: Parked, item: SettleItem) -> None:
        if parked.key in self.broker.parts:
            event = SettleAsked(self.world.token(), QUEUE, parked.ask[0], [item], TIMEOUT_MS)
            self.serving.ask(None, 0, parked.key, event)

    def _value(self, hosted: Hosted, offset: int) -> bytes | None:
        """None: retention was faster. ROTTEN: nobody can read it."""
        try:
            data, headers = hosted.files.read(RECORDS, offset, hosted.core.high_watermark[RECORDS], 1)
        except StorageFailed:
            return ROTTEN
        for at, header in headers:
            if header.base_offset <= offset < header.next_offset:
                if is_rotten(data, at, header):
                    return ROTTEN
                records = list(decode_batch(data[at : at + header.size], header))
                return records[offset - header.base_offset].value or b""
        return None

    def _expire(self, parked: Parked) -> None:
        parked.expired = True
        if not parked.done and not parked.asking:
            self._finish(parked, None, None)

    def wake(self, key: Key) -> None:
        self.broker.host.deliver_after(1, self._ask_again, key)

    def _ask_again(self, key: Key) -> None:
        for parked in list(self.parked.get(key, [])):
            hosted = self.broker.parts.get(key)
            if hosted is None or not self.broker.host.alive:
                return
            if parked.done or parked.asking:
                continue
            ready = hosted.core.queue_ready(QUEUE)
            self._lease(parked)  # also of nothing: it leaves word that somebody waits
            if not ready:
                return

    def role_changed(self, key: Key) -> None:
        """Whoever waits here learns that this broker does not lead the partition any more."""
        hosted = self.broker.parts.get(key)
        for parked in list(self.parked.get(key, [])):
            if not parked.done and not parked.asking and (hosted is None or hosted.core.role != "primary"):
                self._finish(parked, None, self.serving.not_here(key).info())

    def drop(self, key: Key) -> None:
        self.moves.pop(key, None)
        self.role_changed(key)

    def session_ended(self, session: Session) -> None:
        for waiting in self.parked.values():
            for parked in waiting:
                parked.done = parked.done or parked.session is session
            waiting[:] = [parked for parked in waiting if not parked.done]

    # -- windows -----------------------------------------------------------------------------------

    def read_window(self, key: Key, hosted: Hosted, effect: ReadWindow) -> None:
        self.broker.host.deliver_after(self.part.between(50, 3_000), self._read, key, hosted, effect)

    def _read(self, key: Key, hosted: Hosted, effect: ReadWindow) -> None:
        if self.broker.parts.get(key) is not hosted:
            return
        event = self.window(hosted, effect)
        if event.next_offset > effect.offset:
            self.broker.replicas.feed(key, event)
        else:  # rot, or retention was faster
            self.broker.host.deliver_after(200 * MS, self._nothing_read, key, hosted, event)

    def window(self, hosted: Hosted, effect: ReadWindow) -> WindowRead:
        """What there is of the records that are asked for."""
        scanned: list[Scanned | ScannedBatch] = []
        next_offset, size = effect.offset, 0
        try:
            batches = hosted.files.read(RECORDS, effect.offset, effect.below, effect.bytes_max)
        except StorageFailed:
            batches = (b"", [])
        data, headers = batches
        for at, header in headers:
            if is_rotten(data, at, header):
                break
            next_offset, size = header.next_offset, size + header.size
            if not header.is_control:
                scanned += together(
                    [self._scanned(record) for record in decode_batch(data[at : at + header.size], header)]
                )
        return WindowRead(effect.group, effect.offset, next_offset, scanned, size, effect.ahead)

    def _nothing_read(self, key: Key, hosted: Hosted, event: WindowRead) -> None:
        if self.broker.parts.get(key) is hosted:
            self.broker.replicas.feed(key, event)

    def _scanned(self, record: Any) -> Scanned:
        """As `queue_records.py`: moments of true time become moments of this broker's clock."""
        facts, now_ms, now_us = self.part.fact(record.value or b""), self.broker.now_ms(), self.world.engine.now_us
        due_ms = now_ms + facts.from_now_ms(facts.delay_ms, now_us) if facts.delay_ms else 0
        expires_ms = now_ms + facts.from_now_ms(facts.ttl_ms, now_us) if facts.ttl_ms else 0
        return Scanned(record.offset, record.key, facts.priority, due_ms, expires_ms)

    # -- dead letters ------------------------------------------------------------------------------

    def move(self, key: Key, hosted: Hosted, effect: MoveDead) -> None:
        self.world.count("dead letters to move")
        self.moves[key] = effect
        self._on_its_way(key, hosted, effect, hosted.core.primary)

    def _on_its_way(self, key: Key, hosted: Hosted, effect: MoveDead, primary: Any) -> None:
        late = self.part.chance(self.part.drawn.slow_target)
        delay_us = self.part.between(500, 5_000) + (self.part.between(100, 2_500) * MS if late else 0)
        self.part.target.travelling[key] += 1
        # it travels on its own: the broker may die meanwhile
        self.world.engine.after(delay_us, self._arrived, key, hosted, effect, primary, self.broker.host.life)

    def _arrived(self, key: Key, hosted: Hosted, effect: MoveDead, primary: Any, life: int) -> None:
        self.part.target.travelling[key] -= 1
        outcome = self.part.target.take(key, hosted.core, effect)
        delay_us = self.part.between(500, 5_000)
        self.world.engine.after(
            delay_us, self.broker.host.deliver, life, self._told, key, hosted, effect, primary, outcome
        )  # fmt: skip

    def _told(self, key: Key, hosted: Hosted, effect: MoveDead, primary: Any, outcome: str) -> None:
        if self.broker.parts.get(key) is not hosted or hosted.core.primary is not primary:
            return
        if self.moves.get(key) is not effect:
            return
        if not outcome:
            self.world.count("dead-letter answers lost")
            self._on_its_way(key, hosted, effect, primary)
            return
        told = UNKNOWN_PRODUCER if outcome == FORGOTTEN else DONE
        self.broker.replicas.feed(key, DeadMoved(effect.group, effect.offset, effect.sequence, told))
