"""The driver of `MemberCore`: joins a group, claims what is assigned, lets go of what is revoked, commits."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

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
from ferryline.heartbeats import Member, thread_of
from ferryline.protocol.errors import FerrylineError, StaleMember, UnknownMember
from ferryline.protocol.frames import Kind
from ferryline.protocol.messages import (
    Claim,
    ClaimEntry,
    Commit,
    CommitEntry,
    CommittedAnswer,
    CommittedResult,
    GroupAssignment,
    GroupHeartbeat,
)
from ferryline.requests import Key, ask_primaries
from ferryline.tasks import Tasks

if TYPE_CHECKING:
    from ferryline.client import Client

log = logging.getLogger("ferryline.group")

CLAIM_S = 10.0


class Membership:
    """One member of one group. ``opened``, ``revoked`` and ``dropped`` tell the consumer what to read.

    After ``revoked(key)`` the consumer calls `released` once the application is done with the partition.
    """

    def __init__(
        self,
        client: Client,
        group: str,
        topics: tuple[str, ...],
        *,
        instance_id: str,
        session_ms: int,
        max_processing_s: float,
        progress: Callable[[], object],
        opened: Callable[[OpenPartition], None],
        revoked: Callable[[Key], None],
        dropped: Callable[[Key], None],
        failed: Callable[[FerrylineError], None],
    ) -> None:
        self.group = group
        self.member = f"m-{secrets.token_hex(12)}"
        self._client = client
        self._heartbeats = thread_of(client)
        self._opened, self._revoked, self._dropped, self._failed = opened, revoked, dropped, failed
        self._core = MemberCore(
            group,
            self.member,
            topics,
            instance_id=instance_id,
            session_ms=session_ms,
            seed=secrets.randbits(63),
        )
        self._loop = asyncio.get_running_loop()
        self._tasks = Tasks()
        self._timer: asyncio.TimerHandle | None = None
        self._events: deque[Event] = deque()  # heard and not yet handled
        self._feeding = False
        self._joined = False
        self._closed = False
        self._beat = Member(
            self._core.heartbeat(),
            self._answered,
            self._refused,
            interval_s=self._core.heartbeat_ms / 1000,
            max_processing_s=max_processing_s,
            progress=progress,
        )

    async def start(self) -> None:
        await self._heartbeats.join(self._beat)

    async def leave(self) -> None:
        """Leave the group: what was held is free at once, not after the session.

        A static member does not say goodbye: the next process with its instance_id goes on with its partitions.
        """
        self._closed = True
        self._tasks.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if self._core.instance_id:
            self._heartbeats.stop(self._beat)
        else:
            await self._heartbeats.leave(self._beat, self._core.heartbeat(leave=True))

    def released(self, key: Key, generation: int) -> None:
        self._feed(Released(key, generation))

    def generation(self, key: Key) -> int | None:
        return self._core.generation(key)

    # -- the core ----------------------------------------------------------------------------------

    def _feed(self, event: Event) -> None:
        """One event after the other: what an effect leads to waits until the effects before it are carried out.

        Otherwise a partition that is released while its revocation is carried out is declared free first, and owned
        again by the older declaration after it, and the coordinator waits for a release that has happened.
        """
        self._events.append(event)
        if self._feeding:
            return
        self._feeding = True
        try:
            while self._events and not self._closed:
                self._carry_out(self._core.handle(self._events.popleft(), int(self._loop.time() * 1000)))
        finally:
            self._feeding = False
        if not self._closed:
            self._arm()

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Declare):
                self._heartbeats.declare(self._beat, effect.heartbeat)
            elif isinstance(effect, ClaimPartition):
                self._tasks.spawn(self._claim(effect))
            elif isinstance(effect, OpenPartition):
                self._opened(effect)
            elif isinstance(effect, RevokePartition):
                self._revoked(effect.key)
            elif isinstance(effect, DropPartition):
                self._dropped(effect.key)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline_ms = self._core.next_deadline_ms()
        if deadline_ms is not None:
            self._timer = self._loop.call_at(deadline_ms / 1000 + 0.0005, self._feed, TimePassed())

    def _answered(self, answer: GroupAssignment, sent: GroupHeartbeat) -> None:
        self._joined = True
        self._feed(AssignmentReceived(answer, sent))

    def _refused(self, error: FerrylineError) -> None:
        if isinstance(error, UnknownMember) and self._core.instance_id and self._joined:
            # Another process took over the instance. Joining anew would take it back, and so on for ever.
            self._feed(MemberUnknown())
            self._heartbeats.stop(self._beat)
            self._failed(error)
        elif isinstance(error, UnknownMember):
            log.warning("group %s: %s; joining anew", self.group, error)
            self._feed(MemberUnknown())
        elif not self._joined and not error.retriable and error.definite and not self._closed:
            self._failed(error)  # the coordinator will say the same the next time: unknown topic, denied, ...

    async def _claim(self, claim: ClaimPartition) -> None:
        def header(keys: list[Key]) -> Claim:
            entries = [ClaimEntry(*key, claim.generation, claim.token) for key in keys]
            return Claim(self.group, self.member, entries)

        outcomes = await ask_primaries(self._client, Kind.CLAIM, [claim.key], header, CommittedAnswer, timeout=CLAIM_S)
        outcome: CommittedResult | FerrylineError = outcomes[claim.key]
        if isinstance(outcome, FerrylineError):
            log.debug("claim of %s: %s", claim.key, outcome)
            self._feed(ClaimAnswered(claim.key, claim.generation, error=outcome))
        else:
            self._feed(
                ClaimAnswered(
                    claim.key,
                    claim.generation,
                    outcome.offset,
                    outcome.offset_epoch,
                    outcome.log_start,
                    outcome.high_watermark,
                )
            )

    # -- commits -----------------------------------------------------------------------------------

    async def commit(
        self, offsets: Mapping[Key, tuple[int, bool]], metadata: str, *, timeout: float
    ) -> dict[Key, CommittedResult | FerrylineError]:
        """Commit (offset, reset) for partitions that are ours, each under its generation."""
        generations = {key: self._core.generation(key) for key in offsets}
        lost = StaleMember(f"group {self.group}: the partition is not ours any more")
        outcomes: dict[Key, CommittedResult | FerrylineError] = {
            key: lost for key, generation in generations.items() if generation is None
        }

        def header(keys: list[Key]) -> Commit:
            entries = [
                CommitEntry(*key, generations[key] or 0, offsets[key][0], metadata, offsets[key][1]) for key in keys
            ]
            return Commit(self.group, self.member, entries)

        ours = [key for key in offsets if generations[key] is not None]
        if ours:
            outcomes |= await ask_primaries(self._client, Kind.COMMIT, ours, header, CommittedAnswer, timeout=timeout)
        for key, outcome in outcomes.items():
            generation = generations[key]
            if isinstance(outcome, StaleMember) and generation is not None:
                self._feed(MemberFenced(key, generation))
        return outcomes
