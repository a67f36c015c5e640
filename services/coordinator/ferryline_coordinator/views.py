"""How the coordinator's records look in JSON."""

from __future__ import annotations

from typing import Any

from ferryline.protocol.exchanges import ExchangeMeta
from ferryline.protocol.metadata import NO_BROKER, BrokerMeta, PartitionMeta, TopicMeta
from ferryline_coordinator.core.coordinator import CoordinatorCore
from ferryline_coordinator.core.records import GroupRecord
from ferryline_coordinator.core.state import CoordinatorState
from ferryline_coordinator.models import as_json


def topic_json(state: CoordinatorState, topic: TopicMeta) -> dict[str, Any]:
    """A topic, with the health of its partitions."""
    found = (state.part(topic.id, number) for number in range(topic.config.partitions))
    parts = [record.meta for record in found if record is not None]
    return {
        "id": topic.id,
        "name": topic.name,
        "version": topic.version,
        "owner": topic.owner,
        "config": as_json(topic.config),
        "offline": sum(part.primary == NO_BROKER for part in parts),
        "under_replicated": sum(under_replicated(part) for part in parts),
    }


def exchange_json(exchange: ExchangeMeta) -> dict[str, Any]:
    """An exchange; each binding with the id by which it is removed."""
    return {
        "name": exchange.name,
        "type": exchange.type,
        "alternate": exchange.alternate or None,
        "version": exchange.version,
        "bindings": [
            {
                "id": binding.id,
                "topic": None if binding.to_exchange else binding.target,
                "exchange": binding.target if binding.to_exchange else None,
                "routing_key": binding.routing_key,
                "headers": dict(binding.headers),
                "match": binding.match,
            }
            for binding in exchange.bindings
        ],
    }


def under_replicated(part: PartitionMeta) -> bool:
    """Whether a copy is missing; one that only begins to move in is not."""
    return len(part.isr) < len(part.replicas) - len(part.adding)


def partition_json(state: CoordinatorState, part: PartitionMeta) -> dict[str, Any]:
    """A partition, with the name of its topic; ``primary`` is null while there is none."""
    topic = state.topics.get(part.topic_id)
    record = state.parts.get(part.key)
    shown = as_json(part)
    shown["topic"] = topic.name if topic is not None else None
    shown["primary"] = part.primary or None
    shown["frozen"] = record.frozen if record is not None else False
    return shown


def broker_json(state: CoordinatorState, meta: BrokerMeta) -> dict[str, Any]:
    """A broker, with what it holds. ``state``: running, fenced, stopping, joining."""
    held = [state.parts[key].meta for key in state.held_by(meta.id)]
    return {
        **as_json(meta),
        "state": _state_name(meta),
        "replicas": len(held),
        "in_sync": sum(meta.id in part.isr for part in held),
        "primaries": sum(part.primary == meta.id for part in held),
    }


def _state_name(meta: BrokerMeta) -> str:
    if not meta.broker_epoch:
        return "joining"
    if meta.fenced:
        return "fenced"
    return "stopping" if meta.stopping else "running"


def cluster_json(core: CoordinatorCore) -> dict[str, Any]:
    """The cluster in one picture. ``healthy``: every partition has a primary and all its copies."""
    state = core.state
    assert state.cluster is not None
    parts = [record.meta for record in state.parts.values()]
    offline = sum(part.primary == NO_BROKER for part in parts)
    missing = sum(under_replicated(part) for part in parts)
    brokers = [record.meta for record in state.brokers.values()]
    return {
        "cluster_id": state.cluster.cluster_id,
        "coord_epoch": core.coord_epoch,
        "revision": state.revision,
        "feature_level": state.cluster.feature_level,
        "coordinators": list(core.config.coordinators),
        "healthy": not offline and not missing,
        "balancing": core.moves.unbalanced,
        "brokers": {"registered": len(brokers), "running": sum(not broker.fenced for broker in brokers)},
        "topics": len(state.topics),
        "exchanges": len(state.exchanges),
        "partitions": {
            "total": len(parts),
            "offline": offline,
            "under_replicated": missing,
            "moving": sum(bool(part.adding or part.removing) for part in parts),
            "frozen": sum(record.frozen for record in state.parts.values()),
        },
        "groups": len(state.groups),
        "members": core.groups.members(),
    }


def group_json(core: CoordinatorCore, record: GroupRecord) -> dict[str, Any]:
    """A group: its members and who holds what."""
    state = core.state
    partitions = []
    for topic_id in sorted(state.group_topics.get(record.group, ())):
        owners = state.owners[(record.group, topic_id)]
        topic = state.topics.get(topic_id)
        for number, owner in enumerate(owners.owners):
            partitions.append(
                {
                    "topic": topic.name if topic is not None else None,
                    "topic_id": topic_id,
                    "partition": number,
                    "member": owner or None,
                    "generation": owners.generations[number],
                }
            )
    return {
        "group": record.group,
        "settled": not core.groups.unsettled(record.group),
        "members": [
            {
                "member": member.member,
                "topics": list(member.topics),
                "instance_id": member.instance_id,
                "session_ms": member.session_ms,
            }
            for member in record.members
        ],
        "partitions": partitions,
    }
