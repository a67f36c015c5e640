"""The broker's link to the coordinator: one session, every message of the node core and the partition cores.

The link only carries: what to send is decided by the cores, and a failed request is told to them as such. It finds the
active one among the known coordinators, and leaves one that has become silent while there are others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import aiohttp

from ferryline.protocol.access import AccessPolicy, StoredBytes
from ferryline.protocol.dead_letters import EnsureTopic, EnsureTopicOk
from ferryline.protocol.errors import (
    ConnectionFailed,
    CoordinatorStandby,
    FerrylineError,
    RequestTimedOut,
    StaleCoordinator,
)
from ferryline.protocol.frames import Frame, Kind, decode_header
from ferryline.protocol.messages import (
    ROLE_BROKER,
    AlterIsr,
    AlterIsrResult,
    AlterIsrs,
    AlterIsrsAnswer,
    Done,
    Handover,
    HandoverEntry,
    Heartbeat,
    HeartbeatOk,
    Hello,
    Register,
    RegisterOk,
    ReplicaReport,
    Report,
    Resign,
    ResignEntry,
)
from ferryline.protocol.metadata import MetadataAnswer, MetadataRequest, TopicConfig, TopicMeta
from ferryline_broker.core import events as ev
from ferryline_broker.core.node import NodeCore
from ferryline_broker.finding import find_active
from ferryline_service.logs import get_logger
from ferryline_service.node import NodeConnection
from ferryline_service.tls import TlsFiles

_RETRY_FIRST_S, _RETRY_MAX_S = 0.05, 1.0
_CONNECT_TIMEOUT_S = 2.0
_REQUEST_TIMEOUT_S = 5.0
_SILENCE_S = 3.0  # below the lease of a coordinator and the patience of its successor together
_LONG_POLL_SLACK_S = 5.0
_RUN_MAX = 2_000  # entries of one frame
_log = get_logger()


class LinkListener(Protocol):
    """Who hears what the coordinator says."""

    def node_event(self, event: ev.Event) -> None: ...

    def alter_isr_answered(self, result: AlterIsrResult) -> None: ...

    def hand_over_asked(self, entry: HandoverEntry) -> None: ...


class CoordinatorLink:
    """Keeps a session with one coordinator; the driver's `LinkPort`."""

    def __init__(
        self, node: NodeCore, http: aiohttp.ClientSession, tls: TlsFiles, cluster_id: str, urls: list[str]
    ) -> None:
        self.listener: LinkListener
        self._node = node
        self._http = http
        self._tls = tls
        self._cluster_id = cluster_id
        self._given = urls
        self._connection: NodeConnection | None = None
        self._lost = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._proposals: list[AlterIsr] = []
        self._resigns: list[ResignEntry] = []
        self._reports: list[ReplicaReport] = []
        self._loop = asyncio.get_running_loop()
        self._runner: asyncio.Task[None] | None = None
        self._closed = False
        self._last_url = ""
        self._unwanted = ""
        self.count: Callable[[str], None] = lambda code: None  # codes of what a coordinator was left for
        self.on_access: Callable[[AccessPolicy | None, bool], None] = lambda policy, registered: None

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def start(self) -> None:
        self._runner = self._loop.create_task(self._run())

    async def close(self) -> None:
        """End the session after what was sent; unanswered requests fail."""
        self._closed = True
        if self._runner is not None:
            self._runner.cancel()
        for task in list(self._tasks):
            task.cancel()
        if self._connection is not None:
            await self._connection.close()

    def reset(self, reason: str) -> None:
        """The node core does not want this coordinator, because it was replaced: find another one."""
        _log.warning("leaving the coordinator", reason=reason)
        self.count(StaleCoordinator.code)
        self._leave()

    def _leave(self) -> None:
        if self._connection is not None:
            self._unwanted = self._connection.url
            if self._last_url == self._unwanted:
                self._last_url = ""
            self._connection.abort()

    # -- the session --------------------------------------------------------------------------------

    async def _run(self) -> None:
        delay, told = _RETRY_FIRST_S, ""
        while True:
            try:
                url, connection = await find_active(self._urls(), self._connect)
            except Exception as error:
                if not isinstance(error, FerrylineError):
                    _log.exception("session with the coordinator failed")
                if str(error) != told:
                    told = str(error)
                    _log.warning("no session with a coordinator", error=told)
                await asyncio.sleep(delay)
                delay = min(delay * 2, _RETRY_MAX_S)
                continue
            told, delay = "", _RETRY_FIRST_S
            self._last_url, self._unwanted = url, ""
            self._lost.clear()
            if connection.closed:
                continue
            self._connection = connection
            _log.info("session with the coordinator is open", url=url)
            self.listener.node_event(ev.CoordinatorUp())
            await self._lost.wait()
            await asyncio.sleep(_RETRY_FIRST_S)

    def _urls(self) -> list[str]:
        """The last good one first, one that is not wanted last."""
        known = [*self._given, *self._node.metadata.coordinators]
        urls = [*dict.fromkeys([self._last_url, *known] if self._last_url else known)]
        if self._unwanted in urls:
            urls.remove(self._unwanted)
            urls.append(self._unwanted)
        return urls

    async def _connect(self, url: str) -> NodeConnection:
        node = self._node
        hello = Hello(
            role=ROLE_BROKER,
            cluster_id=self._cluster_id,
            broker_id=node.broker_id,
            broker_epoch=node.broker_epoch,
            client=f"broker-{node.broker_id}",
        )
        return await NodeConnection.connect(
            self._http,
            url,
            hello=hello,
            tls=self._tls.client,
            expect="coordinator",
            on_frame=self._on_frame,
            on_close=self._on_close,
            timeout_s=_CONNECT_TIMEOUT_S,
        )

    def _on_close(self, connection: NodeConnection) -> None:
        if self._connection is connection:
            self._connection = None
            self._lost.set()
            if not self._closed:
                _log.warning("session with the coordinator ended", url=connection.url)
                self.listener.node_event(ev.CoordinatorDown())

    def _on_frame(self, connection: NodeConnection, frame: Frame) -> None:
        if frame.kind == Kind.HANDOVER:
            for entry in decode_header(frame.header, Handover).entries:
                self.listener.hand_over_asked(entry)
        elif frame.kind == Kind.ACCESS and connection is self._connection:
            self.on_access(decode_header(frame.header, AccessPolicy), False)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- requests of the node core ------------------------------------------------------------------

    def send_register(self, register: Register) -> None:
        def refused(error: FerrylineError) -> ev.Event:
            return ev.RegisterAnswered(None, error.code, error.message)

        self._spawn(self._ask(Kind.REGISTER, register, RegisterOk, ev.RegisterAnswered, refused, _REQUEST_TIMEOUT_S))

    def send_heartbeat(self, heartbeat: Heartbeat) -> None:
        def refused(error: FerrylineError) -> ev.Event:
            return ev.HeartbeatAnswered(None, error.code)

        self._spawn(self._ask(Kind.HEARTBEAT, heartbeat, HeartbeatOk, ev.HeartbeatAnswered, refused, _SILENCE_S))

    def request_metadata(self, request: MetadataRequest) -> None:
        def refused(_: FerrylineError) -> ev.Event:
            return ev.MetadataReceived(None)

        timeout_s = request.wait_ms / 1000 + _LONG_POLL_SLACK_S
        self._spawn(self._ask(Kind.METADATA, request, MetadataAnswer, ev.MetadataReceived, refused, timeout_s))

    async def _ask(
        self,
        kind: Kind,
        header: Any,
        answer: type[Any],
        good: Callable[[Any], ev.Event],
        bad: Callable[[FerrylineError], ev.Event],
        timeout_s: float,
    ) -> None:
        connection = self._connection
        try:
            if connection is None:
                raise ConnectionFailed("no session with a coordinator")
            event = good(await connection.call(kind, header, answer, timeout_s=timeout_s))
        except FerrylineError as error:
            event = bad(error)
            self._note(connection, kind, error)
        if connection is not None and connection is self._connection:
            # An answer of an earlier session is not for the core any more: CoordinatorDown came in between.
            if isinstance(event, ev.RegisterAnswered):
                self._registered(event.answer)
            self.listener.node_event(event)

    def _registered(self, answer: RegisterOk | None) -> None:
        """Before anybody is served: who may do what. From a deposed coordinator the core takes nothing, nor do we."""
        if answer is not None and answer.coord_epoch >= self._node.coord_epoch:
            self.on_access(answer.access, True)

    def _note(self, connection: NodeConnection | None, kind: Kind, error: FerrylineError) -> None:
        """A silent or deposed coordinator is left, as long as there are others: the next one counts our heartbeats."""
        silent = kind == Kind.HEARTBEAT and isinstance(error, RequestTimedOut)
        if not silent and not isinstance(error, CoordinatorStandby):
            return
        if connection is None or connection is not self._connection or len(self._urls()) < 2:
            return
        _log.warning("leaving the coordinator", url=connection.url, reason=str(error))
        self.count(error.code)
        self._leave()

    async def ensure_topic(self, name: str, config: TopicConfig, owner: str = "") -> TopicMeta:
        """The topic of this name, made with ``config`` if it is missing. Raises FerrylineError; ask again then."""
        connection, node = self._connection, self._node
        if connection is None:
            raise ConnectionFailed("no session with a coordinator")
        asked = EnsureTopic(node.broker_id, node.broker_epoch, name, config, owner)
        answer = await connection.call(Kind.ENSURE_TOPIC, asked, EnsureTopicOk, timeout_s=_REQUEST_TIMEOUT_S)
        return answer.topic

    async def tell_stored(self, held: StoredBytes) -> None:
        """Raises FerrylineError; tell again then."""
        if self._connection is None:
            raise ConnectionFailed("no session with a coordinator")
        await self._connection.call(Kind.STORED, held, Done, timeout_s=_REQUEST_TIMEOUT_S)

    # -- messages of the partition cores ------------------------------------------------------------

    def add_alter_isr(self, proposal: AlterIsr) -> None:
        self._proposals.append(proposal)

    def add_resign(self, entry: ResignEntry) -> None:
        self._resigns.append(entry)

    def add_report(self, report: ReplicaReport) -> None:
        self._reports.append(report)

    def refresh_metadata(self) -> None:
        """Nothing to do: the long poll that is parked at the coordinator answers as soon as there is anything newer."""

    def emit(self) -> None:
        """Send what was collected. Without a session it is dropped: the cores ask again."""
        if not (self._proposals or self._resigns or self._reports):
            return
        proposals, self._proposals = self._proposals, []
        resigns, self._resigns = self._resigns, []
        reports, self._reports = self._reports, []
        if self._connection is None:
            return
        node = self._node
        for first in range(0, len(reports), _RUN_MAX):
            run = Report(node.broker_id, node.broker_epoch, reports[first : first + _RUN_MAX])
            self._spawn(self._tell(Kind.REPORT, run))
        for first in range(0, len(resigns), _RUN_MAX):
            run_of = Resign(node.broker_id, node.broker_epoch, resigns[first : first + _RUN_MAX])
            self._spawn(self._tell(Kind.RESIGN, run_of))
        for first in range(0, len(proposals), _RUN_MAX):
            self._spawn(self._propose(proposals[first : first + _RUN_MAX]))

    async def _tell(self, kind: Kind, header: Any) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            await connection.call(kind, header, Done, timeout_s=_REQUEST_TIMEOUT_S)
        except FerrylineError as error:
            _log.warning("the coordinator did not take a message", kind=kind.name, error=str(error))

    async def _propose(self, proposals: list[AlterIsr]) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            answer = await connection.call(
                Kind.ALTER_ISR, AlterIsrs(proposals), AlterIsrsAnswer, timeout_s=_REQUEST_TIMEOUT_S
            )
        except FerrylineError as error:
            # The outcome is unknown, so nothing is told: the core keeps the larger set and asks again (rule L8).
            _log.warning("a proposal was not answered", error=str(error))
            return
        for result in answer.results:
            self.listener.alter_isr_answered(result)
