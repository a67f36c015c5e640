"""Tokens of a client that come from a function: when it is called, from where, and what its failures become."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from ferryline import tokens
from ferryline.protocol.errors import BadCredentials, ConnectionFailed, InvalidArgument
from ferryline.tokens import TokenSource, claims_of, renew_at
from tests.oidc_issuer import b64


def jwt(life_s: float, number: int = 0) -> str:
    now = time.time()
    return f"{b64({'alg': 'none'})}.{b64({'iat': now, 'exp': now + life_s, 'n': number})}.{b64(b'x')}"


class Giver:
    """A function that counts its calls. ``life_s``: of the JWTs it gives, 0 for opaque tokens."""

    def __init__(self, life_s: float = 0) -> None:
        self.calls = 0
        self.life_s = life_s
        self.threads: set[int] = set()

    async def __call__(self) -> str:
        self.calls += 1
        self.threads.add(threading.get_ident())
        await asyncio.sleep(0)
        return jwt(self.life_s, self.calls) if self.life_s else f"token-{self.calls}"


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "AGAIN_S", 0.0)


async def test_a_text_is_used_as_it_is() -> None:
    source = TokenSource("abc")
    assert await source.token() == "abc"
    assert await source.renew("abc") == "abc"
    assert not source.renewable


async def test_a_token_that_does_not_say_when_it_ends_is_used_until_it_is_refused() -> None:
    give = Giver()
    source = TokenSource(give)
    assert {await source.token() for _ in range(3)} == {"token-1"}
    assert await source.renew("token-1") == "token-2"
    assert await source.token() == "token-2"


async def test_a_token_is_replaced_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    give = Giver(life_s=1000)
    source = TokenSource(give)
    await source.token()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 960)
    await source.token()
    assert give.calls == 1
    monkeypatch.setattr(time, "time", lambda: now + 975)
    await source.token()
    assert give.calls == 2


async def test_many_who_need_one_at_once_have_the_function_called_once() -> None:
    give = Giver()
    source = TokenSource(give)
    assert set(await asyncio.gather(*(source.token() for _ in range(20)))) == {"token-1"}
    assert set(await asyncio.gather(*(source.renew("token-1") for _ in range(20)))) == {"token-2"}


async def test_a_refused_token_that_others_replaced_already_costs_no_call() -> None:
    give = Giver()
    source = TokenSource(give)
    await source.token()
    await source.renew("token-1")
    assert await source.renew("token-1") == "token-2"
    assert give.calls == 2


async def test_the_function_is_not_called_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "AGAIN_S", 60.0)
    give = Giver()
    source = TokenSource(give)
    token = await source.token()
    assert await source.renew(token) == token
    assert give.calls == 1


async def test_a_function_that_is_not_asynchronous_blocks_no_loop() -> None:
    here = threading.get_ident()
    seen: list[int] = []

    def give() -> str:
        seen.append(threading.get_ident())
        return "abc"

    assert await TokenSource(give).token() == "abc"
    assert seen != [here]


async def test_another_loop_has_the_function_called_in_the_first_one() -> None:
    give = Giver()
    source = TokenSource(give)
    await source.token()
    found = await asyncio.to_thread(asyncio.run, source.renew("token-1"))
    assert found == "token-2"
    assert give.threads == {threading.get_ident()}


async def test_a_function_that_needs_no_loop_of_its_own_is_called_although_the_first_loop_is_blocked() -> None:
    calls: list[int] = []

    def give() -> str:
        calls.append(1)
        return f"token-{len(calls)}"

    source = TokenSource(give)
    await source.token()
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(source.renew("token-1"))))
    thread.start()
    thread.join(30)  # blocks this loop meanwhile
    assert found == ["token-2"]


async def test_failures_of_the_function_are_typed() -> None:
    async def broken() -> str:
        raise OSError("no disk")

    async def denied() -> str:
        raise BadCredentials("log in again")

    with pytest.raises(ConnectionFailed, match="no disk"):
        await TokenSource(broken).token()
    with pytest.raises(BadCredentials, match="log in again"):
        await TokenSource(denied).token()
    for odd in (lambda: None, lambda: "a\nb", lambda: "é", lambda: 5):
        with pytest.raises(InvalidArgument):
            await TokenSource(odd).token()  # type: ignore[arg-type, return-value]
    with pytest.raises(InvalidArgument):
        TokenSource(5)  # type: ignore[arg-type]


@pytest.fixture
async def service() -> AsyncIterator[tuple[str, list[str], set[str]]]:
    """URL; tokens that were shown; tokens that are let in."""
    shown: list[str] = []
    good: set[str] = set()

    async def answer(request: web.Request) -> web.Response:
        shown.append(request.headers.get("Authorization", "").removeprefix("Bearer "))
        return web.Response(status=200 if shown[-1] in good else 401, text=await request.text())

    app = web.Application()
    app.router.add_post("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/", shown, good
    await runner.cleanup()


async def test_a_request_is_sent_again_once_with_another_token(service: tuple[str, list[str], set[str]]) -> None:
    url, shown, good = service
    good.add("token-2")
    source = TokenSource(Giver())
    async with aiohttp.ClientSession(middlewares=(source.authorize,)) as http:
        async with http.post(url, data=b"body") as answer:
            assert (answer.status, await answer.text()) == (200, "body")
        assert shown == ["token-1", "token-2"]
        good.clear()
        async with http.post(url, data=b"body") as answer:
            assert answer.status == 401
    assert shown[2:] == ["token-2", "token-3"]


async def test_a_text_that_is_refused_is_shown_once(service: tuple[str, list[str], set[str]]) -> None:
    url, shown, _ = service
    async with aiohttp.ClientSession(middlewares=(TokenSource("abc").authorize,)) as http:
        async with http.post(url) as answer:
            assert answer.status == 401
        async with http.post(url, headers={"Authorization": "Bearer other"}) as answer:
            assert answer.status == 401
    assert shown == ["abc", "other"]


@pytest.mark.parametrize("token", ["", "abc", "a.b.c", "a.!.c", f"a.{b64('[1]')}.c", f"a.{b64('[' * 5000)}.c"])
def test_what_is_no_jwt_has_no_claims_and_no_end(token: str) -> None:
    assert claims_of(token) == {}
    assert renew_at(token, 0) == float("inf")


def test_short_lives_are_renewed_after_four_fifths() -> None:
    now = time.time()
    assert renew_at(jwt(10), now) == pytest.approx(now + 8, abs=1)
    assert renew_at(jwt(3600), now) == pytest.approx(now + 3570, abs=1)
