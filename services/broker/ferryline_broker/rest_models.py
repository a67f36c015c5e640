"""Bodies of the REST of queues. A field that nobody knows is refused; limits are those of the frames."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ferryline.protocol.limits import OFFSET_MAX, WAIT_MS_MAX
from ferryline.protocol.queue_messages import ORDER_KEY
from ferryline_broker.queue_frames import (
    DELAY_MS_MAX,
    DETAIL_CHARS_MAX,
    LEASE_MS_MAX,
    LEASE_MS_MIN,
    MEMBER_CHARS_MAX,
    REASON_CHARS_MAX,
)
from ferryline_broker.queue_requests import RECORDS_MAX
from ferryline_broker.rest_shared import Bytes64

RECEIPT_CHARS_MAX = 2_048  # a member's name of 256 characters, in base64, and what is small
Receipt = Annotated[str, Field(max_length=RECEIPT_CHARS_MAX)]
PartitionIn = Annotated[int | None, Field(ge=0)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


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
    key: str | Bytes64 | None = None
    reason: str = Field("", max_length=REASON_CHARS_MAX)
    dry_run: bool = False
