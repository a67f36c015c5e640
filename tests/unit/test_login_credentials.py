"""What a login leaves on disk: who can read it, and how it is renewed by many at once."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import ferryline as fl
from ferryline.login.credentials import Credentials, LoginToken, Stored, login_token, stored
from ferryline.login.flow import login_of
from ferryline.protocol.errors import BadCredentials, ConnectionFailed
from tests.login_issuer import LoginIssuer
from tests.oidc_issuer import Keyring

URL = "https://localhost:8443"


@pytest.fixture(scope="module")
def keyring() -> Keyring:
    return Keyring()


@pytest.fixture
async def issuer(keyring: Keyring) -> AsyncIterator[LoginIssuer]:
    async with LoginIssuer(keyring) as running:
        yield running


@pytest.fixture
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Credentials:
    monkeypatch.setenv("FERRYLINE_CREDENTIALS", str(tmp_path / "config" / "credentials.json"))
    return Credentials()


async def keep(credentials: Credentials, issuer: LoginIssuer, *urls: str) -> Stored:
    client = issuer.client()
    login = stored(client, login_of(issuer.answer(), client, time.time()))
    await credentials.keep(urls or (URL,), login)
    return login


async def test_only_its_owner_reads_the_file(issuer: LoginIssuer, credentials: Credentials) -> None:
    old = os.umask(0)
    try:
        login = await keep(credentials, issuer)
    finally:
        os.umask(old)
    assert stat.S_IMODE(credentials.path.stat().st_mode) == 0o600
    assert credentials.read() == {URL: login}
    assert {path.name for path in credentials.path.parent.iterdir()} == {"credentials.json", "credentials.lock"}


async def test_a_token_is_used_until_it_is_due(issuer: LoginIssuer, credentials: Credentials) -> None:
    login = await keep(credentials, issuer)
    assert await credentials.token(URL) == login.token
    assert issuer.seen == []
    issuer.life_s = 0
    await keep(credentials, issuer)
    issuer.life_s = 600
    renewed = await credentials.token(URL)
    assert renewed == credentials.read()[URL].token != login.token
    assert issuer.seen[0]["grant_type"] == "refresh_token"


async def test_a_refused_token_is_renewed_although_it_looks_good(issuer: LoginIssuer, credentials: Credentials) -> None:
    login = await keep(credentials, issuer)
    source = LoginToken(credentials, URL)
    assert await source() == login.token
    assert await source() != login.token  # asked again at once: it was refused


async def test_all_addresses_of_a_cluster_have_the_renewed_token(issuer: LoginIssuer, credentials: Credentials) -> None:
    issuer.life_s = 0
    await keep(credentials, issuer, URL, "https://127.0.0.1:8443")
    issuer.life_s = 600
    renewed = await credentials.token(URL)
    assert await credentials.token("https://127.0.0.1:8443") == renewed
    assert len(issuer.seen) == 1


def _ask(path: str, found: multiprocessing.Queue[str]) -> None:
    found.put(asyncio.run(Credentials(Path(path)).token(URL)))


async def test_many_processes_use_a_refresh_token_once(issuer: LoginIssuer, credentials: Credentials) -> None:
    issuer.life_s = 0
    await keep(credentials, issuer)
    issuer.life_s = 600
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_ask, args=(str(credentials.path), found)) for _ in range(3)]
    for process in processes:
        process.start()
    mine = await asyncio.gather(*(credentials.token(URL) for _ in range(5)))
    theirs = [await asyncio.to_thread(found.get, timeout=60) for _ in processes]
    for process in processes:
        await asyncio.to_thread(process.join, 60)
    found.close()
    found.join_thread()
    assert len({*mine, *theirs}) == 1
    assert len(issuer.seen) == 1
    assert not issuer.reused


async def test_a_login_that_the_issuer_ended_says_what_to_do(issuer: LoginIssuer, credentials: Credentials) -> None:
    issuer.life_s = 0
    login = await keep(credentials, issuer)
    issuer.broken = (400, {"error": "invalid_grant"})
    with pytest.raises(BadCredentials, match="ferryline login"):
        await credentials.token(URL)
    assert credentials.read()[URL] == login  # nothing was lost by trying


async def test_an_issuer_that_is_down_is_no_end_of_a_login(issuer: LoginIssuer, credentials: Credentials) -> None:
    issuer.life_s = 0
    await keep(credentials, issuer)
    issuer.down = True
    with pytest.raises(ConnectionFailed):
        await credentials.token(URL)
    issuer.down, issuer.life_s = False, 600
    await credentials.token(URL)


async def test_a_token_without_refresh_ends_with_itself(issuer: LoginIssuer, credentials: Credentials) -> None:
    answer = {**issuer.answer(), "refresh_token": ""}
    client = issuer.client()
    await credentials.keep([URL], stored(client, login_of(answer, client, time.time())))
    token = await credentials.token(URL)
    with pytest.raises(BadCredentials, match="the login has ended"):
        await credentials.token(URL, refused=token)
    with pytest.raises(BadCredentials, match="not logged in"):
        await credentials.token("https://elsewhere:8443")


async def test_a_client_uses_the_login_of_its_address_and_of_no_other(
    issuer: LoginIssuer, credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FERRYLINE_TOKEN", raising=False)
    login = await keep(credentials, issuer)
    source = login_token([URL])
    assert source is not None
    assert await source() == login.token
    assert login_token(["https://elsewhere:8443"]) is None
    assert isinstance(fl.connect(URL).token, LoginToken)
    assert fl.connect("https://elsewhere:8443").token is None
    assert fl.connect(URL, token="").token == ""
    monkeypatch.setenv("FERRYLINE_TOKEN", "abc")
    assert fl.connect(URL).token == "abc"


async def test_whoever_has_no_home_is_just_not_logged_in(
    credentials: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FERRYLINE_CREDENTIALS", "/dev/null/credentials.json")
    assert login_token([URL]) is None

    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    assert login_token([URL]) is None


async def test_a_file_that_makes_no_sense_is_told_and_not_replaced(credentials: Credentials) -> None:
    credentials.path.parent.mkdir()
    credentials.path.write_text("{")
    with pytest.raises(BadCredentials):
        credentials.read()
    with pytest.raises(BadCredentials):
        await credentials.forget([URL])
    assert credentials.path.read_text() == "{"


async def test_what_is_forgotten_is_gone_from_the_disk(issuer: LoginIssuer, credentials: Credentials) -> None:
    login = await keep(credentials, issuer, URL, "https://other:8443")
    assert await credentials.forget([URL]) == [login]
    assert list(credentials.read()) == ["https://other:8443"]
    assert await credentials.forget([URL]) == []
