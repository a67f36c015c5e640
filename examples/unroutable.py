"""What no binding takes: it is counted, or refused when it is mandatory, or goes to the alternate exchange.

python examples/unroutable.py             # against a running cluster: `ferryline up`
"""

from __future__ import annotations

import asyncio

import ferryline as fl


async def main() -> None:
    async with fl.connect() as client, client.producer() as producer:
        admin = client.admin
        await admin.create_topic("known", partitions=1, exist_ok=True)
        await admin.create_topic("strays", partitions=1, exist_ok=True)
        await admin.create_exchange("strict", "direct", exist_ok=True)
        await admin.bind("strict", topic="known", routing_key="known")
        await producer.publish("strict", "lost", routing_key="unknown")
        print(f"counted: {producer.unroutable['strict']}")
        try:
            await producer.publish("strict", "not lost in silence", routing_key="unknown", mandatory=True)
        except fl.errors.Unroutable as refused:
            print(f"refused: {refused.code}")

        await admin.create_exchange("catch-all", "fanout", exist_ok=True)
        await admin.bind("catch-all", topic="strays")
        await admin.create_exchange("lenient", "direct", alternate="catch-all", exist_ok=True)
        await admin.bind("lenient", topic="known", routing_key="known")
        for key in ("known", "unknown"):
            reached = await producer.publish("lenient", "kept", routing_key=key, mandatory=True)
            print(f"{key} -> {', '.join(reached)}")


if __name__ == "__main__":
    asyncio.run(main())
