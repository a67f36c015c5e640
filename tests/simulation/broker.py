"""A broker of the simulation: the product's `NodeCore`, with this file as its driver and shell, and its `Replicas`.

It carries out effects in order, as `core/events.py` demands, and decides nothing about the protocol.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from ferryline.protocol.errors import StorageFailed, StorageFull
from ferryline.protocol.frames import Kind
from ferryline.protocol.messages import Handover, ReplicaData, ReplicaReport, Report
from ferryline.protocol.metadata import MetadataAnswer
from ferryline_broker.core import events as ev
from ferryline_broker.core.events import Key
from ferryline_broker.core.node import NodeConfig, NodeCore, NodeIdentity
from ferryline_broker.log.memory import SimulatedStop
from ferryline_coordinator.core.events import Admitted, BrokerAdmitted
from tests.simulation.clients import is_rotten
from tests.simulation.engine import MS
from tests.simulation.ghost import Violation
from tests.simulation.hosts import Alarm, Host
from tests.simulation.network import Session
from tests.simulation.replicas import Hosted, Replicas
from tests.simulation.serving import Serving
from tests.simulation.upkeep import Upkeep

if TYPE_CHECKING:
    from tests.simulation.world import World


class Broker:
    """One broker over all its process lives. ``number`` is its place in the simulation; the cluster calls it `id`."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.host = Host(world.engine, f"b{number}", world.drift())
        self.disk = world.make_disk(number)
        self.disk.host = self.host
        self.url = f"https://b{number}:9443"
        self.wanted = True  # restarted whenever it is down
        self.stopping = False
        self.leaving = False  # by itself, for its disk: started again as soon as it has ended
        self.steps_to_death = -1  # effects until kill -9; -1: none planned
        self.slow_disk = False
        self.node: NodeCore
        self.replicas = Replicas(self)
        self.serving = Serving(self)
        self._clear()

    def _clear(self) -> None:
        self.replicas = Replicas(self)
        self.joined = False
        self.coordinator: Session | None = None
        self.coordinator_due = False
        self.peers: dict[int, Session] = {}  # sessions that we opened, by broker id
        self.peers_due: set[int] = set()
        self.accepted: dict[int, int] = {}  # session id -> broker id of the opener
        self.pending: dict[int, tuple[str, Any]] = {}  # requests at the coordinator
        self.correlation = 0
        self.fetch_order: dict[tuple[int, Key], int] = {}  # newest fetch taken in, per session and partition
        self.claim_key = b""

    @property
    def parts(self) -> dict[Key, Hosted]:
        return self.replicas.hosted

    @property
    def id(self) -> int:
        return self.disk.broker_id

    @property
    def at_work(self) -> bool:
        return self.host.alive and self.joined

    def __repr__(self) -> str:
        return f"broker {self.number} (id {self.id})"

    # -- lives -------------------------------------------------------------------------------------

    def start(self) -> None:
        world, disk = self.world, self.disk
        self._clear()
        self.serving.clear()
        self.stopping = self.leaving = False
        self.steps_to_death = -1
        self.host.begin_life()
        try:
            self.restart = disk.start()
            world.checks.broker_started(self, self.restart)
            states = {key: self.replicas.open(key, quarantine=False) for key in disk.keys()}  # noqa: SIM118 - a disk is no dict
        except (StorageFailed, StorageFull, SimulatedStop) as error:
            world.count("died while starting")
            world.faults.died_starting(self, repr(error))
            return
        Upkeep(self).start()
        self._log("started", self.restart, disk.incarnation, disk.broker_id)
        if disk.broker_id:
            self._become_node(states)
        self._connect()
        world.ambushes.started(self, self.restart)

    def _become_node(self, states: dict[Key, str]) -> None:
        """From here on this process has a number in the cluster."""
        weather, disk = self.world.weather, self.disk
        identity = NodeIdentity(
            disk.broker_id,
            disk.storage_id,
            disk.incarnation,
            self.restart,
            self.url,
            self.url,
            disk.seen_coord_epoch,
            disk.cluster_id,
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
        self.disk.process_died()
        self.replicas.stop()
        if self.joined:
            self.node_alarm.off = True
        self._clear()

    def dies_now(self) -> bool:
        """Called before each effect: a kill -9 may be planned between two of them."""
        if self.steps_to_death < 0:
            return False
        self.steps_to_death -= 1
        if self.steps_to_death >= 0:
            return False
        self.world.faults.kill_now(self)
        return True

    def leave_after_failed_sync(self) -> None:
        """Rule L10: what a failed fsync has lost nobody knows, so this process ends."""
        self.host.deliver_after(self.world.engine.between(0, 20) * MS, self.world.faults.died_of_disk, self)

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

    def reach(self, peer: int) -> None:
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
            self.reach(peer)

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
                    self.ask("join", BrokerAdmitted(0, self.disk.storage_id, self.url, self.url))
            return
        if session.side(self) == 0:
            self.peers_due.discard(peer.id)
            self.peers[peer.id] = session
            self.replicas.tell_all(ev.PeerUp(peer.id))
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
                self.replicas.tell_all(ev.PeerDown(peer))
                self.host.deliver_after(self.world.engine.between(20, 200) * MS, self._reach_again, peer)
        peer = self.accepted.pop(session.id, 0)
        if peer:
            self.replicas.tell_all(ev.PeerDown(peer))
        self.serving.session_ended(session)

    # -- frames ------------------------------------------------------------------------------------

    def frame_received(self, session: Session, frame: Any) -> None:
        kind = frame[0]
        if kind == "fetch":
            _, order, sender, sender_epoch, fetch = frame
            key = (fetch.topic_id, fetch.partition)
            self.fetch_order[session.id, key] = max(order, self.fetch_order.get((session.id, key), 0))
            if key in self.parts:
                self.replicas.feed(key, ev.FetchReceived(session.id, sender, sender_epoch, fetch))
            else:
                data = ReplicaData(*key, fetch.epoch, fetch.fetch_id, None, "UNKNOWN_PARTITION")
                self.send(session, ("data", self.id, data, (None, None)))
        elif kind == "progress":
            _, order, sender, sender_epoch, progress = frame
            key = (progress.topic_id, progress.partition)
            # Progress and fetches of a session are processed in order: what a fetch overtook is dropped.
            if key in self.parts and order > self.fetch_order.get((session.id, key), 0):
                self.replicas.feed(key, ev.ProgressReceived(session.id, sender, sender_epoch, progress))
        elif kind == "data":
            _, sender, data, payload = frame
            key = (data.topic_id, data.partition)
            if key in self.parts:
                batches = [batch for batch in payload if batch is not None and batch.headers]
                if self.world.rotted and any(
                    is_rotten(b.data, at, header) for b in batches for at, header in b.headers
                ):
                    self.world.count("rotten batches refused by secondaries")
                    self.replicas.feed(key, ev.DataCorrupt(sender, data.epoch, data.fetch_id))
                else:
                    self.replicas.feed(key, ev.DataReceived(sender, data, payload))
        elif kind == "answer":
            self._answered(session, frame)
        elif kind == "tell":
            self._told(frame[1], frame[2])
        elif self.joined:
            self.serving.frame_received(session, frame)
        else:
            self.world.network.end(session, by=self)  # before it has joined nobody serves clients at its address

    def send(self, session: Session, frame: Any) -> None:
        self.world.network.send(session, self, frame)

    # -- the coordinator ---------------------------------------------------------------------------

    def ask(self, name: str, message: Any, context: Any = None, timeout_ms: int = 2_500) -> None:
        """A request to the coordinator; its outcome goes to `_answered` or `_unanswered`, once."""
        if self.coordinator is None:
            self._unanswered(name, context)
            return
        self.correlation += 1
        number = self.correlation
        self.pending[number] = (name, context)
        self.send(self.coordinator, ("request", number, name, message))
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
        name, _ = self.pending.pop(number, ("", None))
        if not name:
            asked = sum(name == "metadata" for name, _ in self.pending.values())
            if isinstance(result, MetadataAnswer) and asked < 2:  # it came twice, or after its time: harmless
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
                    self.replicas.feed(key, ev.AlterIsrAnswered(answer))

    def _joined(self, admitted: Admitted | None) -> None:
        """The number and the certificate are stored; the session begins anew under that name."""
        if admitted is not None and not self.joined:
            self.disk.join(admitted.broker_id, admitted.cluster_id)
            self.world.joined(self)
            self._become_node({})
        self._reset_coordinator_session()

    def _told(self, kind: int, message: Any) -> None:
        if kind == Kind.HANDOVER and isinstance(message, Handover):
            self._hand_over(message)
        elif kind == Kind.REPORT:
            self.ask("report", Report(self.id, self.node.broker_epoch, self._reports()))

    def _reports(self) -> list[ReplicaReport]:
        return [hosted.core.report() for _, hosted in sorted(self.parts.items())]

    def _hand_over(self, message: Handover) -> None:
        for entry in message.entries:
            hosted = self.parts.get((entry.topic_id, entry.partition))
            if hosted is not None and hosted.core.role == "primary" and hosted.core.epoch == entry.epoch:
                self.replicas.feed((entry.topic_id, entry.partition), ev.HandOverAsked())

    # -- the node core -----------------------------------------------------------------------------

    def node_event(self, event: ev.Event) -> None:
        if not self.host.alive:
            return
        self.world.engine.note(self.host.name, event.story())
        seen = self.node.coord_epoch
        effects = self.node.handle(event, self.now_ms())
        answer = getattr(event, "answer", None)
        if answer is not None and answer.coord_epoch < seen:
            self.world.count("answers of replaced coordinators")
            if any(not isinstance(effect, ev.ResetCoordinatorSession) for effect in effects):
                raise Violation("D1.11 no replaced coordinator is heeded", f"{self} knew {seen}: {event} -> {effects}")
        try:
            self._carry_out_node(effects)
        except SimulatedStop:
            self.world.faults.kill_now(self)
        except (StorageFailed, StorageFull) as error:
            self.world.faults.died_of_disk(self, str(error))
        if self.host.alive:
            self.node_alarm.arm()

    def _carry_out_node(self, effects: list[ev.Effect]) -> None:
        queue = deque(effects)
        while queue and self.host.alive:
            effect = queue.popleft()
            if self.dies_now():
                return
            match effect:
                case ev.SendRegister(register):
                    self.ask("register", replace(register, replicas=self._reports()), timeout_ms=60_000)
                case ev.SendHeartbeat(heartbeat):
                    self.ask("heartbeat", heartbeat)
                case ev.RequestMetadata(request):
                    self.ask("metadata", request, timeout_ms=request.wait_ms + 2_000)
                case ev.ConfirmRegistered(_, _, coord_epoch, claim_key):
                    self.disk.confirmed()
                    self._persist_coord_epoch(coord_epoch)
                    self.claim_key = claim_key
                    self.world.checks.broker_registered(self)
                case ev.PersistCoordEpoch(coord_epoch):
                    self._persist_coord_epoch(coord_epoch)
                case ev.OpenReplica(key, _flush, quarantine):
                    state = self.replicas.open(key, quarantine=quarantine)
                    queue.extendleft(reversed(self.node.handle(ev.ReplicaOpened(key, state), self.now_ms())))
                case ev.DeleteReplica(key):
                    self.replicas.drop(key)
                case ev.TellReplica(key, event):
                    if key in self.parts:
                        self.replicas.feed(key, event)
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
        if coord_epoch < self.disk.seen_coord_epoch:
            raise Violation("D1.11 coordinator epoch rises", f"{self}: {self.disk.seen_coord_epoch} -> {coord_epoch}")
        self.disk.persist_coord_epoch(coord_epoch)

    def _reset_coordinator_session(self) -> None:
        session, self.coordinator = self.coordinator, None
        self.pending.clear()
        if session is not None:
            self.world.network.end(session, by=self)
            self.host.deliver_after(self.world.engine.between(20, 200) * MS, self._connect)

    def leave_in_order(self) -> None:
        """Hand over what can be handed over, end without the mark of a clean stop, and be started again."""
        if not self.leaving and self.at_work:
            self.leaving = True
            self.world.count("left for their disks")
            self.host.deliver(self.host.life, self.node_event, ev.StopAsked())

    def _stop_now(self, clean: bool, reason: str) -> None:
        if self.leaving:
            self.die(f"left: {reason}")
            self.world.faults.start_again(self)
            return
        if clean:
            kept = {key: hosted.core for key, hosted in self.parts.items() if hosted.core.role != "stopped"}
            self.disk.stop_cleanly({key: core.high_watermark for key, core in kept.items()})
            for key in kept:
                for copy in self.world.copies(self, key):
                    copy.synced = copy.end
        self.world.count("stopped cleanly" if clean else "stopped uncleanly")
        self.die(f"stopped: {reason}")

    def disk_full(self, full: bool) -> None:
        if self.at_work:
            self.host.deliver(self.host.life, self.node_event, ev.NodeDiskFull(ev.DiskFull(full)))
