"""The network between hosts: sessions that carry frames, and everything that happens to frames.

Two kinds of sessions, drawn per seed and per kind of link:

* *ordered*, like TLS over TCP: frames arrive once and in order; what cannot be delivered ends the session;
* *wild*: each frame on its own may be lost, doubled, late and overtaken, harsher than any transport that the product
  uses. Replication and the coordinator's messages must stand it (rules F2, L8, C2, C6).

Clients always get ordered sessions: an idempotent producer relies on "at most once and in order" (see its core).
A cut holds back frames of ordered sessions, and ends them if it outlasts the patience of either side; it loses frames
of wild ones. Both ends of a session learn of its end on their own time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from tests.simulation.engine import MS, Engine
from tests.simulation.hosts import Host
from tests.simulation.settings import Weather

Deliver = Callable[[], None]


class Endpoint(Protocol):
    """What a host's program offers to the network."""

    host: Host

    def session_opened(self, session: Session) -> None: ...
    def session_ended(self, session: Session) -> None: ...
    def frame_received(self, session: Session, frame: Any) -> None: ...


class Session:
    """One session. Index 0 is the side that opened it, 1 the side that accepted."""

    __slots__ = ("doomed", "drains", "ends", "held", "id", "last_us", "lives", "ordered", "up")

    def __init__(self, number: int, opener: Endpoint, acceptor: Endpoint, ordered: bool) -> None:
        self.id = number
        self.ends = (opener, acceptor)
        self.lives = (opener.host.life, acceptor.host.life)
        self.ordered = ordered
        self.up = [False, False]  # what each side believes
        self.doomed = False  # the network has given it up: nothing more enters it
        self.drains = False  # ... but what is on its way still arrives, as after a clean FIN
        self.last_us = [0, 0]  # time of the last delivery planned towards side i (ordered sessions)
        self.held: list[list[Any]] = [[], []]  # frames towards side i that a cut holds back

    def side(self, end: Endpoint) -> int:
        return 0 if self.ends[0] is end else 1

    def peer(self, end: Endpoint) -> Endpoint:
        return self.ends[1 - self.side(end)]


class Network:
    """All links between all hosts."""

    def __init__(self, engine: Engine, weather: Weather) -> None:
        self.engine = engine
        self.weather = weather
        self.calm = False  # healed: no losses, no doubles, short delays
        self.sessions: dict[int, Session] = {}
        self.cuts: dict[tuple[str, str], int] = {}  # (from, to) -> how many cuts lie on it
        # What happened to frames and sessions beside their arriving: each counts as one fault step.
        self.counts = {"lost": 0, "doubled": 0, "late": 0, "held": 0, "paused": 0, "broken": 0, "refused": 0}
        self._numbers = 0

    # -- links -------------------------------------------------------------------------------------

    def is_cut(self, source: str, target: str) -> bool:
        return (source, target) in self.cuts

    def cut(self, source: str, target: str) -> None:
        self.cuts[source, target] = self.cuts.get((source, target), 0) + 1
        for session in list(self.sessions.values()):
            if session.ordered and {source, target} == {end.host.name for end in session.ends}:
                self.engine.after(self._patience_us(), self._give_up, session, source, target)

    def heal(self, source: str, target: str) -> None:
        count = self.cuts.get((source, target), 0) - 1
        if count > 0:
            self.cuts[source, target] = count
            return
        self.cuts.pop((source, target), None)
        for session in list(self.sessions.values()):
            names = [end.host.name for end in session.ends]
            if {source, target} == set(names):
                self._release(session, names.index(target))

    def heal_all(self) -> None:
        for source, target in list(self.cuts):
            self.cuts[source, target] = 1
            self.heal(source, target)

    def _patience_us(self) -> int:
        return self.engine.between(500, self.weather.session_patience_ms) * MS

    def _give_up(self, session: Session, source: str, target: str) -> None:
        if not session.doomed and self.is_cut(source, target):
            self.counts["broken"] += 1
            self.end(session)

    # -- sessions ----------------------------------------------------------------------------------

    def reachable(self, one: Host, other: Host) -> bool:
        return not self.is_cut(one.name, other.name) and not self.is_cut(other.name, one.name)

    def connect(self, opener: Endpoint, acceptor: Endpoint, kind: str, failed: Callable[[str], None]) -> None:
        """Try to open a session; ``session_opened`` of both sides, or ``failed`` of the opener, follows."""
        life = opener.host.life
        self.engine.after(self.delay_us(), self._arrive, opener, life, acceptor, kind, failed)

    def _arrive(
        self, opener: Endpoint, life: int, acceptor: Endpoint, kind: str, failed: Callable[[str], None]
    ) -> None:
        host = acceptor.host
        if not self.reachable(opener.host, host) or host.paused:
            self.counts["refused"] += 1
            self.engine.after(
                self.engine.between(300, 2000) * MS, opener.host.deliver, life, failed, "connecting timed out"
            )
            return
        if not host.alive:
            self.counts["refused"] += 1
            self.engine.after(self.delay_us(), opener.host.deliver, life, failed, "connection refused")
            return
        if not opener.host.alive or opener.host.life != life:
            return
        self._numbers += 1
        session = Session(self._numbers, opener, acceptor, kind == "client" or self.weather.ordered[kind])
        self.sessions[session.id] = session
        host.deliver(host.life, self._opened, session, 1)
        self.engine.after(self.delay_us(), opener.host.deliver, life, self._opened, session, 0)

    def _opened(self, session: Session, side: int) -> None:
        if session.doomed:
            if side == 0:  # it opened and ended before the opener heard of it
                session.up[0] = True
                session.ends[0].session_opened(session)
                session.up[0] = False
                session.ends[0].session_ended(session)
            return
        session.up[side] = True
        session.ends[side].session_opened(session)

    def end(self, session: Session, *, by: Endpoint | None = None) -> None:
        """The session is over. Each side hears of it on its own time; ``by`` knows already."""
        if session.doomed:
            return
        session.doomed = True
        session.drains = self.engine.chance(0.5)
        self.sessions.pop(session.id, None)
        for side in (0, 1):
            session.held[side].clear()
            end = session.ends[side]
            if end is by:
                session.up[side] = False
                continue
            other = session.ends[1 - side].host
            quick = self.reachable(end.host, other)
            delay_us = self.delay_us() if quick else self._patience_us()
            when_us = max(self.engine.now_us + delay_us, session.last_us[side] + 1)  # no end overtakes its frames
            self.engine.at(when_us, end.host.deliver, session.lives[side], self._ended, session, side)

    def half_end(self, session: Session, by: Endpoint, keep_us: int) -> None:
        """``by`` has given the session up; the other side goes on hearing from it for ``keep_us``."""
        side = session.side(by)
        session.doomed = session.drains = True
        session.up[side] = False
        session.held[0].clear()
        session.held[1].clear()
        self.sessions.pop(session.id, None)
        other = session.ends[1 - side]
        self.engine.after(keep_us, other.host.deliver, session.lives[1 - side], self._ended, session, 1 - side)

    def _ended(self, session: Session, side: int) -> None:
        if session.up[side]:
            session.up[side] = False
            session.ends[side].session_ended(session)

    def host_died(self, end: Endpoint, *, silently: bool) -> None:
        """All sessions of a process end. ``silently``: the machine went with it, so that nobody sends a reset."""
        for session in [s for s in self.sessions.values() if end in s.ends]:
            session.up[session.side(end)] = False
            if silently:
                self.engine.after(self._patience_us() // 4, self.end, session)
            else:
                self.end(session, by=end)

    # -- frames ------------------------------------------------------------------------------------

    def send(self, session: Session, sender: Endpoint, frame: Any) -> None:
        """Put a frame on its way. Into a session that has ended it vanishes."""
        side = 1 - session.side(sender)
        if session.doomed:
            return
        source, target = sender.host.name, session.ends[side].host.name
        cut = self.is_cut(source, target)
        if session.ordered:
            if not self.calm and self.engine.chance(self.weather.session_loss):
                self.counts["broken"] += 1
                self.end(session)
            elif cut or session.held[side]:
                self.counts["held"] += 1
                session.held[side].append(frame)
                if len(session.held[side]) == 1:
                    self.engine.after(self._patience_us(), self._give_up, session, source, target)
            else:
                self._ordered(session, side, frame)
            return
        if cut or (not self.calm and self.engine.chance(self.weather.loss)):
            self.counts["lost"] += 1
            return
        if not self.calm and self.engine.chance(self.weather.double):
            self.counts["doubled"] += 1
            self.engine.after(self.delay_us(wild=True), self._hand_over, session, side, frame)
        self.engine.after(self.delay_us(wild=True), self._hand_over, session, side, frame)

    def repeat(self, session: Session, sender: Endpoint, frame: Any, late_us: int) -> None:
        """``frame`` arrives at this time, too, whatever else the session carries."""
        self.engine.after(late_us, self._hand_over, session, 1 - session.side(sender), frame)

    def _ordered(self, session: Session, side: int, frame: Any) -> None:
        when_us = max(session.last_us[side] + 1, self.engine.now_us + self.delay_us())
        session.last_us[side] = when_us
        self.engine.at(when_us, self._hand_over, session, side, frame)

    def _release(self, session: Session, side: int) -> None:
        held, session.held[side] = session.held[side], []
        for frame in held:
            self._ordered(session, side, frame)

    def _hand_over(self, session: Session, side: int, frame: Any) -> None:
        if session.doomed and not session.drains:
            return
        end = session.ends[side]
        host = end.host
        if host.alive and not host.paused and host.life == session.lives[side]:  # `deliver`, without its calls
            if session.up[side]:
                end.frame_received(session, frame)
        else:
            if host.paused:
                self.counts["paused"] += 1
            host.deliver(session.lives[side], self._received, session, side, frame)

    def _received(self, session: Session, side: int, frame: Any) -> None:
        if session.up[side]:
            session.ends[side].frame_received(session, frame)

    # -- delays ------------------------------------------------------------------------------------

    def delay_us(self, *, wild: bool = False) -> int:
        rng = self.engine.rng
        if self.calm:
            return 200 + int(rng.random() * 600)
        delay = self.weather.delay_us * (0.5 + rng.random())
        if rng.random() < self.weather.slow:
            self.counts["late"] += 1
            delay += rng.random() * (self.weather.late_us if wild else self.weather.slow_us)
        return int(delay) + 1
