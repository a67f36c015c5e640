"""Carries out what the core decides: one event after another, commits in groups, effects only when durable.

While a commit is on its way, further events are decided on what it will have made true; their effects wait behind it.
If a commit's outcome is not OK, everything decided since is thrown away with the core: campaign, load, begin again.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any, Protocol

from ferryline.protocol.access import AccessPolicy
from ferryline.protocol.errors import (
    CoordinatorLoading,
    CoordinatorStandby,
    CoordinatorUnavailable,
    ErrorInfo,
    FerrylineError,
    ShuttingDown,
    UnsupportedVersion,
    from_info,
)
from ferryline_coordinator.clock import now_ms
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.coordinator import CoordinatorCore, CoreBroken
from ferryline_coordinator.core.records import encode_record, record_key
from ferryline_coordinator.core.state import CoordinatorState
from ferryline_coordinator.store.interface import MetaStore, Outcome, StoreUnusable
from ferryline_service.claims import CLAIM_KEY_BYTES
from ferryline_service.logs import get_logger

Answer = Callable[[Any, ErrorInfo | None], None]
_log = get_logger()


class Surroundings(Protocol):
    """What the driver needs done outside."""

    def tell(self, broker_id: int, kind: int, message: Any) -> None:
        """Send a frame to a broker, if it has a session."""

    def probe(self, probe: ev.Probe) -> None:
        """Probe a broker and report `ProbeEnded`."""

    def noted(self, note: ev.Note) -> None:
        """Something to count."""

    def access_changed(self, policy: AccessPolicy) -> None:
        """Decide by this policy from now on; it is durable."""

    def term_ended(self) -> None:
        """Primaryship began anew: brokers must open sessions and register again."""


class Driver:
    """One core at a time. Used from the loop's thread only."""

    def __init__(self, store: MetaStore, config: CoreConfig, surroundings: Surroundings) -> None:
        self.core = CoordinatorCore(config)
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._store = store
        self.access = config.access  # what the access file says; None: there is none
        self._config = config
        self._surroundings = surroundings
        self._loop = asyncio.get_running_loop()
        self._replies: dict[int, Answer] = {}
        self._reply = 0
        self._queue: deque[ev.Decision] = deque()
        self._committing = False
        self._settled: list[asyncio.Future[None]] = []
        self._versions: dict[str, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving = False
        self._beginning = False
        self._stopping = False
        self.on_committed: Callable[[float], None] = _ignore  # seconds that the store took
        self.terms_lost = 0  # primaryships that ended without being asked to

    # -- terms --------------------------------------------------------------------------------------

    async def start(self, at_least: int = 0) -> None:
        """Campaign, load, found the cluster on an empty store. Raises StoreUnusable."""
        primaryship = await self._store.campaign(at_least)
        loaded = await self._store.load(primaryship.revision)
        core = CoordinatorCore(self._config)
        self._versions = {key: version for key, (_, version) in loaded.records.items()}
        values = [(key, value) for key, (value, _) in loaded.records.items()]
        try:
            core.load(values, primaryship.coord_epoch, now_ms())
        except UnsupportedVersion as later:  # a later release has been here: leave it to that one
            raise StoreUnusable(str(later)) from None
        floor = core.state.cluster.coord_epoch_floor if core.state.cluster is not None else 0
        if primaryship.coord_epoch < floor:
            return await self.start(floor)
        self.core = core
        self._serving = True
        self._spawn(self._watch(core))
        if not core.founded:
            self.post(ev.Founded(uuid.uuid4().hex, secrets.token_bytes(CLAIM_KEY_BYTES)))
            await self.settled()
        if self._config.access is not None:
            self.post(ev.AccessFileRead(self._config.access))
        _log.info("primaryship won", coord_epoch=primaryship.coord_epoch, records=len(values))
        self._arm()
        return None

    async def _watch(self, core: CoordinatorCore) -> None:
        """Step down as soon as primaryship may be over, not only at the next commit."""
        try:
            await self._store.watch()
            if self._serving and self.core is core and not self._stopping:
                await self._begin_again("primaryship is over, or could not be kept alive")
        except Exception as error:
            self._unusable(error)

    def begin(self) -> None:
        """`start` without waiting for it; what goes wrong ends up in `failed`."""
        self._spawn(self._begin())

    async def _begin(self) -> None:
        try:
            await self.start()
        except Exception as error:
            self._unusable(error)

    async def _begin_again(self, why: str, at_least: int = 0) -> None:
        """Nothing that was decided since the last durable commit has left this process; forget it."""
        if self._beginning or self._stopping:
            return
        self._beginning = True
        self.terms_lost += 1
        _log.warning("primaryship given up", reason=why)
        self._serving = False
        self._queue.clear()
        self._answer_all(CoordinatorUnavailable(f"the coordinator begins again: {why}"))
        self._wake_settled()
        self._surroundings.term_ended()
        try:
            await self._store.resign()
            await self.start(at_least)
        except StoreUnusable as unusable:
            self._fail(unusable)
        finally:
            self._beginning = False

    def _unusable(self, error: Exception) -> None:
        """The store failed, or answered what nobody foresaw: going on in silence would be the worst of all."""
        _log.critical("the store cannot be used", error=str(error), exc_info=not isinstance(error, StoreUnusable))
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """This process cannot go on: whoever supervises it starts another."""
        self._serving = False
        if not self.failed.done():
            self.failed.set_result(error)
        self._queue.clear()
        self._answer_all(CoordinatorUnavailable("the coordinator failed; another one will have to tell"))
        self._wake_settled()

    def _answer_all(self, error: FerrylineError) -> None:
        replies, self._replies = self._replies, {}
        for answer in replies.values():
            answer(None, error.info())

    async def step_down(self) -> None:
        """Commit what was decided, answer whoever waits, and let the next coordinator begin. Not for coming back."""
        self.answer_parked()
        await self.settled()
        self._stopping = True
        self._serving = False
        self._answer_all(ShuttingDown("this coordinator is stopping"))
        await self._store.resign()

    async def close(self) -> None:
        """`step_down`, and let go of the store."""
        if not self._stopping:
            await self.step_down()
        if self._timer is not None:
            self._timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._store.close()

    # -- events -------------------------------------------------------------------------------------

    def take_access(self, file: AccessPolicy) -> None:
        """The access file says something else now: in this term, and in those that follow."""
        self.access = file
        self._config = replace(self._config, access=file)
        if self.serving:
            self.post(ev.AccessFileRead(file))

    @property
    def serving(self) -> bool:
        """Whether this coordinator is the active one, as far as anybody can know: its lease cannot have ended yet."""
        return self._serving and self._store.holds()

    @property
    def state(self) -> CoordinatorState:
        """For reading, after `settled`."""
        return self.core.state

    def expect(self, answer: Answer) -> int:
        """A reply handle; ``answer(message, error)`` is called once with one of the two."""
        self._reply += 1
        self._replies[self._reply] = answer
        return self._reply

    def drop(self, reply: int) -> None:
        """Whoever waited under this handle is gone."""
        if self._replies.pop(reply, None) is not None and self.serving:
            self.post(ev.Abandoned(reply))

    async def ask(self, make: Callable[[int], ev.Event]) -> Any:
        """Post ``make(reply)`` and return what the core replies; raises what it refuses."""
        done: asyncio.Future[Any] = self._loop.create_future()

        def answer(message: Any, error: ErrorInfo | None) -> None:
            if done.done():
                return
            if error is not None:
                done.set_exception(from_info(error))
            else:
                done.set_result(message)

        reply = self.expect(answer)
        try:
            self.post(make(reply))
            return await done
        finally:
            self.drop(reply)

    def post(self, event: ev.Event) -> None:
        """One event into the core. Raises ShuttingDown or CoordinatorLoading when there is no core to take it."""
        if not self.serving:
            reply = getattr(event, "reply", 0)
            self._replies.pop(reply, None)
            raise self.not_serving()
        try:
            decision = self.core.handle(event, now_ms())
            self.core.apply(decision)
        except CoreBroken as broken:
            _log.critical("an invariant does not hold", error=str(broken), story=[repr(e) for e in broken.story[-50:]])
            self._fail(broken)
            raise
        except Exception as bug:
            _log.critical("the core failed", exc_info=bug)
            self._fail(bug)
            raise
        self._take(decision)
        self._arm()

    def not_serving(self) -> FerrylineError:
        if self._stopping or self.failed.done():
            return ShuttingDown("this coordinator is stopping")
        active = self._store.active()
        if active:
            return CoordinatorStandby(f"this coordinator is on standby; the active one is {active}", active=active)
        return CoordinatorLoading("this coordinator is loading its records")

    async def settled(self) -> None:
        """Return when everything decided so far is durable: what `state` shows then has happened."""
        if self._queue or self._committing:
            done = self._loop.create_future()
            self._settled.append(done)
            await done

    def answer_parked(self) -> None:
        """Resolve long polls: the process is about to stop."""
        if self._serving:
            self._take(self.core.close())

    # -- decisions ----------------------------------------------------------------------------------

    def _take(self, decision: ev.Decision) -> None:
        if not decision.durable and not self._queue and not self._committing:
            self._carry_out(decision)
            return
        if decision.durable or decision.effects:
            self._queue.append(decision)
        if not self._committing and self._queue:
            self._committing = True
            self._spawn(self._commit_all())

    async def _commit_all(self) -> None:
        try:
            while self._queue and self._serving:
                decisions = list(self._queue)
                self._queue.clear()
                outcome = await self._commit(decisions)
                if outcome is not Outcome.OK:
                    self._committing = False
                    await self._begin_again(f"a commit ended as {outcome.value}")
                    return
                for decision in decisions:
                    self._carry_out(decision)
        except Exception as error:
            self._unusable(error)
        finally:
            self._committing = False
            self._wake_settled()

    async def _commit(self, decisions: list[ev.Decision]) -> Outcome:
        puts: dict[str, bytes | None] = {}  # None: deleted
        for decision in decisions:
            puts.update(dict.fromkeys(decision.deletes))
            puts.update({record_key(record): encode_record(record) for record in decision.puts})
        if not puts:
            return Outcome.OK
        written = {key: value for key, value in puts.items() if value is not None}
        deleted = [key for key, value in puts.items() if value is None]
        guards = [(key, self._versions.get(key, 0)) for key in puts]
        began = perf_counter()
        committed = await self._store.commit(written, deleted, guards)
        self.on_committed(perf_counter() - began)
        if committed.outcome is Outcome.OK:
            for key in written:
                self._versions[key] = committed.revision
            for key in deleted:
                self._versions.pop(key, None)
        return committed.outcome

    def _wake_settled(self) -> None:
        waiting, self._settled = self._settled, []
        for done in waiting:
            if not done.done():
                done.set_result(None)

    def _carry_out(self, decision: ev.Decision) -> None:
        for effect in decision.effects:
            match effect:
                case ev.Reply(reply, message):
                    self._answer(reply, message, None)
                case ev.Refuse(reply, error):
                    self._answer(reply, None, error)
                case ev.Tell(broker_id, kind, message):
                    self._surroundings.tell(broker_id, kind, message)
                case ev.Probe():
                    self._surroundings.probe(effect)
                case ev.Note():
                    self._surroundings.noted(effect)
                case ev.AccessChanged(policy):
                    self._surroundings.access_changed(policy)
                case ev.Recampaign(coord_epoch):
                    self._spawn(self._begin_again("brokers have seen a later coordinator", coord_epoch))
                    return
                case _:
                    raise AssertionError(effect)

    def _answer(self, reply: int, message: Any, error: ErrorInfo | None) -> None:
        answer = self._replies.pop(reply, None)
        if answer is None:
            return  # abandoned meanwhile
        try:
            answer(message, error)
        except Exception:
            _log.exception("an answer could not be given")

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- time ---------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """One timer, at the core's next deadline."""
        deadline = self.core.next_deadline_ms()
        if self._timer is not None:
            if deadline is not None and deadline == self._timer_ms:
                return
            self._timer.cancel()
            self._timer = None
        if deadline is not None and self._serving:
            self._timer_ms = deadline
            self._timer = self._loop.call_later(max(0, deadline - now_ms()) / 1000, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if not self.serving:
            return  # `_watch` finds out, too
        try:
            self.post(ev.Tick())
        except Exception:
            return  # logged, and `failed` is set: the process ends


def _ignore(_: float) -> None:
    return
