"""Work queue: jobs go to whoever has time, one that fails comes again, and none is done twice.

ferryline up              # in another terminal; it prints what to put into FERRYLINE_CA
python examples/work_queue.py
"""

from __future__ import annotations

import asyncio

import ferryline as fl

JOBS = tuple(f"job {number}" for number in range(1, 7))
RETRY = fl.Retry(3, backoff=fl.exponential(0.1, 1))


async def work(client: fl.Client, done: list[tuple[str, int]]) -> None:
    """One of several that do the same. ``prefetch=1``: nothing waits here while another one is idle."""
    async with client.receiver("jobs-to-do", group="workers", value=str, prefetch=1) as receiver:
        while len(done) < len(JOBS):
            for message in await receiver.receive(1, max_wait=0.2):
                if message.value == "job 3" and message.delivery_count == 1:
                    await message.nack(reason="out of paper")
                    continue
                await message.ack()
                done.append((message.value, message.delivery_count))


async def main() -> None:
    async with fl.connect() as client:
        await client.admin.create_topic("jobs-to-do", partitions=1, retry=RETRY, exist_ok=True)
        async with client.producer() as producer:
            for job in JOBS:
                await producer.send("jobs-to-do", job)
        done: list[tuple[str, int]] = []
        await asyncio.gather(*(work(client, done) for _ in range(3)))
        for job, attempts in sorted(done):
            print(f"{job}: done" if attempts == 1 else f"{job}: done at attempt {attempts}")


if __name__ == "__main__":
    asyncio.run(main())
