"""Routing: a subscriber names the severities it wants, through a direct exchange.

python examples/routing.py                # against a running cluster: `ferryline up`
"""

from __future__ import annotations

import asyncio

import ferryline as fl

WANTED = {"pager": ["error"], "archive": ["info", "warning", "error"]}
LINES = {"info": "started", "warning": "the disk is filling up", "error": "the disk is full"}


async def main() -> None:
    async with fl.connect() as client:
        await client.admin.create_exchange("severities", "direct", exist_ok=True)
        for topic, severities in WANTED.items():
            await client.admin.create_topic(topic, partitions=1, exist_ok=True)
            for severity in severities:
                await client.admin.bind("severities", topic=topic, routing_key=severity)
        async with client.producer() as producer:
            for severity, line in LINES.items():
                await producer.publish("severities", line, routing_key=severity)
        for topic, severities in WANTED.items():
            async with client.consumer(topic, group=topic, value=str) as consumer:
                for _ in severities:
                    message = await anext(consumer)
                    print(f"{topic}: {message.routing_key}: {message.value}")
                await consumer.commit()


if __name__ == "__main__":
    asyncio.run(main())
