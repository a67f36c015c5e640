"""Request and reply: ask a worker, wait for its answer. Start as many workers as you like; they share the requests.

python examples/request_reply.py          # against a running cluster: `ferryline up`
"""

from __future__ import annotations

import asyncio

import ferryline as fl


def fibonacci(n: int) -> int:
    before, last = 0, 1
    for _ in range(n):
        before, last = last, before + last
    return before


async def work(client: fl.Client) -> None:
    """One worker: reads requests, sends replies."""
    async with client.consumer("fibonacci", group="workers", value=int) as consumer:
        async for message in consumer:
            await client.reply(message, fibonacci(message.value))


async def main() -> None:
    async with fl.connect() as client:
        await client.admin.create_topic("fibonacci", partitions=3, exist_ok=True)
        worker = asyncio.create_task(work(client))
        numbers = [1, 10, 30]
        answers = await asyncio.gather(*(client.request("fibonacci", n, reply=int, timeout=20) for n in numbers))
        for n, answer in zip(numbers, answers, strict=True):
            print(f"fibonacci({n}) = {answer}")
        worker.cancel()
        await asyncio.wait([worker])


if __name__ == "__main__":
    asyncio.run(main())
