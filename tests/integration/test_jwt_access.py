"""JWTs at a real cluster: hostile ones are refused wherever they are shown; good ones end, and nobody notices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

import ferryline as fl
from ferryline.cli.driver import ProcessCluster
from ferryline.protocol.errors import BadCredentials
from ferryline.trust import ssl_context
from tests.hostile_jwts import HOSTILE, weak_keys
from tests.integration.conftest import Start
from tests.integration.jwt_campaign import Tally, show
from tests.oidc_issuer import AUDIENCE, Issuer, Keyring
from tests.polling import poll

pytestmark = pytest.mark.process

TOKEN_S = 4  # short, and still longer than a busy machine takes to use one
_ACCESS = """
[[issuers]]
name = "test"
issuer = "{issuer}"
audience = "{audience}"
leeway_ms = 0

[[principals]]
name = "test:ann"
grants = [
    {{resource = "topic", pattern = "*", actions = ["manage"]}},
    {{resource = "group", pattern = "*", actions = ["manage"]}},
]
"""


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with Issuer(Keyring()) as running:
        yield running


async def begin(start_cluster: Start, issuer: Issuer, folder: Path, brokers: int) -> ProcessCluster:
    (folder / "access.toml").write_text(_ACCESS.format(issuer=issuer.url, audience=AUDIENCE))
    return await start_cluster(brokers=brokers, coordinator_args=["--access", str(folder / "access.toml")])


async def test_every_hostile_token_is_refused_over_rest_and_sessions_of_both_services(
    issuer: Issuer, start_cluster: Start, tmp_path: Path
) -> None:
    issuer.extra = weak_keys()
    cluster = await begin(start_cluster, issuer, tmp_path, brokers=1)
    urls = [cluster.url, cluster.url_of(cluster.brokers[0])]
    tls = ssl_context(str(cluster.ca))
    async with (
        Issuer(issuer.keyring) as attacker,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls, limit=8)) as http,
    ):
        for url in urls:
            assert (await show(http, f"{url}/v1/whoami", issuer.good()))[0] == 200
        tally = Tally()
        for number, (name, make) in enumerate(HOSTILE.items()):
            token = make(issuer, attacker.url)
            paths = ("/v1/whoami", "/v1/session") if number % 2 else ("/v1/session", "/v1/whoami")
            for url, path in zip(urls, paths, strict=True):
                tally.note(name, token, *await show(http, url + path, token), 0.0)
        assert tally.odd == []
        assert attacker.requests == []
        for url in urls:  # neither service minds
            assert (await show(http, f"{url}/v1/whoami", issuer.good()))[0] == 200
    for bad in (lambda: issuer.good(aud="another"), lambda: issuer.good(exp=1), "fl_0000000000000000_x", ""):
        with pytest.raises(BadCredentials):  # a client is told so at once
            async with fl.connect(cluster.url, ca=cluster.ca, token=bad, timeout=60):
                pass


async def test_no_error_is_seen_while_tokens_end_under_load(
    issuer: Issuer, start_cluster: Start, tmp_path: Path
) -> None:
    """Sends that never pause, a consumer, a receiver and an administrator, through three ends of their tokens."""
    cluster = await begin(start_cluster, issuer, tmp_path, brokers=2)
    given: list[str] = []

    async def token() -> str:
        given.append(issuer.good(exp=int(time.time()) + TOKEN_S))
        return given[-1]

    sent, read, received = 0, set[int](), set[int]()
    async with fl.connect(cluster.url, ca=cluster.ca, token=token) as client:
        await client.admin.create_topic("orders", partitions=4)
        async with (
            client.producer() as producer,
            client.consumer("orders", group="billing") as consumer,
            client.receiver("orders", group="packing") as receiver,
        ):

            async def consuming() -> None:
                async for message in consumer:
                    read.add(int(message.value))

            async def receiving() -> None:
                async for message in receiver:
                    async with message.processing():
                        received.add(int(message.value))

            tasks = [asyncio.create_task(consuming()), asyncio.create_task(receiving())]
            end = time.monotonic() + 3 * TOKEN_S
            while time.monotonic() < end:
                results = await producer.send_many(
                    "orders", [(f"k{number % 50}", b"%d" % number) for number in range(sent, sent + 20)]
                )
                assert [result for result in results if isinstance(result, BaseException)] == []
                sent += 20
                await client.admin.list_topics()
                assert not [task.exception() for task in tasks if task.done()]
            await poll(lambda: len(read) == sent and len(received) == sent, within_s=60)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
    assert len(set(given)) >= 3
