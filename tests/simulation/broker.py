"""A broker of the simulation: the product's `NodeCore` and `PartitionCore`s, with this file as their driver and shell.

The driver carries out effects in order, as `core/events.py` demands, and tells the truth about everything it did to the
`ghost` copies before anybody else can act on it. It decides nothing about the protocol.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from ferryline.protocol.frames import Kind
from ferryline.protocol.messages import (
    RECORDS,
    STATE,
    AlterIsrs,
    Handover,
    ReplicaData,
    Report,
    Resign,
)
from ferryline.protocol.metadata import NO_BROKER, MetadataAnswer
from ferryline_broker.core import events as ev
from ferryline_broker.core.events import Key
from ferryline_broker.core.node import NodeConfig, NodeCore, NodeIdentity
from ferryline_broker.core.partition import PartitionCore, ReplicaConfig
from ferryline_coordinator.core.events import Admitted, BrokerAdmitted
from tests.simulation.disks import FastDisk, FastReplica
from tests.simulation.engine import MS
from tests.simulation.ghost import Violation
from tests.simulation.hosts import Alarm, Host
from tests.simulation.network import Session
from tests.simulation.serving import Serving, Waiter

if TYPE_CHECKING:
    from tests.simulation.world import World


class ProcessDied(Exception):
    """The process was killed between two effects."""


class Flushing:
    """Group commit of one log: at most one flush runs, the next one takes everything that came meanwhile."""

    __slots__ = ("again", "end", "running")

    def __init__(self) -> None:
        self.running = False
        self.again = False
        self.end = 0  # everything below was written before the flush began and still stands


class Hosted:
    """One replica in a running process."""

    def __init__(self, core: PartitionCore, files: FastReplica, alarm: Alarm) -> None:
        self.core = core
        self.files = files
        self.alarm = alarm
        self.flushing = (Flushing(), Flushing())
        self.marked_ms = 0


class Broker:
    """One broker over all its process lives. ``number`` is its place in the simulation, `id` what the cluster calls it."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.host = Host(world.engine, f"b{number}", world.drift())
        self.disk = FastDisk(f"storage-{number}-0")
        self.url = f"https://b{number}:9443"
        self.wanted = True  # restarted whenever it is down
        self.stopping = False
        self.steps_to_death = -1  # effects until kill -9; -1: none planned
        self.slow_disk = False
        self.write_error = False
        self.sync_error = False
        self.node: NodeCore
        self.parts: dict[Key, Hosted] = {}
        self.serving = Serving(self)
        self._clear()

    def _clear(self) -> None:
        self.parts.clear()
        self.joined = False
        self.coordinator: Session | None = None
        self.coordinator_due = False
        self.peers: dict[int, Session] = {}  # sessions that we opened, by broker id
        self.peers_due: set[int] = set()
        self.accepted: dict[int, int] = {}  # session id -> broker id of the opener
        self.pending: dict[int, tuple[str, Any]] = {}  # requests at the coordinator
        self.correlation = 0
        self.fetches_sent = 0
        self.fetch_order: dict[tuple[int, Key], int] = {}  # newest fetch taken in, per session and partition
        self.claim_key = b""
        self.asking: Waiter | None = None  # the question that is being taken in

    @property
    def id(self) -> int:
        return self.disk.files.broker_id

    @property
    def at_work(self) -> bool:
        return self.host.alive and self.joined

    def __repr__(self) -> str:
        return f"broker {self.number} (id {self.id})"

    # -- lives -------------------------------------------------------------------------------------

    def start(self) -> None:
        world, files = self.world, self.disk.files
        self._clear()
        self.serving.clear()
        self.stopping = False
        self.steps_to_death = -1
        restart = self.disk.start()
        self.host.begin_life()
        world.checks.broker_started(self, restart)
        states: dict[Key, str] = {}
        for key in sorted(self.disk.replicas):
            states[key] = self._host(key, quarantine=False)
        self.restart = restart
        if files.broker_id:
            self._become_node(states)
        self._log("started", restart, files.incarnation, files.broker_id)
        self._connect()

    def _become_node(self, states: dict[Key, str]) -> None:
        """From here on this process has a number in the cluster."""
        weather, files = self.world.weather, self.disk.files
        identity = NodeIdentity(
            files.broker_id,
            files.storage_id,
            files.incarnation,
            self.restart,
            self.url,
            self.url,
            files.seen_coord_epoch,
            files.cluster_id,
            states,
        )
        self.node = NodeCore(
            NodeConfig(
                heartbeat_ms=500,
                register_retry_ms=200,
                metadata_wait_ms=weather.metadata_wait_ms,
                metadata_retry_ms=200,
                stop_ms=3_000,
            ),
            identity,
        )
        self.joined = True
        self.node_alarm = Alarm(self.host, self.node.next_deadline_ms, lambda: self.node_event(ev.Tick()))

    def die(self, why: str, *, power: bool = False) -> None:
        """The process ends here and now; with ``power`` the machine too."""
        if not self.host.alive:
            return
        self._log("died", why)
        self.world.network.host_died(self, silently=power)
        self.host.end_life()
        for hosted in self.parts.values():
            hosted.alarm.off = True
        if self.joined:
            self.node_alarm.off = True
        self._clear()

    def _log(self, *what: Any) -> None:
        self.world.engine.note(self.host.name, what)

    def now_ms(self) -> int:
        return self.host.now_ms()

    # -- sessions ----------------------------------------------------------------------------------

    def _connect(self) -> None:
        if self.coordinator is None and not self.coordinator_due:
            self.coordinator_due = True
            self.world.network.connect(self, self.world.coordinator_address(), "coordinator", self._connect_failed)

    def _connect_failed(self, _why: str) -> None:
        self.coordinator_due = False
        self.host.deliver_after(self.world.engine.between(50, 300) * MS, self._connect)

    def _reach(self, peer: int) -> None:
        """Open a session to another broker, by its id."""
        if peer in self.peers or peer in self.peers_due or peer == self.id:
            return
        target = self.world.broker_by_id(peer)
        if target is None:
            return
        self.peers_due.add(peer)

        def failed(_why: str) -> None:
            self.peers_due.discard(peer)
            self.host.deliver_after(self.world.engine.between(50, 400) * MS, self._reach_again, peer)

        self.world.network.connect(self, target, "replica", failed)

    def _reach_again(self, peer: int) -> None:
        if any(hosted.core.secondary and hosted.core.secondary.primary == peer for hosted in self.parts.values()):
            self._reach(peer)

    def session_opened(self, session: Session) -> None:
        peer = session.peer(self)
        if peer is self.world.coordinator or not isinstance(peer, Broker):
            if session.side(self) == 0:
                self.coordinator_due = False
                self.coordinator = session
                self.pending.clear()
                if self.joined:
                    self.node_event(ev.CoordinatorUp())
                else:
                    self._ask("join", BrokerAdmitted(0, self.disk.files.storage_id, self.url, self.url))
            return
        if session.side(self) == 0:
            self.peers_due.discard(peer.id)
            self.peers[peer.id] = session
            self._tell_all(ev.PeerUp(peer.id))
        else:
            self.accepted[session.id] = peer.id

    def session_ended(self, session: Session) -> None:
        if session is self.coordinator:
            self.coordinator = None
            pending, self.pending = self.pending, {}
            for name, context in pending.values():
                self._unanswered(name, context)
            if self.joined:
                self.node_event(ev.CoordinatorDown())
            self.host.deliver_after(self.world.engine.between(20, 200) * MS, self._connect)
            return
        for peer, open_session in list(self.peers.items()):
            if open_session is session:
                del self.peers[peer]
                self._tell_all(ev.PeerDown(peer))
                self.host.deliver_after(self.world.engine.between(20, 200) * MS, self._reach_again, peer)
        peer = self.accepted.pop(session.id, 0)
        if peer:
            self._tell_all(ev.PeerDown(peer))
        self.serving.session_ended(session)

    def _tell_all(self, event: ev.Event) -> None:
        for key in sorted(self.parts):
            self.part_event(key, event)

    # -- frames ------------------------------------------------------------------------------------

    def frame_received(self, session: Session, frame: Any) -> None:
        kind = frame[0]
        if kind == "fetch":
            _, order, sender, sender_epoch, fetch = frame
            key = (fetch.topic_id, fetch.partition)
            self.fetch_order[session.id, key] = max(order, self.fetch_order.get((session.id, key), 0))
            if key in self.parts:
                self.part_event(key, ev.FetchReceived(session.id, sender, sender_epoch, fetch))
            else:
                data = ReplicaData(*key, fetch.epoch, fetch.fetch_id, None, "UNKNOWN_PARTITION")
                self._send(session, ("data", self.id, data, (None, None)))
        elif kind == "progress":
            _, order, sender, sender_epoch, progress = frame
            key = (progress.topic_id, progress.partition)
            # Progress and fetches of a session are processed in order: what a fetch overtook is dropped.
            if key in self.parts and order > self.fetch_order.get((session.id, key), 0):
                self.part_event(key, ev.ProgressReceived(session.id, sender, sender_epoch, progress))
        elif kind == "data":
            _, sender, data, payload = frame
            key = (data.topic_id, data.partition)
            if key in self.parts:
                self.part_event(key, ev.DataReceived(sender, data, payload))
        elif kind == "answer":
            self._answered(session, frame)
        elif kind == "tell":
            self._told(frame[1], frame[2])
        elif self.joined:
            self.serving.frame_received(session, frame)

    def _send(self, session: Session, frame: Any) -> None:
        self.world.network.send(session, self, frame)

    # -- the coordinator ---------------------------------------------------------------------------

    def _ask(self, name: str, message: Any, context: Any = None, timeout_ms: int = 2_500) -> None:
        """A request to the coordinator; its outcome goes to `_answered` or `_unanswered`, once."""
        if self.coordinator is None:
            self._unanswered(name, context)
            return
        self.correlation += 1
        number = self.correlation
        self.pending[number] = (name, context)
        self._send(self.coordinator, ("request", number, name, message))
        self.host.deliver_after(timeout_ms * MS, self._timed_out, self.coordinator.id, number)

    def _timed_out(self, session: int, number: int) -> None:
        if self.coordinator is not None and self.coordinator.id == session and number in self.pending:
            self._unanswered(*self.pending.pop(number))

    def _unanswered(self, name: str, context: Any) -> None:
        if name == "join":
            self._reset_coordinator_session()
        elif name == "metadata":
            self.node_event(ev.MetadataReceived(None))
        elif name == "heartbeat":
            self.node_event(ev.HeartbeatAnswered(None))

    def _answered(self, session: Session, frame: Any) -> None:
        _, number, result, error = frame
        if session is not self.coordinator:
            return
        name, context = self.pending.pop(number, ("", None))
        if not name:
            if isinstance(result, MetadataAnswer):  # an answer that came twice, or after its time: harmless
                self.node_event(ev.MetadataReceived(result))
            return
        code = error.code if error is not None else ""
        if name == "join":
            self._joined(result)
        elif name == "register":
            self.node_event(ev.RegisterAnswered(result, code, error.message if error else ""))
        elif name == "heartbeat":
            self.node_event(ev.HeartbeatAnswered(result, code))
        elif name == "metadata":
            self.node_event(ev.MetadataReceived(result))
        elif name == "alter" and result is not None:
            for answer in result.results:
                key = (answer.topic_id, answer.partition)
                if key in self.parts:
                    self.part_event(key, ev.AlterIsrAnswered(answer))

    def _joined(self, admitted: Admitted | None) -> None:
        """The number and the certificate are stored; the session begins anew under that name."""
        if admitted is not None and not self.joined:
            self.disk.files.broker_id, self.disk.files.cluster_id = admitted.broker_id, admitted.cluster_id
            self.world.joined(self)
            self._become_node({})
        self._reset_coordinator_session()

    def _told(self, kind: int, message: Any) -> None:
        if kind == Kind.HANDOVER and isinstance(message, Handover):
            self._hand_over(message)
        elif kind == Kind.REPORT:
            reports = [hosted.core.report() for _, hosted in sorted(self.parts.items())]
            self._ask("report", Report(self.id, self.node.broker_epoch, reports))

    def _hand_over(self, message: Handover) -> None:
        for entry in message.entries:
            hosted = self.parts.get((entry.topic_id, entry.partition))
            if hosted is not None and hosted.core.role == "primary" and hosted.core.epoch == entry.epoch:
                self.part_event((entry.topic_id, entry.partition), ev.HandOverAsked())

    # -- the node core -----------------------------------------------------------------------------

    def node_event(self, event: ev.Event) -> None:
        if not self.host.alive:
            return
        self.world.engine.note(self.host.name, event.story())
        self._carry_out_node(self.node.handle(event, self.now_ms()))
        if self.host.alive:
            self.node_alarm.arm()

    def _carry_out_node(self, effects: list[ev.Effect]) -> None:
        queue = deque(effects)
        while queue and self.host.alive:
            effect = queue.popleft()
            if self._dies_now():
                return
            match effect:
                case ev.SendRegister(register):
                    reports = [hosted.core.report() for _, hosted in sorted(self.parts.items())]
                    self._ask("register", self.world.with_reports(register, reports), timeout_ms=60_000)
                case ev.SendHeartbeat(heartbeat):
                    self._ask("heartbeat", heartbeat)
                case ev.RequestMetadata(request):
                    self._ask("metadata", request, timeout_ms=request.wait_ms + 2_000)
                case ev.ConfirmRegistered(broker_id, cluster_id, coord_epoch, claim_key):
                    self.disk.confirmed(broker_id, cluster_id, coord_epoch)
                    self.claim_key = claim_key
                    self.world.checks.broker_registered(self)
                case ev.PersistCoordEpoch(coord_epoch):
                    self._persist_coord_epoch(coord_epoch)
                case ev.OpenReplica(key, _flush, quarantine):
                    state = self._host(key, quarantine=quarantine)
                    queue.extendleft(reversed(self.node.handle(ev.ReplicaOpened(key, state), self.now_ms())))
                case ev.DeleteReplica(key):
                    self._drop(key)
                case ev.TellReplica(key, event):
                    if key in self.parts:
                        self.part_event(key, event)
                case ev.ResetCoordinatorSession(_):
                    self._reset_coordinator_session()
                case ev.Registered(_, fenced):
                    self.world.count("fenced by answer" if fenced else "unfenced by answer")
                case ev.StopNow(clean, reason):
                    self._stop_now(clean, reason)
                    return
                case _:
                    raise AssertionError(f"unknown effect {effect!r}")

    def _persist_coord_epoch(self, coord_epoch: int) -> None:
        if coord_epoch < self.disk.files.seen_coord_epoch:
            raise Violation("D1.11 coordinator epoch rises", f"{self}: {self.disk.files.seen_coord_epoch} -> {coord_epoch}")
        self.disk.files.seen_coord_epoch = coord_epoch

    def _reset_coordinator_session(self) -> None:
        session, self.coordinator = self.coordinator, None
        self.pending.clear()
        if session is not None:
            self.world.network.end(session, by=self)
            self.host.deliver_after(self.world.engine.between(20, 200) * MS, self._connect)

    def _stop_now(self, clean: bool, reason: str) -> None:
        if clean:
            for hosted in self.parts.values():
                for log in (RECORDS, STATE):
                    self._synced(hosted, log, hosted.core.log_end[log])
                hosted.files.checkpoint(hosted.core.high_watermark)
            self.disk.files.clean_incarnation = self.disk.files.incarnation
        self.world.count("stopped cleanly" if clean else "stopped uncleanly")
        self.die(f"stopped: {reason}")

    # -- the partition cores -----------------------------------------------------------------------

    def _host(self, key: Key, *, quarantine: bool) -> str:
        """Open a replica and put its core to work. Returns its log state."""
        old = self.parts.pop(key, None)
        if old is not None:
            old.alarm.off = True
        files = self.disk.open(key, quarantine=quarantine)
        opened = files.opened(True)
        core = PartitionCore(key, self.id or self.disk.files.broker_id, self.world.replica_config, opened)
        alarm = Alarm(self.host, core.next_deadline_ms, lambda: self.part_event(key, ev.Tick()))
        self.parts[key] = Hosted(core, files, alarm)
        self.world.checks.replica_opened(self, key, files, core)
        return opened.log_state

    def _drop(self, key: Key) -> None:
        hosted = self.parts.pop(key, None)
        if hosted is not None:
            hosted.alarm.off = True
            self.serving.drop(key)
        self.disk.delete(key)
        self.world.checks.replica_deleted(self, key)

    def part_event(self, key: Key, event: ev.Event) -> None:
        """The one way into a partition core."""
        hosted = self.parts.get(key)
        if hosted is None or not self.host.alive:
            return
        self.world.engine.note(self.host.name, (key[1], event.story()))
        effects = hosted.core.handle(event, self.now_ms())
        self._carry_out(key, hosted, effects)
        if self.host.alive and self.parts.get(key) is hosted:
            self.world.checks.after_step(self, key, hosted.core)
            hosted.alarm.arm()

    def _dies_now(self) -> bool:
        if self.steps_to_death < 0:
            return False
        self.steps_to_death -= 1
        if self.steps_to_death >= 0:
            return False
        self.world.faults.kill_now(self)
        return True

    def _carry_out(self, key: Key, hosted: Hosted, effects: list[ev.Effect]) -> None:
        queue = deque(effects)
        core, copies, now_ms = hosted.core, self.world.copies(self, key), self.now_ms()
        while queue and self.host.alive and self.parts.get(key) is hosted:
            effect = queue.popleft()
            if self._dies_now():
                return
            match effect:
                case ev.Append(log, data, headers):
                    if self.write_error:
                        self.world.count("write errors")
                        queue = deque(core.handle(ev.StorageFailed(log, "write: Input/output error"), now_ms))
                        continue
                    hosted.files.append(log, data, headers)
                    for _, header in headers:
                        copies[log].append((header.base_offset, header.next_offset, header.epoch, header.crc))
                    if log == STATE and self.asking is not None:
                        self.asking.state_end, self.asking = headers[0][1].next_offset, None
                case ev.Flush(log):
                    self._flush(key, hosted, log)
                case ev.WakeReaders(log, high_watermark):
                    self.world.checks.watermark(self, key, log, high_watermark, core)
                    self.serving.wake(key)
                case ev.AnswerProduce() | ev.AnswerGroup() | ev.AnswerBarrier() | ev.Refuse():
                    self.serving.answer(key, core, effect)
                case ev.SendFetch(to, fetch):
                    self._send_to_primary(to, "fetch", fetch)
                case ev.SendProgress(to, progress):
                    self._send_to_primary(to, "progress", progress)
                case ev.SendData():
                    self._send_data(key, hosted, effect)
                case ev.PersistEpoch(epoch):
                    hosted.files.persist_epoch(epoch)
                case ev.RoleChanged(role, epoch, reason):
                    self.world.checks.role_changed(self, key, role, epoch, reason)
                    self.serving.wake(key)
                case ev.ReplayState():
                    queue.extend(core.handle(ev.StateReplayed(hosted.files.state_entries()), now_ms))
                case ev.RebuildProducers():
                    queue.extend(core.handle(ev.ProducersRebuilt(hosted.files.producers()), now_ms))
                case ev.DeleteReplica(_):
                    self._drop(key)
                case ev.RefreshMetadata():
                    self.world.count("refreshes asked")  # the parked request answers as soon as there is news
                case _:
                    self._carry_out_rare(key, hosted, effect)

    def _carry_out_rare(self, key: Key, hosted: Hosted, effect: ev.Effect) -> None:
        copies, core = self.world.copies(self, key), hosted.core
        match effect:
            case ev.Truncate(log, offset):
                hosted.flushing[log].end = min(hosted.flushing[log].end, offset)
                hosted.files.truncate(log, offset)
                part = core.part
                recovered = part is not None and part.recovery_epoch > 0
                copies[log].truncate(offset, recovered=recovered)
                self.world.checks.shrunk(self, key, "truncations")
            case ev.ResetLog(log, offset):
                hosted.flushing[log].end = 0
                hosted.files.reset(log, offset)
                copies[log].reset(offset)
                self.world.checks.shrunk(self, key, "resets")
            case ev.AdvanceStart(log, offset):
                copies[log].advance_start(hosted.files.advance_start(log, offset))
                self.world.count("log start moved")
            case ev.SendAlterIsr(proposal):
                self.world.count("proposals")
                self._ask("alter", AlterIsrs([proposal]))
            case ev.SendResign(entry):
                self.world.count("resignations")
                self._ask("resign", Resign(self.id, self.node.broker_epoch, [entry]))
            case ev.SendReport(report):
                self._ask("report", Report(self.id, self.node.broker_epoch, [report]))
            case _:
                raise AssertionError(f"unknown effect {effect!r}")

    # -- replication -------------------------------------------------------------------------------

    def _send_to_primary(self, to: int, kind: str, message: Any) -> None:
        session = self.peers.get(to)
        if session is None:
            if to != NO_BROKER:
                self._reach(to)
            return
        self.fetches_sent += 1
        self._send(session, (kind, self.fetches_sent, self.id, self.node.broker_epoch, message))

    def _send_data(self, key: Key, hosted: Hosted, effect: ev.SendData) -> None:
        session = self.world.network.sessions.get(effect.session)
        if session is None or not session.up[session.side(self)]:
            return
        payload = []
        for log in (RECORDS, STATE):
            read = effect.reads[log]
            data, headers = hosted.files.read(log, *read) if read is not None else (b"", [])
            payload.append(ev.LogBatches(data, headers))
        self._send(session, ("data", self.id, effect.data, (payload[0], payload[1])))

    # -- disk --------------------------------------------------------------------------------------

    def _flush(self, key: Key, hosted: Hosted, log: int) -> None:
        state = hosted.flushing[log]
        if state.running:
            state.again = True
            return
        state.running, state.again = True, False
        state.end = self.world.copies(self, key)[log].end
        engine, weather = self.world.engine, self.world.weather
        delay_us = int(weather.flush_us * (0.3 + engine.rng.random()))
        if not self.world.calm and (self.slow_disk or engine.chance(weather.slow_flush)):
            delay_us += int(engine.rng.random() * weather.slow_flush_us)
        self.host.deliver_after(delay_us, self._flush_ended, key, hosted, log)

    def _flush_ended(self, key: Key, hosted: Hosted, log: int) -> None:
        state = hosted.flushing[log]
        state.running = False
        if self.parts.get(key) is not hosted:
            return
        if self.sync_error:
            self.world.count("sync errors")
            self.part_event(key, ev.StorageFailed(log, "fdatasync: Input/output error"))
            return
        end = state.end
        self._synced(hosted, log, end)
        if state.again:
            self._flush(key, hosted, log)
        if self.now_ms() - hosted.marked_ms >= 1_000:
            hosted.marked_ms = self.now_ms()
            hosted.files.checkpoint(hosted.core.high_watermark)
        self.part_event(key, ev.Flushed(log, end))

    def _synced(self, hosted: Hosted, log: int, end: int) -> None:
        hosted.files.sync(log, end)
        copy = self.world.copies(self, hosted.core.key)[log]
        copy.synced = max(copy.synced, min(end, copy.end))

    def disk_full(self, full: bool) -> None:
        if self.at_work:
            self.host.deliver(self.host.life, self.node_event, ev.NodeDiskFull(full))
