"""Verified tokens in a real Redis: shared by services that have the claim key, believed from nobody else."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from ferryline.protocol.access import AccessPolicy
from ferryline.protocol.errors import InvalidArgument, Unavailable
from ferryline_service.access.redis_link import RedisAway, RedisLink
from ferryline_service.access.verifier import Verifier
from tests.oidc_issuer import Issuer, Keyring
from tests.polling import poll
from tests.redis_server import RedisServer

pytestmark = pytest.mark.redis
CLAIM_KEY = b"k" * 32


@pytest.fixture
def redis(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path, free_port())
    server.start()
    yield server
    server.resume()
    server.kill()


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with Issuer(Keyring()) as running:
        yield running


@pytest.fixture
async def services(issuer: Issuer, redis: RedisServer) -> AsyncIterator[Callable[..., Verifier]]:
    """``services()``: one more service with the same policy."""
    made: list[Verifier] = []

    def one(claim_key: bytes = CLAIM_KEY, audience: str = "ferryline") -> Verifier:
        verifier = Verifier(lambda: claim_key)
        verifier.take(AccessPolicy(1, True, issuers=(issuer.meta(audience=audience),), redis_url=redis.url))
        made.append(verifier)
        return verifier

    yield one
    for verifier in made:
        await verifier.close()


async def shared(issuer: Issuer, services: Callable[..., Verifier], redis: RedisServer) -> str:
    """A token that one service has verified and told Redis of; its issuer is down from then on."""
    token = issuer.good()
    await services().verify(token)
    with Redis.from_url(redis.url) as client:
        await poll(client.dbsize)
    issuer.down = True
    return token


async def test_what_one_service_verified_another_one_believes(
    issuer: Issuer, services: Callable[..., Verifier], redis: RedisServer
) -> None:
    token = await shared(issuer, services, redis)
    assert (await services().verify(token)).name == "test:ann"


async def test_an_entry_that_was_changed_in_redis_is_not_believed(
    issuer: Issuer, services: Callable[..., Verifier], redis: RedisServer
) -> None:
    token = await shared(issuer, services, redis)
    with Redis.from_url(redis.url) as client:
        (name,) = client.keys("*")
        value = client.get(name)
        assert isinstance(value, bytes)
        for forged in (value.replace(b"ann", b"bob"), value[32:], b"", b"\0" * 32 + value[32:], value + b"\0"):
            client.set(name, forged)
            with pytest.raises(Unavailable):
                await services().verify(token)
        client.set(name, value)
    await services().verify(token)


async def test_an_entry_under_another_token_is_not_believed(
    issuer: Issuer, services: Callable[..., Verifier], redis: RedisServer
) -> None:
    """Whoever writes to Redis copies the entry of one token to the place of another."""
    token = await shared(issuer, services, redis)
    other = services()
    stranger = issuer.good(sub="bob")
    place, _ = other.cache._names(stranger, CLAIM_KEY)
    with Redis.from_url(redis.url) as client:
        (name,) = client.keys("*")
        client.copy(name, place)
    with pytest.raises(Unavailable):
        await other.verify(stranger)
    await other.verify(token)


@pytest.mark.parametrize("different", [{"claim_key": b"x" * 32}, {"claim_key": b""}, {"audience": "another"}])
async def test_another_cluster_or_another_policy_finds_nothing(
    issuer: Issuer, services: Callable[..., Verifier], redis: RedisServer, different: dict[str, object]
) -> None:
    token = await shared(issuer, services, redis)
    with pytest.raises(Unavailable):
        await services(**different).verify(token)


async def test_entries_end_with_the_token_and_after_five_minutes(
    issuer: Issuer, services: Callable[..., Verifier], redis: RedisServer
) -> None:
    verifier = services()
    with Redis.from_url(redis.url) as client:
        for life_s in (60, 3600):
            await verifier.verify(issuer.good(exp=int(time.time()) + life_s))
            await poll(client.dbsize)
            (name,) = client.keys("*")
            assert 0 < client.pttl(name) <= min(life_s, 300) * 1000  # type: ignore[operator]
            client.flushall()


async def test_a_redis_that_hangs_or_died_costs_no_answer(
    issuer: Issuer, services: Callable[..., Verifier], redis: RedisServer
) -> None:
    verifier = services()
    redis.pause()
    assert (await verifier.verify(issuer.good())).name == "test:ann"
    redis.resume()
    redis.kill()
    assert (await verifier.verify(issuer.good(sub="bob"))).name == "test:bob"


async def test_a_link_tries_nothing_for_a_while_after_a_failure_and_then_connects_again(redis: RedisServer) -> None:
    link = RedisLink(redis.url, pause_s=0.2)
    assert await link.run(lambda client: client.ping())
    redis.kill()
    calls = []

    async def ask(client: object) -> None:
        calls.append(client)
        await link._redis.ping()

    for _ in range(5):
        with pytest.raises(RedisAway):
            await link.run(ask)
    assert len(calls) < 5
    redis.start()

    async def answers() -> bool:
        try:
            return bool(await link.run(lambda client: client.ping()))
        except RedisAway:
            return False

    await poll(answers)
    await link.close()


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379", "redis://localhost:port", ""])
def test_what_is_no_address_of_redis_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidArgument):
        RedisLink(url)
