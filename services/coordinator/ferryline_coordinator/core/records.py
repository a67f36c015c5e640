"""What the coordinator knows durably: records under text keys. State is what replaying them gives, nothing else.

    cluster                      ClusterRecord
    broker/<id>                  BrokerRecord
    topic/<topic id>             TopicMeta
    exchange/<name>              ExchangeMeta
    principal/<name>             PrincipalMeta
    part/<topic id>/<number>     PartRecord
    gone/<topic id>              TopicGone
    group/<name>                 GroupRecord
    owners/<group>/<topic id>    GroupOwners

Values are MessagePack arrays: fields are appended, never moved; new ones have defaults.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from ferryline.protocol.access import PrincipalMeta
from ferryline.protocol.exchanges import ExchangeMeta
from ferryline.protocol.metadata import BrokerMeta, PartitionMeta, TopicMeta


class ClusterRecord(msgspec.Struct, array_like=True, frozen=True):
    """One per cluster; made once. It changes with every metadata change, because it holds the revision.

    ``revision`` rises by one with each decision that brokers and clients can see. ``broker_epoch`` is the highest ever
    given. ``claim_key`` signs the tokens of group claims. ``coord_epoch_floor``: a broker has seen a coordinator epoch
    below this one, which this store does not know of: no coordinator may start under it.
    """

    cluster_id: str
    claim_key: bytes
    revision: int = 0
    broker_id: int = 0  # highest id ever given
    broker_epoch: int = 0
    feature_level: int = 1
    coord_epoch_floor: int = 0
    generation_floor: int = 0  # primaries may remember generations up to this one, of groups that were deleted
    coordinators: tuple[str, ...] = ()  # URLs of several coordinators; empty where there is one
    access_revision: int = 0  # rises with each change of who may do what


class BrokerRecord(msgspec.Struct, array_like=True, frozen=True):
    """A broker as everybody sees it, and what only the coordinator needs.

    ``rolled_back``: its storage came back older than it was (rule C2): whatever it holds counts as empty until its
    storage id changes.
    """

    meta: BrokerMeta
    rolled_back: bool = False
    feature_level: int = 1
    versions: tuple[int, int] = (1, 1)


class PartRecord(msgspec.Struct, array_like=True, frozen=True):
    """A partition. ``frozen``: this store forgot something a broker has seen; nothing is elected without recovery."""

    meta: PartitionMeta
    frozen: bool = False


class TopicGone(msgspec.Struct, array_like=True, frozen=True):
    """A deleted topic: the explicit command by which brokers remove its data. ``revision`` at which it went."""

    topic_id: str
    revision: int


class GroupMember(msgspec.Struct, array_like=True, frozen=True):
    member: str
    topics: tuple[str, ...]
    instance_id: str
    session_ms: int


class GroupRecord(msgspec.Struct, array_like=True, frozen=True):
    """Who is in a group; written when somebody joins, leaves or changes its topics."""

    group: str
    members: tuple[GroupMember, ...] = ()


class GroupOwners(msgspec.Struct, array_like=True, frozen=True):
    """Who holds each partition of one topic in one group, by partition number.

    ``owners[p]`` is a member or "" (nobody); ``generations[p]`` rises with every grant and never falls.
    """

    group: str
    topic_id: str
    owners: tuple[str, ...]
    generations: tuple[int, ...]


Record: TypeAlias = (
    ClusterRecord
    | BrokerRecord
    | TopicMeta
    | PartRecord
    | TopicGone
    | GroupRecord
    | GroupOwners
    | ExchangeMeta
    | PrincipalMeta
)

CLUSTER_KEY = "cluster"
_TYPES: dict[str, type[Record]] = {
    "cluster": ClusterRecord,
    "broker": BrokerRecord,
    "topic": TopicMeta,
    "part": PartRecord,
    "gone": TopicGone,
    "group": GroupRecord,
    "owners": GroupOwners,
    "exchange": ExchangeMeta,
    "principal": PrincipalMeta,
}
_encoder = msgspec.msgpack.Encoder()
_decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
    prefix: msgspec.msgpack.Decoder(kind) for prefix, kind in _TYPES.items()
}


def broker_key(broker_id: int) -> str:
    return f"broker/{broker_id}"


def topic_key(topic_id: str) -> str:
    return f"topic/{topic_id}"


def part_key(topic_id: str, partition: int) -> str:
    return f"part/{topic_id}/{partition}"


def gone_key(topic_id: str) -> str:
    return f"gone/{topic_id}"


def group_key(group: str) -> str:
    return f"group/{group}"


def owners_key(group: str, topic_id: str) -> str:
    return f"owners/{group}/{topic_id}"


def exchange_key(name: str) -> str:
    return f"exchange/{name}"


def principal_key(name: str) -> str:
    return f"principal/{name}"


def cluster_id_of(value: bytes) -> str:
    """Of an encoded ClusterRecord."""
    record: ClusterRecord = _decoders["cluster"].decode(value)
    return record.cluster_id


def record_key(record: Record) -> str:
    """The key a record is stored under."""
    match record:
        case ClusterRecord():
            return CLUSTER_KEY
        case BrokerRecord():
            return broker_key(record.meta.id)
        case TopicMeta():
            return topic_key(record.id)
        case PartRecord():
            return part_key(record.meta.topic_id, record.meta.partition)
        case TopicGone():
            return gone_key(record.topic_id)
        case GroupRecord():
            return group_key(record.group)
        case GroupOwners():
            return owners_key(record.group, record.topic_id)
        case ExchangeMeta():
            return exchange_key(record.name)
        case PrincipalMeta():
            return principal_key(record.name)


def encode_record(record: Record) -> bytes:
    return _encoder.encode(record)


def decode_record(key: str, value: bytes) -> Record:
    """Raises KeyError or msgspec.MsgspecError: a store that holds something else is not ours to guess at."""
    record: Record = _decoders[key.partition("/")[0]].decode(value)
    return record
