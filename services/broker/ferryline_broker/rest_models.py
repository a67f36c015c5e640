"""Bodies of a broker's REST. A field that nobody knows is refused; limits are those of the frames."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ferryline.protocol.exchanges import ROUTING_KEY_BYTES_MAX
from ferryline.protocol.limits import (
    COMMIT_METADATA_BYTES_MAX,
    HEADER_NAME_BYTES_MAX,
    HEADERS_MAX,
    NAME_PATTERN,
    OFFSET_MAX,
    PARTITIONS_MAX,
    WAIT_MS_MAX,
)
from ferryline.protocol.queue_messages import ORDER_KEY
from ferryline_broker.queue_checks import (
    DELAY_MS_MAX,
    DETAIL_CHARS_MAX,
    LEASE_MS_MAX,
    LEASE_MS_MIN,
    MEMBER_CHARS_MAX,
    REASON_CHARS_MAX,
)
from ferryline_broker.queue_requests import RECORDS_MAX
from ferryline_broker.rest_shared import Base64

RECEIPT_CHARS_MAX = 2_048  # a member's name of 256 characters, in base64, and what is small
Receipt = Annotated[str, Field(max_length=RECEIPT_CHARS_MAX)]
PartitionIn = Annotated[int | None, Field(ge=0, lt=PARTITIONS_MAX)]
APPEND_RECORDS_MAX = 10_000  # of one request
Text = str | Base64


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class RecordIn(_Body):
    """One record. Key and values are text, or bytes in base64."""

    key: Text | None = None
    value: Text | None = None
    headers: dict[Annotated[str, Field(max_length=HEADER_NAME_BYTES_MAX)], Text | None] = Field(
        default={}, max_length=HEADERS_MAX
    )


class AppendedIn(RecordIn):
    """``partition``: left out, the key chooses it."""

    partition: PartitionIn = None


class RecordsIn(_Body):
    records: list[AppendedIn] = Field(min_length=1, max_length=APPEND_RECORDS_MAX)


class PublishedIn(RecordIn):
    routing_key: str = Field("", max_length=ROUTING_KEY_BYTES_MAX)


class PublishIn(_Body):
    """``mandatory``: refuse them all if one of them would reach no topic."""

    records: list[PublishedIn] = Field(min_length=1, max_length=APPEND_RECORDS_MAX)
    mandatory: bool = False


class OffsetIn(_Body):
    """``offset``: of the next record to read, or "start" or "end" of what is retained."""

    topic: str = Field(pattern=NAME_PATTERN.pattern.replace(r"\A", "^").replace(r"\Z", "$"))
    partition: int = Field(ge=0, lt=PARTITIONS_MAX)
    offset: Annotated[int, Field(ge=0, le=OFFSET_MAX)] | Literal["start", "end"]
    metadata: str = Field("", max_length=COMMIT_METADATA_BYTES_MAX // 4)


class OffsetsIn(_Body):
    """Where a group goes on. ``dry_run``: only say what would change."""

    offsets: list[OffsetIn] = Field(min_length=1, max_length=PARTITIONS_MAX)
    dry_run: bool = False


class ReceiveIn(_Body):
    """Lease up to ``records``, waiting up to ``wait_ms`` for the first one."""

    records: int = Field(100, ge=1, le=RECORDS_MAX)
    wait_ms: int = Field(0, ge=0, le=WAIT_MS_MAX)
    lease_ms: int = Field(30_000, ge=LEASE_MS_MIN, le=LEASE_MS_MAX)
    member: str = Field("rest", max_length=MEMBER_CHARS_MAX)
    ordering: str = ORDER_KEY
    partition: PartitionIn = None
    start: str = "start"
    strict: bool = False


class SettlementIn(_Body):
    """What became of one record. ``delay_ms`` of a nack or extend; -1: the topic's back-off, or the lease's length."""

    receipt: Receipt
    action: str
    delay_ms: int = Field(-1, ge=-1, le=DELAY_MS_MAX)
    reason: str = Field("", max_length=REASON_CHARS_MAX)
    detail: str = Field("", max_length=DETAIL_CHARS_MAX)


class SettleIn(_Body):
    entries: list[SettlementIn] = Field(min_length=1, max_length=RECORDS_MAX)


class KeepIn(_Body):
    """All that ``member`` still holds here: what else is leased to it is free at once."""

    member: str = Field("rest", max_length=MEMBER_CHARS_MAX)
    receipts: list[Receipt] = Field([], max_length=RECORDS_MAX)
    partition: PartitionIn = None


class SelectIn(_Body):
    """``partition``: this one only; otherwise all that this broker leads."""

    partition: PartitionIn = None


class PurgeIn(SelectIn):
    dry_run: bool = False


class RedriveIn(SelectIn):
    """Parked records from ``offset`` on, up to ``count`` in each partition (0: all), of this key and reason only."""

    offset: int = Field(-1, ge=-1, le=OFFSET_MAX)
    count: int = Field(0, ge=0, le=RECORDS_MAX)
    key: str | Base64 | None = None
    reason: str = Field("", max_length=REASON_CHARS_MAX)
    dry_run: bool = False
