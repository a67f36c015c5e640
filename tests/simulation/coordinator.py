"""The coordinator of the simulation: the product's `CoordinatorCore` on a store that survives its crashes.

The driver commits decisions in order, some time after they were taken, and carries out the effects of a decision only
when it is durable. A crash may fall before the commit, between commit and effects, and between two effects.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ferryline.protocol.messages import AlterIsrs, AlterIsrsAnswer, Heartbeat, Register, Report, Resign
from ferryline.protocol.metadata import MetadataRequest
from ferryline_coordinator.core import events as ce
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.coordinator import CoordinatorCore
from ferryline_coordinator.core.records import encode_record, record_key
from tests.simulation.engine import MS
from tests.simulation.hosts import Alarm, Host
from tests.simulation.network import Session

if TYPE_CHECKING:
    from tests.simulation.world import World


class Store:
    """What `MetaStore` promises: a commit is whole and durable, and fails for whoever is not the last to campaign."""

    def __init__(self) -> None:
        self.epoch = 0
        self.rows: dict[str, bytes] = {}
        self.commits = 0

    def campaign(self) -> int:
        self.epoch += 1
        return self.epoch

    def commit(self, epoch: int, puts: dict[str, bytes], deletes: tuple[str, ...]) -> str:
        """ "ok" or "lost"."""
        if epoch != self.epoch:
            return "lost"
        for key in deletes:
            self.rows.pop(key, None)
        self.rows.update(puts)
        self.commits += 1
        return "ok"


class Coordinator:
    """One coordinator process at a time; a paused one may come back as a zombie beside its successor."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.host = Host(world.engine, name, world.drift())
        self.store = world.store
        self.core: CoordinatorCore
        self.steps_to_death = -1
        self.probes_lie_until_us = 0
        self._clear()

    def _clear(self) -> None:
        self.brokers: dict[int, int] = {}  # session -> broker id
        self.replies: dict[int, Callable[[Any, Any], None]] = {}
        self.reply = 0
        self.queue: deque[ce.Decision] = deque()
        self.committing = False

    def __repr__(self) -> str:
        return f"coordinator {self.host.name}"

    # -- lives -------------------------------------------------------------------------------------

    def start(self) -> None:
        world = self.world
        self._clear()
        self.steps_to_death = -1
        self.host.begin_life()
        self.epoch = self.store.campaign()
        world.checks.campaigned(self.epoch)
        self.core = CoordinatorCore(world.core_config)
        self.core.load(sorted(self.store.rows.items()), self.epoch, self.host.now_ms())
        self.alarm = Alarm(self.host, self.core.next_deadline_ms, lambda: self.event(ce.Tick()))
        world.engine.note(self.host.name, ("campaigned", self.epoch))
        if not self.store.rows:
            self.event(ce.Founded("c" * 32, b"k" * 32))
        self.alarm.arm()

    def die(self, why: str) -> None:
        if not self.host.alive:
            return
        self.world.engine.note(self.host.name, ("died", why))
        self.alarm.off = True
        self.world.network.host_died(self, silently=False)
        self.host.end_life()
        self._clear()

    # -- the core ----------------------------------------------------------------------------------

    def event(self, event: ce.Event) -> None:
        """The one way in."""
        if not self.host.alive:
            return
        self.world.engine.note(self.host.name, event)
        decision = self.core.handle(event, self.host.now_ms())
        if isinstance(event, ce.AlterIsrsReceived):
            self._note_vouchers(event, decision)
        self.core.apply(decision)
        if decision.durable or decision.effects:
            self.queue.append(decision)
            self._work()
        if self.host.alive:
            self.alarm.arm()

    def _note_vouchers(self, event: ce.AlterIsrsReceived, decision: ce.Decision) -> None:
        """Accepted proposals say which life of each member its primary has seen complete."""
        for effect in decision.effects:
            if isinstance(effect, ce.Reply) and isinstance(effect.message, AlterIsrsAnswer):
                for proposal, result in zip(event.message.proposals, effect.message.results, strict=True):
                    if result.accepted:
                        self.world.checks.vouched(proposal)

    def _work(self) -> None:
        """Effects that need no commit leave at once, unless an earlier decision is still on its way to the disk."""
        while self.queue and not self.committing and self.host.alive:
            if self.queue[0].durable:
                self.committing = True
                weather, engine = self.world.weather, self.world.engine
                delay_us = int(weather.flush_us * (0.3 + engine.rng.random()))
                if not self.world.calm and engine.chance(weather.slow_flush):
                    self.world.count("slow commits")
                    delay_us += int(engine.rng.random() * min(weather.slow_flush_us, 500_000))
                self.host.deliver_after(delay_us, self._commit)
                return
            self._carry_out(self.queue.popleft())

    def _commit(self) -> None:
        """Everything that is due and waited for the same disk write, in one commit."""
        self.committing = False
        decisions: list[ce.Decision] = []
        while self.queue:
            decisions.append(self.queue.popleft())
        if self._dies_now():
            return
        puts: dict[str, Any] = {}
        deletes: dict[str, None] = {}
        for decision in decisions:
            for key in decision.deletes:
                puts.pop(key, None)
                deletes[key] = None
            for record in decision.puts:
                puts[record_key(record)] = record
                deletes.pop(record_key(record), None)
        encoded = {key: encode_record(record) for key, record in puts.items()}
        world = self.world
        fate = "ok" if world.calm or not world.engine.chance(world.weather.unknown) else self._unknown()
        outcome = self.store.commit(self.epoch, encoded, tuple(deletes)) if fate != "not written" else "unknown"
        self.world.engine.note(self.host.name, ("commit", outcome, sorted(puts)))
        if outcome == "lost":
            self.world.count("commits of zombies refused")
            self.die("another coordinator took over")
            return
        if outcome == "ok":
            world.checks.committed(decisions)
        if fate != "ok":
            self._begin_again()
            return
        for decision in decisions:
            self._carry_out(decision)
        self._work()

    def _unknown(self) -> str:
        """The connection to the store broke in the middle: the commit was written, or not, and nobody can tell."""
        self.world.count("failed commits, of unknown outcome")
        return self.world.engine.pick(["written", "not written"])

    def _begin_again(self) -> None:
        """What was decided since the last sure commit has left nobody's hands here: campaign, load, begin anew."""
        self.die("a commit of unknown outcome")
        if self is self.world.coordinator:
            self.start()

    def _dies_now(self) -> bool:
        if self.steps_to_death < 0:
            return False
        self.steps_to_death -= 1
        if self.steps_to_death >= 0:
            return False
        self.world.faults.kill_coordinator(self)
        return True

    def _carry_out(self, decision: ce.Decision) -> None:
        for effect in decision.effects:
            if not self.host.alive or self._dies_now():
                return
            match effect:
                case ce.Reply(reply, message):
                    self._answer(reply, message, None)
                case ce.Refuse(reply, error):
                    self.world.count(f"coordinator refused {error.code}")
                    self._answer(reply, None, error)
                case ce.Tell(broker_id, kind, message):
                    self._tell(broker_id, kind, message)
                case ce.Probe():
                    self._probe(effect)
                case ce.Note(name, fields, _):
                    self.world.count(f"note {name}")
                    self.world.engine.note(self.host.name, (name, sorted(fields.items())))
                case ce.Recampaign(coord_epoch):
                    self.store.epoch = max(self.store.epoch, coord_epoch - 1)
                    self.die("recampaign")
                    return
                case _:
                    raise AssertionError(f"unknown effect {effect!r}")

    def _answer(self, reply: int, message: Any, error: Any) -> None:
        callback = self.replies.pop(reply, None)
        assert callback is not None, f"reply {reply} is unknown or answered twice: {message!r} {error!r}"
        callback(message, error)

    def _tell(self, broker_id: int, kind: int, message: Any) -> None:
        numbers = [number for number, broker in self.brokers.items() if broker == broker_id]
        session = self.world.network.sessions.get(max(numbers, default=0))
        if session is not None:
            self.world.network.send(session, self, ("tell", kind, message))

    def _probe(self, probe: ce.Probe) -> None:
        world = self.world
        broker = world.broker_by_id(probe.broker_id)
        delay_us = 2 * world.network.delay_us()
        lied = world.ambushes.lies_about(probe.broker_id)
        alive = (
            broker is not None
            and broker.host.alive
            and not broker.host.paused
            and world.network.reachable(self.host, broker.host)
            and world.engine.now_us >= self.probes_lie_until_us
            and not lied
        )
        late = delay_us > probe.timeout_ms * MS
        if not alive and not lied and broker is not None and broker.host.alive:
            delay_us = probe.timeout_ms * MS  # nobody refuses: the connection hangs
        event = ce.ProbeEnded(probe.probe, probe.broker_id, alive and not late)
        self.host.deliver_after(min(delay_us, probe.timeout_ms * MS), self.event, event)

    def expect(self, callback: Callable[[Any, Any], None]) -> int:
        """A handle for one answer of the core."""
        self.reply += 1
        self.replies[self.reply] = callback
        return self.reply

    # -- sessions ----------------------------------------------------------------------------------

    def session_opened(self, session: Session) -> None:
        broker_id = getattr(session.peer(self), "id", None)
        if broker_id:
            self.brokers[session.id] = broker_id
            self.event(ce.SessionOpened(session.id, broker_id))

    def session_ended(self, session: Session) -> None:
        broker_id = self.brokers.pop(session.id, None)
        if broker_id is not None:
            self.event(ce.SessionClosed(session.id, broker_id))

    def frame_received(self, session: Session, frame: Any) -> None:
        kind, number = frame[0], frame[1]

        def to_broker(message: Any, error: Any) -> None:
            self.world.network.send(session, self, ("answer", number, message, error))

        if kind == "request":
            self._request(session, self.expect(to_broker), frame[3])
            return

        def to_client(message: Any, error: Any) -> None:
            name = "cluster" if kind == "metadata" else "group"
            self.world.network.send(session, self, (name, number, message, error))

        if kind == "metadata":
            self.event(ce.MetadataAsked(self.expect(to_client), MetadataRequest()))
        else:
            self.event(ce.GroupHeartbeatReceived(self.expect(to_client), frame[2]))

    def _request(self, session: Session, reply: int, message: Any) -> None:
        match message:
            case Register():
                self.event(ce.RegisterReceived(reply, session.id, message))
            case Heartbeat():
                self.event(ce.HeartbeatReceived(reply, session.id, message))
            case AlterIsrs():
                self.event(ce.AlterIsrsReceived(reply, session.id, message))
            case Resign():
                self.event(ce.ResignReceived(reply, session.id, message))
            case Report():
                self.event(ce.ReportReceived(reply, session.id, message))
            case MetadataRequest():
                self.event(ce.MetadataAsked(reply, message, self.brokers.get(session.id, 0)))
            case ce.BrokerAdmitted():
                self.event(ce.BrokerAdmitted(reply, message.storage_id, message.internal, message.external))
            case _:
                raise AssertionError(f"unknown request {message!r}")


def config_of(fence_ms: int) -> CoreConfig:
    return CoreConfig(
        fence_ms=fence_ms,
        probe_ms=300,
        replacement_ms=6_000,
        balance_ms=500,
        preferred_ms=2_000,
        handover_retry_ms=1_000,
    )


__all__ = ["Coordinator", "Store", "config_of"]
