"""What the coordinator answers, as JSON Schemas. Tests hold real answers against them."""

from __future__ import annotations

from ferryline.protocol.exchanges import EXCHANGE_TYPES, MATCH_ALL, MATCH_ANY
from ferryline.protocol.messages import GroupAssignment, GroupPartition
from ferryline.protocol.metadata import BrokerMeta, MetadataAnswer, PartitionMeta, TopicConfig
from ferryline_coordinator import definitions
from ferryline_service.schemas import (
    COUNT,
    FLAG,
    TEXT,
    WHOLE,
    Schema,
    component,
    nullable,
    of_struct,
    one_of,
    several,
    shape,
    table,
)
from ferryline_service.shared_operations import GRANT, QUOTA

_PARTITION = of_struct(PartitionMeta, topic=nullable(TEXT), primary=nullable(COUNT), frozen=FLAG)
_TOPIC: dict[str, Schema] = {
    "id": TEXT,
    "name": TEXT,
    "version": COUNT,
    "config": of_struct(TopicConfig),
    "owner": TEXT,
    "offline": COUNT,
    "under_replicated": COUNT,
}
_BINDING = shape(
    id=TEXT,
    topic=nullable(TEXT),
    exchange=nullable(TEXT),
    routing_key=TEXT,
    headers=table(nullable(TEXT)),
    match=one_of(MATCH_ALL, MATCH_ANY),
)
_EXCHANGE: dict[str, Schema] = {
    "name": TEXT,
    "type": one_of(*EXCHANGE_TYPES),
    "alternate": nullable(TEXT),
    "version": COUNT,
    "bindings": several(_BINDING),
}
_KEY: dict[str, Schema] = {"id": TEXT, "created_ms": COUNT, "expires_ms": COUNT}
_MEMBER = shape(member=TEXT, topics=several(TEXT), instance_id=TEXT, session_ms=COUNT)
_HELD = shape(topic=nullable(TEXT), topic_id=TEXT, partition=COUNT, member=nullable(TEXT), generation=COUNT)
_STEP = shape(
    {"error": component("Error")},
    kind=one_of(definitions.TOPIC, definitions.EXCHANGE, definitions.BINDING, definitions.PRINCIPAL),
    name=TEXT,
    action=one_of(
        definitions.CREATE,
        definitions.ALTER,
        definitions.ADD_PARTITIONS,
        definitions.BIND,
        definitions.UNCHANGED,
        definitions.CONFLICT,
    ),
    detail=TEXT,
)

SCHEMAS: dict[str, Schema] = {
    "Topic": shape(**_TOPIC),
    "TopicWithPartitions": shape(**_TOPIC, partitions=several(component("Partition"))),
    "Partition": _PARTITION,
    "Exchange": shape(**_EXCHANGE),
    "Bound": shape(**_EXCHANGE, bound=TEXT),
    "Broker": of_struct(
        BrokerMeta,
        state=one_of("joining", "fenced", "stopping", "running"),
        replicas=COUNT,
        in_sync=COUNT,
        primaries=COUNT,
    ),
    "Group": shape(group=TEXT, settled=FLAG, members=several(_MEMBER), partitions=several(_HELD)),
    "Assignment": of_struct(
        GroupAssignment, assigned=several(of_struct(GroupPartition)), revoked=several(of_struct(GroupPartition))
    ),
    "Metadata": of_struct(MetadataAnswer),
    "Principal": shape(
        name=TEXT,
        grants=several(GRANT),
        quota=QUOTA,
        keys=several(shape(**_KEY)),
        disabled=FLAG,
        comment=TEXT,
        version=COUNT,
        declared=FLAG,
    ),
    "NewKey": shape(principal=TEXT, version=COUNT, key=TEXT, **_KEY),
    "Definition": shape(
        version=COUNT,
        cluster_id=TEXT,
        topics=several(shape(name=TEXT, config=of_struct(TopicConfig))),
        exchanges=several({"type": "object"}),
        principals=several({"type": "object"}),
    ),
    "Imported": shape(dry_run=FLAG, changed=COUNT, failed=COUNT, results=several(_STEP)),
    "Cluster": shape(
        cluster_id=TEXT,
        coord_epoch=COUNT,
        revision=COUNT,
        feature_level=COUNT,
        coordinators=several(TEXT),
        healthy=FLAG,
        balancing=FLAG,
        brokers=shape(registered=COUNT, running=COUNT),
        topics=COUNT,
        exchanges=COUNT,
        partitions=shape(total=COUNT, offline=COUNT, under_replicated=COUNT, moving=COUNT, frozen=COUNT),
        groups=COUNT,
        members=COUNT,
    ),
    "KeyRoute": shape(
        topic=TEXT,
        topic_id=TEXT,
        partition=COUNT,
        partitions=COUNT,
        primary=nullable(COUNT),
        epoch=COUNT,
        url=nullable(TEXT),
    ),
    "ExchangeRoute": shape(exchange=TEXT, routing_key=TEXT, topics=several(TEXT)),
    "Certified": shape(broker_id=COUNT, cert=TEXT, ca=TEXT, cluster_id=TEXT),
    "Login": shape(
        issuers=several(
            shape(name=TEXT, issuer=TEXT, audience=TEXT, client_id=TEXT, client_secret=TEXT, scopes=several(TEXT))
        )
    ),
    "Upgrade": shape(
        feature_level=COUNT,
        possible=COUNT,
        behind=several(COUNT),
        coordinator=shape(feature_level=COUNT, versions=several(COUNT)),
        brokers=several(shape(id=COUNT, running=FLAG, feature_level=COUNT, versions=several(COUNT))),
    ),
    "Backup": shape(cluster_id=TEXT, revision=COUNT, feature_level=WHOLE, records=table(TEXT)),
    "Certificates": shape(
        node=nullable({"type": "object"}), authorities=several({"type": "object"}), phase=TEXT, ca=TEXT
    ),
    "Restored": shape(partitions=several({"type": "array"})),
}
