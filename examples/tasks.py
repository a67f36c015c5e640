"""Workers: a subscriber, a task with a result, and a schedule, in one app.

ferryline up                                          # in another terminal
ferryline topic create orders
ferryline worker run examples.tasks:app --reload      # in a third one, from the root of the repository
python -m examples.tasks                              # submits, watches, and prints what came of it
"""

from __future__ import annotations

import asyncio

import msgspec

import ferryline as fl

app = fl.App(name="shop")


class Order(msgspec.Struct):
    """What the topic ``orders`` holds, as JSON."""

    id: int
    customer: str


class Rates:
    """Something that handlers share; made once for each process."""

    def price(self, order: Order) -> float:
        return 9.5 * order.id


app.provide(Rates, Rates)


@app.use
async def timed(message: fl.Message, call_next):
    """Around every attempt at every record."""
    begin = asyncio.get_running_loop().time()
    try:
        return await call_next(message)
    finally:
        print(
            f"{message.topic}/{message.partition}/{message.offset}: {asyncio.get_running_loop().time() - begin:.3f} s"
        )


@app.subscriber("orders", group="billing", retry=fl.Retry(3, backoff=fl.exponential(0.1, 2)))
async def bill(order: Order, rates: Rates, context: fl.Context) -> None:
    """Bills of one customer are made one after the other, because orders are keyed by customer."""
    if order.customer == "nobody":
        raise fl.Reject("there is no such customer")  # to orders.dlq, at once
    print(f"{order.customer} pays {rates.price(order)}, attempt {context.attempt} of {context.attempts}")


@app.task(queue="media", timeout=10, retry=fl.Retry(3, backoff=fl.exponential(0.1, 2)))
def resize(url: str, width: int = 800, *, context: fl.Context) -> str:
    """No coroutine, so it runs in a thread."""
    if context.attempt == 1 and width > 1000:
        raise OSError("the first attempt at a large one fails, for show")
    return f"{url}?width={width}"


@app.schedule(every=10)
async def tidy() -> None:
    """Every ten seconds, once, however many workers there are."""
    print("tidying up")


async def main() -> None:
    async with app:
        for number, customer in enumerate(["ann", "bob", "ann", "nobody"]):
            await app.producer.send("orders", Order(number, customer), key=customer)
        job = await resize.submit("https://example.org/cat.png", width=2000)
        async for status in job.watch():
            print(f"{job.id}: {status}")
        print(await job.result())


if __name__ == "__main__":
    asyncio.run(main())
