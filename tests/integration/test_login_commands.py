"""`ferryline login`, `whoami` and `logout` against a real cluster; the issuer and the person are of this test.

`test_login.py` does the same with an issuer from npm and a browser, where those are found.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import aiohttp
import pytest

from ferryline.cli.driver import ProcessCluster
from ferryline.login.credentials import Credentials
from tests.integration.conftest import Start
from tests.login_issuer import LoginIssuer
from tests.oidc_issuer import Keyring

pytestmark = pytest.mark.process

_ACCESS = """
[[issuers]]
name = "test"
issuer = "{issuer}"
audience = "cli"
client_id = "cli"
leeway_ms = 0

[[issuers]]
name = "other"
issuer = "https://issuer.invalid"
audience = "cli"
client_id = "cli"

[[rules]]
issuer = "test"
claim = "sub"
value = "ann"
grants = [{{resource = "topic", pattern = "orders", actions = ["read"]}}]
"""


@pytest.fixture
async def issuer() -> AsyncIterator[LoginIssuer]:
    async with LoginIssuer(Keyring()) as running:
        yield running


class Terminal:
    """Commands of one person, who is told nothing but the address of the cluster."""

    def __init__(self, cluster: ProcessCluster, home: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FERRYLINE_")}
        ours = {
            "URL": cluster.url,
            "CA": str(cluster.ca),
            "CREDENTIALS": str(home / "c.json"),
            "CONFIG": str(home / "f"),
        }
        self.env = {**kept, **{f"FERRYLINE_{name}": value for name, value in ours.items()}, "NO_COLOR": "1"}
        self.credentials = Credentials(home / "c.json")

    async def start(self, *args: str) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        program = (sys.executable, "-m", "ferryline.cli", *args)
        return await asyncio.create_subprocess_exec(*program, stdout=pipe, stderr=pipe, env=self.env)

    async def run(self, *args: str) -> tuple[int | None, str]:
        """Status, and what was said on both streams."""
        process = await self.start(*args)
        async with asyncio.timeout(60):
            out, err = await process.communicate()
        return process.returncode, out.decode() + err.decode()


async def test_a_person_logs_in_with_what_the_cluster_says(
    issuer: LoginIssuer, start_cluster: Start, tmp_path: Path
) -> None:
    """
    1. Nobody: denied. Two issuers: one must be named, and one that there is.
    2. The terminal says where to go; the person goes there and comes back.
    3. whoami says who, and what is granted; the context says that it is a login.
    4. Logged out: the issuer is told, and whoami is denied again.
    """
    (tmp_path / "access.toml").write_text(_ACCESS.format(issuer=issuer.url))
    cluster = await start_cluster(brokers=1, coordinator_args=["--access", str(tmp_path / "access.toml")])
    ann = Terminal(cluster, tmp_path)
    (denied, _), (unclear, told), (unknown, known) = await asyncio.gather(
        ann.run("whoami"), ann.run("login", "--no-browser"), ann.run("login", "--issuer", "nobody")
    )
    assert (denied, unclear, unknown) == (4, 2, 3)
    assert issuer.url in told
    assert "no issuer 'nobody'; there are: test" in known

    status, said = await _log_in(ann, issuer)
    assert status == 0, said
    assert "logged in as ann" in said
    assert "and is renewed" in said

    (_, me), (_, context) = await asyncio.gather(
        ann.run("whoami", "--output", "json"), ann.run("context", "show", "--output", "json")
    )
    assert json.loads(me)["principal"] == "test:ann"
    assert json.loads(me)["grants"] == ["topic orders: read"]
    assert "(login of ann)" in context

    refresh = ann.credentials.read()[cluster.url].refresh_token
    assert (await ann.run("logout"))[0] == 0
    assert issuer.revoked == [refresh]
    assert (await ann.run("whoami"))[0] == 4


async def _log_in(person: Terminal, issuer: LoginIssuer) -> tuple[int | None, str]:
    process = await person.start("login", "--issuer", "test", "--no-browser")
    assert process.stderr is not None
    try:
        async with asyncio.timeout(60):
            async for line in process.stderr:
                if line.decode().strip().startswith(issuer.url):
                    break
            query = dict(parse_qsl(urlsplit(line.decode().strip()).query))
            async with aiohttp.ClientSession() as http, http.get(issuer.redirected(query)) as page:
                assert "close this window" in await page.text()
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, out.decode() + err.decode()
