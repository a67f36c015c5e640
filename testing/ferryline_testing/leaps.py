"""Days in milliseconds: time that nobody uses is leapt over.

An idle cluster is busy: heartbeats every 500 ms, pings, polls that are parked anew. Three days of them are millions of
events that change nothing. So when nothing has happened for a while, time goes at once to just before the next moment
that matters: a timer of the test's own code, or a deadline of a queue (a delayed record, a retry that is due). What the
processes do to keep each other alive does not notice: its timers fire as much later, and the clock of coordinator and
node cores leaves the leap out. Wall clocks, record timestamps, retention, delays and leases see all of it.

When nothing at all is left to wait for, the test would never end: after an hour of that it is told so (`Stuck`).

There is no leap while records are written or leased, while anybody takes over or is about to, or while anything is on
its way. With a broker down, paused or cut off, two minutes without an event have to pass first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ferryline_testing.events import EventLog
from ferryline_testing.lives import NEVER
from ferryline_testing.network import Network
from ferryline_testing.nodes import BrokerNode, CoordinatorNode
from ferryline_testing.virtual_time import START_S, VirtualTime

LOOK_S = 1.0
LEAST_S = 10.0  # a shorter leap costs more than it saves
SHORT_S = 600.0
BEFORE_S, BEFORE_SHORT_S = 2.0, 0.6  # before the moment that matters all runs as always, upkeep of brokers included ...
AFTER_S = 0.05  # ... and for so long after it, if it changes nothing
CALM_S, TROUBLED_CALM_S = 3.0, 125.0  # the latter is longer than any retry of a client or a broker
STUCK_S = 3_600.0  # some seconds of real time


class Stuck(RuntimeError):
    """Everybody waits, without a deadline, and nothing is going to happen. Raised out of the event loop."""


class Leaps:
    """Asked by the clock before each jump."""

    def __init__(
        self,
        clock: VirtualTime,
        network: Network,
        coordinator: CoordinatorNode,
        brokers: Iterable[BrokerNode],
        events: EventLog,
        busy: Callable[[], bool],
    ) -> None:
        self._clock, self._network, self._events = clock, network, events
        self._coordinator, self._brokers = coordinator, list(brokers)
        self._busy = busy  # the test's clients still have something to send
        self._look_at_s = clock.now_s + CALM_S
        self._seen: Any = None
        self._seen_since_s = clock.now_s
        self._due_s = clock.now_s  # the last moment that mattered, or is to come
        self.count = 0

    def consider(self) -> None:
        now = self._clock.now_s
        if now < self._look_at_s:
            return
        self._look_at_s = now + LOOK_S
        seen = [broker.shell.log_ends() if broker.shell is not None else None for broker in self._brokers]
        if seen != self._seen:
            self._seen, self._seen_since_s = seen, now
            return
        goal, calm_s = self._goal_s(), now - max(self._seen_since_s, self._events.last_s + START_S)
        by_s = goal - now - (BEFORE_S if goal - now > SHORT_S else BEFORE_SHORT_S)
        if goal == NEVER:
            self._nothing_to_wait_for(now, min(calm_s, now - self._due_s))
        else:
            self._due_s = goal
        if goal == NEVER or by_s < LEAST_S or self._busy():
            return
        if calm_s < (TROUBLED_CALM_S if self._troubled() else CALM_S) or self._leased():
            return
        if self._network.moving:
            self._look_at_s = now  # a moment later nothing is on its way
            return
        self._leap(by_s)
        self._look_at_s = goal + AFTER_S

    def _nothing_to_wait_for(self, now: float, calm_s: float) -> None:
        if calm_s >= STUCK_S:
            self._seen_since_s = self._due_s = now  # whoever cleans up has time again
            raise Stuck(
                f"for {STUCK_S:g} s of virtual time nothing has happened, and nothing is due: every task waits for "
                "something without a deadline (asyncio.timeout gives one)"
            )

    def _goal_s(self) -> float:
        """The next moment that matters."""
        goal = self._clock.next_of_test_s()
        for broker in self._brokers:
            if broker.shell is not None and (due_ms := broker.shell.queue_deadline_ms()) is not None:
                goal = min(goal, due_ms / 1000)
        return goal

    def _troubled(self) -> bool:
        shell = self._coordinator.shell
        lives = [node.life for node in (self._coordinator, *self._brokers)]
        if shell is None or self._network.parted or any(life is None or life.paused for life in lives):
            return True
        return bool(shell.unsettled())

    def _leased(self) -> bool:
        """Whoever holds a lease renews it long before its end, and takes it for lost some time before the broker does:
        a leap would go over all of that."""
        return any(broker.shell is not None and broker.shell.leases() for broker in self._brokers)

    def _leap(self, by_s: float) -> None:
        self.count += 1
        self._clock.leap(by_s)
        for broker in self._brokers:
            if broker.shell is not None and broker.life is not None and not broker.life.paused:
                broker.life.context().run(broker.shell.time_passed)
