"""A small service to be tested: it bills each order, and reminds of those that are not paid after three days."""

from __future__ import annotations

from typing import Protocol

import ferryline as fl

REMIND_S = 3 * 86_400.0
RETRY = fl.Retry(5, backoff=fl.exponential(1, 60))


class Bank(Protocol):
    """Whoever moves the money. Raises OSError when it cannot be reached, ValueError when it refuses."""

    async def charge(self, order: int, cents: int) -> None: ...


async def place(producer: fl.Producer, order: int, customer: str, cents: int) -> None:
    """Take an order. It is billed soon, and reminded of later."""
    await producer.send("orders", {"order": order, "cents": cents}, key=customer)
    await producer.send("reminders", {"order": order}, key=customer, delay=REMIND_S)


async def bill(client: fl.Client, bank: Bank) -> None:
    """Bill order after order, those of one customer in their order, until cancelled."""
    async with client.receiver("orders", group="billing", value=dict) as receiver:
        async for message in receiver:
            async with message.processing():
                await bank.charge(message.value["order"], message.value["cents"])
