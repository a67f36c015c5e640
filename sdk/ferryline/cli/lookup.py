"""Where records with an id of their sender's stand, and since when a log holds everything: for `ferryline explain`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from ferryline.app.reading import read_back
from ferryline.positions import look_up
from ferryline.protocol.metadata import NO_BROKER

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.message import Message
    from ferryline.protocol.metadata import TopicMeta

PLACES_MAX = 20  # records of one id that are told of
DEDUPE_MS = 300_000  # a queue takes a second record with the same id for a repetition within this time
_PULL_S = 2.0


class Found(msgspec.Struct):
    """``places``: (topic, partition, offset), in the order of the topics. ``since_ms``: everything that came from then
    on was looked through; 0: everything there ever was. ``unread``: partitions that nobody can read at the moment."""

    places: list[tuple[str, int, int]] = []
    since_ms: int = 0
    unread: list[str] = []


async def find(client: Client, identity: str, topics: Sequence[str], since_ms: int) -> Found:
    """Read these topics from a moment on, for records with this id. Raises UnknownTopic."""
    found = Found(since_ms=since_ms)
    for topic in topics:
        meta = await client.learn_topic(topic)
        readable: list[int] = []
        for partition in range(meta.config.partitions):
            part = client.routing.cluster.partition(meta.id, partition)
            if part is not None and part.primary == NO_BROKER:
                found.unread.append(f"{topic}/{partition}")
                continue
            readable.append(partition)
            found.since_ms = max(found.since_ms, await complete_since(client, meta, partition))
        async for batch in read_back(client, topic, readable, since_ms, client.timeout):
            places = [(topic, one.partition, one.offset) for one in batch if one.id == identity]
            found.places += sorted(places)[: PLACES_MAX - len(found.places)]
    return found


async def complete_since(client: Client, meta: TopicMeta, partition: int) -> int:
    """The moment from which on a partition holds everything that it got; 0 if nothing was ever taken from it."""
    key = (meta.id, partition)
    ends = (await look_up(client, {key: "end"}, client.timeout))[key]
    if ends.log_start <= 0:
        return 0
    first = await first_from(client, meta.name, partition, ends.log_start) if ends.log_start < ends.offset else None
    return int(datetime.now(UTC).timestamp() * 1000) if first is None else first.timestamp_ms


async def first_from(client: Client, topic: str, partition: int, offset: int) -> Message[bytes] | None:
    """The first record that stands at this offset or behind it; None if none comes soon."""
    async with client.consumer(topic, partitions=[partition], start=offset) as consumer:
        found: list[Message[bytes]] = await consumer.pull(1, _PULL_S)
        return found[0] if found else None


async def repetition_of(client: Client, message: Message[bytes]) -> str:
    """Where the record stands that this one repeats, by its id, as queues see it; "" if it repeats none."""
    if not message.id:
        return ""
    since_ms = message.timestamp_ms - DEDUPE_MS
    async for batch in read_back(client, message.topic, [message.partition], since_ms, client.timeout):
        for one in batch:
            if one.offset >= message.offset:
                return ""
            if one.id == message.id:
                return f"{one.topic}/{one.partition}/{one.offset}"
    return ""


def moment(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds")


def expired(message: Message[bytes], now_ms: int) -> str:
    """When the time that it may be delivered in ended; "" if it has not, or it has no such limit."""
    text = message.headers.text("fl-expires-at")
    if not (text.isascii() and text.isdigit() and len(text) <= 15) or int(text) > now_ms:
        return ""
    return moment(int(text))


def not_found(identity: str, topics: Sequence[str], found: Found) -> str:
    """What is said of an id that no record has."""
    where = f"topic {topics[0]}" if len(topics) == 1 else f"any of {len(topics)} topics"
    since = moment(found.since_ms) if found.since_ms else "the beginning"
    unread = f"; not read, as it has no primary: {', '.join(found.unread)}" if found.unread else ""
    return f"{identity!r} is not in the retained log since {since} of {where}{unread}"
