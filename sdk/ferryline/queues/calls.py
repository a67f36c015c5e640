"""Frames on their way to brokers, each with a session that may have to be opened first, and a deadline."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ferryline.protocol.errors import ConnectionFailed, DeadlineExceeded, FerrylineError, RequestTimedOut
from ferryline.protocol.frames import FLAG_MORE, Frame
from ferryline.tasks import Tasks
from ferryline.transport import Session

if TYPE_CHECKING:
    from ferryline.client import Client

log = logging.getLogger("ferryline.queue")

Done = Callable[[Frame | None, FerrylineError | None], None]


class Call:
    """One frame until its answer; ``done(frame, error)`` is called once, or for each answer until the one without
    FLAG_MORE. Without a task: acks come by the thousand."""

    __slots__ = ("calls", "correlation", "done", "header", "kind", "session", "timeout_s", "timer")

    def __init__(self, calls: Calls, kind: int, header: Any, timeout_s: float, done: Done) -> None:
        self.calls = calls
        self.kind = kind
        self.header = header
        self.timeout_s = timeout_s
        self.done = done
        self.session: Session | None = None
        self.correlation = 0
        self.timer: asyncio.TimerHandle | None = None

    def send(self, session: Session) -> None:
        self.session = session
        try:
            self.correlation = session.ask(self.kind, self.header, (), self.on_answer)
        except FerrylineError as error:
            self.on_answer(None, error)
            return
        self.timer = asyncio.get_running_loop().call_later(self.timeout_s, self._overdue)

    def on_answer(self, frame: Frame | None, error: FerrylineError | None) -> None:
        if self not in self.calls.open:
            return
        if frame is None or not frame.flags & FLAG_MORE:
            self._end()
        try:
            self.done(frame, error)
        except Exception:  # not foreseen; it must not end the session, which others use too
            log.exception("an answer could not be taken")

    def forget(self) -> None:
        """Heed no answer."""
        self._end()
        if self.session is not None:
            self.session.forget(self.correlation)

    def _overdue(self) -> None:
        if self.session is not None:
            self.session.forget(self.correlation)
        self.on_answer(None, RequestTimedOut(f"no answer within {self.timeout_s:g} s"))

    def _end(self) -> None:
        self.calls.open.pop(self, None)
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Calls:
    """All frames of one receiver that have no answer yet."""

    def __init__(self, client: Client) -> None:
        self.open: dict[Call, None] = {}
        self._client = client
        self._tasks = Tasks()

    def start(self, broker: int, kind: int, header: Any, timeout_s: float, done: Done) -> Call:
        """Send a frame to a broker; ``done`` may be called before this returns."""
        call = Call(self, kind, header, timeout_s, done)
        self.open[call] = None
        session = self._client.connections.ready(broker)
        if session is not None:
            call.send(session)
        else:
            self._tasks.spawn(self._connect(broker, call))
        return call

    async def close(self) -> None:
        """Heed no answer any more."""
        for call in list(self.open):
            call.forget()
        self._tasks.cancel()
        await self._tasks.join()

    async def _connect(self, broker: int, call: Call) -> None:
        connections = self._client.connections
        try:
            session = await connections.session(broker, timeout=connections.connector.connect_timeout + 1)
        except FerrylineError as error:
            if isinstance(error, DeadlineExceeded):  # of this connection, not of the records
                error = ConnectionFailed(f"broker {broker}: {error.message}")
            call.on_answer(None, error)
        else:
            if call in self.open:
                call.send(session)
