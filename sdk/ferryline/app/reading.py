"""Reading what a topic holds already, up to what is now its end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from ferryline.message import At, Message
from ferryline.positions import look_up

if TYPE_CHECKING:
    from ferryline.client import Client

_PULL_S = 0.05  # offsets without a record bring no news, only another position


async def read_back(
    client: Client, topic: str, partitions: Sequence[int], since_ms: int, timeout: float
) -> AsyncIterator[list[Message[bytes]]]:
    """Records with timestamps from ``since_ms`` on, of some partitions, in lists, up to the present end of each.

    Raises UnknownTopic, and what a consumer raises.
    """
    meta = await client.learn_topic(topic)
    keys = {(meta.id, number): number for number in partitions}
    goal = At(max(0, since_ms))
    begins = await look_up(client, dict.fromkeys(keys, goal), timeout)
    ends = await look_up(client, dict.fromkeys(keys, "end"), timeout)
    left = {number: ends[key].offset for key, number in keys.items() if begins[key].offset < ends[key].offset}
    if not left:
        return
    consumer = client.consumer(topic, partitions=sorted(left), start=goal)
    async with consumer:
        while left:
            batch: list[Message[bytes]] = await consumer.pull(5_000, _PULL_S)
            if batch:
                yield batch
            for number in list(left):
                if consumer.position((topic, number)) >= left[number]:
                    del left[number]
