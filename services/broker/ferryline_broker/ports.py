"""What the partition driver calls: whoever waits for an answer, and the ways out to peers and coordinator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ferryline.protocol.messages import AlterIsr, ReplicaData, ReplicaFetch, ReplicaProgress, ReplicaReport, ResignEntry
from ferryline_broker.core import events as ev
from ferryline_broker.core import queue_events as qe

if TYPE_CHECKING:
    from ferryline_broker.hosted import HostedReplica
    from ferryline_service.access.caller import Caller

Answer = (
    ev.AnswerProduce | ev.AnswerGroup | ev.AnswerBarrier | ev.Refuse | qe.AnswerLease | qe.AnswerSettle | qe.AnswerQueue
)


class Request(Protocol):
    """Something that waits for answers of cores. `settle` once per token; `emit` at the end of the pass, when asked."""

    def settle(self, index: int, answer: Answer) -> None: ...

    def emit(self) -> None: ...


class Asker(Protocol):
    """Who asked, and is answered when it is decided: a session, or a request over REST. ``closed``: nobody listens."""

    @property
    def caller(self) -> Caller: ...

    @property
    def closed(self) -> bool: ...

    @property
    def close_callbacks(self) -> list[Callable[[Any], None]]: ...

    def answer(
        self, kind: int, correlation: int, header: Any, parts: Sequence[ev.Bytes] = (), *, more: bool = False
    ) -> None: ...

    def flush(self) -> None: ...


class Emitter(Protocol):
    """Something with work for the end of the pass."""

    def emit(self) -> None: ...


class PeerPort(Protocol):
    """Where replication frames leave; each call only collects, `emit` sends."""

    def add_fetch(self, to: int, fetch: ReplicaFetch) -> None: ...

    def add_progress(self, to: int, progress: ReplicaProgress) -> None: ...

    def room(self, session: int) -> int:
        """How many bytes of log the next answer to a secondary should carry at most; 0 for none at all."""

    def add_data(self, session: int, data: ReplicaData, parts: list[ev.Bytes]) -> None: ...

    def emit(self) -> None: ...


class LinkPort(Protocol):
    """Where messages to the coordinator leave; the same."""

    def add_alter_isr(self, proposal: AlterIsr) -> None: ...

    def add_resign(self, entry: ResignEntry) -> None: ...

    def add_report(self, report: ReplicaReport) -> None: ...

    def refresh_metadata(self) -> None: ...

    def emit(self) -> None: ...


class QueuePort(Protocol):
    """Who carries out what queues want."""

    def read_window(self, hosted: HostedReplica, effect: qe.ReadWindow) -> None: ...

    def wake(self, hosted: HostedReplica, effect: qe.WakeReceivers) -> None: ...

    def ask_again(self) -> None:
        """At the end of each pass: whoever was woken in it may ask."""

    def move_dead(self, hosted: HostedReplica, effect: qe.MoveDead) -> None: ...

    def role_changed(self, hosted: HostedReplica) -> None: ...

    def cut(self, hosted: HostedReplica) -> None:
        """The record log was cut, or emptied."""
