"""Looking at the log without moving anybody's position."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from heapq import merge
from typing import TYPE_CHECKING, Any

from ferryline.falconq.primaries import Primaries
from ferryline.falconq.shown import shown
from ferryline.positions import look_up
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.records import DecodedRecord, decode_batch, split_batches

if TYPE_CHECKING:
    from ferryline.client import Client

_BYTES = 1024 * 1024  # read at a time; a larger batch comes whole
_ANSWER_BYTES = 4 * 1024 * 1024  # of messages of one partition, about


async def bounds(client: Client, topic: TopicMeta, partitions: Iterable[int]) -> dict[int, tuple[int, int]]:
    """Of each partition [start, end) of what can be read."""
    found = await look_up(client, {(topic.id, number): "start" for number in partitions}, client.timeout)
    return {key[1]: (result.log_start, result.high_watermark) for key, result in found.items()}


async def peeked(
    client: Client, primaries: Primaries, topic: TopicMeta, partitions: Iterable[int], offset: int, batch: int
) -> list[dict[str, Any]]:
    """Up to ``batch`` messages from ``offset`` on, partitions merged by time; none where that is beyond the end."""
    known = await bounds(client, topic, partitions)
    lines = await asyncio.gather(
        *(_line(primaries, topic, number, max(offset, start), end, batch) for number, (start, end) in known.items())
    )
    first = list(merge(*lines, key=lambda one: (one[1].timestamp, one[0])))[:batch]
    return [shown(partition, record.offset, record) for partition, record in first]


async def _line(
    primaries: Primaries, topic: TopicMeta, partition: int, offset: int, end: int, batch: int
) -> list[tuple[int, DecodedRecord]]:
    found: list[tuple[int, DecodedRecord]] = []
    size = 0
    while offset < end and len(found) < batch and size < _ANSWER_BYTES:
        _, payload = await primaries.fetch((topic.id, partition), offset, _BYTES)
        if not payload:
            break
        size += len(payload)
        for at, header in split_batches(payload):
            if not header.is_control:
                records = decode_batch(payload[at : at + header.size], header)
                found += [(partition, record) for record in records if record.offset >= offset]
            offset = max(offset, header.next_offset)
    return found[:batch]
