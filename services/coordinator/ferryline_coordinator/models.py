"""Bodies of the REST surface, as pydantic models. Unknown fields are refused: a typing mistake must not be silent."""

from __future__ import annotations

import base64
from typing import Annotated, Any

import msgspec
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from ferryline.protocol.exchanges import (
    BINDING_HEADERS_MAX,
    EXCHANGE_TYPES,
    MATCH_ALL,
    MATCH_ANY,
    ROUTING_KEY_BYTES_MAX,
    BindingMeta,
    binding_to,
)
from ferryline.protocol.limits import HTTP_BODY_BYTES_MAX, PARTITIONS_MAX, RECORD_BYTES_CEILING, REPLICATION_MAX
from ferryline.protocol.messages import GroupAssignment, GroupHeartbeat, GroupPartition
from ferryline.protocol.metadata import FLUSH_FSYNC, FLUSH_REPLICATED, ON_DEAD_PARK, ON_DEAD_SKIP
from ferryline_service.schemas import Name, one_of, told

YEARS_MS = 100 * 365 * 86_400_000
Flush = Annotated[str, WithJsonSchema(one_of(FLUSH_FSYNC, FLUSH_REPLICATED))]
OnDead = Annotated[str, WithJsonSchema(one_of(ON_DEAD_SKIP, ON_DEAD_PARK))]
Kind = Annotated[str, WithJsonSchema(one_of(*EXCHANGE_TYPES))]
Match = Annotated[str, WithJsonSchema(one_of(MATCH_ALL, MATCH_ANY))]
MaybeName = Annotated[str, WithJsonSchema({"type": "string", "pattern": "^[A-Za-z0-9._-]{0,200}$"})]


class Body(BaseModel):
    """Base of request bodies."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RetrySettings(Body):
    """How queues of a topic retry; what is left out keeps its default or its present value."""

    attempts: int | None = Field(None, description="leases of a record, all together", **told(1, 1_000))
    backoff_ms: int | None = Field(None, **told(0, 86_400_000))
    backoff_max_ms: int | None = Field(None, **told(0, 86_400_000))
    on_dead: OnDead | None = Field(None, description="skip (copy to the dead letters) or park (stop the lane)")
    dead_letters: MaybeName | None = Field(None, description='topic that takes the copies; "" means NAME.dlq')


class TopicSettings(Body):
    """Settings of a topic; what is left out keeps its default or its present value. -1: no limit."""

    partitions: int | None = Field(None, **told(1, PARTITIONS_MAX))
    replication: int | None = Field(None, **told(1, REPLICATION_MAX))
    min_isr: int | None = Field(None, **told(1, REPLICATION_MAX))
    flush: Flush | None = Field(None, description="fsync or replicated")
    retention_ms: int | None = Field(None, **told(-1, YEARS_MS))
    retention_bytes: int | None = Field(None, **told(-1, 2**60))
    segment_bytes: int | None = Field(None, **told(16 * 1024, 2**31 - 1))
    segment_ms: int | None = Field(None, **told(1_000, YEARS_MS))
    max_record_bytes: int | None = Field(None, **told(1, RECORD_BYTES_CEILING))
    retry: RetrySettings | None = None

    def given(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class CreateTopic(Body):
    name: Name
    config: TopicSettings = TopicSettings()


class AlterTopic(Body):
    config: TopicSettings


class AddPartitions(Body):
    """``keys_move``: the caller knows that keys move to other partitions."""

    partitions: int = Field(**told(1, PARTITIONS_MAX))
    keys_move: bool = False


class CreateExchange(Body):
    """``alternate``: the exchange that gets what no binding takes."""

    name: Name
    type: Kind = Field(description="direct, topic, fanout or headers")
    alternate: MaybeName | None = None


class Bind(Body):
    """Where the binding leads (``topic`` or ``exchange``), and what it takes."""

    topic: Name | None = None
    exchange: Name | None = None
    routing_key: str = Field(
        "",
        description="of a topic exchange: a pattern with * and #",
        json_schema_extra={"maxLength": ROUTING_KEY_BYTES_MAX},
    )
    headers: dict[str, str | None] = Field(
        {},
        description="null: the header is there, with any value",
        json_schema_extra={"maxProperties": BINDING_HEADERS_MAX},
    )
    match: Match = Field(MATCH_ALL, description="all or any of the headers")

    def binding(self) -> BindingMeta:
        return binding_to(
            topic=self.topic,
            exchange=self.exchange,
            routing_key=self.routing_key,
            headers=self.headers,
            match=self.match,
        )


class Recover(Body):
    """``accept_data_loss``: go on without the replicas that do not report."""

    topic: Name
    partition: int = Field(**told(0, PARTITIONS_MAX - 1))
    accept_data_loss: bool = False


class Join(Body):
    """A broker's first request. ``csr`` is PEM; of it, key and host names are taken."""

    token: str = Field(max_length=200)
    csr: str = Field(max_length=16_384)
    storage_id: str = Field(max_length=64)
    internal_url: str = Field(max_length=500)
    external_url: str = Field(max_length=500)


class Renew(Body):
    """A broker's request for a new certificate, over a connection that shows its present one."""

    csr: str = Field(max_length=16_384)


class OwnedPartition(Body):
    topic_id: str
    partition: int
    generation: int = 0


class MemberHeartbeat(Body):
    """A group heartbeat; see GroupHeartbeat of the protocol."""

    member: str
    topics: list[str] = []
    owned: list[OwnedPartition] = []
    instance_id: str = ""
    session_ms: int = 45_000
    leave: bool = False
    sequence: int = Field(0, ge=0, le=2**62)

    def message(self, group: str) -> GroupHeartbeat:
        owned = [GroupPartition(p.topic_id, p.partition, p.generation) for p in self.owned]
        return GroupHeartbeat(
            group,
            self.member,
            self.topics,
            owned,
            self.instance_id,
            self.session_ms,
            self.leave,
            self.sequence,
        )


def assignment_json(answer: GroupAssignment) -> dict[str, Any]:
    """Answer to a heartbeat; tokens in base64."""

    def shown(partition: GroupPartition) -> dict[str, Any]:
        token = base64.b64encode(partition.token).decode()
        return {**as_json(partition), "token": token}

    return {
        **as_json(answer),
        "assigned": [shown(p) for p in answer.assigned],
        "revoked": [shown(p) for p in answer.revoked],
    }


def as_json(struct: msgspec.Struct) -> dict[str, Any]:
    """A protocol struct with its field names, nested ones too."""
    return {name: _plain(getattr(struct, name)) for name in struct.__struct_fields__}


def _plain(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return as_json(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value


BODY_BYTES_MAX = HTTP_BODY_BYTES_MAX
