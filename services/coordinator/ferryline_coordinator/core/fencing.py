"""When a broker is taken for dead (rule C3 and the fast path of section 8).

A *suspect* is a broker that will be fenced: silent for fence_ms, gone (its session ended and it does not answer),
registering anew, or stopping. Before that, whoever shares an in-sync set with it is probed, and those that do not
answer are fenced with it as one set; otherwise, of two replicas that died together, only the one that was fenced last
would stay a candidate. The rest of the in-sync sets of those is probed in turn.

All of this is soft state: after a restart every broker is given a full fence_ms again.
"""

from __future__ import annotations

from typing import Protocol

from msgspec.structs import replace

from ferryline.protocol.metadata import NO_BROKER, PartitionMeta
from ferryline_coordinator.core.change import Change
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.elections import fence
from ferryline_coordinator.core.events import Probe, ProbeEnded, RegisterReceived

SILENT, GONE, REGISTERING, STOPPING = "silent", "gone", "registering", "stopping"
NOTES_MAX = 20  # elections of one decision that are told one by one
_FINAL = (REGISTERING, STOPPING)  # a sign of life does not lift these


class Registrar(Protocol):
    """Finishes a registration that waited for its fence."""

    def finish(self, change: Change, event: RegisterReceived) -> None: ...


class Fencing:
    """One round at a time; whoever becomes suspect while it runs joins it."""

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        self._probe_number = 0
        self._probes: dict[int, tuple[int, int]] = {}  # broker -> (probe number, deadline)
        self._verdicts: dict[int, bool] = {}  # broker -> answered in this round
        self._known_peers: tuple[tuple[int, tuple[int, ...]], frozenset[int]] = ((-1, ()), frozenset())
        self.doubted: set[int] = set()  # their session ended; their own probe decides
        self.suspects: dict[int, str] = {}
        self.registrations: dict[int, RegisterReceived] = {}  # waiting until their broker is fenced
        self.heard_ms: dict[int, int] = {}  # last sign of life of each broker
        self.gate: dict[int, int] = {}  # metadata revision a fenced broker must have applied to be unfenced

    # -- what may start a round ---------------------------------------------------------------------

    def session_closed(self, change: Change, broker_id: int) -> None:
        """The fast path: probe it, and at the same time whoever would have to be probed next."""
        if not change.unfenced(broker_id) or broker_id in self.suspects:
            return
        self.doubted.add(broker_id)
        if self._verdicts.get(broker_id):
            del self._verdicts[broker_id]  # that sign of life of it came before
        self._probe(change, broker_id, self._config.probe_ms)
        for peer in self._peers(change, {broker_id}):
            self._probe_peer(change, peer)

    def suspect(self, change: Change, broker_id: int, why: str) -> None:
        if self.suspects.get(broker_id) not in _FINAL:
            self.suspects[broker_id] = why
        self.doubted.discard(broker_id)

    def look_for_silence(self, change: Change) -> None:
        for broker in change.brokers():
            meta = broker.meta
            if not meta.fenced and meta.id not in self.suspects and change.now_ms >= self._silent_at(meta.id):
                self.suspect(change, meta.id, SILENT)

    # -- what ends doubts ---------------------------------------------------------------------------

    def heard(self, broker_id: int, now_ms: int) -> None:
        """A sign of life under the present registration."""
        self.heard_ms[broker_id] = now_ms
        self.doubted.discard(broker_id)
        if self.suspects.get(broker_id) in (SILENT, GONE):
            del self.suspects[broker_id]
        if self.active:
            self._verdicts[broker_id] = True
            self._probes.pop(broker_id, None)

    def everybody_heard(self, brokers: list[int], now_ms: int) -> None:
        """The coordinator itself was away: nobody can be blamed for the silence."""
        for broker_id in brokers:
            self.heard_ms[broker_id] = now_ms

    def probe_ended(self, event: ProbeEnded) -> None:
        if self._probes.get(event.broker_id, (0, 0))[0] == event.probe:
            self._judge(event.broker_id, event.alive)

    def probes_expired(self, now_ms: int) -> None:
        for broker_id in sorted(self._probes):
            if now_ms >= self._probes[broker_id][1]:
                self._judge(broker_id, False)

    def _judge(self, broker_id: int, alive: bool) -> None:
        self._probes.pop(broker_id, None)
        self._verdicts[broker_id] = alive
        if broker_id in self.doubted:
            self.doubted.discard(broker_id)
            if not alive:
                self.suspects[broker_id] = GONE

    # -- the round ----------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        return bool(self.suspects or self.doubted)

    def advance(self, change: Change, registrar: Registrar) -> None:
        """Ask whom must be asked; when nobody is left to ask, fence the whole set and let registrations go on."""
        if not self.suspects:
            if not self.doubted:
                self._end_round()
            return
        gone = set(self.suspects)
        while True:
            peers = self._peers(change, gone)
            dead = {peer for peer in peers if self._verdicts.get(peer) is False}
            if not dead:
                break
            gone |= dead
        unasked = [peer for peer in sorted(peers) if peer not in self._verdicts]
        for peer in unasked:
            self._probe_peer(change, peer)
        if unasked:
            return
        reasons = {broker_id: self.suspects.get(broker_id, GONE) for broker_id in sorted(gone)}
        waiting = [self.registrations.pop(b) for b in sorted(gone) if b in self.registrations]
        self.suspects.clear()
        fence_brokers(change, reasons)
        for broker_id in reasons:
            self.doubted.discard(broker_id)
        for event in waiting:
            registrar.finish(change, event)
        for broker_id in reasons:
            self.gate[broker_id] = change.next_revision()
        if not self.doubted:
            self._end_round()

    def _end_round(self) -> None:
        self._probes.clear()
        self._verdicts.clear()

    def _peers(self, change: Change, gone: set[int]) -> set[int]:
        """Who shares an in-sync set with one of them and is not one of them."""
        about = (change.state.revision, tuple(sorted(gone)))
        if self._known_peers[0] != about or change.writes_parts:  # a round asks again with every answer
            peers: set[int] = set()
            for broker_id in sorted(gone):
                for key in change.state.held.get(broker_id, ()):
                    record = change.part(key)
                    if record is not None and broker_id in record.meta.isr:
                        peers.update(record.meta.isr)
            if change.writes_parts:
                about = (-1, ())  # not what the next decision will see
            self._known_peers = (about, frozenset(peers))
        return {peer for peer in self._known_peers[1] if peer not in gone and change.unfenced(peer)}

    def _probe_peer(self, change: Change, broker_id: int) -> None:
        # A neighbour that lives also says so by its next heartbeat: a probe lost on a busy machine costs nothing.
        self._probe(change, broker_id, self._config.probe_ms + self._config.heartbeat_ms)

    def _probe(self, change: Change, broker_id: int, timeout_ms: int) -> None:
        broker = change.broker(broker_id)
        if broker is None or broker_id in self._probes or broker_id in self._verdicts:
            return
        self._probe_number += 1
        self._probes[broker_id] = (self._probe_number, change.now_ms + timeout_ms)
        change.add(Probe(self._probe_number, broker_id, broker.meta.internal, timeout_ms))

    # -- time ---------------------------------------------------------------------------------------

    def _silent_at(self, broker_id: int) -> int:
        return self.heard_ms[broker_id] + self._config.fence_ms

    def next_deadline_ms(self, unfenced: list[int]) -> int | None:
        due = [deadline for _, deadline in self._probes.values()]
        due.extend(self._silent_at(broker_id) for broker_id in unfenced if broker_id not in self.suspects)
        return min(due, default=None)


def fence_brokers(change: Change, reasons: dict[int, str]) -> None:
    """C3 for a set of brokers, in one decision."""
    gone = sorted(reasons)
    fenced_now = []
    elected: list[PartitionMeta] = []
    for broker_id in gone:
        record = change.broker(broker_id)
        if record is not None and not record.meta.fenced:
            change.put_broker(replace(record, meta=replace(record.meta, fenced=True)))
            fenced_now.append(broker_id)
    # Asked for each of thousands of partitions, and the same for all of them.
    brokers = change.brokers()
    able = frozenset(record.meta.id for record in brokers if change.electable(record.meta.id))
    draining = frozenset(record.meta.id for record in brokers if record.meta.draining)
    electable, reluctant = able.__contains__, draining.__contains__
    touched = {key for broker_id in gone for key in change.state.held.get(broker_id, ())}
    for key in sorted(touched):
        part = change.part(key)
        if part is None:
            continue
        before = part.meta
        after = fence(before, gone, electable, reluctant, frozen=part.frozen)
        if after is not before:
            stored = change.put_part(after)
            if stored.primary != before.primary:
                elected.append(stored)
    note_elected(change, elected)
    for broker_id in fenced_now:
        change.note("fenced", "warning", broker=broker_id, reason=reasons[broker_id])


def note_elected(change: Change, elected: list[PartitionMeta]) -> None:
    """One note for each election, or one for all of them: a log line for each of thousands helps nobody."""
    if len(elected) > NOTES_MAX:
        offline = sum(part.primary == NO_BROKER for part in elected)
        change.note("elected", count=len(elected), offline=offline)
        return
    for part in elected:
        change.note("elected", topic_id=part.topic_id, partition=part.partition, primary=part.primary, epoch=part.epoch)


def is_draining(change: Change, broker_id: int) -> bool:
    broker = change.broker(broker_id)
    return broker is not None and broker.meta.draining
