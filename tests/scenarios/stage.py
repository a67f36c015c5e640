"""A cluster without weather, moved by hand: what the commands of a scenario do.

The same world, cores, disks and checks as in the simulation, but no random faults: sessions are ordered, delays are
short, and nothing happens that a command did not ask for. Every invariant is checked at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ferryline.protocol.errors import ErrorInfo
from ferryline.protocol.messages import RECORDS, AlterIsrsAnswer
from ferryline.protocol.metadata import NO_BROKER
from ferryline.protocol.records import encode_batch
from ferryline_broker.core import events as ev
from ferryline_broker.core.events import Key
from ferryline_coordinator.core import events as ce
from ferryline_coordinator.core.config import CoreConfig
from tests.simulation.broker import Broker
from tests.simulation.clients import Client
from tests.simulation.engine import MS
from tests.simulation.history import FAIL, INFO, OK, Send
from tests.simulation.settings import Config, Weather
from tests.simulation.world import TOPIC, World

PRODUCE_TIMEOUT_MS = 1_000
ANSWER_MS = 20_000  # longest wait for an answer


def quiet_weather(brokers: int) -> Weather:
    return Weather(
        brokers=brokers,
        partitions=1,
        producers=0,
        members=0,
        produce_gap_ms=1_000,
        duration_ms=0,
        ordered={"replica": True, "coordinator": True},
        loss=0.0,
        double=0.0,
        session_loss=0.0,
        delay_us=500,
        slow=0.0,
        slow_us=0,
        late_us=0,
        session_patience_ms=1_500,
        drift=0.0,
        flush_us=500,
        slow_flush=0.0,
        slow_flush_us=0,
        real_log=True,
        holes=False,
        lag_max_ms=10_000,
        fence_ms=3_000,
        handover_ms=300,
        fetch_wait_ms=5_000,
        metadata_wait_ms=30_000,
        snapshot_bytes=1 << 20,
        ambush=0.0,
        fault_gap_ms=1_000,
        fault_ms=1_000,
        weights={},
    )


class Teller(Client):
    """A client that sends one record once, without retries, and says what it heard."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "teller")
        self.heard: dict[str, str] = {}
        self.order = 0

    def produce(self, broker: Broker, key: Key, value: str) -> None:
        self.order += 1
        send = Send("teller", self.order, key, value.encode(), self.engine.now_us)
        self.world.history.send(send)
        data = encode_batch([(None, value.encode(), [])])
        self.ask(broker, "produce", key, 1, data, PRODUCE_TIMEOUT_MS, context=send)

    def answered(self, context: Any, frame: Any) -> None:
        _, _, offset, _epoch, error = frame
        self._settle(context, offset, error)

    def unanswered(self, context: Any, *, sent: bool) -> None:
        if isinstance(context, Send):
            code = "CONNECTION_LOST" if sent else "CONNECTION_FAILED"
            self._settle(context, -1, ErrorInfo(code, "", True, not sent))

    def _settle(self, send: Send, offset: int, error: ErrorInfo | None) -> None:
        send.ended_us = self.engine.now_us
        if error is None:
            send.outcome, send.offset = OK, offset
            text = f"acknowledged at {offset}"
        elif error.definite:
            send.outcome = FAIL
            text = f"refused: {error.code}"
        else:
            send.outcome = INFO
            text = f"outcome unknown: {error.code}"
        self.heard[send.value.decode()] = text


class Stage:
    """Commands of scenarios; each returns the text that it prints."""

    def __init__(self, config: Config, brokers: int) -> None:
        self.world = World(config, 1, weather=quiet_weather(brokers), core_config=CoreConfig())
        self.config = config
        self.teller = Teller(self.world)
        self.held: list[tuple[Any, Any, Any]] = []
        self.holding = ""  # host whose proposals are held back
        self.cut_after_answer = ""  # host that hears nothing of the coordinator once a proposal of it was answered
        self.alter_answers: list[str] = []
        world = self.world
        self._network_send = world.network.send
        world.network.send = self._send  # type: ignore[method-assign]
        world.coordinator.start()
        for number in range(brokers):  # one after the other, so that broker n gets number n
            world.add_broker().start()
            self._until(lambda number=number: self._serving(number), 5_000)
        world._create_topic()
        self._until(lambda: bool(world.checks.parts), 5_000)
        self.wait("1s")

    # -- time --------------------------------------------------------------------------------------

    def _until(self, done: Callable[[], bool], limit_ms: int) -> bool:
        engine = self.world.engine
        return done() or engine.run_until(engine.now_us + limit_ms * MS, done)

    def _serving(self, number: int) -> bool:
        broker = self.world.brokers[number]
        record = self.world.checks.brokers.get(broker.id)
        return record is not None and not record.meta.fenced

    def wait(self, text: str) -> str:
        seconds = float(text.removesuffix("s"))
        self.world.engine.run_until(self.world.engine.now_us + int(seconds * 1000) * MS)
        return ""

    # -- who ---------------------------------------------------------------------------------------

    def broker(self, name: str) -> Broker:
        broker = self.world.broker_by_id(int(name))
        if broker is None:
            raise ValueError(f"there is no broker {name}")
        return broker

    def host(self, name: str) -> str:
        return self.world.coordinator.host.name if name == "coordinator" else self.broker(name).host.name

    @property
    def key(self) -> Key:
        return next(iter(self.world.checks.parts))

    # -- clients -----------------------------------------------------------------------------------

    def produce(self, values: list[str], to: str = "", *, wait: bool = True) -> str:
        part = self.world.checks.parts[self.key].meta
        target = self.world.broker_by_id(int(to) if to else part.primary)
        if target is None:
            return "nobody leads the partition"
        for value in values:
            self.teller.produce(target, self.key, value)
        if wait:
            self._until(lambda: all(value in self.teller.heard for value in values), ANSWER_MS)
        return self.heard(values)

    def heard(self, values: list[str]) -> str:
        """What became of records whose answer was not there yet."""
        return "\n".join(f"{value}: {self.teller.heard.get(value, 'no answer yet')}" for value in values)

    def read(self, name: str) -> str:
        """Every record on the broker's disk: offset, epoch, value; committed ones before the bar."""
        broker = self.broker(name)
        hosted = broker.parts.get(self.key)
        if hosted is None:
            return "no replica here"
        core, world = hosted.core, self.world
        found = []
        span = hosted.core.log_start[RECORDS], hosted.core.log_end[RECORDS]
        values = {offset: value for offset, value in world.read_all(broker, self.key, *span)}
        for base, after, epoch, _crc in hosted.files.stored(RECORDS):
            if base == core.high_watermark[RECORDS]:
                found.append("|")
            text = " ".join(values[o].decode() for o in range(base, after) if o in values) or "(epoch starts)"
            found.append(f"{base}@{epoch} {text}")
        return "\n".join(found) or "empty"

    # -- processes and disks -----------------------------------------------------------------------

    def kill(self, name: str) -> str:
        if name == "coordinator":
            self.world.coordinator.die("kill -9")
        else:
            self.broker(name).die("kill -9")
        return ""

    def power_cut(self, names: list[str]) -> str:
        """Nothing that was not synced survives."""
        brokers = [self.broker(name) for name in names]
        for broker in brokers:
            broker.die("power cut", power=True)
        for broker in brokers:
            broker.disk.lose_unsynced()
            self.world.checks.disk_changed(broker, lossy=self.config.flush != "fsync")
        return ""

    def start(self, name: str) -> str:
        if name == "coordinator":
            self.world.coordinator.start()
        else:
            self.broker(name).start()
        return ""

    def stop(self, name: str) -> str:
        self.broker(name).node_event(ev.StopAsked())
        return ""

    def pause(self, name: str) -> str:
        self.broker(name).host.pause()
        return ""

    def resume(self, name: str) -> str:
        self.broker(name).host.resume()
        return ""

    def exchange_disk(self, name: str) -> str:
        """The broker comes back under its number with another, empty disk."""
        broker = self.broker(name)
        broker.die("disk exchanged", power=True)
        self.world.replace_disk(broker, same_id=True)
        return ""

    # -- network -----------------------------------------------------------------------------------

    def cut(self, source: str, target: str, *, both: bool) -> str:
        pairs = [(self.host(source), self.host(target))]
        if both:
            pairs.append((pairs[0][1], pairs[0][0]))
        for pair in pairs:
            self.world.network.cut(*pair)
        return ""

    def heal(self) -> str:
        self.world.network.heal_all()
        return ""

    def _send(self, session: Any, sender: Any, frame: Any) -> None:
        """Every frame passes here, so that a story can stop some of them."""
        if frame[0] == "request" and frame[2] == "alter" and sender.host.name == self.holding:
            self.held.append((session, sender, frame))
            return
        if frame[0] == "answer" and isinstance(frame[2], AlterIsrsAnswer):
            self.alter_answers += [result.error or "accepted" for result in frame[2].results]
            target = session.peer(sender).host.name
            if target == self.cut_after_answer:
                self.world.network.cut(sender.host.name, target)
                self.cut_after_answer = ""
        self._network_send(session, sender, frame)

    def hold_proposals(self, name: str) -> str:
        """What this broker proposes about in-sync sets stays on its way until `release`."""
        self.holding = self.host(name)
        return ""

    def release(self) -> str:
        """The held proposals go on; prints what the coordinator answers."""
        self.holding = ""
        held, self.held = self.held, []
        self.alter_answers.clear()
        for session, sender, frame in held:
            self._network_send(session, sender, frame)
        self._until(lambda: len(self.alter_answers) >= len(held), 100)
        return "\n".join(f"proposal {number}: {answer}" for number, answer in enumerate(self.alter_answers, 1))

    def lose_answer(self, name: str) -> str:
        """The next proposal of this broker is answered, but neither the answer nor anything after it arrives."""
        self.cut_after_answer = self.host(name)
        return ""

    # -- operators ---------------------------------------------------------------------------------

    def recover(self, *, accept_data_loss: bool) -> str:
        answers: list[str] = []

        def done(message: Any, error: ErrorInfo | None) -> None:
            answers.append(f"refused: {error.code}" if error else f"primary {message.primary} epoch {message.epoch}")

        self.world.command(lambda reply: ce.RecoveryAsked(reply, TOPIC, self.key[1], accept_data_loss), done)
        self._until(lambda: bool(answers), 2_000)
        return answers[0] if answers else "no answer"

    # -- looking -----------------------------------------------------------------------------------

    def state(self) -> str:
        part = self.world.checks.parts[self.key].meta
        names = lambda ids: ",".join(map(str, sorted(ids))) or "-"  # noqa: E731
        leader = part.primary if part.primary != NO_BROKER else "nobody"
        lines = [f"record: primary {leader} epoch {part.epoch} isr {names(part.isr)} elr {names(part.elr)}"]
        if part.last_known_elr:
            lines[0] += f" last known {names(part.last_known_elr)}"
        if part.recovery_epoch:
            lines[0] += f" recovered in epoch {part.recovery_epoch}"
        lines += [self._state_of(broker) for broker in self.world.brokers]
        return "\n".join(lines)

    def _state_of(self, broker: Broker) -> str:
        record = self.world.checks.brokers.get(broker.id)
        notes = ["fenced"] if record is None or record.meta.fenced else []
        if not broker.host.alive:
            return f"broker {broker.id}: down" + "".join(f", {note}" for note in notes)
        if broker.host.paused:
            notes.append("paused")
        hosted = broker.parts.get(self.key)
        if hosted is None:
            return f"broker {broker.id}: no replica" + "".join(f", {note}" for note in notes)
        core = hosted.core
        notes.append(f"{core.role} epoch {core.epoch}" + (f" counts {','.join(map(str, sorted(core.maximal_isr)))}"
                                                         if core.maximal_isr else ""))  # fmt: skip
        notes.append(f"log ends at {core.log_end[RECORDS]}, committed to {core.high_watermark[RECORDS]}")
        return f"broker {broker.id}: " + ", ".join(notes)
