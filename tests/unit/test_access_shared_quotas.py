"""Quotas that services share through a real Redis: what both spend counts for both; nobody waits when it is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client.exposition import generate_latest

from ferryline.protocol.access import AccessPolicy, Quota
from ferryline.protocol.errors import QuotaExceeded
from ferryline_service.access.caller import Caller
from ferryline_service.access.quotas import Quotas
from ferryline_service.access.shared_quotas import QuotaCounts, SharedQuotas
from ferryline_service.metrics import ServiceMetrics
from tests.polling import poll
from tests.redis_server import RedisServer

pytestmark = pytest.mark.redis

CALLER = Caller("billing", (), Quota(requests=100, records=1_000, bytes=10**9))


@pytest.fixture
def redis(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path, free_port())
    server.start()
    yield server
    server.kill()


@asynccontextmanager
async def service(policy: AccessPolicy, *, services: int = 2, cluster: str = "c1") -> AsyncIterator[Quotas]:
    """The quotas of one service, settled as in production."""
    quotas = Quotas()
    quotas.take(policy, services=services)
    shared = SharedQuotas(quotas, cluster)
    shared.start()
    try:
        yield quotas
    finally:
        await shared.close()


def policy(redis: RedisServer) -> AccessPolicy:
    return AccessPolicy(enabled=True, redis_url=redis.url)


async def test_what_one_service_lets_in_the_other_one_waits_for(redis: RedisServer) -> None:
    async with service(policy(redis)) as one, service(policy(redis)) as other:
        await poll(lambda: one.shared and other.shared)
        one.spend(CALLER, records=600_000)  # ten minutes of the rate
        await poll(lambda: other.wait_ms(CALLER) > 500_000)  # asking is enough to hear of it
        with pytest.raises(QuotaExceeded) as refused:
            other.spend(CALLER, records=1)
        assert 500_000 < refused.value.details["retry_after_ms"] <= 599_000
        other.request(CALLER)  # another bucket
        other.spend(Caller("somebody", (), Quota(records=1_000)), records=1)


async def test_what_both_spend_adds_up_however_it_falls_between_settlements(redis: RedisServer) -> None:
    caller = Caller("slow", (), Quota(records=1))
    async with service(policy(redis)) as one, service(policy(redis)) as other:
        await poll(lambda: one.shared and other.shared)
        for _ in range(50):
            one.charge(caller, records=10)
            other.charge(caller, records=10)
            await asyncio.sleep(0.002)
        # 1,000 s of the rate, of which the test itself takes some.
        await poll(lambda: 900_000 < one.wait_ms(caller) <= 999_000 and 900_000 < other.wait_ms(caller) <= 999_000)


async def test_what_is_given_back_is_given_back_to_all(redis: RedisServer) -> None:
    async with service(policy(redis)) as one, service(policy(redis)) as other:
        await poll(lambda: one.shared and other.shared)
        one.spend(CALLER, records=600_000)
        await poll(lambda: other.wait_ms(CALLER) > 500_000)
        one.give_back(CALLER, records=600_000)
        await poll(lambda: other.wait_ms(CALLER) == one.wait_ms(CALLER) == 0)


async def test_clusters_that_use_the_same_redis_do_not_meet(redis: RedisServer) -> None:
    async with service(policy(redis)) as one, service(policy(redis), cluster="c2") as other:
        await poll(lambda: one.shared and other.shared)
        one.spend(CALLER, records=600_000)
        async with service(policy(redis)) as same:
            await poll(lambda: same.wait_ms(CALLER) > 0)
        other.spend(CALLER, records=1)
        assert other.wait_ms(CALLER) == 0


async def test_a_redis_that_died_costs_no_request_and_gives_each_service_its_share(redis: RedisServer) -> None:
    async with service(policy(redis), services=4) as quotas:
        await poll(lambda: quotas.shared)
        redis.kill()
        quotas.request(CALLER)
        await poll(lambda: not quotas.shared)
        caller = Caller("after", (), Quota(records=1_000))
        quotas.spend(caller, records=10_000)
        assert 30_000 < quotas.wait_ms(caller) <= 39_000  # a quarter of the rate
        quotas.request(CALLER)


async def test_a_redis_that_hangs_makes_nobody_wait(redis: RedisServer) -> None:
    async with service(policy(redis)) as quotas:
        await poll(lambda: quotas.shared)
        redis.pause()
        try:
            quotas.request(CALLER)  # returns at once: it asks nobody
            await poll(lambda: not quotas.shared)
            quotas.request(CALLER)
        finally:
            redis.resume()
        await poll(lambda: quotas.shared)


async def test_a_redis_that_comes_back_empty_is_told_what_was_spent_meanwhile(redis: RedisServer) -> None:
    async with service(policy(redis)) as one, service(policy(redis)) as other:
        await poll(lambda: one.shared and other.shared)
        redis.kill()
        await poll(lambda: not one.shared and not other.shared)
        one.spend(CALLER, records=600_000)  # twenty minutes of its half
        redis.start()
        await poll(lambda: one.shared and other.shared)
        await poll(lambda: 500_000 < other.wait_ms(CALLER) <= 599_000)
        await poll(lambda: 500_000 < one.wait_ms(CALLER) <= 599_000)


async def test_a_policy_without_redis_ends_the_sharing(redis: RedisServer) -> None:
    async with service(policy(redis)) as quotas:
        await poll(lambda: quotas.shared)
        quotas.take(AccessPolicy(revision=2, enabled=True))
        await poll(lambda: not quotas.shared)
        quotas.request(CALLER)
        await poll(lambda: not quotas.touched)


async def test_an_address_that_makes_no_sense_leaves_quotas_local() -> None:
    async with service(AccessPolicy(enabled=True, redis_url="ftp://nowhere")) as quotas:
        quotas.request(CALLER)
        await poll(lambda: not quotas.touched)
        assert not quotas.shared


async def test_keys_end_with_what_they_remember(redis: RedisServer) -> None:
    from redis.asyncio import Redis

    async with service(policy(redis)) as quotas:
        await poll(lambda: quotas.shared)
        quotas.spend(CALLER, records=600_000)
        async with Redis.from_url(redis.url) as client:
            keys = await poll(lambda: client.keys("*"))
            assert keys == [b"ferryline:c1:quota:{billing}:records"]
            assert 500_000 < await client.pttl(keys[0]) <= 601_000


async def test_an_operator_sees_whether_quotas_are_shared_and_what_was_refused(redis: RedisServer) -> None:
    metrics = ServiceMetrics("broker")
    async with service(policy(redis)) as quotas:
        QuotaCounts(quotas, metrics)
        await poll(lambda: 'ferryline_quota_shared{service="broker"} 1.0' in generate_latest(metrics.registry).decode())
        quotas.spend(CALLER, records=10_000)
        with pytest.raises(QuotaExceeded):
            quotas.spend(CALLER, records=1)
        shown = generate_latest(metrics.registry).decode()
        assert 'ferryline_quota_refused_total{quota="records",service="broker"} 1.0' in shown
    assert 'ferryline_quota_shared{service="broker"} 0.0' in generate_latest(metrics.registry).decode()
