"""Replication between brokers: sessions out to the primaries of our secondaries, sessions in from theirs.

One session per direction and pair carries all shared partitions. The secondary opens it, fetches on it and tells its
progress; the primary answers. Order within a session is kept end to end, because the primary counts a Progress only
behind a fetch of the same session.
"""

from __future__ import annotations

import asyncio

import aiohttp

from ferryline.protocol.errors import CorruptBatch, FerrylineError, Forbidden, MalformedRequest
from ferryline.protocol.frames import Frame, Kind, decode_header
from ferryline.protocol.limits import FRAME_ENTRIES_MAX
from ferryline.protocol.messages import (
    RECORDS,
    ROLE_BROKER,
    STATE,
    Hello,
    Message,
    ReplicaData,
    ReplicaDatas,
    ReplicaFetch,
    ReplicaFetches,
    ReplicaProgress,
    ReplicaProgresses,
)
from ferryline.protocol.records import split_batches
from ferryline_broker.core import events as ev
from ferryline_broker.core.node import NodeCore
from ferryline_broker.core.replica import ROLE_PRIMARY, ROLE_SECONDARY
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.outbox import DataOutbox, FetchOutbox
from ferryline_broker.sessions import PeerState
from ferryline_service.logs import get_logger
from ferryline_service.node import NodeConnection
from ferryline_service.server_session import ServerSession
from ferryline_service.tls import TlsFiles

_RETRY_FIRST_S, _RETRY_MAX_S = 0.02, 1.0
_CONNECT_TIMEOUT_S = 2.0
_BACKLOG_BYTES = 4 * 1024 * 1024  # unsent to one secondary: below this answers are as large as asked for ...
_BACKLOG_BYTES_MAX = 32 * 1024 * 1024  # ... and above this they carry nothing
_ROOM_FULL, _ROOM_TIGHT = 2**31, 64 * 1024
_log = get_logger()


class PeerLink:
    """Our session to one primary; reconnects until it is closed."""

    def __init__(self, peers: Peers, broker_id: int) -> None:
        self.broker_id = broker_id
        self.connection: NodeConnection | None = None
        self.outbox = FetchOutbox(self._tell)
        self._peers = peers
        self._lost = asyncio.Event()
        self._hurry = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def _tell(self, kind: int, header: Message, parts: list[ev.Bytes]) -> None:
        if self.connection is not None:
            self.connection.tell(kind, header, parts)

    def hurry(self) -> None:
        """The peer's address or state changed: try again now."""
        self._hurry.set()

    def close(self) -> None:
        self._task.cancel()
        if self.connection is not None:
            self.connection.on_close = None
            self.connection.abort()

    async def _run(self) -> None:
        delay, told = _RETRY_FIRST_S, ""
        while True:
            self._hurry.clear()
            try:
                connection = await self._peers.connect(self)
            except Exception as error:
                if not isinstance(error, FerrylineError):
                    _log.exception("session with a primary failed", broker=self.broker_id)
                if str(error) != told:
                    told = str(error)
                    _log.warning("no session with a primary", broker=self.broker_id, error=told)
                try:
                    async with asyncio.timeout(delay):
                        await self._hurry.wait()
                    delay = _RETRY_FIRST_S
                except TimeoutError:
                    delay = min(delay * 2, _RETRY_MAX_S)
                continue
            delay, told = _RETRY_FIRST_S, ""
            self._lost.clear()
            if not connection.closed:
                self.connection = connection
                self._peers.link_up(self)
                await self._lost.wait()

    def lost(self, connection: NodeConnection) -> None:
        if self.connection is connection:
            self.connection = None
            self.outbox.clear()
            self._lost.set()
            self._peers.link_down(self)


class Peers:
    """All replication sessions of this broker; the driver's `PeerPort`."""

    def __init__(self, driver: PartitionDriver, node: NodeCore, http: aiohttp.ClientSession, tls: TlsFiles) -> None:
        self._driver = driver
        self._node = node
        self._http = http
        self._tls = tls
        self._links: dict[int, PeerLink] = {}
        self._fetching: dict[PeerLink, None] = {}  # links with something in their outbox
        self._sessions: dict[int, ServerSession] = {}  # incoming, by number
        self._current: dict[int, ServerSession] = {}  # incoming, newest by broker
        self._answering: dict[ServerSession, None] = {}
        self._numbers = 0
        self._closed = False

    # -- out: our secondaries fetch -----------------------------------------------------------------

    def reconcile(self) -> None:
        """Keep a session to each primary of a replica of ours, and no others. Call when the metadata changed."""
        if self._closed:
            return
        me = self._node.broker_id
        wanted: set[int] = set()
        for part in self._node.metadata.partitions.values():
            if part.primary and part.primary != me and me in part.replicas:
                wanted.add(part.primary)
        for broker_id in sorted(set(self._links) - wanted):
            link = self._links.pop(broker_id)
            self._fetching.pop(link, None)
            link.close()
        for broker_id in sorted(wanted):
            link = self._links.get(broker_id) or self._open(broker_id)
            link.hurry()

    def _open(self, broker_id: int) -> PeerLink:
        link = self._links[broker_id] = PeerLink(self, broker_id)
        return link

    async def connect(self, link: PeerLink) -> NodeConnection:
        """A session to the primary, HELLO done. Raises FerrylineError."""
        node = self._node
        broker = node.metadata.brokers.get(link.broker_id)
        if broker is None or not node.registered:
            raise FerrylineError(f"broker {link.broker_id} is not known yet")
        hello = Hello(
            role=ROLE_BROKER,
            cluster_id=node.metadata.cluster_id,
            broker_id=node.broker_id,
            broker_epoch=node.broker_epoch,
            client=f"broker-{node.broker_id}",
        )
        return await NodeConnection.connect(
            self._http,
            broker.internal,
            hello=hello,
            tls=self._tls.client,
            expect=f"broker-{link.broker_id}",
            on_frame=self._on_data_frame,
            on_close=link.lost,
            timeout_s=_CONNECT_TIMEOUT_S,
        )

    def link_up(self, link: PeerLink) -> None:
        _log.info("session with a primary is open", broker=link.broker_id)
        self._driver.feed_all(ev.PeerUp(link.broker_id), ROLE_SECONDARY)

    def link_down(self, link: PeerLink) -> None:
        self._driver.feed_all(ev.PeerDown(link.broker_id), ROLE_SECONDARY)

    def add_fetch(self, to: int, fetch: ReplicaFetch) -> None:
        self._add(to, fetch)

    def add_progress(self, to: int, progress: ReplicaProgress) -> None:
        self._add(to, progress)

    def _add(self, to: int, item: ReplicaFetch | ReplicaProgress) -> None:
        link = self._links.get(to)
        if link is None:
            if not self._closed:
                self._open(to)  # PeerUp will make the core ask again
        elif link.connection is not None:
            link.outbox.add(item)
            self._fetching[link] = None

    def _on_data_frame(self, connection: NodeConnection, frame: Frame) -> None:
        if frame.kind != Kind.REPLICA_DATA:
            raise MalformedRequest(f"kind {frame.kind} is not for a secondary")
        datas = decode_header(frame.header, ReplicaDatas)
        payload, at = frame.payload, 0
        sender = datas.broker_id
        if connection.identity is not None and connection.identity != f"broker-{sender}":
            raise Forbidden(f"{connection.identity} answers as broker {sender}")
        for data in datas.answers:
            sizes = (0, 0) if data.logs is None else (data.logs[RECORDS].size, data.logs[STATE].size)
            parts = (payload[at : at + sizes[0]], payload[at + sizes[0] : at + sizes[0] + sizes[1]])
            at += sizes[0] + sizes[1]
            if at > len(payload):
                raise MalformedRequest(f"payload: {len(payload)} bytes are less than the header announces")
            self._take(sender, data, parts)

    def _take(self, sender: int, data: ReplicaData, parts: tuple[memoryview, memoryview]) -> None:
        """Check what came, byte by byte, before the core hears of it."""
        hosted = self._driver.replicas.get((data.topic_id, data.partition))
        if hosted is None:
            return
        try:
            batches = (
                ev.LogBatches(parts[RECORDS], split_batches(parts[RECORDS]) if parts[RECORDS] else []),
                ev.LogBatches(parts[STATE], split_batches(parts[STATE]) if parts[STATE] else []),
            )
        except CorruptBatch as error:
            _log.error("corrupt data from a primary", broker=sender, partition=hosted.name, error=str(error))
            self._driver.feed(hosted, ev.DataCorrupt(sender, data.epoch, data.fetch_id))
            return
        self._driver.feed(hosted, ev.DataReceived(sender, data, batches))

    # -- in: other brokers' secondaries fetch from us -----------------------------------------------

    def on_frame(self, session: ServerSession, frame: Frame) -> None:
        """REPLICA_FETCH and REPLICA_PROGRESS. Only an authenticated broker gets here with a PeerState."""
        state = self._state(session)
        if frame.kind == Kind.REPLICA_FETCH:
            fetches = decode_header(frame.header, ReplicaFetches)
            self._check_sender(session, fetches.broker_id, len(fetches.fetches))
            for fetch in fetches.fetches:
                hosted = self._driver.replicas.get((fetch.topic_id, fetch.partition))
                if hosted is None or hosted.broken:
                    refused = ReplicaData(
                        fetch.topic_id, fetch.partition, fetch.epoch, fetch.fetch_id, None, "NOT_PRIMARY"
                    )
                    self.add_data(state.number, refused, [])
                    self._driver.end_pass_soon()
                    continue
                event = ev.FetchReceived(state.number, session.broker_id, fetches.broker_epoch, fetch)
                self._driver.feed(hosted, event)
        else:
            told = decode_header(frame.header, ReplicaProgresses)
            self._check_sender(session, told.broker_id, len(told.progress))
            for progress in told.progress:
                hosted = self._driver.replicas.get((progress.topic_id, progress.partition))
                if hosted is not None:
                    self._driver.feed(
                        hosted, ev.ProgressReceived(state.number, session.broker_id, told.broker_epoch, progress)
                    )

    def _check_sender(self, session: ServerSession, broker_id: int, entries: int) -> None:
        if broker_id != session.broker_id:
            raise Forbidden(f"broker {session.broker_id} speaks as broker {broker_id}")
        if entries > FRAME_ENTRIES_MAX:
            raise MalformedRequest(f"entries: {entries} is over the limit of {FRAME_ENTRIES_MAX}")

    def _state(self, session: ServerSession) -> PeerState:
        state = session.state
        if type(state) is PeerState:
            return state
        if session.role != ROLE_BROKER or state is not None:
            raise Forbidden("replication is for brokers only; this session is a client's")
        self._numbers += 1

        def tell(kind: int, header: Message, parts: list[ev.Bytes]) -> None:
            session.tell(kind, header, parts)
            session.flush()

        state = session.state = PeerState(self._numbers, DataOutbox(self._node.broker_id, tell))
        self._sessions[state.number] = session
        self._current[session.broker_id] = session
        session.close_callbacks.append(self._session_closed)
        return state

    def _session_closed(self, session: ServerSession) -> None:
        state: PeerState = session.state
        self._sessions.pop(state.number, None)
        self._answering.pop(session, None)
        if self._current.get(session.broker_id) is session:
            # Only the newest session: the end of an overtaken one must not unpark what came after it.
            del self._current[session.broker_id]
            self._driver.feed_all(ev.PeerDown(session.broker_id), ROLE_PRIMARY)

    def room(self, session: int) -> int:
        """Less while much is unsent, so that the catch-up of many partitions costs neither memory without bound nor the
        others' latency: a small append still passes where a large read has to wait for its next fetch."""
        to = self._sessions.get(session)
        if to is None:
            return 0
        state: PeerState = to.state
        backlog = to.unsent_bytes + state.outbox.held_bytes
        if backlog < _BACKLOG_BYTES:
            return _ROOM_FULL
        return _ROOM_TIGHT if backlog < _BACKLOG_BYTES_MAX else 0

    def add_data(self, session: int, data: ReplicaData, parts: list[ev.Bytes]) -> None:
        to = self._sessions.get(session)
        if to is not None:
            state: PeerState = to.state
            state.outbox.add(data, parts)
            self._answering[to] = None

    # -- both ---------------------------------------------------------------------------------------

    def emit(self) -> None:
        if self._answering:
            answering, self._answering = self._answering, {}
            for session in answering:
                session.state.outbox.emit()
        if self._fetching:
            fetching, self._fetching = self._fetching, {}
            node = self._node
            for link in fetching:
                link.outbox.emit(node.broker_id, node.broker_epoch)

    def close(self) -> None:
        self._closed = True
        links, self._links = self._links, {}
        self._fetching.clear()
        for link in links.values():
            link.close()
