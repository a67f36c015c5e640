"""Heartbeats of group members, on a thread of their own with their own loop and connection.

A handler that blocks the application's loop for minutes must not cost it its partitions. So this thread repeats what
the member last declared, whatever the application does, and hands the answers over when the loop comes round. It ends
the renewal when a record has been in the application's hands for ``max_processing``: a deadlock must not hold
partitions for ever. A watchdog writes to the log where the application's loop is stuck.

Receivers of queues have their leases renewed here for the same reason (`host`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import msgspec

from ferryline.core.retry import Backoff, Jitter, told_ms
from ferryline.finding import hinted
from ferryline.protocol.errors import (
    ClientClosed,
    ConnectionFailed,
    CoordinatorUnavailable,
    FerrylineError,
    InternalError,
    RequestTimedOut,
    Throttled,
    Unavailable,
)
from ferryline.protocol.frames import Kind
from ferryline.protocol.messages import GroupAssignment, GroupHeartbeat
from ferryline.transport import Connector, Session

if TYPE_CHECKING:
    from ferryline.client import Client

log = logging.getLogger("ferryline.heartbeats")

ANSWER_S = 5.0
LEAVE_S = 2.0
OPEN_S = 2.0  # a stopped coordinator takes connections and says nothing: try the next one
STUCK_AFTER_S = 5.0  # the application's loop did not come round for this long: say where it is
STUCK_AGAIN_S = 60.0
HOSTED_END_S = 1.0  # how long the end of the thread waits for what it hosts

Work = Callable[[Connector], Coroutine[Any, Any, None]]


class Member:
    """One membership, as the thread sees it. ``declared`` is replaced as a whole by the application's loop."""

    def __init__(
        self,
        declared: GroupHeartbeat,
        on_answer: Callable[[GroupAssignment, GroupHeartbeat], None],
        on_error: Callable[[FerrylineError], None],
        *,
        interval_s: float,
        max_processing_s: float,
        progress: Callable[[], object],
    ) -> None:
        self.declared = declared
        self.on_answer = on_answer
        self.on_error = on_error
        self.interval_s = interval_s
        self.max_processing_s = max_processing_s
        self._progress = progress  # changes whenever the application takes a record; None while it waits for one
        self._seen: tuple[object, float] = (None, 0.0)  # last progress, and when it was new
        self.loop = asyncio.get_running_loop()
        self.wake: asyncio.Event | None = None  # belongs to the thread's loop
        self.task: asyncio.Task[None] | None = None
        self.sequence = 0

    def overdue(self) -> bool:
        """Whether one record has been in processing for too long. Asked at each heartbeat, by the thread."""
        progress, now = self._progress(), time.monotonic()
        if progress is None or progress != self._seen[0]:
            self._seen = (progress, now)
            return False
        return now - self._seen[1] > self.max_processing_s


class Hosted:
    """Other work on the thread's loop, until `stop`."""

    def __init__(self, thread: HeartbeatThread, work: Work) -> None:
        self.work = work
        self.task: asyncio.Task[None] | None = None  # belongs to the thread's loop
        self._thread = thread

    def stop(self) -> None:
        """End it, without waiting."""
        self._thread.unhost(self)


def thread_of(client: Client) -> HeartbeatThread:
    """The heartbeat thread of a client, made at the first call."""
    if client.heartbeats is None:
        client.heartbeats = HeartbeatThread(client)
    return client.heartbeats


class HeartbeatThread:
    """All memberships of one client, and what else it hosts. Starts with the first of them, ends with `close`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._stop: asyncio.Event | None = None
        self._session: Session | None = None
        self._opening: asyncio.Lock | None = None
        self._connector: Connector | None = None
        self._members: list[Member] = []
        self._hosted: list[Hosted] = []
        self._app_loop = asyncio.get_running_loop()
        self._app_thread = threading.get_ident()
        self._app_seen = time.monotonic()

    # -- called by the application's loop ------------------------------------------------------------

    async def join(self, member: Member) -> None:
        """Begin to send heartbeats for a member."""
        await self._start()
        self._call(self._add, member)

    async def host(self, work: Work) -> Hosted:
        """Run ``work(connector)`` on the thread until it is stopped or the thread ends."""
        await self._start()
        hosted = Hosted(self, work)
        self._call(self._begin, hosted)
        return hosted

    def unhost(self, hosted: Hosted) -> None:
        """End what `host` began."""
        self._call(self._end, hosted)

    def declare(self, member: Member, heartbeat: GroupHeartbeat) -> None:
        """What the heartbeats say from now on; the next one is sent at once."""
        member.declared = heartbeat
        self._call(self._wake, member)

    def stop(self, member: Member) -> None:
        """Stop the heartbeats of a member without a word; its session goes on until its end."""
        self._call(self._remove, member)

    async def leave(self, member: Member, heartbeat: GroupHeartbeat) -> None:
        """Stop the heartbeats of a member and say goodbye, for at most ``LEAVE_S`` seconds."""
        member.declared = heartbeat
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        leaving = self._leave(member)
        try:
            future = asyncio.run_coroutine_threadsafe(leaving, loop)
        except RuntimeError:
            leaving.close()
            return
        try:
            async with asyncio.timeout(LEAVE_S + 1):
                await asyncio.wrap_future(future)
        except (FerrylineError, TimeoutError) as error:
            log.debug("leaving: %s", error)

    async def close(self) -> None:
        """End the thread; waits for it at most two seconds."""
        if self._thread is None or self._loop is None or self._stop is None:
            return
        self._call(self._stop.set)
        thread = self._thread
        for _ in range(200):
            if not thread.is_alive():
                return
            await asyncio.sleep(0.01)

    async def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ferryline-heartbeats", daemon=True)
            self._thread.start()
        await asyncio.wrap_future(self._started)

    def _call(self, function: Callable[..., object], *args: object) -> None:
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(function, *args)
            except RuntimeError:
                pass  # the thread has ended

    # -- the thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except Exception:
            log.exception("the heartbeat thread failed")

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._opening = asyncio.Lock()
        client = self._client
        self._connector = client.connector.sibling(f"{client.name}+heartbeats")
        self._started.set_result(None)
        watchdog = self._loop.create_task(self._watch())
        try:
            await self._stop.wait()
        finally:
            watchdog.cancel()
            for member in self._members:
                if member.task is not None:
                    member.task.cancel()
            hosted = [item.task for item in self._hosted if item.task is not None]
            for task in hosted:
                task.cancel()
            if hosted:
                await asyncio.wait(hosted, timeout=HOSTED_END_S)
            if self._session is not None:
                await self._session.close()
            await self._connector.close()

    def _begin(self, hosted: Hosted) -> None:
        assert self._connector is not None
        self._hosted.append(hosted)
        hosted.task = asyncio.get_running_loop().create_task(hosted.work(self._connector))
        hosted.task.add_done_callback(lambda task: self._ended(hosted, task))

    def _end(self, hosted: Hosted) -> None:
        if hosted.task is not None:
            hosted.task.cancel()

    def _ended(self, hosted: Hosted, task: asyncio.Task[None]) -> None:
        self._hosted.remove(hosted)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("work on the heartbeat thread failed", exc_info=error)

    def _add(self, member: Member) -> None:
        member.wake = asyncio.Event()
        self._members.append(member)
        member.task = asyncio.get_running_loop().create_task(self._beat(member))

    def _wake(self, member: Member) -> None:
        if member.wake is not None:
            member.wake.set()

    async def _beat(self, member: Member) -> None:
        failures, backoff, jitter = 0, Backoff(50, 1_000), Jitter(id(member))
        wake = member.wake
        assert wake is not None
        while True:
            wake.clear()
            pause_s = member.interval_s
            if member.overdue():
                log.error(
                    "group %s: a record has been in processing for over %g s; this member stops its heartbeats",
                    member.declared.group, member.max_processing_s,
                )  # fmt: skip
            else:
                try:
                    answer, sent = await self._send(member)
                    failures = 0
                    self._tell(member, member.on_answer, answer, sent)
                    pause_s = answer.heartbeat_ms / 1000
                except Exception as error:
                    failures += 1
                    if not isinstance(error, FerrylineError):  # not foreseen: say so, and go on
                        log.exception("heartbeat of group %s", member.declared.group)
                        error = InternalError(str(error))
                    log.debug("heartbeat of group %s: %s", member.declared.group, error)
                    self._tell(member, member.on_error, error)
                    pause_s = backoff.pause_ms(failures, jitter.next(), error) / 1000
                    pause_s = pause_s if told_ms(error) else min(member.interval_s, pause_s)
            try:
                async with asyncio.timeout(pause_s):
                    await wake.wait()
            except TimeoutError:
                pass

    async def _send(self, member: Member) -> tuple[GroupAssignment, GroupHeartbeat]:
        member.sequence += 1
        sent = msgspec.structs.replace(member.declared, sequence=member.sequence)
        session = await self._coordinator()
        try:
            answer, _ = await session.request(Kind.GROUP_HEARTBEAT, sent, GroupAssignment, timeout=ANSWER_S)
        except (RequestTimedOut, Unavailable):
            # Stopped, cut off, or not the active one any more: the next heartbeat looks for another coordinator.
            if self._session is session and len(self._urls()) > 1:
                self._session = None
                await session.close()
            raise
        return answer, sent

    def _urls(self) -> list[str]:
        client = self._client
        return [*dict.fromkeys([*client.routing.coordinators, *client.urls])]

    def _remove(self, member: Member) -> None:
        if member.task is not None:
            member.task.cancel()
        if member in self._members:
            self._members.remove(member)

    async def _leave(self, member: Member) -> None:
        self._remove(member)
        async with asyncio.timeout(LEAVE_S):
            await self._send(member)

    async def _coordinator(self) -> Session:
        """A session to a coordinator; brokers do not decide about groups."""
        assert self._opening is not None
        assert self._connector is not None
        async with self._opening:
            if self._session is not None and self._session.is_open:
                return self._session
            client = self._client
            last: FerrylineError = CoordinatorUnavailable("no coordinator is known")
            urls = self._urls()
            for url in urls:  # grows while it is gone through
                try:
                    session = await self._connector.open(url, client.routing.cluster_id, timeout=OPEN_S)
                except FerrylineError as error:
                    last = error
                    if (active := hinted(error)) and active not in urls:
                        urls.append(active)
                    continue
                if session.peer.server == "coordinator":
                    self._session = session
                    return session
                await session.close()
                last = ConnectionFailed(f"{url} is a broker, not a coordinator")
            if isinstance(last, Throttled):  # it does answer: not now
                raise last
            raise CoordinatorUnavailable(f"no coordinator answers: {last}") from last

    def _tell(self, member: Member, callback: Callable[..., None], *args: object) -> None:
        try:
            member.loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            raise ClientClosed("the application's loop has ended") from None

    # -- watchdog ------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        told_at = 0.0
        while True:
            try:
                self._app_loop.call_soon_threadsafe(self._seen)
            except RuntimeError:  # the application's loop was closed without closing the client
                if self._stop is not None:
                    self._stop.set()
                return
            await asyncio.sleep(1.0)
            now = time.monotonic()
            stuck_s = now - self._app_seen
            if stuck_s > STUCK_AFTER_S and now - told_at > STUCK_AGAIN_S:
                told_at = now
                log.warning("the event loop has not come round for %.0f s; it is at %s", stuck_s, self._where())

    def _seen(self) -> None:
        self._app_seen = time.monotonic()

    def _where(self) -> str:
        """File and line where the application's thread stands now."""
        frame = sys._current_frames().get(self._app_thread)
        if frame is None:
            return "an unknown place"
        stack = traceback.extract_stack(frame)
        return " <- ".join(f"{entry.filename}:{entry.lineno} ({entry.name})" for entry in reversed(stack[-3:]))
