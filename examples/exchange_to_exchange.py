"""Exchange to exchange: one place to publish to, and rules in stages behind it.

everything (fanout) --> audit
                    --> events (topic) -- eu.#    --> europe
                                       -- #.order --> orders

python examples/exchange_to_exchange.py   # against a running cluster: `ferryline up`
"""

from __future__ import annotations

import asyncio

import ferryline as fl


async def main() -> None:
    async with fl.connect() as client:
        admin = client.admin
        await admin.create_exchange("everything", "fanout", exist_ok=True)
        await admin.create_exchange("events", "topic", exist_ok=True)
        for topic in ("audit", "europe", "orders"):
            await admin.create_topic(topic, partitions=1, exist_ok=True)
        await admin.bind("everything", topic="audit")
        await admin.bind("everything", to_exchange="events")
        await admin.bind("events", topic="europe", routing_key="eu.#")
        await admin.bind("events", topic="orders", routing_key="#.order")
        try:
            await admin.bind("events", to_exchange="everything", routing_key="#")
        except fl.errors.Conflict as refused:
            print(f"refused: {refused.message}")
        async with client.producer() as producer:
            for key in ("eu.shop.order", "eu.shop.login", "us.login"):
                reached = await producer.publish("everything", {"what": key}, routing_key=key)
                print(f"{key} -> {', '.join(reached)}")


if __name__ == "__main__":
    asyncio.run(main())
