"""Members of groups that let the SDK's own `MemberCore` decide; this file is its driver.

`clients.Member` decides by itself, and misbehaves on purpose (it commits what it has lost). Both kinds meet in a group.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from ferryline.core.membership import (
    AssignmentReceived,
    ClaimAnswered,
    ClaimPartition,
    Declare,
    DropPartition,
    Effect,
    Event,
    MemberCore,
    MemberFenced,
    MemberUnknown,
    OpenPartition,
    Released,
    RevokePartition,
    TimePassed,
)
from ferryline.protocol.errors import ConnectionFailed, ErrorInfo, FerrylineError, PrimaryNotAvailable, from_info
from ferryline.protocol.messages import GroupHeartbeat
from ferryline_broker.core.events import Key
from tests.simulation.clients import Held, Member
from tests.simulation.engine import MS
from tests.simulation.hosts import Alarm

if TYPE_CHECKING:
    from tests.simulation.world import World


class SdkMember(Member):
    """Reads, processes and commits as its base does; what it holds, claims and gives up is the core's decision."""

    def __init__(self, world: World, group: str, number: int) -> None:
        super().__init__(world, group, number)
        self.zombie_commits = False
        self.events: deque[Event] = deque()
        self.core = MemberCore(group, self.host.name, (world.topic,), session_ms=self.SESSION_MS, seed=number)
        self.declared = self.core.heartbeat()
        self.alarm = Alarm(self.host, self.core.next_deadline_ms, lambda: self.feed(TimePassed()))

    # -- heartbeats --------------------------------------------------------------------------------

    def _heartbeat(self) -> None:
        self.host.deliver_after(self.HEARTBEAT_MS * MS, self._heartbeat)
        self._beat()

    def _beat(self) -> None:
        self.sequence += 1
        beat = replace(self.declared, sequence=self.sequence)
        self.ask(self.world.coordinator_address(), "group", beat, context=beat)

    # -- the core ----------------------------------------------------------------------------------

    def feed(self, event: Event) -> None:
        """One event after the other, as the SDK's `Membership` does it."""
        self.events.append(event)
        if len(self.events) > 1:
            return
        while self.events:
            self.engine.note(self.host.name, self.events[0])
            self._carry_out(self.core.handle(self.events[0], self.host.now_ms()))
            self.events.popleft()
        self.alarm.arm()

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            self.world.count(f"members told to {type(effect).__name__}")
            match effect:
                case Declare(heartbeat):
                    self.declared = heartbeat
                    self._beat()
                case ClaimPartition(key, generation, token):
                    held = self.held[key] = Held(generation, token)
                    self._claim(key, held)
                case OpenPartition(key, _, offset, offset_epoch):
                    self._open(key, self.held[key], offset, offset_epoch)
                case RevokePartition(key):
                    self._give_up(key, self.held[key])
                case DropPartition(key, _):
                    self.held.pop(key, None)

    def _open(self, key: Key, held: Held, offset: int, offset_epoch: int) -> None:
        held.claimed = True
        held.committed = offset
        held.poll = self.world.poll(f"{self.group}/{self.host.name}", key, max(offset, 0))
        held.poll.epoch = offset_epoch
        self._read(key, held)

    def _give_up(self, key: Key, held: Held) -> None:
        super()._give_up(key, held)
        self._released(key, held)

    def _released(self, key: Key, held: Held) -> None:
        if held.leaving and self.held.get(key) is not held:
            self.feed(Released(key, held.generation))

    # -- claims ------------------------------------------------------------------------------------

    def _claim(self, key: Key, held: Held) -> None:
        primary = self._primary(key)
        if primary is None:
            self.refresh()
            self.host.deliver_after(1, self._claimed, key, held, None, PrimaryNotAvailable("none known"))
            return
        self.ask(
            primary, "claim", key, self.group, self.host.name, held.generation, held.token, context=("claim", key, held)
        )

    def _claimed(self, key: Key, held: Held, found: Any, error: FerrylineError | None) -> None:
        if error is not None:
            self.refresh()
            self.feed(ClaimAnswered(key, held.generation, error=error))
        elif self.held.get(key) is held:
            self.feed(ClaimAnswered(key, held.generation, found.offset, found.offset_epoch))

    # -- answers -----------------------------------------------------------------------------------

    def answered(self, context: Any, frame: Any) -> None:
        error = frame[3]
        if isinstance(context, GroupHeartbeat):
            if error is None:
                self.feed(AssignmentReceived(frame[2], context))
            elif error.code == "UNKNOWN_MEMBER":
                self.feed(MemberUnknown())
            return
        kind, key, held = context
        if kind == "claim":
            self._claimed(key, held, frame[2], from_info(error) if error is not None else None)
            return
        super().answered(context, frame)
        if kind == "commit":
            self._released(key, held)

    def unanswered(self, context: Any, *, sent: bool) -> None:
        if isinstance(context, GroupHeartbeat):
            return
        if not isinstance(context, str) and context[0] == "claim":
            _, key, held = context
            self._claimed(key, held, None, ConnectionFailed("no answer to the claim"))
            return
        super().unanswered(context, sent=sent)

    def _refused(self, kind: str, key: Key, held: Held, error: ErrorInfo) -> None:
        if error.code == "STALE_MEMBER":
            self.feed(MemberFenced(key, held.generation))
            if self.held.get(key) is held:
                del self.held[key]
        elif error.code == "UNKNOWN_TOPIC" and held.leaving:
            del self.held[key]  # `answered` tells that it is released
        elif error.code == "UNKNOWN_TOPIC":
            self._again(kind, key, held)
        else:
            super()._refused(kind, key, held, error)
