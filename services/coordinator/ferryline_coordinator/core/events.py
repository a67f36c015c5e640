"""What happens to the coordinator, and what it wants done: events in, a `Decision` out.

    decision = core.handle(event, now_ms)
    core.apply(decision)                   # the only thing that changes durable state
    ... commit decision.puts and decision.deletes ...
    ... then, and only then, carry out decision.effects, in order ...

Several decisions may share one commit, if their effects wait for it in order. If a commit fails or its outcome is
unknown, the core is thrown away: campaign again, load again (replication.md, section 12).

``expected``: tags (`tags`) one of which must be that of what is changed; () if anything may be.
``reply`` is the driver's handle for whoever asked: each gets exactly one `Reply` or `Refuse`, unless `Abandoned` came.
``session`` numbers the sessions of brokers: they rise, and a broker's latest one is the one that counts. Messages of
an earlier session of the same broker are refused.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ferryline.protocol.access import AccessPolicy, Grant, KeyMeta, Quota, StoredBytes
from ferryline.protocol.dead_letters import EnsureTopic
from ferryline.protocol.errors import ErrorInfo
from ferryline.protocol.exchanges import BindingMeta
from ferryline.protocol.messages import AlterIsrs, GroupHeartbeat, Heartbeat, Register, Report, Resign
from ferryline.protocol.metadata import MetadataRequest
from ferryline_coordinator.core.records import Record


class Event(msgspec.Struct, frozen=True):
    """Base of all events."""


class Effect(msgspec.Struct, frozen=True):
    """Base of all effects."""


# -- events: time, start, sessions, probes ----------------------------------------------------------


class Tick(Event):
    """A deadline passed (or may have)."""


class Founded(Event):
    """First start on an empty store: identifiers for the new cluster. Changes nothing if the cluster exists."""

    cluster_id: str
    claim_key: bytes


class CoordinatorsKnown(Event):
    """The coordinators that run on this store now. Everybody is told when that differs from what they were told."""

    urls: tuple[str, ...]


class SessionOpened(Event):
    """A broker's session said HELLO. Registration may follow."""

    session: int
    broker_id: int


class SessionClosed(Event):
    """A broker's session ended: the fast path begins with a probe."""

    session: int
    broker_id: int


class ProbeEnded(Event):
    """Outcome of `Probe`. ``alive``: it answered in time; False: refused, unreachable or silent."""

    probe: int
    broker_id: int
    alive: bool


# -- events: messages of brokers --------------------------------------------------------------------


class RegisterReceived(Event):
    """``broker_id`` of the message was checked against the certificate of the session."""

    reply: int
    session: int
    message: Register


class HeartbeatReceived(Event):
    reply: int
    session: int
    message: Heartbeat


class AlterIsrsReceived(Event):
    reply: int
    session: int
    message: AlterIsrs


class ResignReceived(Event):
    reply: int
    session: int
    message: Resign


class ReportReceived(Event):
    reply: int
    session: int
    message: Report


class StoredTold(Event):
    """What the topics of each owner hold at a broker. Answer: `Done`."""

    reply: int
    session: int
    message: StoredBytes


class TopicEnsured(Event):
    """A broker needs a topic. ``topic_id`` is for one that has to be made. Answer: `EnsureTopicOk`."""

    reply: int
    session: int
    message: EnsureTopic
    topic_id: str


# -- events: messages of anybody --------------------------------------------------------------------


class MetadataAsked(Event):
    """Answered at once if there is news for the asker, else when there is or when its wait is over.

    ``broker_id``: asked by that broker (0: by somebody else). Brokers also learn of topics deleted long ago.
    """

    reply: int
    message: MetadataRequest
    broker_id: int = 0


class Abandoned(Event):
    """Whoever waited under this handle is gone; no answer."""

    reply: int


class GroupHeartbeatReceived(Event):
    reply: int
    message: GroupHeartbeat


# -- events: commands of operators ------------------------------------------------------------------


class BrokerAdmitted(Event):
    """A join token was used: give out a broker id for this storage. The same storage gets the same id again.

    Answer: `Admitted`.
    """

    reply: int
    storage_id: str
    internal: str
    external: str


class TopicCreated(Event):
    """Create a topic. ``settings``: fields of TopicConfig by name. ``owner``: who asks. Answer: TopicMeta."""

    reply: int
    name: str
    topic_id: str
    settings: dict[str, Any] = {}
    owner: str = ""


class TopicAltered(Event):
    """Change settings (not partitions, not replication). Answer: TopicMeta."""

    reply: int
    name: str
    settings: dict[str, Any]
    expected: tuple[str, ...] = ()


class PartitionsAdded(Event):
    """Raise the partition count. Keys move to other partitions, so ``keys_move`` must say so. Answer: TopicMeta."""

    reply: int
    name: str
    partitions: int
    keys_move: bool = False
    expected: tuple[str, ...] = ()


class TopicDeleted(Event):
    """Answer: TopicMeta of the deleted topic."""

    reply: int
    name: str
    expected: tuple[str, ...] = ()


class ExchangeCreated(Event):
    """Create an exchange without bindings. ``alternate``: "" for none. Answer: ExchangeMeta."""

    reply: int
    name: str
    type: str
    alternate: str = ""


class ExchangeDeleted(Event):
    """Bindings that lead to it go with it, and it is nobody's alternate any more. Answer: the deleted ExchangeMeta."""

    reply: int
    name: str
    expected: tuple[str, ...] = ()


class BindingAdded(Event):
    """Answer: the exchange's ExchangeMeta."""

    reply: int
    exchange: str
    binding: BindingMeta
    expected: tuple[str, ...] = ()


class BindingRemoved(Event):
    """``binding_id`` as of `BindingMeta`. Answer: the exchange's ExchangeMeta."""

    reply: int
    exchange: str
    binding_id: str
    expected: tuple[str, ...] = ()


class DrainSet(Event):
    """Move everything off a broker (``draining``), or let it take part again. Answer: BrokerMeta."""

    reply: int
    broker_id: int
    draining: bool


class BrokerForgotten(Event):
    """Remove a fenced broker without replicas from the records. Answer: BrokerMeta."""

    reply: int
    broker_id: int


class LevelRaised(Event):
    """Raise the cluster's feature level as far as everybody can run at. Answer: the level."""

    reply: int


class RestoreBegun(Event):
    """Put records of a backup into an empty cluster; topics get partitions that nobody leads yet. ``records`` are
    encoded, by key; ``epochs``: of each partition, not below any that its logs hold. Repeating changes nothing.
    Answer: list of (topic id, partition, broker that takes the logs in; 0: they are in)."""

    reply: int
    records: dict[str, bytes]
    epochs: dict[tuple[str, int], int]


class RestoreEnded(Event):
    """The broker holds both logs of the backup: let it lead. Answer: PartitionMeta."""

    reply: int
    topic_id: str
    partition: int
    broker_id: int


class RecoveryAsked(Event):
    """Choose a primary for a partition that has no candidate (rule C7). Answer: PartitionMeta.

    Balanced: every replica has reported; the longest undamaged log wins. ``accept_data_loss``: forced, with the reports
    there are. NOT_READY while reports are on their way.
    """

    reply: int
    topic: str
    partition: int
    accept_data_loss: bool = False


class GroupDeleted(Event):
    """Forget a group without live members. Answer: GroupRecord."""

    reply: int
    group: str


# -- events: who may do what ------------------------------------------------------------------------


class AccessFileRead(Event):
    """What the access file says now. Told at the start of each term, and whenever the file has changed."""

    file: AccessPolicy


class PrincipalCreated(Event):
    """Answer: PrincipalMeta."""

    reply: int
    name: str
    grants: tuple[Grant, ...] = ()
    quota: Quota = Quota()
    disabled: bool = False
    comment: str = ""


class PrincipalAltered(Event):
    """Change what is not None. ``version``: refuse if the principal has another one. Answer: PrincipalMeta."""

    reply: int
    name: str
    grants: tuple[Grant, ...] | None = None
    quota: Quota | None = None
    disabled: bool | None = None
    comment: str | None = None
    version: int | None = None
    expected: tuple[str, ...] = ()


class PrincipalDeleted(Event):
    """Its keys go with it. Answer: PrincipalMeta of the deleted principal."""

    reply: int
    name: str
    version: int | None = None
    expected: tuple[str, ...] = ()


class KeyAdded(Event):
    """One more API key; its secret never comes here. Answer: PrincipalMeta."""

    reply: int
    name: str
    key: KeyMeta
    expected: tuple[str, ...] = ()


class KeyRemoved(Event):
    """Answer: PrincipalMeta."""

    reply: int
    name: str
    key_id: str
    expected: tuple[str, ...] = ()


# -- effects ----------------------------------------------------------------------------------------


class Reply(Effect):
    """Answer with ``message``: the struct the event's docstring names, or the wire answer of the request."""

    reply: int
    message: Any


class Refuse(Effect):
    """Answer with an error of the tree."""

    reply: int
    error: ErrorInfo


class Tell(Effect):
    """Send a frame without answer on the broker's latest session, if it has one. It may be lost."""

    broker_id: int
    kind: int
    message: Any


class Probe(Effect):
    """Connect to a broker's internal address and ask /healthz; report `ProbeEnded` within ``timeout_ms``."""

    probe: int
    broker_id: int
    internal: str
    timeout_ms: int


class Note(Effect):
    """Something an operator wants to see: a log line, and the metric ``name`` counts up.

    ``name``: elected, fenced, unfenced, registered, isr_changed, frozen, unclean_recovery, move_started,
    move_finished, move_cancelled, offline.
    """

    name: str
    fields: dict[str, Any] = {}
    level: str = "info"


class AccessChanged(Effect):
    """The policy by which this coordinator decides from now on."""

    policy: AccessPolicy


class Recampaign(Effect):
    """Give up primaryship and start again under a coordinator epoch of at least ``coord_epoch``."""

    coord_epoch: int


class Admitted(msgspec.Struct, frozen=True):
    """Answer to `BrokerAdmitted`."""

    broker_id: int
    cluster_id: str


class Decision(msgspec.Struct, frozen=True):
    """What follows from one event: records to make durable in one commit, then effects."""

    puts: tuple[Record, ...] = ()
    deletes: tuple[str, ...] = ()
    effects: tuple[Effect, ...] = ()

    @property
    def durable(self) -> bool:
        """Whether there is anything to commit."""
        return bool(self.puts or self.deletes)
