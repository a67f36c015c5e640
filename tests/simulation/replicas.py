"""The replicas of one simulated broker: its `PartitionCore`s, and the driver that carries out their effects.

Effects are carried out in order, as `core/events.py` demands. The truth about everything that was done is told to the
`ghost` copies before anybody else can act on it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from ferryline.protocol.errors import StorageFailed, StorageFull
from ferryline.protocol.messages import RECORDS, STATE, AlterIsrs, Report, Resign
from ferryline.protocol.metadata import NO_BROKER
from ferryline.protocol.records import decode_batch
from ferryline_broker.core import events as ev
from ferryline_broker.core.events import Key
from ferryline_broker.core.groups import SnapshotEntry, StateEntry
from ferryline_broker.core.partition import PartitionCore
from ferryline_broker.core.queue_events import (
    AnswerLease,
    AnswerQueue,
    AnswerSettle,
    MoveDead,
    ReadWindow,
    WakeReceivers,
)
from ferryline_broker.log.interface import LogDamaged
from ferryline_broker.log.memory import SimulatedStop
from tests.simulation.disks import ReplicaFiles
from tests.simulation.ghost import Violation
from tests.simulation.hosts import Alarm
from tests.simulation.serving import Waiter

if TYPE_CHECKING:
    from tests.simulation.broker import Broker


class Flushing:
    """Group commit of one log: at most one flush runs, the next one takes everything that came meanwhile."""

    __slots__ = ("again", "end", "running")

    def __init__(self) -> None:
        self.running = False
        self.again = False
        self.end = 0  # everything below was written before the flush began and still stands


class Hosted:
    """One replica in a running process."""

    def __init__(self, core: PartitionCore, files: ReplicaFiles, alarm: Alarm) -> None:
        self.core = core
        self.files = files
        self.alarm = alarm
        self.flushing = (Flushing(), Flushing())
        self.marked_ms = 0


class Replicas:
    """All replicas of one process life of a broker."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.world = broker.world
        self.host = broker.host
        self.hosted: dict[Key, Hosted] = {}
        self.asking: Waiter | None = None  # the question that is being taken in
        self._sent = 0  # fetches and progress, numbered so that the other side can tell their order

    def stop(self) -> None:
        for hosted in self.hosted.values():
            hosted.alarm.off = True

    def tell_all(self, event: ev.Event) -> None:
        for key in sorted(self.hosted):
            self.feed(key, event)

    # -- hosting -----------------------------------------------------------------------------------

    def open(self, key: Key, *, quarantine: bool) -> str:
        """Open a replica and put its core to work. Returns its log state."""
        old = self.hosted.pop(key, None)
        if old is not None:
            old.alarm.off = True
        files = self.broker.disk.open(key, quarantine=quarantine)
        if quarantine:
            self.world.checks.replica_deleted(self.broker, key)
            self.world.count("quarantined")
        opened = files.opened()
        core = PartitionCore(key, self.broker.id, self.world.replica_config, opened)
        if self.world.queues is not None:
            core.handle(ev.RetryChanged(self.world.queues.drawn.retry), self.host.now_ms())
        alarm = Alarm(self.host, core.next_deadline_ms, lambda: self.feed(key, ev.Tick()))
        self.hosted[key] = Hosted(core, files, alarm)
        self.world.checks.replica_opened(self.broker, key, files, core)
        return opened.log_state

    def drop(self, key: Key) -> None:
        hosted = self.hosted.pop(key, None)
        if hosted is not None:
            hosted.alarm.off = True
            self.broker.serving.drop(key)
        self.broker.disk.delete(key)
        self.world.checks.replica_deleted(self.broker, key)

    # -- events in, effects out --------------------------------------------------------------------

    def feed(self, key: Key, event: ev.Event) -> None:
        """The one way into a partition core."""
        hosted = self.hosted.get(key)
        if hosted is None or not self.host.alive:
            return
        self.world.engine.note(self.host.name, (key[1], event.story()))
        effects = hosted.core.handle(event, self.host.now_ms())
        try:
            self._carry_out(key, hosted, effects)
        except SimulatedStop:
            self.world.faults.kill_now(self.broker)
            return
        if self.host.alive and self.hosted.get(key) is hosted:
            self.world.checks.after_step(self.broker, key, hosted.core)
            hosted.alarm.arm()

    def _carry_out(self, key: Key, hosted: Hosted, effects: list[ev.Effect]) -> None:
        queue = deque(effects)
        while queue and self.host.alive and self.hosted.get(key) is hosted:
            effect = queue.popleft()
            if self.broker.dies_now():
                return
            try:
                queue.extend(self._do(key, hosted, effect))
            except (StorageFailed, StorageFull) as error:
                self.world.count("failed writes")
                failed = ev.StorageFailed(getattr(effect, "log", RECORDS), error.message)
                if isinstance(error, StorageFull):
                    self.world.count("replicas stopped by full disks")
                    records, state = self.world.copies(self.broker, key)
                    failed = replace(failed, ends=(records.end, state.end))
                elif type(effect) in ev.WRITES and not isinstance(error, LogDamaged):
                    self.host.deliver_after(0, self.broker.leave_in_order)  # not before the core has heard
                queue = deque(hosted.core.handle(failed, self.host.now_ms()))

    def _do(self, key: Key, hosted: Hosted, effect: ev.Effect) -> list[ev.Effect]:
        """Carry out one effect. Returns the effects of what the core was told synchronously."""
        broker, world, core = self.broker, self.world, hosted.core
        match effect:
            case ev.Append(log, data, headers):
                self._append(key, hosted, log, data, headers)
            case ev.Flush(log):
                self._flush(key, hosted, log)
            case ev.WakeReaders(log, high_watermark):
                world.checks.watermark(broker, key, log, high_watermark, core)
                broker.serving.wake(key)
            case ev.AnswerProduce() | ev.AnswerGroup() | ev.AnswerBarrier() | ev.Refuse():
                broker.serving.answer(key, core, effect)
            case AnswerLease() | AnswerSettle() | AnswerQueue():
                broker.serving.answer(key, core, effect)
            case ev.SendFetch(to, fetch):
                self._send_to_primary(to, "fetch", fetch)
            case ev.SendProgress(to, progress):
                self._send_to_primary(to, "progress", progress)
            case ev.AwaitPassEnd():  # whatever else comes until then is taken in first
                self.host.deliver_after(int(world.engine.rng.random() * 200) + 1, self._pass_ended, key, hosted)
            case ev.SendData():
                self._send_data(hosted, effect)
            case ev.PersistEpoch(epoch):
                hosted.files.persist_epoch(epoch)
            case ev.RoleChanged(role, epoch, reason):
                world.checks.role_changed(broker, key, role, epoch, reason)
                if role == "primary":
                    world.faults.promoted(broker)
                broker.serving.wake(key)
                broker.serving.role_changed(key)
            case ev.ReplayState():
                return core.handle(ev.StateReplayed(hosted.files.state_entries()), self.host.now_ms())
            case ReadWindow(ahead=True):
                assert broker.serving.queues is not None
                return core.handle(broker.serving.queues.window(hosted, effect), self.host.now_ms())
            case ev.RebuildProducers():
                return core.handle(ev.ProducersRebuilt(hosted.files.producers()), self.host.now_ms())
            case _:
                self._do_rare(key, hosted, effect)
        return []

    def _do_rare(self, key: Key, hosted: Hosted, effect: ev.Effect) -> None:
        broker, checks, copies = self.broker, self.world.checks, self.world.copies(self.broker, key)
        match effect:
            case ev.Truncate(log, offset):
                self._truncate(key, hosted, log, offset)
            case ev.ResetLog(log, offset, epoch):
                hosted.flushing[log].end = 0
                hosted.files.reset(log, offset, epoch)
                copies[log].reset(offset)
                checks.shrunk(broker, key, "resets")
            case ev.AdvanceStart(log, offset):
                copies[log].advance_start(hosted.files.advance_start(log, offset))
                self.world.count("log start moved")
            case ev.SendAlterIsr(proposal):
                self.world.count("proposals")
                late_us = self.world.ambushes.proposing(broker, hosted.core, proposal)
                late_us = late_us or self.world.faults.proposing(broker, proposal)
                if late_us:
                    self.host.deliver_after(late_us, broker.ask, "alter", AlterIsrs([proposal]))
                else:
                    broker.ask("alter", AlterIsrs([proposal]))
            case ev.SendResign(entry):
                self.world.count("resignations")
                resign = Resign(broker.id, broker.node.broker_epoch, [entry])
                late_us = self.world.ambushes.resigning(broker, hosted.core)
                if late_us:
                    self.host.deliver_after(late_us, broker.ask, "resign", resign)
                else:
                    broker.ask("resign", resign)
            case ev.SendReport(report):
                if broker.joined:
                    broker.ask("report", Report(broker.id, broker.node.broker_epoch, [report]))
            case ev.DeleteReplica(_):
                self.drop(key)
            case ReadWindow() | WakeReceivers() | MoveDead():
                broker.serving.queue_effect(key, hosted, effect)
            case ev.RefreshMetadata():
                self.world.count("refreshes asked")  # the parked request answers as soon as there is news
            case _:
                raise AssertionError(f"unknown effect {effect!r}")

    def _pass_ended(self, key: Key, hosted: Hosted) -> None:
        if self.hosted.get(key) is hosted:
            self.feed(key, ev.PassEnded())

    # -- replication -------------------------------------------------------------------------------

    def _send_to_primary(self, to: int, kind: str, message: Any) -> None:
        session = self.broker.peers.get(to)
        if session is None:
            if to != NO_BROKER:
                self.broker.reach(to)
            return
        self._sent += 1
        frame = (kind, self._sent, self.broker.id, self.broker.node.broker_epoch, message)
        if not self.world.ambushes.asking(self.broker, session, kind, frame):
            self.broker.send(session, frame)

    def _send_data(self, hosted: Hosted, effect: ev.SendData) -> None:
        session = self.world.network.sessions.get(effect.session)
        if session is None or not session.up[session.side(self.broker)]:
            return
        payload = []
        for log in (RECORDS, STATE):
            read = effect.reads[log]
            data, headers = hosted.files.read(log, *read) if read is not None else (b"", [])
            payload.append(ev.LogBatches(data, headers))
        frame = ("data", self.broker.id, effect.data, (payload[0], payload[1]))
        late_us = self.world.ambushes.answering(self.broker, session, frame)
        if late_us:
            self.host.deliver_after(late_us, self.broker.send, session, frame)
        else:
            self.broker.send(session, frame)

    # -- disk --------------------------------------------------------------------------------------

    def _append(self, key: Key, hosted: Hosted, log: int, data: ev.Bytes, headers: list[Any]) -> None:
        hosted.files.append(log, data, headers)
        copy = self.world.copies(self.broker, key)[log]
        for _, header in headers:
            copy.append((header.base_offset, header.next_offset, header.epoch, header.crc))
            if log == RECORDS and header.producer_id >= 0 and not header.is_control and hosted.core.role == "primary":
                identity = (header.producer_id, header.producer_epoch, header.base_sequence)
                copy.truth.named[header.base_offset, header.crc] = identity
        if log == STATE and self.world.queues is not None and hosted.core.role == "primary":
            self.world.checks.queues.appended(self.broker, key, hosted.core, _entries(data, headers))
        if log == STATE and self.asking is not None and not _is_snapshot(data, headers):
            self.asking.state_end, self.asking = headers[0][1].next_offset, None

    def _truncate(self, key: Key, hosted: Hosted, log: int, offset: int) -> None:
        hosted.flushing[log].end = min(hosted.flushing[log].end, offset)
        end = hosted.files.truncate(log, offset)
        if end != offset:
            raise Violation(
                "core and log agree on the log end", f"{self.broker} {key} log {log}: {offset}, cut at {end}"
            )
        part = hosted.core.part
        recovered = part is not None and part.recovery_epoch > 0
        self.world.copies(self.broker, key)[log].truncate(offset, recovered=recovered)
        self.world.checks.shrunk(self.broker, key, "truncations")
        self.world.faults.truncated(self.broker)
        self.world.ambushes.truncated(hosted.core)

    def _flush(self, key: Key, hosted: Hosted, log: int) -> None:
        state = hosted.flushing[log]
        if state.running:
            state.again = True
            return
        state.running, state.again = True, False
        state.end = self.world.copies(self.broker, key)[log].end
        engine, weather = self.world.engine, self.world.weather
        delay_us = int(weather.flush_us * (0.3 + engine.rng.random()))
        if not self.world.calm and (self.broker.slow_disk or engine.chance(weather.slow_flush)):
            self.world.count("slow flushes")
            delay_us += int(engine.rng.random() * weather.slow_flush_us)
        delay_us += self.world.faults.flushing(self.broker, primary=hosted.core.role == "primary")
        self.host.deliver_after(delay_us, self._flush_ended, key, hosted, log)

    def _flush_ended(self, key: Key, hosted: Hosted, log: int) -> None:
        state = hosted.flushing[log]
        state.running = False
        if self.hosted.get(key) is not hosted:
            return
        try:
            end = hosted.files.sync(log, state.end)
            copy = self.world.copies(self.broker, key)[log]
            copy.synced = max(copy.synced, min(end, copy.end))
            if state.again:
                self._flush(key, hosted, log)
            self._checkpoint(hosted)
        except StorageFailed as error:
            self.world.count("failed flushes")
            self.feed(key, ev.StorageFailed(log, error.message))
            self.broker.leave_after_failed_sync()
            return
        except SimulatedStop:
            self.world.faults.kill_now(self.broker)
            return
        self.feed(key, ev.Flushed(log, end))

    def _checkpoint(self, hosted: Hosted) -> None:
        """At least every second. Nothing of a stopped replica, as in the product's upkeep: its last effects were
        dropped, so its core may be ahead of its log and of what was told."""
        if hosted.core.role != "stopped" and self.host.now_ms() - hosted.marked_ms >= 1_000:
            hosted.marked_ms = self.host.now_ms()
            hosted.files.checkpoint(hosted.core.high_watermark)


def _is_snapshot(data: ev.Bytes, headers: list[Any]) -> bool:
    """Nobody's answer waits for a snapshot: a question that changes nothing may be what it is taken at."""
    entries = _entries(data, headers[:1])
    return bool(entries) and isinstance(entries[0], SnapshotEntry)


def _entries(data: ev.Bytes, headers: list[Any]) -> list[StateEntry]:
    return [
        msgspec.msgpack.decode(record.value or b"", type=StateEntry)
        for at, header in headers
        if not header.is_control
        for record in decode_batch(data[at : at + header.size], header)
    ]
