"""Decide what a member of a consumer group holds, claims and gives up. Pure: no I/O, no clock, no randomness.

    coordinator says             here
    assigned(generation)    ->   ClaimPartition -> (claim answered) -> OpenPartition: fetch from the committed offset
    revoked                 ->   RevokePartition: stop, finish what was handed out, commit -> Released -> out of `owned`
    neither                 ->   DropPartition: somebody else may own it; commit nothing

Rules:

* A partition is in ``owned`` of every heartbeat from the moment it was taken from an answer until it was released or
  lost. The coordinator gives it to nobody else meanwhile.
* Answers count in the order of their heartbeats; one that was overtaken changes nothing. A generation that was given up
  is taken again only from an answer to a heartbeat that did not name it: the coordinator knew, and changed its mind.
* UNKNOWN_MEMBER: the session ended and others own what we held. Everything is dropped, and the member joins anew.
* No answer changes nothing: during a coordinator outage a member keeps what it has.
"""

from __future__ import annotations

from collections import deque

import msgspec

from ferryline.core.retry import Backoff, Jitter
from ferryline.protocol.errors import FerrylineError, StaleMember
from ferryline.protocol.messages import GroupAssignment, GroupHeartbeat, GroupPartition

PartitionKey = tuple[str, int]  # (topic_id, partition)
CLAIMING, OPEN, REVOKING = "claiming", "open", "revoking"


class Event(msgspec.Struct, frozen=True):
    """Base of what may happen to a member."""


class AssignmentReceived(Event, frozen=True):
    """The coordinator answered the heartbeat ``sent``."""

    answer: GroupAssignment
    sent: GroupHeartbeat


class MemberUnknown(Event, frozen=True):
    """The coordinator does not know this member any more."""


class ClaimAnswered(Event, frozen=True):
    """A claim was committed, or refused with ``error``."""

    key: PartitionKey
    generation: int
    offset: int = -1  # committed by the group; -1: nothing yet
    offset_epoch: int = -1
    log_start: int = -1
    high_watermark: int = -1
    error: FerrylineError | None = None


class Released(Event, frozen=True):
    """The application has finished a revoked partition, and what it finished is committed."""

    key: PartitionKey
    generation: int


class MemberFenced(Event, frozen=True):
    """A broker answered STALE_MEMBER: a later generation owns the partition."""

    key: PartitionKey
    generation: int


class Subscribed(Event, frozen=True):
    """The application reads these topics from now on."""

    topics: tuple[str, ...]


class TimePassed(Event, frozen=True):
    """`next_deadline_ms` has come."""


class Effect(msgspec.Struct, frozen=True):
    """Base of what a driver is told to do."""


class Declare(Effect, frozen=True):
    """What every heartbeat says from now on; send one at once. ``sequence`` is the sender's business."""

    heartbeat: GroupHeartbeat


class ClaimPartition(Effect, frozen=True):
    """Send Claim to the primary; exactly one ClaimAnswered follows."""

    key: PartitionKey
    generation: int
    token: bytes


class OpenPartition(Effect, frozen=True):
    """Ours: fetch from ``offset`` (-1: the group has committed nothing here, the start policy decides)."""

    key: PartitionKey
    generation: int
    offset: int
    offset_epoch: int
    log_start: int
    high_watermark: int


class RevokePartition(Effect, frozen=True):
    """Stop fetching, hand nothing more out, let the application finish, commit, then tell Released."""

    key: PartitionKey
    generation: int


class DropPartition(Effect, frozen=True):
    """Not ours any more: forget it, commit nothing."""

    key: PartitionKey
    generation: int


class _Held:
    """One partition that the member has. ``state``: CLAIMING -> OPEN -> REVOKING."""

    __slots__ = ("failures", "generation", "retry_at_ms", "state", "token")

    def __init__(self, generation: int, token: bytes) -> None:
        self.generation = generation
        self.token = token
        self.state = CLAIMING
        self.failures = 0
        self.retry_at_ms = 0  # when to claim again; 0: a claim is on its way, or none is needed


class MemberCore:
    """One member of one group. ``member``: an id that no other member uses.

    Invariant: whatever stands in `held` was declared in the last Declare, and nothing else.
    """

    def __init__(
        self,
        group: str,
        member: str,
        topics: tuple[str, ...],
        *,
        instance_id: str = "",
        session_ms: int = 45_000,
        seed: int = 0,
    ) -> None:
        self.group = group
        self.member = member
        self.topics = topics
        self.instance_id = instance_id
        self.session_ms = session_ms
        self.heartbeat_ms = 3_000
        self.history: deque[tuple[int, Event]] = deque(maxlen=64)
        self._held: dict[PartitionKey, _Held] = {}
        self._given_up: dict[PartitionKey, int] = {}  # highest generation released, lost or fenced
        self._last_answer = 0  # sequence of the last heartbeat whose answer was taken
        self._backoff = Backoff(10, 500)
        self._jitter = Jitter(seed)

    # -- questions ---------------------------------------------------------------------------------

    def heartbeat(self, *, leave: bool = False) -> GroupHeartbeat:
        """What a heartbeat says now."""
        owned = [] if leave else [GroupPartition(*key, held.generation) for key, held in sorted(self._held.items())]
        return GroupHeartbeat(
            self.group, self.member, list(self.topics), owned, self.instance_id, self.session_ms, leave
        )

    def generation(self, key: PartitionKey) -> int | None:
        """The generation under which commits for a partition are made; None if it is not ours."""
        held = self._held.get(key)
        return held.generation if held is not None and held.state != CLAIMING else None

    def held(self) -> list[PartitionKey]:
        return sorted(self._held)

    def next_deadline_ms(self) -> int | None:
        waits = [held.retry_at_ms for held in self._held.values() if held.retry_at_ms]
        return min(waits) if waits else None

    # -- events ------------------------------------------------------------------------------------

    def handle(self, event: Event, now_ms: int) -> list[Effect]:
        self.history.append((now_ms, event))
        before = self._declared()
        out: list[Effect] = []
        if isinstance(event, AssignmentReceived):
            self._assignment(event.answer, event.sent, out)
        elif isinstance(event, MemberUnknown):
            for key in sorted(self._held):
                out.append(DropPartition(key, self._held[key].generation))
                self._give_up(key)
        elif isinstance(event, ClaimAnswered):
            self._claimed(event, now_ms, out)
        elif isinstance(event, Released):
            held = self._held.get(event.key)
            if held is not None and held.generation == event.generation and held.state == REVOKING:
                self._give_up(event.key)
        elif isinstance(event, MemberFenced):
            held = self._held.get(event.key)
            if held is not None and held.generation <= event.generation:
                self._give_up(event.key)
                out.append(DropPartition(event.key, held.generation))
        elif isinstance(event, Subscribed):
            self.topics = event.topics
            out.append(Declare(self.heartbeat()))
        elif isinstance(event, TimePassed):
            self._claim_again(now_ms, out)
        else:
            raise TypeError(f"unknown event {event!r}")
        if self._declared() != before:
            out.append(Declare(self.heartbeat()))
        return out

    def _declared(self) -> list[tuple[PartitionKey, int]]:
        return sorted((key, held.generation) for key, held in self._held.items())

    def _assignment(self, answer: GroupAssignment, sent: GroupHeartbeat, out: list[Effect]) -> None:
        if answer.member != self.member or answer.sequence <= self._last_answer:
            return
        self._last_answer = answer.sequence
        self.heartbeat_ms = answer.heartbeat_ms
        assigned = {(item.topic_id, item.partition): item for item in answer.assigned}
        named = {(item.topic_id, item.partition) for item in sent.owned}
        revoked = {(item.topic_id, item.partition) for item in answer.revoked}
        for key in sorted(self._held):
            if key in assigned:
                continue
            held = self._held[key]
            if key in revoked and held.state != CLAIMING:
                if held.state != REVOKING:
                    held.state = REVOKING
                    out.append(RevokePartition(key, held.generation))
            else:  # nothing was handed out of a partition that is still being claimed: it is free at once
                self._give_up(key)
                out.append(DropPartition(key, held.generation))
        for key, item in sorted(assigned.items()):
            if key not in named or item.generation > self._given_up.get(key, 0):
                self._take(key, item, out)

    def _take(self, key: PartitionKey, item: GroupPartition, out: list[Effect]) -> None:
        held = self._held.get(key)
        if held is not None and held.generation >= item.generation:
            return
        if held is not None and held.state != CLAIMING:
            out.append(DropPartition(key, held.generation))  # others may have owned it in between: read its offset anew
        self._held[key] = _Held(item.generation, item.token)
        out.append(ClaimPartition(key, item.generation, item.token))

    def _claimed(self, event: ClaimAnswered, now_ms: int, out: list[Effect]) -> None:
        held = self._held.get(event.key)
        if held is None or held.generation != event.generation or held.state != CLAIMING:
            return
        if event.error is None:
            held.state = OPEN
            held.failures = held.retry_at_ms = 0
            out.append(
                OpenPartition(
                    event.key, event.generation, event.offset, event.offset_epoch, event.log_start, event.high_watermark
                )
            )
        elif isinstance(event.error, StaleMember):
            self._give_up(event.key)
            out.append(DropPartition(event.key, event.generation))
        else:  # whatever it is, the partition stays assigned to us and nobody else will read it
            held.failures += 1
            pause_ms = self._backoff.pause_ms(held.failures, self._jitter.next(), event.error)
            held.retry_at_ms = now_ms + pause_ms

    def _claim_again(self, now_ms: int, out: list[Effect]) -> None:
        for key, held in sorted(self._held.items()):
            if held.retry_at_ms and held.retry_at_ms <= now_ms:
                held.retry_at_ms = 0
                out.append(ClaimPartition(key, held.generation, held.token))

    def _give_up(self, key: PartitionKey) -> None:
        held = self._held.pop(key)
        self._given_up[key] = max(held.generation, self._given_up.get(key, 0))
