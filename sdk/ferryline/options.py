"""Options of a consumer, checked before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ferryline.message import At, TopicPartition, at
from ferryline.protocol.errors import InvalidArgument
from ferryline.protocol.limits import OFFSET_MAX, check_name, check_range
from ferryline.serializers import Decoder, decoder_for

Where = int | str | At | datetime
OnPartitions = Callable[[list[TopicPartition]], None]
_STARTS = {"start": "start", "earliest": "start", "end": "end", "latest": "end"}


def check_seconds(value: object, what: str, low: float, high: float) -> float:
    """Return ``value`` if it is a number of seconds in [low, high]; otherwise raise InvalidArgument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InvalidArgument(f"{what}: {value!r} is not a number of seconds in {low:g}..{high:g}", field=what)
    return float(value)


def check_wait(value: object) -> float:
    """Return a ``max_wait``: any number of seconds; below 0 is not at all. NaN would never be over."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise InvalidArgument(f"max_wait: {value!r} is not a number of seconds", field="max_wait")
    return float(value)


def check_where(where: Any, field: str) -> int | str | At:
    """A position as the brokers understand it. Raises InvalidArgument, naming the field."""
    if isinstance(where, datetime):
        return at(where)
    if isinstance(where, At):
        return where
    if isinstance(where, str) and where in _STARTS:
        return _STARTS[where]
    if isinstance(where, int) and not isinstance(where, bool):
        return check_range(where, field, 0, OFFSET_MAX)
    raise InvalidArgument(f'{field}: {where!r} is none of an offset, "start", "end", at(datetime)', field=field)


@dataclass(frozen=True, slots=True)
class ConsumerOptions:
    """What a consumer was asked for. Times in seconds, unless the name says ms."""

    topics: tuple[str, ...]
    group: str | None
    decode: Decoder | None
    start: int | str | At
    partitions: tuple[int, ...] | None  # chosen by hand; None: all, or what the group assigns
    auto_commit: bool
    auto_commit_interval: float
    instance_id: str
    session_ms: int
    max_processing: float
    partition_bytes: int
    buffer_bytes: int
    check_crcs: bool
    on_assign: OnPartitions | None
    on_revoke: OnPartitions | None

    @classmethod
    def checked(
        cls,
        topics: str | Sequence[str],
        *,
        group: str | None,
        value: Any,
        start: Where,
        partitions: Iterable[int] | None,
        auto_commit: bool,
        auto_commit_interval: float,
        instance_id: str,
        session_timeout: float,
        max_processing: float,
        partition_bytes: int,
        buffer_bytes: int,
        check_crcs: bool,
        on_assign: OnPartitions | None,
        on_revoke: OnPartitions | None,
    ) -> ConsumerOptions:
        """Raises InvalidName or InvalidArgument, naming the field and the limit."""
        names = tuple(dict.fromkeys([topics] if isinstance(topics, str) else topics))
        if not names:
            raise InvalidArgument("topics: at least one is needed", field="topics")
        for name in names:
            check_name(name)
        if group is not None:
            check_name(group, "group")
        chosen = None if partitions is None else tuple(sorted(set(partitions)))
        if chosen is not None and len(names) > 1:
            raise InvalidArgument("partitions: can be chosen for one topic only", field="partitions")
        check_range(partition_bytes, "partition_bytes", 1024, 16 * 1024 * 1024)
        return cls(
            names,
            group,
            decoder_for(value),
            check_where(start, "start"),
            chosen,
            auto_commit and group is not None,
            check_seconds(auto_commit_interval, "auto_commit_interval", 0.01, 3600.0),
            check_name(instance_id, "instance_id") if instance_id else "",
            int(check_seconds(session_timeout, "session_timeout", 1.0, 3600.0) * 1000),
            check_seconds(max_processing, "max_processing", 0.1, 7 * 86_400.0),
            partition_bytes,
            check_range(buffer_bytes, "buffer_bytes", partition_bytes, 2**40),
            check_crcs,
            on_assign,
            on_revoke,
        )
