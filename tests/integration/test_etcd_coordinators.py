"""Three coordinators on three etcd members: take-overs under traffic, standbys that answer, zombies that do not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import ferryline as fl
from ferryline.cli.driver import ProcessCluster
from ferryline.protocol.errors import CoordinatorStandby
from ferryline.transport import Connector
from tests.integration.takeover_campaign import BOUND_S, run
from tests.integration.takeovers import Watch

pytestmark = [pytest.mark.process, pytest.mark.etcd]
Eventually = Callable[..., Awaitable[Any]]


async def campaign(folder: Path, kinds: list[str], seed: int) -> dict[str, float]:
    """One round of each kind; returns how long each take-over took."""
    folder.mkdir()
    done = await run(0, seed, kinds=kinds, rate=300.0, folder=folder)
    assert done.wrong == []
    assert done.facts["acknowledged"] > 1_000
    assert done.facts["redelivered"] == 0, "members of groups keep what they have"
    assert done.facts["changes"] > 10
    return {r.kind: max(r.active_s, r.change_s) for r in done.rounds}


async def test_a_killed_a_stopped_and_a_stopping_coordinator_are_replaced_and_nothing_is_lost(tmp_path: Path) -> None:
    # Bounds for a busy machine; benchmarks/results/takeover-ledger.jsonl has what they are on a quiet one.
    bounds = {"kill": BOUND_S / 2, "stop": BOUND_S, "term": BOUND_S / 4}
    took = await campaign(tmp_path / "once", list(bounds), seed=7)
    late = [kind for kind, bound in bounds.items() if took[kind] >= bound]
    if late:  # the machine may have been elsewhere, once
        took |= await campaign(tmp_path / "again", late, seed=8)
    assert took["kill"] < bounds["kill"], "a process that is gone is deposed before its lease ends"
    assert took["stop"] < bounds["stop"]
    assert took["term"] < bounds["term"], "it hands over"


@pytest.mark.slow
async def test_etcd_may_lose_members_one_by_one_and_all_at_once(tmp_path: Path) -> None:
    took = await campaign(tmp_path / "once", ["kill+etcd-kill", "etcd-leader-kill", "etcd-restart"], seed=8)
    assert max(took.values()) < 2 * BOUND_S


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[ProcessCluster]:
    made = ProcessCluster(tmp_path, brokers=2, coordinators=2, store="etcd", etcd_members=1)
    try:
        await made.start()
        yield made
    finally:
        await made.kill_all()
        await asyncio.sleep(0.1)


async def standby_of(cluster: ProcessCluster) -> tuple[str, str]:
    """Names of the active coordinator and of the standby."""
    async with Watch(cluster) as watch:
        active, _ = await watch.until_active(0, 60.0)
    return active, next(name for name in cluster.coordinators if name != active)


async def test_whoever_knows_only_a_standby_finds_the_active_one(
    cluster: ProcessCluster, eventually: Eventually
) -> None:
    """1. a standby is alive and says what it is  2. sessions and changes are refused with the active one's address
    3. a client that knows only the standby works all the same, groups included  4. so does a new broker
    5. everybody learns of all coordinators.
    """
    active, standby = await standby_of(cluster)
    active_url, standby_url = cluster.url_of(active), cluster.url_of(standby)
    async with Watch(cluster) as watch:
        assert (await watch.get(standby, "/healthz"))[0] == 200
        assert await watch.get(standby, "/readyz") == (200, {"status": "standby", "active": active_url})
        assert await watch.get(active, "/readyz") == (200, {"status": "ready"})
        status, problem = await watch.get(standby, "/v1/topics")
        assert (status, problem["code"], problem["retriable"]) == (503, "COORDINATOR_STANDBY", True)
        assert problem["details"] == {"active": active_url}
        assert await watch.metric(standby, "ferryline_coordinator_active") == 0
        assert await watch.metric(active, "ferryline_coordinator_active") == 1
    connector = Connector(ca=str(cluster.ca))
    with pytest.raises(CoordinatorStandby) as refused:
        await connector.open(standby_url)
    assert refused.value.details["active"] == active_url
    await connector.close()

    local = cluster.local
    name = local.add_broker()
    args = local.services[name].args
    while cluster.url_of(active) in args:
        at = args.index(cluster.url_of(active))
        del args[at - 1 : at + 1]
    assert args.count("--coordinator") == 1
    await cluster.restart(name)

    async with fl.connect(standby_url, ca=cluster.ca, timeout=60.0) as client:
        await client.admin.create_topic("t", partitions=2, replication=2)
        async with client.producer() as producer, client.consumer("t", group="g", start="start") as consumer:
            for number in range(20):
                await producer.send("t", b"%d" % number, key=b"k%d" % number)
            seen: set[bytes] = set()
            async with asyncio.timeout(60):
                async for message in consumer:
                    seen.add(message.raw or b"")
                    if len(seen) == 20:
                        break
        told = [await client.admin.cluster() for _ in range(1)]
        assert told[0].brokers[-1].id == 3
        await eventually(lambda: sorted(client.routing.coordinators) == sorted([active_url, standby_url]))


async def test_when_etcd_is_away_traffic_goes_on_and_changes_wait_for_it(cluster: ProcessCluster) -> None:
    active, _ = await standby_of(cluster)
    async with Watch(cluster) as watch, fl.connect(cluster.urls, ca=cluster.ca) as client:
        await client.admin.create_topic("t", partitions=1, replication=2)
        async with client.producer() as producer:
            await producer.send("t", b"before")
            await cluster.kill("etcd-1")
            for _ in range(16):
                await asyncio.wait_for(producer.send("t", b"during"), 10.0)
                await asyncio.sleep(0.5)
            assert await watch.active() == ("", 0), "nobody believes in itself longer than its lease"
            status, problem = await watch.get(active, "/v1/topics")
            assert (status, problem["retriable"]) == (503, True)
            with pytest.raises(fl.FerrylineError):
                await client.admin.create_topic("u", timeout=1.0)
            await cluster.restart("etcd-1")
            await watch.until_active(1, 60.0)
            await client.admin.create_topic("u", partitions=1, replication=2, timeout=60.0, exist_ok=True)
            await producer.send("u", b"after")
