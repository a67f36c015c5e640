"""Options of a receiver, checked before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ferryline.options import check_seconds
from ferryline.protocol.errors import InvalidArgument
from ferryline.protocol.limits import check_name, check_range
from ferryline.protocol.queue_messages import ORDERINGS
from ferryline.serializers import Decoder, decoder_for

PREFETCH_MAX = 100_000
LEASE_S_MIN, LEASE_S_MAX = 1.0, 12 * 3600.0
GATHER_S_MAX = 0.5  # settled or not is known that much later
DELAY_S_MAX = 365 * 86_400.0
REASON_BYTES_MAX, DETAIL_BYTES_MAX = 256, 4096
_STARTS = {"start": "start", "earliest": "start", "end": "end", "latest": "end"}


@dataclass(frozen=True, slots=True)
class ReceiverOptions:
    """What a receiver was asked for. Times in seconds, unless the name says ms."""

    topic: str
    group: str
    decode: Decoder | None
    lease_ms: int
    prefetch: int
    prefetch_bytes: int
    ordering: str
    start: str
    strict: bool  # priorities, without ageing
    max_processing: float
    close_timeout: float
    gather: float

    @classmethod
    def checked(
        cls,
        topic: str,
        *,
        group: str,
        value: Any,
        lease: float,
        prefetch: int,
        prefetch_bytes: int,
        ordering: str,
        start: str,
        strict: bool,
        max_processing: float,
        close_timeout: float,
        gather: float,
    ) -> ReceiverOptions:
        """Raises InvalidName or InvalidArgument, naming the field and the limit."""
        if ordering not in ORDERINGS:
            raise InvalidArgument(f"ordering: {ordering!r:.40} is not one of {', '.join(ORDERINGS)}", field="ordering")
        if start not in _STARTS:
            raise InvalidArgument(f'start: {start!r:.40} is neither "start" nor "end"', field="start")
        return cls(
            check_name(topic),
            check_name(group, "group"),
            decoder_for(value),
            int(check_seconds(lease, "lease", LEASE_S_MIN, LEASE_S_MAX) * 1000),
            check_range(prefetch, "prefetch", 1, PREFETCH_MAX),
            check_range(prefetch_bytes, "prefetch_bytes", 1024, 2**40),
            ordering,
            _STARTS[start],
            bool(strict),
            check_seconds(max_processing, "max_processing", 0.1, 7 * 86_400.0),
            check_seconds(close_timeout, "close_timeout", 0.0, 3600.0),
            check_seconds(gather, "gather", 0.0, GATHER_S_MAX),
        )


def check_delay(delay: object, what: str) -> int:
    """A delay in ms. Raises InvalidArgument, naming the field and the limit."""
    return int(check_seconds(delay, what, 0.0, DELAY_S_MAX) * 1000)


def shortened(text: str, bytes_max: int) -> str:
    """The end of a text goes first when it is too long: what went wrong stands at the beginning."""
    return text if len(text) * 4 <= bytes_max else _cut(text.encode(errors="replace"), bytes_max)


def _cut(data: bytes, bytes_max: int) -> str:
    return data.decode() if len(data) <= bytes_max else data[: bytes_max - 3].decode(errors="ignore") + "..."
