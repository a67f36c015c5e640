"""Sessions by broker, and the picture of the cluster that says where the brokers are.

`Connections` keeps one session per broker and opens it when first asked. `MetadataWatch` keeps the cluster's metadata
fresh with two parked polls, one at a coordinator and one at a broker: whichever hears of a change first wins, and
clients start and fail over during a coordinator outage from what the brokers know.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from ferryline.core.metadata import Routing
from ferryline.core.retry import Backoff, Jitter, told_ms
from ferryline.finding import hinted
from ferryline.protocol.errors import (
    ClientClosed,
    ConnectionFailed,
    DeadlineExceeded,
    FerrylineError,
    InternalError,
    PrimaryNotAvailable,
    Unauthorized,
)
from ferryline.protocol.frames import Kind
from ferryline.protocol.metadata import MetadataAnswer
from ferryline.transport import Connector, Session

log = logging.getLogger("ferryline.connections")

POLL_MS = 30_000  # parked metadata poll
POLL_MARGIN_S = 5.0
ASK_COORDINATOR_S = 2.0  # then a broker is asked, whose copy is a little older
OLDER_S = 2.0  # by so much at most, unless it has lost its coordinator
DENIALS = 3
COORDINATOR = 0  # key of the coordinator's session among those of brokers, whose ids begin at 1


class Connections:
    """One session per broker, opened on demand, shared by everything in the client."""

    def __init__(self, connector: Connector, routing: Routing) -> None:
        self.connector = connector
        self.routing = routing
        self.on_lost: list[Callable[[int], None]] = []  # told the broker id whose session ended
        self._sessions: dict[int, Session] = {}
        self._opening: dict[int, asyncio.Task[Session]] = {}
        self._closed = False

    def ready(self, broker: int) -> Session | None:
        """The open session to a broker, if there is one now."""
        session = self._sessions.get(broker)
        return session if session is not None and session.error is None else None

    async def session(self, broker: int, *, timeout: float) -> Session:
        """The session to a broker, opened if need be.

        Raises ConnectionFailed, PrimaryNotAvailable (nobody knows its address) or DeadlineExceeded.
        """
        ready = self.ready(broker)
        if ready is not None:
            return ready
        if self._closed:
            raise ClientClosed("the client is closed")
        opening = self._opening.get(broker)
        if opening is None:
            opening = self._opening[broker] = asyncio.get_running_loop().create_task(self._open(broker))
            opening.add_done_callback(lambda task: self._opened(broker, task))
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(opening)
        except TimeoutError:
            raise DeadlineExceeded(f"no session to broker {broker} within {timeout:g} s") from None
        except asyncio.CancelledError:
            if opening.cancelled():
                raise ClientClosed("the client is closed") from None
            raise

    def adopt(self, session: Session) -> None:
        """Take over a session that was opened by address (a bootstrap URL) once its broker is known."""
        broker = session.peer.broker_id
        if broker and self.ready(broker) is None:
            self._keep(broker, session)

    async def _open(self, broker: int) -> Session:
        url = self.routing.address(broker)
        if url is None:
            raise PrimaryNotAvailable(f"the address of broker {broker} is not known", broker=broker)
        session = await self.connector.open(url, self.routing.cluster_id)
        if session.peer.broker_id != broker:  # another broker took over the address
            await session.close()
            raise ConnectionFailed(f"{url}: expected broker {broker}, found {session.peer.broker_id}", url=url)
        self._keep(broker, session)
        return session

    def _opened(self, broker: int, task: asyncio.Task[Session]) -> None:
        self._opening.pop(broker, None)
        if not task.cancelled() and task.exception() is not None:
            log.debug("broker %d: %s", broker, task.exception())

    def _keep(self, broker: int, session: Session) -> None:
        self._sessions[broker] = session
        session.on_lost.append(lambda lost: self._lost(broker, lost))

    def _lost(self, broker: int, session: Session) -> None:
        if self._sessions.get(broker) is session:
            del self._sessions[broker]
        for callback in list(self.on_lost):
            callback(broker)

    async def close(self) -> None:
        self._closed = True
        for task in list(self._opening.values()):
            task.cancel()
        sessions = list(self._sessions.values())
        if sessions:
            await asyncio.gather(*(session.close() for session in sessions))


class MetadataWatch:
    """Keeps `Routing` up to date. ``on_change`` callbacks run after every change, in the loop."""

    def __init__(self, connections: Connections, urls: Sequence[str], *, seed: int = 0) -> None:
        self.connections = connections
        self.routing = connections.routing
        self.urls = list(urls)
        self.on_change: list[Callable[[], None]] = []
        self._jitter = Jitter(seed)
        self._tasks: list[asyncio.Task[None]] = []
        self._nudges = [asyncio.Event(), asyncio.Event()]
        self._changed: asyncio.Event = asyncio.Event()
        self._last_error: FerrylineError | None = None
        self._denied: dict[int, FerrylineError] = {}  # by slot that was denied again and again, by all it asked
        self._by_url: dict[str, Session] = {}

    def start(self) -> None:
        if not self._tasks:
            loop = asyncio.get_running_loop()
            self._tasks = [loop.create_task(self._watch(slot)) for slot in (0, 1)]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tasks = []
        sessions = [session for session in self._by_url.values() if session.is_open]
        if sessions:
            await asyncio.gather(*(session.close() for session in sessions))

    def refresh(self) -> None:
        """What we know is probably old. A parked poll needs no push; one that backs off tries again now."""
        for nudge in self._nudges:
            nudge.set()

    def change(self) -> asyncio.Event:
        """An event that is set at the next change of the metadata."""
        return self._changed

    async def wait_for(self, change: asyncio.Event, timeout: float) -> bool:
        """Wait for a change, at most ``timeout`` seconds. Returns whether there was one."""
        try:
            async with asyncio.timeout(timeout):
                await change.wait()
        except TimeoutError:
            return False
        return True

    async def until(self, satisfied: Callable[[], bool], *, timeout: float) -> bool:
        """Wait until the metadata satisfies a condition. Returns whether it did in time."""
        try:
            async with asyncio.timeout(timeout):
                while not satisfied():
                    changed = self._changed
                    self.refresh()
                    await changed.wait()
        except TimeoutError:
            return satisfied()
        return True

    async def ready(self, *, timeout: float) -> None:
        """Wait for the first picture of the cluster. Raises ConnectionFailed with the last cause at the deadline, or
        Unauthorized as soon as it is sure that nobody lets this client in."""
        await self.until(lambda: self.routing.revision >= 0 or len(self._denied) == 2, timeout=timeout)
        if self.routing.revision >= 0:
            return
        if len(self._denied) == 2:
            raise self._denied[0]
        cause = self._last_error
        text = f"no answer from {', '.join(self.urls)} within {timeout:g} s"
        raise ConnectionFailed(f"{text}: {cause}" if cause else text, urls=self.urls) from cause

    async def ask(self, *, timeout: float, known: Callable[[], bool] = lambda: True) -> None:
        """Fetch the metadata now, from a coordinator if one answers soon, else from a broker. What a broker does not
        know may have been made a moment ago: if ``known`` is false then, its changes are waited for, for `OLDER_S`.

        Raises the last error when nobody answered within ``timeout`` seconds.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        last: FerrylineError = DeadlineExceeded(f"nobody answered within {timeout:g} s")
        silent: Session | None = None
        for slot in (0, 1, 0, 1):
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                break
            if slot == 0:
                left = min(left, ASK_COORDINATOR_S)
            try:
                async with asyncio.timeout(left):
                    source = await self._source(slot, silent)
                    silent = source  # unless it answers
                    await self._poll(source, 0, left)
                    if source.peer.server != "coordinator":
                        await self._catch_up(source, known)
            except TimeoutError:
                pass
            except FerrylineError as error:
                last, silent = error, None
                if pause_ms := told_ms(error):
                    await asyncio.sleep(min(pause_ms / 1000, max(0.0, deadline - asyncio.get_running_loop().time())))
            else:
                return
        raise last

    async def _catch_up(self, broker: Session, known: Callable[[], bool]) -> None:
        try:
            async with asyncio.timeout(OLDER_S):
                while not known():
                    await self._poll(broker, round(OLDER_S * 1000), OLDER_S + POLL_MARGIN_S)
        except TimeoutError:
            pass

    # -- the two loops -----------------------------------------------------------------------------

    async def _watch(self, slot: int) -> None:
        """Slot 0 prefers a coordinator, slot 1 a broker; each takes what it finds."""
        failures, backoff = 0, Backoff(20, 500)
        nudge = self._nudges[slot]
        while True:
            try:
                session = await self._source(slot)
                wait_ms = POLL_MS if self.routing.revision >= 0 else 0
                await self._poll(session, wait_ms, wait_ms / 1000 + POLL_MARGIN_S)
                failures = 0
                self._denied.pop(slot, None)
            except Exception as error:
                failures += 1
                if not isinstance(error, FerrylineError):  # not foreseen: say so, and go on
                    log.exception("metadata poll %d", slot)
                    error = InternalError(str(error))
                self._last_error = error
                log.debug("metadata poll %d: %s", slot, error)
                self._note_denial(slot, failures, error)
                nudge.clear()
                delay_ms = backoff.pause_ms(failures, self._jitter.next(), error)
                if told_ms(error):
                    await asyncio.sleep(delay_ms / 1000)
                elif failures > 1 or not error.retriable:
                    try:  # a nudge may cut the wait short, but never below a fifth: senders nudge often in an outage
                        await asyncio.sleep(delay_ms / 5000)
                        async with asyncio.timeout(delay_ms / 1250):
                            await nudge.wait()
                    except TimeoutError:
                        pass

    def _note_denial(self, slot: int, failures: int, error: FerrylineError) -> None:
        """Several in a row: a key that was just made is known to every broker a moment later."""
        if not isinstance(error, Unauthorized):
            self._denied.pop(slot, None)
        elif failures >= DENIALS:
            self._denied[slot] = error
            self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _poll(self, session: Session, wait_ms: int, timeout: float) -> None:
        answer, _ = await session.request(Kind.METADATA, self.routing.request(wait_ms), MetadataAnswer, timeout=timeout)
        self.take(answer)

    def take(self, answer: MetadataAnswer) -> None:
        if not self.routing.apply(answer):
            return
        self._wake()
        for callback in list(self.on_change):
            try:
                callback()
            except Exception:
                log.exception("a metadata callback failed")

    async def _source(self, slot: int, silent: Session | None = None) -> Session:
        """An open session to poll, but not ``silent``, in order of preference; what is known to work goes first."""
        candidates = self._candidates(slot)
        for url, broker in candidates:
            session = self.connections.ready(broker) if broker else self._by_url.get(url)
            if session is not None and session.is_open and session is not silent:
                return session
        last: FerrylineError = ConnectionFailed("no other address is known")
        for url, broker in candidates:  # grows while it is gone through
            try:
                if broker:
                    found = await self.connections.session(broker, timeout=self.connections.connector.connect_timeout)
                else:
                    found = await self._open(url)
                if found is not silent:
                    return found
            except FerrylineError as error:
                last = error
                if (active := hinted(error)) and (active, COORDINATOR) not in candidates:
                    candidates.append((active, COORDINATOR))
        raise last

    def _candidates(self, slot: int) -> list[tuple[str, int]]:
        """(url, broker id or 0). Coordinators by address, brokers by id; bootstrap addresses last."""
        brokers = [("", broker) for broker in self.routing.live_brokers()]
        if brokers:  # spread clients over brokers
            turn = int(self._jitter.next() * len(brokers))
            brokers = brokers[turn:] + brokers[:turn]
        known = {self.routing.address(broker) for _, broker in brokers}
        coordinators = [(url, COORDINATOR) for url in self.routing.coordinators]
        rest = [(url, COORDINATOR) for url in self.urls if url not in known and (url, COORDINATOR) not in coordinators]
        if not brokers and slot == 1:
            rest.reverse()  # before anything is known, the two loops begin at different addresses
        return coordinators + rest + brokers if slot == 0 else brokers + rest + coordinators

    async def _open(self, url: str) -> Session:
        session = self._by_url.get(url)
        if session is not None and session.is_open:
            return session
        session = await self.connections.connector.open(url, self.routing.cluster_id)
        self.connections.adopt(session)
        self._by_url[url] = session
        return session
