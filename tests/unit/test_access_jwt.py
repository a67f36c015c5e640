"""JWTs: hostile ones are refused, good ones name their principal, and an issuer's troubles stay small."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from aiohttp import web

from ferryline.protocol.access import AccessPolicy
from ferryline.protocol.errors import BadCredentials, Unavailable
from ferryline_service.access import jwks
from ferryline_service.access.jwks import UnusableKeys, checked_url, read_keys, small_order
from ferryline_service.access.jwt_rules import parse
from ferryline_service.access.verifier import Verifier
from tests.hostile_jwts import HOSTILE, weak_keys
from tests.oidc_issuer import Issuer, Keyring, jwk_of


@pytest.fixture(scope="module")
def keyring() -> Keyring:
    return Keyring()


@pytest.fixture
async def issuer(keyring: Keyring) -> AsyncIterator[Issuer]:
    async with Issuer(keyring) as running:
        yield running


class Clock:
    """Wall clock that tests move; by default it runs with the real one."""

    def __init__(self) -> None:
        self.ahead_ms = 0

    def __call__(self) -> int:
        return time.time_ns() // 1_000_000 + self.ahead_ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def verifier(issuer: Issuer, clock: Clock) -> AsyncIterator[Verifier]:
    made = Verifier(wall_ms=clock)
    made.take(AccessPolicy(revision=1, enabled=True, issuers=(issuer.meta(),)))
    yield made
    await made.close()


def policy(*metas: Any, revision: int = 1) -> AccessPolicy:
    return AccessPolicy(revision=revision, enabled=True, issuers=metas)


async def refusal(verifier: Verifier, token: str) -> BadCredentials:
    with pytest.raises(BadCredentials) as refused:
        await verifier.verify(token)
    return refused.value


async def _believed(verifier: Verifier, token: str) -> bool:
    try:
        await verifier.verify(token)
    except BadCredentials:
        return False
    return True


# -- hostile tokens ---------------------------------------------------------------------------------


def test_the_table_is_long_enough() -> None:
    assert len(HOSTILE) >= 40


async def test_every_hostile_token_is_refused_and_no_address_in_a_token_is_asked(
    issuer: Issuer, verifier: Verifier, keyring: Keyring
) -> None:
    issuer.extra = weak_keys()
    async with Issuer(keyring) as attacker:
        believed = [name for name, make in HOSTILE.items() if await _believed(verifier, make(issuer, attacker.url))]
        assert believed == []
        assert attacker.requests == []
    assert (await verifier.verify(issuer.good())).name == "test:ann"  # the same verifier, all the while
    assert len(issuer.requests) <= 4, "unknown key ids ask the issuer once in ten seconds"


@pytest.mark.parametrize("kid", ["rsa-1", "ec-1", "ed-1"])
async def test_a_good_token_of_each_algorithm_is_believed(issuer: Issuer, verifier: Verifier, kid: str) -> None:
    claims = issuer.claims(groups=["a", "b"], level=3, admin=True, realm_access={"roles": ["x"]})
    verified = await verifier.verify(issuer.sign(claims, kid=kid))
    assert (verified.issuer, verified.name) == ("test", "test:ann")
    assert verified.claims["groups"] == ["a", "b"]
    assert verified.claims["realm_access.roles"] == ["x"]
    assert verified.expires_ms == claims["exp"] * 1000


async def test_an_algorithm_that_this_issuer_may_not_use_is_refused(issuer: Issuer, verifier: Verifier) -> None:
    verifier.take(policy(issuer.meta(algorithms=("ES256",)), revision=2))
    assert (await refusal(verifier, issuer.good())).details["reason"] == "algorithm"
    await verifier.verify(issuer.sign(issuer.claims(), kid="ec-1"))


async def test_a_list_of_audiences_that_holds_ours_is_believed(issuer: Issuer, verifier: Verifier) -> None:
    await verifier.verify(issuer.good(aud=["other", "ferryline"]))


async def test_an_email_names_somebody_only_if_it_was_verified(issuer: Issuer, verifier: Verifier) -> None:
    verifier.take(policy(issuer.meta(name_claim="email"), revision=2))
    for unproven in (False, "true", 1, None):
        token = issuer.good(email="ann@example.org", email_verified=unproven)
        assert (await refusal(verifier, token)).details["reason"] == "claims"
    verified = await verifier.verify(issuer.good(email="ann@example.org", email_verified=True))
    assert verified.name == "test:ann@example.org"


async def test_rules_do_not_see_an_email_that_nobody_verified(issuer: Issuer, verifier: Verifier) -> None:
    assert "email" not in (await verifier.verify(issuer.good(email="boss@example.org"))).claims


async def test_a_number_that_nobody_can_be_told_of_is_no_claim(issuer: Issuer, verifier: Verifier) -> None:
    """It would be an error of the service as soon as tokens are shared."""
    verified = await verifier.verify(issuer.good(large=2**64, levels=[-(2**63) - 1, 7], level=3))
    assert {"levels": [7], "level": 3}.items() <= verified.claims.items()
    assert "large" not in verified.claims
    assert msgspec.msgpack.encode(verified)


async def test_times_are_taken_with_the_leeway_of_the_issuer(issuer: Issuer, verifier: Verifier) -> None:
    verifier.take(policy(issuer.meta(leeway_ms=30_000), revision=2))
    now = int(time.time())
    await verifier.verify(issuer.good(exp=now - 5, iat=now + 5, nbf=now + 5))
    assert (await refusal(verifier, issuer.good(exp=now - 35))).details["reason"] == "expired"
    assert (await refusal(verifier, issuer.good(nbf=now + 60))).details["reason"] == "not_yet"


# -- what is remembered -----------------------------------------------------------------------------


async def test_a_remembered_token_ends_with_its_expiry(issuer: Issuer, verifier: Verifier, clock: Clock) -> None:
    token = issuer.good()
    await verifier.verify(token)
    assert len(verifier.cache) == 1
    clock.ahead_ms = 601_000
    assert (await refusal(verifier, token)).details["reason"] == "expired"


async def test_a_token_is_verified_again_after_five_minutes(issuer: Issuer, verifier: Verifier, clock: Clock) -> None:
    token = issuer.good()
    await verifier.verify(token)
    clock.ahead_ms = 301_000
    assert verifier.cache.recall(token, clock()) is None
    await verifier.verify(token)
    assert verifier.cache.recall(token, clock()) is not None


async def test_a_token_of_an_issuer_that_was_removed_is_refused(issuer: Issuer, verifier: Verifier) -> None:
    token = issuer.good()
    await verifier.verify(token)
    verifier.take(policy(revision=2))
    assert (await refusal(verifier, token)).details["reason"] == "issuer"


async def test_a_remembered_token_ends_with_the_key_that_signed_it(
    issuer: Issuer, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "ASK_AGAIN_S", 0.0)
    token = issuer.good()
    await verifier.verify(token)
    issuer.kids = ["ec-1"]
    await refusal(verifier, issuer.sign(issuer.claims(), kid="not-there"))  # has the keys fetched again
    assert (await refusal(verifier, token)).details["reason"] == "key"


async def test_the_oldest_of_too_many_remembered_tokens_is_forgotten(issuer: Issuer, verifier: Verifier) -> None:
    verifier.cache._entries_max = 2
    tokens = [issuer.good(sub=f"s{number}") for number in range(3)]
    for token in tokens:
        await verifier.verify(token)
    assert len(verifier.cache) == 2
    assert verifier.cache.recall(tokens[0], 0) is None


# -- the keys of an issuer --------------------------------------------------------------------------


async def test_a_new_key_is_found_when_a_token_names_it(
    issuer: Issuer, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    issuer.kids = ["rsa-1"]
    await verifier.verify(issuer.good())
    issuer.kids = ["rsa-1", "ec-1"]
    token = issuer.sign(issuer.claims(), kid="ec-1")
    assert (await refusal(verifier, token)).details["reason"] == "key"  # asked a moment ago
    monkeypatch.setattr(jwks, "ASK_AGAIN_S", 0.0)
    await verifier.verify(token)


async def test_an_issuer_that_is_down_keeps_the_keys_that_it_had(
    issuer: Issuer, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    await verifier.verify(issuer.good())
    issuer.down = True
    monkeypatch.setattr(jwks, "ASK_AGAIN_S", 0.0)
    await refusal(verifier, issuer.sign(issuer.claims(), kid="not-there"))
    await verifier.verify(issuer.good(sub="bob"))


async def test_an_issuer_that_never_answered_makes_tokens_unavailable_and_is_asked_again(
    issuer: Issuer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    issuer.down = True
    verifier = Verifier(wall_ms=clock)
    verifier.take(policy(issuer.meta()))
    try:
        with pytest.raises(Unavailable):
            await verifier.verify(issuer.good())
        issuer.down = False
        monkeypatch.setattr(jwks, "RETRY_S", 0.0)
        await verifier.verify(issuer.good())
    finally:
        await verifier.close()


def _redirect(to: str) -> Callable[[], web.Response]:
    return lambda: web.Response(status=302, headers={"Location": to})


def _huge() -> web.Response:
    return web.Response(body=b" " * 1_000_000 + b"{}")


def _not_json() -> web.Response:
    return web.Response(body=b"[" * 100_000)


def _clear() -> web.Response:
    return web.json_response({"issuer": "", "jwks_uri": "http://192.0.2.1/keys"})


def _no_keys() -> web.Response:
    return web.json_response({"keys": []})


def _too_many() -> web.Response:
    return web.json_response({"keys": [{}] * 65})


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/.well-known/openid-configuration", _redirect("/good/configuration")),
        ("/.well-known/openid-configuration", _huge),
        ("/.well-known/openid-configuration", _clear),
        ("/keys", _redirect("/good/keys")),
        ("/keys", _huge),
        ("/keys", _not_json),
        ("/keys", _no_keys),
        ("/keys", _too_many),
    ],
)
async def test_documents_that_are_not_what_they_must_be_give_no_keys(issuer: Issuer, path: str, answer: Any) -> None:
    issuer.answers[path] = answer
    good = {"issuer": issuer.url, "jwks_uri": f"{issuer.url}/good/keys"}
    issuer.answers["/good/configuration"] = lambda: web.json_response(good)
    issuer.answers["/good/keys"] = lambda: web.json_response({"keys": [issuer.keyring.jwk("rsa-1")]})
    verifier = Verifier()
    verifier.take(policy(issuer.meta()))
    try:
        with pytest.raises(Unavailable):
            await verifier.verify(issuer.good())
    finally:
        await verifier.close()


async def test_a_discovery_document_of_another_issuer_gives_no_keys(issuer: Issuer) -> None:
    other = {"issuer": f"{issuer.url}/", "jwks_uri": f"{issuer.url}/keys"}
    issuer.answers["/.well-known/openid-configuration"] = lambda: web.json_response(other)
    verifier = Verifier()
    verifier.take(policy(issuer.meta()))
    try:
        with pytest.raises(Unavailable):
            await verifier.verify(issuer.good())
        assert "/keys" not in issuer.requests
    finally:
        await verifier.close()


async def test_a_token_that_names_no_key_must_not_choose_among_several(issuer: Issuer, verifier: Verifier) -> None:
    token = issuer.sign(issuer.claims(), header={"kid": None})
    await verifier.verify(token)
    other = Keyring()
    issuer.extra = [jwk_of("RS256", other.rsa.public_key(), "rsa-2")]
    later = Verifier()
    later.take(policy(issuer.meta()))
    try:
        assert (await refusal(later, token)).details["reason"] == "key"
    finally:
        await later.close()


@pytest.mark.parametrize("name", [name for name in HOSTILE if name.startswith("form_")])
async def test_a_token_in_another_form_is_not_even_taken_apart(issuer: Issuer, name: str) -> None:
    if name != "form_trailing_bytes":  # which are a longer signature, in good form
        with pytest.raises(BadCredentials):
            parse(HOSTILE[name](issuer, ""))


async def test_keys_of_a_configured_address_need_no_discovery(issuer: Issuer) -> None:
    verifier = Verifier()
    verifier.take(policy(issuer.meta(jwks_url=f"{issuer.url}/keys")))
    try:
        await verifier.verify(issuer.good())
        assert issuer.requests == ["/keys"]
    finally:
        await verifier.close()


@pytest.mark.parametrize("url", ["http://192.0.2.1/keys", "file:///etc/passwd", "https://", "https://a@b/", "ftp://a"])
def test_only_https_addresses_are_asked(url: str) -> None:
    with pytest.raises(UnusableKeys):
        checked_url(url, "url")


def test_two_keys_under_one_name_are_both_left_out(keyring: Keyring) -> None:
    other = jwk_of("RS256", Keyring().rsa.public_key(), "rsa-1")
    assert read_keys({"keys": [keyring.jwk("rsa-1"), other, keyring.jwk("ec-1")]}).keys() == {("ec-1", "ES256")}


def test_a_key_set_with_private_keys_gives_none_of_them(keyring: Keyring) -> None:
    assert read_keys({"keys": [{**keyring.jwk("ed-1"), "d": "AAAA"}]}) == {}


def test_points_of_small_order_are_told_from_keys(keyring: Keyring) -> None:
    # y of the points of order 8: d * y^4 + 2 * y^2 - 1 = 0 on the curve.
    order_8 = "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"
    for weak in (bytes(32), (1).to_bytes(32, "little"), bytes.fromhex(order_8)):
        assert small_order(weak)
        assert small_order(weak[:31] + bytes([weak[31] | 0x80]))
    assert not small_order(keyring.ed.public_key().public_bytes_raw())
