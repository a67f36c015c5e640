"""Virtual time for the event loop that already runs: it stands still while anything can run, and jumps to the next
timer when nothing can.

It takes the place of the loop's clock and of its waiting for sockets, and gives both back. Timers that exist when it
begins keep their distance, and so do those that are left when it ends. While a thread works for the loop
(``asyncio.to_thread``) time stands still, too, unless it asks the loop for something and may be waiting for that. It
starts at the same value each time: sums of floats then round alike in two runs of one seed.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import sys
from collections.abc import Callable
from typing import Any

from ferryline_testing.lives import HERE, NEVER, Life

START_S = 1_000.0
_GHOST_S = 5.0  # a killed process may clean up after itself for so long
_POLL_EVERY = 64  # passes of a busy loop between two looks at real sockets and signals
_THREAD_WAIT_S = 0.01
_RESULT = "_set_state"  # what asyncio calls when a thread has ended
_SDK, _FOR_USERS = "ferryline.", "ferryline.app"  # handlers and schedules run in tasks of the latter


class _Waiting:
    """In the place of the loop's selector: what waits for sockets waits for virtual time instead."""

    def __init__(self, real: Any, select: Callable[[float | None], list[Any]]) -> None:
        self._real = real
        self.select = select

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class VirtualTime:
    """The clock of one loop. ``on_idle`` is called before each jump, and may move time itself (`leap`).

    ``leapt_s``: how much of the time that passed the machinery of the cluster has not noticed (`leaps`).
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, client: Life) -> None:
        if not hasattr(loop, "_selector") or not hasattr(loop, "_scheduled"):
            raise RuntimeError(f"virtual time needs an event loop of asyncio's own, not {type(loop).__name__}")
        self.now_s = START_S
        self.leapt_s = 0.0
        self.on_idle: Callable[[], None] = _nothing
        self.holding = False  # a life is paused or ended: look at whose timers come next
        self._loop: Any = loop
        self._client = client
        self._held: list[Any] = []  # timers of paused lives
        self._threads = 0
        self._asked = False  # by one of these threads
        self._passes = 0
        self._real: Any = None
        self._real_factory: Any = None

    def time(self) -> float:
        return self.now_s

    # -- taking over the loop -----------------------------------------------------------------------

    def begin(self) -> None:
        loop = self._loop
        self._shift_all(START_S - loop.time())
        self._real, self._real_factory = loop._selector, loop.get_task_factory()
        loop._selector = _Waiting(self._real, self._select)
        loop.time = self.time
        loop.run_in_executor = self._run_in_executor
        loop.call_soon_threadsafe = self._call_soon_threadsafe
        loop.set_task_factory(self._make_task)

    def end(self) -> None:
        """Give the loop back. Timers of the cluster's processes are dropped."""
        loop = self._loop
        for handle in loop._scheduled:
            if handle._context.get(HERE) is not None:
                handle.cancel()
        del loop.time, loop.run_in_executor, loop.call_soon_threadsafe
        loop._selector = self._real
        loop.set_task_factory(self._real_factory)
        self._shift_all(loop.time() - self.now_s)

    def _shift_all(self, by_s: float) -> None:
        for handle in self._loop._scheduled:
            handle._when += by_s  # all alike: the heap stays one

    def _make_task(self, loop: Any, work: Any, **options: Any) -> asyncio.Future[Any]:
        """Tasks of a process are noted with its life. Tasks that the SDK starts belong to the client, not to the test:
        otherwise each poll of a client would count as something that the test waits for."""
        context = options.get("context")
        here = HERE.get() if context is None else context.get(HERE)
        if here is None and _made_by_sdk():
            here = self._client
            options["context"] = contextvars.copy_context() if context is None else context.copy()
            options["context"].run(HERE.set, here)
        if self._real_factory is not None:
            task: asyncio.Future[Any] = self._real_factory(loop, work, **options)
        else:
            task = asyncio.Task(work, loop=loop, **options)
        if here is not None:
            here.tasks[task] = None
            task.add_done_callback(here.finished)
        return task

    def _run_in_executor(self, executor: Any, work: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        self._threads += 1
        done: asyncio.Future[Any] = type(self._loop).run_in_executor(self._loop, executor, work, *args)
        done.add_done_callback(self._thread_done)
        return done

    def _thread_done(self, _: asyncio.Future[Any]) -> None:
        self._threads -= 1
        self._asked = self._asked and self._threads > 0

    def _call_soon_threadsafe(self, callback: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self._threads and getattr(callback, "__name__", "") != _RESULT:
            self._asked = True
        return type(self._loop).call_soon_threadsafe(self._loop, callback, *args, **options)

    # -- waiting ------------------------------------------------------------------------------------

    def _select(self, timeout: float | None) -> list[Any]:
        if timeout is not None and timeout <= 0:
            self._passes += 1
            events: list[Any] = [] if self._passes % _POLL_EVERY else self._real.select(0)
            return events
        if timeout is None or (self._threads and not self._asked):
            events = self._real.select(_THREAD_WAIT_S)
            return events
        events = self._real.select(0)
        if not events:
            self.on_idle()
            self._jump()
        return events

    def _jump(self) -> None:
        """To the first timer that may fire."""
        scheduled = self._loop._scheduled
        while scheduled:
            handle = scheduled[0]
            if handle._cancelled or (self.holding and not self._may_fire(handle)):
                self._take_first()
                continue
            self.now_s = max(self.now_s, handle._when)
            break
        if self.holding:
            self._hold_equals()

    def _hold_equals(self) -> None:
        """The loop runs every timer that is due, whosesoever it is."""
        scheduled, firing = self._loop._scheduled, []
        while scheduled and scheduled[0]._when <= self.now_s + 1e-9:
            handle = scheduled[0]
            may_fire = not handle._cancelled and self._may_fire(handle)
            heapq.heappop(scheduled)
            if may_fire:
                firing.append(handle)
            else:
                self._took(handle)
        for handle in firing:
            heapq.heappush(scheduled, handle)

    def _may_fire(self, handle: Any) -> bool:
        life = handle._context.get(HERE)
        return life is None or not (life.paused or life.ended_s + _GHOST_S < self.now_s)

    def _take_first(self) -> None:
        self._took(heapq.heappop(self._loop._scheduled))

    def _took(self, handle: Any) -> None:
        handle._scheduled = False
        if handle._cancelled:
            self._loop._timer_cancelled_count -= 1
        elif handle._context.get(HERE).ended_s == NEVER:
            self._held.append(handle)
        else:
            handle.cancel()

    # -- lives --------------------------------------------------------------------------------------

    def resume(self, life: Life) -> None:
        """Its timers fire again; those that were due meanwhile at once, in order."""
        held, self._held = self._held, []
        for handle in held:
            if handle._cancelled:
                continue
            if handle._context.get(HERE) is life:
                handle._scheduled = True
                heapq.heappush(self._loop._scheduled, handle)
            else:
                self._held.append(handle)

    def drop(self, life: Life) -> None:
        """Its timers never fire."""
        for handle in [*self._loop._scheduled, *self._held]:
            if handle._context.get(HERE) is life:
                handle.cancel()
        self._held = [handle for handle in self._held if not handle._cancelled]

    def next_of_test_s(self) -> float:
        """When the first timer of the test's own code fires; NEVER if there is none."""
        own = (h._when for h in self._loop._scheduled if not h._cancelled and h._context.get(HERE) is None)
        return min(own, default=NEVER)

    def leap(self, by_s: float) -> None:
        """Let time pass without any timer of the cluster: they fire as much later."""
        self.now_s += by_s
        self.leapt_s += by_s
        scheduled = self._loop._scheduled
        for handle in scheduled:
            if handle._context.get(HERE) is not None:
                handle._when += by_s
        heapq.heapify(scheduled)


def _made_by_sdk() -> bool:
    """Who makes this task? Not whose coroutine it is: a test may run ``producer.send(...)`` as a task of its own."""
    frame = sys._getframe(2)  # the factory's caller
    while frame is not None and frame.f_globals.get("__name__", "").startswith("asyncio."):
        frame = frame.f_back  # type: ignore[assignment]
    module = str(frame.f_globals.get("__name__", "")) if frame is not None else ""
    return module.startswith(_SDK) and not module.startswith(_FOR_USERS)


def _nothing() -> None:
    return
