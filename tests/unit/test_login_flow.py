"""Logging in: what may come back from a browser and an issuer, and what must not be believed."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import aiohttp
import pytest

from ferryline.cli.failures import Failed
from ferryline.cli.login import choose
from ferryline.cli.settings import UsageError
from ferryline.login import browser, device
from ferryline.login.flow import (
    SECRET_BYTES,
    Client,
    Endpoints,
    attempt,
    authorization_url,
    code_of,
    discovery_url,
    endpoints,
    login_of,
)
from ferryline.login.issuer import Issuer as Requests
from ferryline.protocol.errors import BadCredentials, ConnectionFailed, DeadlineExceeded, InvalidArgument
from tests.login_issuer import LoginIssuer
from tests.oidc_issuer import Keyring

CLIENT = Client("https://issuer.example", "cli", "cli")
TRIED = attempt(bytes(range(3 * SECRET_BYTES)), "http://127.0.0.1:5/callback")
AT = Endpoints("https://issuer.example/auth?x=1", "https://issuer.example/token")


@pytest.fixture(scope="module")
def keyring() -> Keyring:
    return Keyring()


@pytest.fixture
async def issuer(keyring: Keyring) -> AsyncIterator[LoginIssuer]:
    async with LoginIssuer(keyring) as running:
        yield running


# -- what is asked ----------------------------------------------------------------------------------


def test_the_address_for_the_browser_holds_a_challenge_and_not_its_verifier() -> None:
    url = authorization_url(CLIENT, AT, TRIED)
    query = dict(parse_qsl(urlsplit(url).query))
    digest = hashlib.sha256(TRIED.verifier.encode()).digest()
    assert query["code_challenge"] == base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    assert query["code_challenge_method"] == "S256"
    assert (query["state"], query["nonce"], query["x"]) == (TRIED.state, TRIED.nonce, "1")
    assert TRIED.verifier not in url
    assert len({TRIED.state, TRIED.nonce, TRIED.verifier}) == 3


def test_an_audience_of_its_own_is_asked_for() -> None:
    query = dict(parse_qsl(urlsplit(authorization_url(Client("https://i", "cli", "urn:mq"), AT, TRIED)).query))
    assert (query["audience"], query["resource"]) == ("urn:mq", "urn:mq")


@pytest.mark.parametrize("at", [Endpoints("", "https://i/t"), Endpoints("https://i/a", "https://i/t", pkce=False)])
def test_an_issuer_without_code_flow_or_pkce_is_refused(at: Endpoints) -> None:
    with pytest.raises(InvalidArgument):
        authorization_url(CLIENT, at, TRIED)


@pytest.mark.parametrize("issuer", ["http://issuer.example", "ftp://issuer.example", "issuer.example", ""])
def test_an_issuer_in_clear_is_refused(issuer: str) -> None:
    with pytest.raises(InvalidArgument):
        discovery_url(issuer)


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"issuer": "https://other.example"},
        {"issuer": "https://issuer.example/"},
        {"issuer": "https://issuer.example", "token_endpoint": "http://issuer.example/token"},
        {"issuer": "https://issuer.example", "token_endpoint": "http://127.0.0.1/token"},
        {"issuer": "https://issuer.example", "device_authorization_endpoint": "javascript:alert(1)"},
    ],
)
def test_a_document_of_another_issuer_or_with_addresses_in_clear_is_refused(document: Any) -> None:
    with pytest.raises(InvalidArgument):
        endpoints("https://issuer.example", document)


ISSUERS = [
    {"name": "a", "issuer": "https://a.example", "audience": "mq", "client_id": "cli", "scopes": ["openid", "email"]},
    {"name": "b", "issuer": "https://b.example", "audience": "cli", "client_id": "cli", "scopes": []},
]


def test_an_issuer_is_chosen_by_name_or_address_with_what_was_given_instead() -> None:
    by_name, by_address = choose(ISSUERS, "a", {}), choose(ISSUERS, "https://b.example", {"audience": "x"})
    assert by_name == Client("https://a.example", "cli", "mq", ("openid", "email"), name="a")
    assert by_address == Client("https://b.example", "cli", "x", name="b")
    stranger = choose(ISSUERS, "https://c.example", {"client_id": "c"})
    assert stranger == Client("https://c.example", "c", "c")


@pytest.mark.parametrize(
    ("issuers", "wanted", "told"),
    [
        ([], "", "nobody can log in at this cluster"),
        (ISSUERS, "c", "no issuer 'c'; there are: a .https://a.example., b"),
        (ISSUERS, "https://c.example", "no issuer"),
        (ISSUERS, "", "--issuer is needed: a"),
    ],
)
def test_an_issuer_that_is_not_there_or_not_clear_is_told(issuers: Any, wanted: str, told: str) -> None:
    with pytest.raises((Failed, UsageError), match=told):
        choose(issuers, wanted, {})


# -- what comes back with the browser ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state": "another"}, "state"),
        ({"state": ""}, "state"),
        ({"state": "é"}, "state"),
        ({"iss": "https://other.example"}, "issuer"),
        ({"error": "access_denied"}, "refused"),
        ({"code": ""}, "code"),
    ],
)
def test_an_answer_that_is_not_to_this_login_gives_no_code(changes: dict[str, str], reason: str) -> None:
    query = {"state": TRIED.state, "code": "c", "iss": CLIENT.issuer, **changes}
    with pytest.raises(BadCredentials) as refused:
        code_of(query, CLIENT, TRIED)
    assert refused.value.details["reason"] == reason


def test_an_answer_to_this_login_gives_its_code() -> None:
    assert code_of({"state": TRIED.state, "code": "c"}, CLIENT, TRIED) == "c"


# -- tokens -----------------------------------------------------------------------------------------


async def test_an_access_token_for_the_cluster_goes_before_the_id_token(issuer: LoginIssuer) -> None:
    answer = issuer.answer()
    client = issuer.client(audience="mq")
    answer["access_token"] = issuer.sign(issuer.claims(aud=["x", "mq"]))
    assert login_of(answer, client, 0.0).kind == "access"
    login = login_of(answer, issuer.client(), 0.0)
    assert (login.kind, login.who, login.refresh_token) == ("id", "ann", answer["refresh_token"])


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"iss": "https://other.example"}, "id_token"),
        ({"aud": "another"}, "id_token"),
        ({"exp": 1}, "id_token"),
        ({"exp": "soon"}, "id_token"),
        ({"nonce": "another"}, "nonce"),
        ({"nonce": None}, "nonce"),
    ],
)
async def test_an_id_token_that_is_not_of_this_login_is_refused(
    issuer: LoginIssuer, claims: dict[str, Any], reason: str
) -> None:
    changed = {**issuer.claims(aud="cli", nonce="n"), **claims}
    answer = {"id_token": issuer.sign({name: value for name, value in changed.items() if value is not None})}
    with pytest.raises(BadCredentials) as refused:
        login_of(answer, issuer.client(), issuer.claims()["iat"], nonce="n")
    assert refused.value.details["reason"] == reason


async def test_tokens_for_somebody_else_are_named(issuer: LoginIssuer) -> None:
    with pytest.raises(BadCredentials, match="no token of the issuer is for 'mq', only for cli"):
        login_of(issuer.answer(), issuer.client(audience="mq"), 0.0)
    for odd in (None, [], {}, {"id_token": 5}, {"id_token": "a.b.c"}):
        with pytest.raises(BadCredentials):
            login_of(odd, issuer.client(), 0.0, nonce="n")


# -- with a browser ---------------------------------------------------------------------------------


class Person:
    """Goes where the terminal says, logs in, and follows the issuer back. ``pages``: what the browser showed."""

    def __init__(self, issuer: LoginIssuer, back: Callable[[dict[str, str]], list[str]]) -> None:
        self.pages: list[tuple[int, str]] = []
        self.task: asyncio.Task[None] | None = None
        self._issuer, self._back = issuer, back

    def __call__(self, url: str) -> None:
        self.task = asyncio.get_running_loop().create_task(self._visit(url))

    async def _visit(self, url: str) -> None:
        query = dict(parse_qsl(urlsplit(url).query))
        async with aiohttp.ClientSession() as http:
            for address in self._back(query):
                async with http.get(address) as answer:
                    self.pages.append((answer.status, await answer.text()))
                    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


async def test_a_login_with_a_browser_ends_with_a_token_and_a_page_that_says_so(issuer: LoginIssuer) -> None:
    """A link that somebody else made comes first, and changes nothing."""
    person = Person(issuer, lambda query: [issuer.redirected(query, state="another"), issuer.redirected(query)])
    async with Requests(issuer.url) as requests:
        login = await browser.log_in(issuer.client(), requests, person, timeout=30)
    assert person.task is not None
    await person.task
    assert login.who == "ann"
    assert [status for status, _ in person.pages] == [400, 200]
    assert "close this window" in person.pages[1][1]
    (asked,) = issuer.seen
    assert asked["code"] == "the-code"
    assert len(asked["code_verifier"]) >= 43
    assert asked["redirect_uri"].startswith("http://127.0.0.1:")


@pytest.mark.parametrize("changes", [{"error": "access_denied", "code": ""}, {"iss": "https://other.example"}])
async def test_a_refused_login_says_so_in_both_places(issuer: LoginIssuer, changes: dict[str, str]) -> None:
    person = Person(issuer, lambda query: [issuer.redirected(query, **changes)])
    async with Requests(issuer.url) as requests:
        with pytest.raises(BadCredentials):
            await browser.log_in(issuer.client(), requests, person, timeout=30)
    assert person.task is not None
    await person.task
    assert [status for status, _ in person.pages] == [403]


async def test_a_page_never_shows_markup_of_the_issuer(issuer: LoginIssuer) -> None:
    person = Person(issuer, lambda query: [issuer.redirected(query, error="<script>x</script>", code="")])
    async with Requests(issuer.url) as requests:
        with pytest.raises(BadCredentials):
            await browser.log_in(issuer.client(), requests, person, timeout=30)
    assert person.task is not None
    await person.task
    assert "<script>" not in person.pages[0][1]


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        ((400, {"error": "invalid_grant"}), BadCredentials),
        ((500, {"error": "down"}), ConnectionFailed),
        ((200, {}), BadCredentials),
        ((302, None), ConnectionFailed),
    ],
)
async def test_a_code_that_gives_no_token_is_told_to_the_browser(
    issuer: LoginIssuer, broken: tuple[int, Any], error: type[Exception]
) -> None:
    issuer.broken = broken
    person = Person(issuer, lambda query: [issuer.redirected(query)])
    async with Requests(issuer.url) as requests:
        with pytest.raises(error):
            await browser.log_in(issuer.client(), requests, person, timeout=30)
    assert person.task is not None
    await person.task
    assert person.pages[0][0] == 403


async def test_nobody_waits_for_ever_for_a_person(issuer: LoginIssuer) -> None:
    async with Requests(issuer.url) as requests:
        with pytest.raises(DeadlineExceeded):
            await browser.log_in(issuer.client(), requests, lambda _: None, timeout=0.05)
    async with Requests("http://127.0.0.1:1") as requests:
        with pytest.raises(ConnectionFailed):
            await browser.log_in(Client("http://127.0.0.1:1", "cli", "cli"), requests, lambda _: None, timeout=5)


# -- with a device ----------------------------------------------------------------------------------


async def test_a_code_that_is_typed_elsewhere_gives_a_token(issuer: LoginIssuer) -> None:
    shown: list[tuple[str, str, str]] = []
    async with Requests(issuer.url) as requests:
        login = await device.log_in(issuer.client(), requests, lambda *what: shown.append(what), timeout=30)
    assert login.who == "ann"
    assert shown == [(f"{issuer.url}/type", "WDJB", "")]
    assert len(issuer.seen) == 2  # not typed yet, typed


async def test_a_device_flow_ends_when_it_is_refused_or_takes_too_long(issuer: LoginIssuer) -> None:
    issuer.pending = 10_000
    async with Requests(issuer.url) as requests:
        with pytest.raises(DeadlineExceeded):
            await device.log_in(issuer.client(), requests, lambda *_: None, timeout=0.3)
        issuer.broken = (400, {"error": "access_denied", "error_description": "no\n\x1b[31m"})
        with pytest.raises(BadCredentials) as refused:
            await device.log_in(issuer.client(), requests, lambda *_: None, timeout=30)
    assert "\x1b" not in str(refused.value)
