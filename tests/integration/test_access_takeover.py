"""Access with several coordinators: whoever takes over knows every principal, and the policy's revision goes on."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import ferryline as fl
from ferryline.cli.driver import ProcessCluster
from tests.integration.test_access import FILE, ROOT_KEY
from tests.polling import poll

pytestmark = [pytest.mark.process, pytest.mark.etcd, pytest.mark.slow]
Start = Callable[..., Awaitable[ProcessCluster]]
WRITE_T = {"resource": "topic", "pattern": "t", "actions": ["write"]}


class Asking:
    """REST at any of the services."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http

    async def __call__(
        self, url: str, path: str, key: str = ROOT_KEY, method: str = "GET", body: Any = None
    ) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key}"}
        async with self._http.request(method, url + path, json=body, headers=headers) as response:
            return response.status, await response.json(content_type=None)


async def test_the_next_coordinator_knows_who_may_do_what(start_cluster: Start, tmp_path: Path) -> None:
    file = tmp_path / "access.toml"
    file.write_text(FILE)
    cluster = await start_cluster(
        brokers=2, coordinators=2, store="etcd", etcd_members=1, coordinator_args=["--access", str(file)]
    )
    tls = ssl.create_default_context(cafile=str(cluster.ca))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls)) as http:
        ask = Asking(http)
        states = {name: (await ask(cluster.url_of(name), "/readyz"))[1]["status"] for name in cluster.coordinators}
        standby, active = (next(name for name in states if states[name] == what) for what in ("standby", "ready"))
        next_url, url = cluster.url_of(standby), cluster.url_of(active)
        status, problem = await ask(next_url, "/v1/whoami")
        assert (status, problem["details"]["active"]) == (503, url)
        async with fl.connect(next_url, ca=str(cluster.ca), token=ROOT_KEY, timeout=30) as client:
            await client.admin.create_topic("t", partitions=2, replication=2)  # led on to the active one
        await ask(url, "/v1/principals", method="POST", body={"name": "p", "grants": [WRITE_T]})
        key = (await ask(url, "/v1/principals/p/keys", method="POST", body={}))[1]["key"]
        before = (await ask(url, "/v1/whoami"))[1]["revision"]
        await cluster.kill(active)
        async with fl.connect(next_url, ca=str(cluster.ca), token=key, timeout=60) as client, client.producer() as sent:
            await sent.send("t", b"v", key="k")

        async def told() -> bool:
            answers = [
                await ask(where, "/v1/whoami", key) for where in (next_url, *map(cluster.url_of, cluster.brokers))
            ]
            return all(status == 200 and known["revision"] > before for status, known in answers)

        await poll(told, within_s=60)
        assert (await ask(next_url, "/v1/principals/p", method="DELETE"))[0] == 200

        async def gone() -> bool:
            answers = [await ask(cluster.url_of(name), "/v1/whoami", key) for name in cluster.brokers]
            return all(status == 401 for status, _ in answers)

        await poll(gone, within_s=30)
