"""Run it with ``pytest examples/testing``: no cluster has to be there, and days pass at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from billing import REMIND_S, RETRY, bill, place

import ferryline as fl

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.ferryline(topics={"orders": {"partitions": 3, "retry": RETRY}, "reminders": {"partitions": 1}}, seed=2),
]


class Bank:
    """A bank for tests. ``fails``: asked before each charge; raises what the charge is to raise."""

    def __init__(self) -> None:
        self.charged: list[int] = []
        self.fails: Callable[[int], None] = lambda order: None

    async def charge(self, order: int, cents: int) -> None:
        self.fails(order)
        self.charged.append(order)


@pytest.fixture
def bank() -> Bank:
    return Bank()


@pytest_asyncio.fixture
async def producer(ferryline_client: fl.Client, bank: Bank) -> AsyncIterator[fl.Producer]:
    """A producer, while the service runs."""
    service = asyncio.create_task(bill(ferryline_client, bank))
    async with ferryline_client.producer() as producer:
        yield producer
    service.cancel()
    await asyncio.wait([service])


async def test_each_order_is_billed_in_the_order_of_its_customer(
    ferryline_cluster: fl.testing.Cluster, producer: fl.Producer, bank: Bank
) -> None:
    for order in range(20):
        await place(producer, order, "anne", 500)
    await ferryline_cluster.advance(seconds=5)
    assert bank.charged == list(range(20))


async def test_no_order_is_lost_when_a_broker_dies(
    ferryline_cluster: fl.testing.Cluster, producer: fl.Producer, bank: Bank
) -> None:
    for order in range(30):
        await place(producer, order, f"customer-{order % 5}", 500)
        if order == 10:
            ferryline_cluster.kill(ferryline_cluster.primary("orders", 0))
    await ferryline_cluster.advance(minutes=2)
    assert sorted(set(bank.charged)) == list(range(30))


async def test_a_bank_that_is_away_is_asked_again(
    ferryline_cluster: fl.testing.Cluster, producer: fl.Producer, bank: Bank
) -> None:
    asked: list[int] = []

    def away(order: int) -> None:
        asked.append(order)
        if len(asked) < 3:
            raise OSError("no answer")

    bank.fails = away
    await place(producer, 1, "anne", 500)
    await ferryline_cluster.advance(minutes=5)
    assert bank.charged == [1]


async def test_an_order_that_nobody_can_bill_becomes_a_dead_letter(
    ferryline_cluster: fl.testing.Cluster, ferryline_client: fl.Client, producer: fl.Producer, bank: Bank
) -> None:
    def refuse(order: int) -> None:
        if order == 1:
            raise ValueError("no such account")

    bank.fails = refuse
    await place(producer, 1, "anne", 500)
    await place(producer, 2, "anne", 500)
    await ferryline_cluster.advance(minutes=10)
    assert bank.charged == [2]
    letters = [letter async for letter in ferryline_client.dead_letters("orders").browse()]
    assert [(letter.reason, letter.attempts) for letter in letters] == [("ValueError: no such account", 5)]


async def test_a_customer_is_reminded_after_three_days(
    ferryline_cluster: fl.testing.Cluster, ferryline_client: fl.Client, producer: fl.Producer
) -> None:
    await place(producer, 1, "anne", 500)
    placed = ferryline_cluster.now()
    async with ferryline_client.receiver("reminders", group="mail", value=dict) as receiver:
        message = await anext(aiter(receiver))
        assert message.value == {"order": 1}
        await message.ack()
    assert abs((ferryline_cluster.now() - placed).total_seconds() - REMIND_S) < 1
