"""A coordinator outage stops changes, never traffic."""

from __future__ import annotations

import asyncio

import pytest

import ferryline as fl
from ferryline.cli.driver import COORDINATOR, ProcessCluster
from tests.integration.steady import Steady

pytestmark = pytest.mark.process

OUTAGE_S = 8.0
NEWCOMERS = "newcomers"


async def outage(cluster: ProcessCluster, seconds: float) -> Steady:
    """1. the coordinator is killed under load  2. nothing fails, groups keep their partitions  3. new clients start
    from the brokers' metadata  4. it returns  5. a broker dies and is replaced as before.
    """
    async with Steady(cluster) as steady:
        await steady.client.admin.create_topic(NEWCOMERS, partitions=2, replication=2)
        await steady.run_for(1.0)
        await cluster.kill(COORDINATOR)
        again, moved = steady.traffic.ledger.deliveries, steady.traffic.ledger.verdict().redelivered
        errors = dict(steady.traffic.read_errors)
        await asyncio.sleep(seconds / 2)
        await _new_clients(cluster)
        await asyncio.sleep(seconds / 2)
        await steady.flows()
        assert steady.traffic.send_errors == {}
        assert steady.traffic.read_errors == errors
        assert steady.traffic.ledger.deliveries > again
        assert steady.traffic.ledger.verdict().redelivered == moved, "a partition changed hands without a coordinator"

        await cluster.restart(COORDINATOR)
        await steady.run_for(2.0)
        await steady.flows()
        victim = steady.primary_name()
        await cluster.kill(victim)
        await steady.flows(30.0)
        await cluster.restart(victim)
        assert await steady.healed(60.0), steady.partitions()
    steady.assert_kept()
    assert steady.traffic.send_errors == {}
    return steady


async def _new_clients(cluster: ProcessCluster) -> None:
    """A producer and a consumer that start now, knowing only brokers."""
    urls = [cluster.url_of(name) for name in cluster.brokers]
    async with (
        fl.connect(urls, ca=cluster.ca) as client,
        client.consumer(NEWCOMERS, start="start") as consumer,
        client.producer() as producer,
    ):
        await producer.send(NEWCOMERS, b"hello", key="k")
        async with asyncio.timeout(30):
            async for message in consumer:
                assert message.raw == b"hello"
                return


async def test_traffic_goes_on_without_a_coordinator_and_changes_with_it(cluster: ProcessCluster) -> None:
    await outage(cluster, OUTAGE_S)


@pytest.mark.slow
async def test_an_outage_of_a_minute_harms_nothing(cluster: ProcessCluster) -> None:
    await outage(cluster, 60.0)
