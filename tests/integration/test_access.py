"""Access in a running cluster, through the SDK: what is granted works, what is not fails by itself, changes arrive."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import ferryline as fl
from ferryline.cli.processes import LocalCluster
from ferryline.positions import look_up
from ferryline.protocol.errors import BadCredentials, FerrylineError, Forbidden
from ferryline_service.access.keys import ID_BYTES, SECRET_BYTES, make_key
from tests.polling import poll

pytestmark = pytest.mark.process
Eventually = Callable[..., Awaitable[Any]]
ROOT_KEY, ROOT_ID, ROOT_DIGEST = make_key(bytes([7] * (ID_BYTES + SECRET_BYTES)))
FILE = f"""
[[principals]]
name = "root"
grants = [
    {{ resource = "topic", actions = ["manage"] }}, {{ resource = "group", actions = ["manage"] }},
    {{ resource = "exchange", actions = ["manage"] }}, {{ resource = "cluster", actions = ["manage"] }},
]
keys = [{{ id = "{ROOT_ID}", sha256 = "{ROOT_DIGEST.hex()}" }}]
"""


def grant(resource: str, pattern: str, *actions: str) -> dict[str, Any]:
    return {"resource": resource, "pattern": pattern, "actions": list(actions)}


class Guarded:
    """A cluster with access on; ``open`` and ``closed`` are topics of this test."""

    def __init__(self, cluster: LocalCluster, file: Path, test: str) -> None:
        self.cluster, self.file = cluster, file
        self._test = test
        self.open, self.closed = self.name("open"), self.name("closed")

    def name(self, short: str) -> str:
        """Of a topic, group or principal of this test."""
        return f"{self._test}.{short}"

    def path(self, principal: str) -> str:
        return f"/v1/principals/{self.name(principal)}"

    def client(self, key: str, **options: Any) -> Any:
        return fl.connect(self.cluster.urls, ca=str(self.cluster.ca), token=key, **{"timeout": 20, **options})

    async def rest(self, method: str, path: str, body: Any = None, key: str = ROOT_KEY, url: str = "") -> Any:
        connector = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=str(self.cluster.ca)))
        headers = {"Authorization": f"Bearer {key}"}
        async with (
            aiohttp.ClientSession(connector=connector, headers=headers) as http,
            http.request(method, (url or self.cluster.url) + path, json=body) as response,
        ):
            found = await response.json(content_type=None)
            assert response.status < 300, found
            return found

    async def principal(self, short: str, *grants: dict[str, Any]) -> str:
        """Made, with one key: which is returned."""
        await self.rest("POST", "/v1/principals", {"name": self.name(short), "grants": list(grants)})
        key = str((await self.rest("POST", self.path(short) + "/keys", {}))["key"])
        await poll(lambda: self._told(key, grants), within_s=30)
        return key

    async def grant(self, short: str, key: str, *grants: dict[str, Any]) -> None:
        """Exactly this from now on, at every broker."""
        await self.rest("PATCH", self.path(short), {"grants": list(grants)})
        await poll(lambda: self._told(key, grants), within_s=30)

    async def _told(self, key: str, grants: Sequence[dict[str, Any]]) -> bool:
        """Whether every service knows the key, and what is granted."""
        for url in self.cluster.urls:
            try:
                known = await self.rest("GET", "/v1/whoami", key=key, url=url)
            except AssertionError:
                return False
            if known["grants"] != list(grants):
                return False
        return True


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two brokers for all tests of this file; each has topics, groups and principals of its own."""
    root = tmp_path_factory.mktemp("access")
    (root / "access.toml").write_text(FILE)
    cluster = LocalCluster(root / "cluster", brokers=2, coordinator_args=["--access", str(root / "access.toml")])
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.kill_all()


@pytest.fixture
async def guarded(cluster: LocalCluster, request: pytest.FixtureRequest) -> Guarded:
    test = f"t{abs(hash(request.node.name)) % 10**9}"
    guarded = Guarded(cluster, cluster.root.parent / "access.toml", test)
    async with guarded.client(ROOT_KEY) as client:
        for name in (guarded.open, guarded.closed):
            await client.admin.create_topic(name, partitions=2, replication=2)
    return guarded


def again(cluster: LocalCluster, name: str) -> None:
    """Kill a service, if it runs, and start it: blocks until it is ready."""
    cluster.kill(name)
    cluster.start_one(name)


async def ends(guarded: Guarded) -> list[int]:
    """Where the partitions of the closed topic end."""
    async with guarded.client(ROOT_KEY) as client:
        topic = await client.admin.describe_topic(guarded.closed)
        found = await look_up(client, {(topic.id, partition): "end" for partition in (0, 1)}, 20)
    return [result.offset for result in found.values()]


async def begun(guarded: Guarded) -> list[int]:
    """`ends`, once the mark of the first epoch is committed in each partition; a new topic answers before."""
    found = await ends(guarded)
    return found if all(found) else []


async def refused(what: Awaitable[Any]) -> str:
    """Code of what it fails with, "" if it does not."""
    try:
        await what
    except FerrylineError as error:
        return error.code
    return ""


async def test_a_forbidden_topic_does_not_fail_the_others(guarded: Guarded) -> None:
    key = await guarded.principal("writer", grant("topic", guarded.open, "write"))
    before = await poll(lambda: begun(guarded))
    async with guarded.client(key) as client, client.producer() as producer:
        sent = [
            producer.send_nowait(topic, b"%d" % number, key=f"k{number}")
            for number in range(200)
            for topic in (guarded.open, guarded.closed)
        ]
        codes = [await refused(future) for future in sent]
    assert codes == ["", Forbidden.code] * 200
    async with guarded.client(ROOT_KEY) as client, client.consumer(guarded.open, group=guarded.name("g")) as consumer:
        assert len([await anext(consumer) for _ in range(200)]) == 200
    assert await ends(guarded) == before


async def test_reading_needs_the_group_and_the_topic(guarded: Guarded) -> None:
    async with guarded.client(ROOT_KEY) as client, client.producer() as producer:
        for topic in (guarded.open, guarded.closed):
            await producer.send(topic, b"v", key="k")
    key = await guarded.principal(
        "reader", grant("topic", guarded.open, "read"), grant("group", guarded.name("g*"), "read")
    )
    async with guarded.client(key) as client:
        async with client.consumer(guarded.open, group=guarded.name("g1")) as consumer:
            message = await anext(consumer)
            await consumer.commit()
            assert message.value == b"v"
        async with client.receiver(guarded.open, group=guarded.name("g2")) as receiver:
            message = await anext(receiver)
            await message.ack()
        for topic, group in ((guarded.open, "other"), (guarded.closed, guarded.name("g3"))):
            for made in (client.consumer(topic, group=group), client.receiver(topic, group=group)):
                with pytest.raises(Forbidden):
                    async with made as reading:
                        await anext(reading)
        with pytest.raises(Forbidden):
            async with client.consumer(guarded.closed) as reading:  # without a group
                await anext(reading)
        async with client.producer() as producer:
            with pytest.raises(Forbidden):
                await producer.send(guarded.open, b"v")


@pytest.mark.parametrize("how", ["consumer", "receiver"])
async def test_who_loses_a_grant_is_told_and_gets_nothing_more(guarded: Guarded, how: str) -> None:
    everything = [grant("topic", guarded.open, "read"), grant("group", guarded.name("g"), "read")]
    key = await guarded.principal("reader", *everything)
    async with (
        guarded.client(ROOT_KEY) as root,
        root.producer() as producer,
        guarded.client(key) as client,
        getattr(client, how)(guarded.open, group=guarded.name("g")) as reading,
    ):
        await producer.send(guarded.open, b"v", key="k")
        await anext(reading)
        await guarded.grant("reader", key, *everything[1:])
        with pytest.raises(Forbidden):  # it waits at the broker, and is looked at when there is something
            # Of another key: what a queue has handed out and not settled holds back what follows it.
            await asyncio.gather(anext(reading), producer.send(guarded.open, b"v", key="another"))


async def test_dead_letters_are_copied_by_the_brokers_for_whoever_may_not(guarded: Guarded) -> None:
    await guarded.rest("PATCH", f"/v1/topics/{guarded.open}", {"config": {"retry": {"attempts": 1}}})
    key = await guarded.principal(
        "worker",
        grant("topic", guarded.open, "read", "write"),
        grant("group", guarded.name("g"), "read"),
    )
    async with guarded.client(key) as client:
        async with client.producer() as producer:
            for number in range(20):
                await producer.send(guarded.open, b"%d" % number, key=f"k{number}")
        async with client.receiver(guarded.open, group=guarded.name("g")) as receiver:
            for _ in range(20):
                await (await anext(receiver)).reject("cannot be done")
    async with (
        guarded.client(ROOT_KEY) as client,
        client.consumer(guarded.open + ".dlq", group=guarded.name("looking")) as consumer,
    ):
        dead = {(await anext(consumer)).value for _ in range(20)}
    assert dead == {b"%d" % number for number in range(20)}
    async with guarded.client(key) as client:
        with pytest.raises(Forbidden):
            async with client.consumer(guarded.open + ".dlq") as consumer:
                await anext(consumer)


async def test_a_removed_key_ends_its_sessions_at_the_brokers(guarded: Guarded, eventually: Eventually) -> None:
    key = await guarded.principal("writer", grant("topic", guarded.open, "write"))
    async with guarded.client(key, timeout=5) as client, client.producer(delivery_timeout=5) as producer:
        await producer.send(guarded.open, b"before", key="k")
        await guarded.rest("DELETE", guarded.path("writer") + f"/keys/{key.split('_')[1]}")

        async def over() -> bool:
            return bool(await refused(producer.send(guarded.open, b"after", key="k")))

        await eventually(over, within_s=60)
        assert await refused(producer.send(guarded.open, b"after", key="k")) != ""
    with pytest.raises(BadCredentials):
        async with guarded.client(key, timeout=5):
            pass


async def test_a_changed_file_and_a_restarted_broker_get_the_same_policy(
    guarded: Guarded, eventually: Eventually
) -> None:
    key, key_id, digest = make_key(bytes([9] * (ID_BYTES + SECRET_BYTES)))
    later = '\n[[principals]]\nname = "later"\ngrants = [{ resource = "topic", actions = ["write"] }]\n'
    guarded.file.write_text(FILE + later + f'keys = [{{ id = "{key_id}", sha256 = "{digest.hex()}" }}]\n')

    async def known() -> bool:
        async with contextlib.AsyncExitStack() as stack:
            client = await stack.enter_async_context(guarded.client(key, timeout=5))
            producer = await stack.enter_async_context(client.producer())
            for number in range(10):  # both brokers lead one of the partitions
                await producer.send(guarded.closed, b"v", key=f"k{number}")
            return True

    async def works() -> bool:
        try:
            return await known()
        except FerrylineError:
            return False

    await eventually(works, within_s=60)
    again(guarded.cluster, "broker-1")
    await eventually(works, within_s=60)
    guarded.cluster.kill("coordinator")
    assert await works()  # brokers go on by the policy they have
    again(guarded.cluster, "coordinator")
    await eventually(works, within_s=60)
