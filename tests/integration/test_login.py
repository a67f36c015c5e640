"""People log in with an issuer that nobody here wrote, in a real browser, and work with what they got."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import ferryline as fl
from ferryline.cli.driver import ProcessCluster
from ferryline.login.credentials import Credentials
from ferryline.protocol.errors import BadCredentials, Forbidden
from tests.integration.conftest import Start
from tests.integration.oidc.chromium import Chromium
from tests.integration.oidc.oidc import NpmIssuer
from tests.polling import poll

pytestmark = [pytest.mark.oidc, pytest.mark.process]

TOKEN_S = 12  # of the issuer's tokens: short, so that a test sees some of them end
_ACCESS = """
[[issuers]]
name = "npm"
issuer = "{issuer}"
audience = "{audience}"
client_id = "{client_id}"
scopes = ["openid", "offline_access", "email", "groups"]
leeway_ms = 0

[[rules]]
issuer = "npm"
claim = "groups"
value = "packers"
grants = [
    {{resource = "topic", pattern = "orders*", actions = ["manage"]}},
    {{resource = "group", pattern = "packing", actions = ["read"]}},
]
"""


def access(issuer: NpmIssuer, audience: str) -> str:
    return _ACCESS.format(issuer=issuer.url, audience=audience, client_id=issuer.client_id)


class Person:
    """Somebody with a terminal of their own."""

    def __init__(self, cluster: ProcessCluster, home: Path) -> None:
        self.credentials = Credentials(home / "credentials.json")
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FERRYLINE_")},
            "FERRYLINE_URL": cluster.url,
            "FERRYLINE_CA": str(cluster.ca),
            "FERRYLINE_CREDENTIALS": str(self.credentials.path),
            "FERRYLINE_CONFIG": str(home / "config.toml"),
            "NO_COLOR": "1",
        }

    async def start(self, *args: str) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "ferryline.cli", *args, stdout=pipe, stderr=pipe, env=self.env
        )

    async def run(self, *args: str) -> tuple[int | None, str, str]:
        process = await self.start(*args)
        async with asyncio.timeout(120):
            out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    async def whoami(self) -> dict[str, Any]:
        status, out, err = await self.run("whoami", "--output", "json")
        assert status == 0, err
        return dict(json.loads(out))


async def _address(process: asyncio.subprocess.Process, beginning: str) -> str:
    """The first line of what a command says to a person that begins like this."""
    assert process.stderr is not None
    async with asyncio.timeout(60):
        async for line in process.stderr:
            if line.decode().strip().startswith(beginning):
                return line.decode().strip()
    raise AssertionError(f"no line begins with {beginning}")


@asynccontextmanager
async def started(person: Person, *args: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A command that runs meanwhile; killed if it has not ended."""
    process = await person.start(*args)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def log_in(person: Person, browser: Chromium, issuer: NpmIssuer, name: str) -> None:
    async with started(person, "login", "--no-browser") as process:
        await browser.go(await _address(process, issuer.url))
        await browser.type("login", name)
        await browser.type("password", "whatever it is")
        await browser.press()
        await browser.see("offline access")
        await browser.press()
        await browser.see("You can close this window")
        async with asyncio.timeout(60):
            out, err = await process.communicate()
        assert process.returncode == 0, err
        assert f"logged in as {name}@example.org" in out.decode()


async def log_in_elsewhere(person: Person, browser: Chromium, issuer: NpmIssuer, name: str) -> None:
    """With a code, typed on another machine."""
    async with started(person, "login", "--device") as process:
        await browser.go(await _address(process, f"{issuer.url}/device?"))
        await browser.see("Confirm Device")
        await browser.press("[type=submit][autofocus]")
        await browser.type("login", name)
        await browser.type("password", "whatever it is")
        await browser.press()
        await browser.see("offline access")
        await browser.press()
        await browser.see("Sign-in Success")
        async with asyncio.timeout(60):
            _, err = await process.communicate()
        assert process.returncode == 0, err


@pytest.fixture
async def issuer() -> AsyncIterator[NpmIssuer]:
    async with NpmIssuer(TOKEN_S) as running:
        yield running


@pytest.fixture
async def browser(tmp_path: Path) -> AsyncIterator[Chromium]:
    async with Chromium(tmp_path / "browser") as running:
        yield running


async def test_a_person_logs_in_with_a_browser_and_works_past_the_end_of_the_first_token(
    issuer: NpmIssuer, browser: Chromium, start_cluster: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    1. `ferryline login` prints an address; a browser goes there, ann logs in and consents.
    2. whoami names her, and the rule about her group gives her grants.
    3. A program that is told nothing but the address sends and reads for three lives of a token, without an error.
    4. Several programs that find the token due at once use its refresh token once: the issuer would end the login.
    5. What no rule grants is forbidden; after `ferryline logout` she is nobody, and her refresh token is worth nothing.
    """
    (tmp_path / "access.toml").write_text(access(issuer, issuer.client_id))
    cluster = await start_cluster(brokers=2, coordinator_args=["--access", str(tmp_path / "access.toml")])
    ann = Person(cluster, tmp_path)
    assert (await ann.run("whoami"))[0] == 4  # denied
    await log_in(ann, browser, issuer, "ann")

    assert stat.S_IMODE(ann.credentials.path.stat().st_mode) == 0o600
    me = await ann.whoami()
    assert me["principal"] == "npm:ann"
    assert me["grants"] == ["topic orders*: manage", "group packing: read"]

    monkeypatch.setenv("FERRYLINE_CREDENTIALS", str(ann.credentials.path))
    first = ann.credentials.read()[cluster.url]
    async with fl.connect(cluster.url, ca=cluster.ca) as client:
        await client.admin.create_topic("orders", partitions=2)
        with pytest.raises(Forbidden):
            await client.admin.create_topic("secrets")
        sent, read = await _work(client, 3 * TOKEN_S)
    assert len(sent) > 20
    assert sorted(read) == sorted(sent)
    assert ann.credentials.read()[cluster.url].token != first.token

    for _ in range(2):
        await poll(lambda: _due(ann, cluster.url), within_s=60)
        assert {who["principal"] for who in await asyncio.gather(*(ann.whoami() for _ in range(4)))} == {"npm:ann"}

    kept = ann.credentials.read()[cluster.url]
    assert (await ann.run("logout"))[0] == 0
    assert ann.credentials.read() == {}
    assert (await ann.run("whoami"))[0] == 4
    await ann.credentials.keep([cluster.url], kept)
    await poll(lambda: _due(ann, cluster.url), within_s=60)
    with pytest.raises(BadCredentials, match="log in again"):
        await ann.credentials.token(cluster.url)


async def _work(client: fl.Client, seconds: float) -> tuple[list[int], list[int]]:
    """Send numbers for so long; read until all of them have come."""
    sent: list[int] = []
    read: list[int] = []
    async with client.producer() as producer, client.consumer("orders", group="packing", value=int) as consumer:

        async def reading() -> None:
            async for message in consumer:
                read.append(message.value)

        reader = asyncio.create_task(reading())
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await producer.send("orders", str(len(sent)).encode(), key=f"k{len(sent) % 7}")
            sent.append(len(sent))
            await asyncio.sleep(0.1)
            if reader.done():
                reader.result()
        await poll(lambda: len(set(read)) >= len(sent), within_s=60, what="everything that was sent is read")
        reader.cancel()
        await asyncio.wait([reader])
    return sent, read


def _due(person: Person, url: str) -> bool:
    return time.time() > person.credentials.read()[url].expires_s - 1


async def test_a_code_typed_elsewhere_gives_an_access_token_for_the_cluster(
    issuer: NpmIssuer, browser: Chromium, start_cluster: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "access.toml").write_text(access(issuer, issuer.audience))
    cluster = await start_cluster(brokers=1, coordinator_args=["--access", str(tmp_path / "access.toml")])
    ann, bob = Person(cluster, tmp_path / "ann"), Person(cluster, tmp_path / "bob")
    await log_in_elsewhere(ann, browser, issuer, "ann")
    login = ann.credentials.read()[cluster.url]
    assert login.kind == "access"
    monkeypatch.setenv("FERRYLINE_CREDENTIALS", str(ann.credentials.path))
    async with fl.connect(cluster.url, ca=cluster.ca) as client:
        await client.admin.create_topic("orders", partitions=1, replication=1)
        sent, read = await _work(client, 1.0)
        assert sorted(read) == sorted(sent)

    async with Chromium(tmp_path / "bobs-browser") as another:
        await log_in_elsewhere(bob, another, issuer, "bob")
    assert (await bob.whoami())["grants"] == []
    monkeypatch.setenv("FERRYLINE_CREDENTIALS", str(bob.credentials.path))
    async with fl.connect(cluster.url, ca=cluster.ca) as client, client.producer() as producer:
        with pytest.raises(Forbidden):
            await producer.send("orders", b"1")
