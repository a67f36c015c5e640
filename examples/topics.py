"""Topics: patterns over dotted words choose records. ``*`` is one word, ``#`` is any number of words, none included.

python examples/topics.py                 # against a running cluster: `ferryline up`
"""

from __future__ import annotations

import asyncio

import ferryline as fl

# A record says how fast, which colour and what kind of animal.
WANTED = {"oranges": ["*.orange.*"], "rabbits": ["*.*.rabbit", "lazy.#"]}
ANIMALS = ("quick.orange.rabbit", "lazy.orange.elephant", "quick.orange.fox", "lazy.brown.fox", "quick.brown.fox")


async def main() -> None:
    async with fl.connect() as client:
        await client.admin.create_exchange("animals", "topic", exist_ok=True)
        for topic, patterns in WANTED.items():
            await client.admin.create_topic(topic, partitions=1, exist_ok=True)
            for pattern in patterns:
                await client.admin.bind("animals", topic=topic, routing_key=pattern)
        sent = dict.fromkeys(WANTED, 0)
        async with client.producer() as producer:
            for animal in ANIMALS:
                reached = await producer.publish("animals", animal.replace(".", " "), routing_key=animal)
                print(f"{animal} -> {', '.join(reached) or 'nobody'}")
                for topic in reached:
                    sent[topic] += 1
        for topic, count in sent.items():
            async with client.consumer(topic, group=topic, value=str) as consumer:
                for _ in range(count):
                    print(f"{topic}: {(await anext(consumer)).value}")
                await consumer.commit()


if __name__ == "__main__":
    asyncio.run(main())
