"""Publish and subscribe: every subscriber gets every record, through a fanout exchange.

ferryline up              # in another terminal; it prints what to put into FERRYLINE_CA
python examples/publish_subscribe.py
"""

from __future__ import annotations

import asyncio

import ferryline as fl

SUBSCRIBERS = ("screen", "file")
LINES = ("the disk is filling up", "the disk is full")


async def subscribe(client: fl.Client, name: str) -> None:
    """Read what is new for this subscriber."""
    async with client.consumer(name, group=name, value=str) as consumer:
        for _ in LINES:
            message = await anext(consumer)
            print(f"{name}: {message.value}")
        await consumer.commit()


async def main() -> None:
    async with fl.connect() as client:
        await client.admin.create_exchange("logs", "fanout", exist_ok=True)
        for name in SUBSCRIBERS:
            await client.admin.create_topic(name, partitions=1, exist_ok=True)
            await client.admin.bind("logs", topic=name)
        async with client.producer() as producer:
            for line in LINES:
                await producer.publish("logs", line, mandatory=True)
        for name in SUBSCRIBERS:
            await subscribe(client, name)


if __name__ == "__main__":
    asyncio.run(main())
