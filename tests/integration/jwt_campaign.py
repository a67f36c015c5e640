"""Hostile JWTs by the thousand at a real cluster: ``python -m tests.integration.jwt_campaign``.

A coordinator and a broker as processes, an issuer on the loopback whose key set holds weak keys, too, and an attacker's
server that must never be asked. First every token of the table (`tests.hostile_jwts`), by REST and as a session, at
both services. Then tokens made by chance from a seed: bits, letters and parts of good and hostile ones exchanged,
headers and claims changed and signed by the issuer's key or a stranger's.

It must show that none is believed, that each is refused with BAD_CREDENTIALS in bounded time (the slowest is told),
that the memory of both services is flat, and that good tokens are believed all the while.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from ferryline.cli.driver import ProcessCluster
from ferryline.trust import ssl_context
from tests.hostile_jwts import HOSTILE, weak_keys
from tests.oidc_issuer import AUDIENCE, Issuer, Keyring

ACCESS = """
[[issuers]]
name = "test"
issuer = "{issuer}"
audience = "{audience}"
leeway_ms = 0
"""
PATHS = ("/v1/whoami", "/v1/session")
AT_ONCE = 8
GOOD_EVERY = 200
SLOWEST_S = 6.0  # a key id that nobody knows may wait for one fetch of keys, of 5 s at most
GROWTH_BYTES = 8 * 1024 * 1024  # of both services together, in the second half
SAMPLES = 8
REFUSED = (401, "BAD_CREDENTIALS")


@dataclass
class Tally:
    """What came of all tokens."""

    shown: int = 0
    answers: dict[str, int] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)  # the first few that were not refused as they must be
    slowest_s: float = 0.0
    good: int = 0

    def note(self, name: str, token: str, status: int, code: str, seconds: float) -> None:
        """Count an answer. What is no header of HTTP, or too long for one, does not get as far as the gate: 400."""
        self.shown += 1
        self.slowest_s = max(self.slowest_s, seconds)
        key = f"{status} {code}"
        self.answers[key] = self.answers.get(key, 0) + 1
        unsendable = status == 400 and (len(token) > 8000 or not token.isascii() or not token.isprintable())
        if (status, code) != REFUSED and not unsendable and len(self.odd) < 20:
            self.odd.append(f"{name}: {key}")


async def show(http: aiohttp.ClientSession, url: str, token: str) -> tuple[int, str]:
    """Status and code of the answer to whoever shows a token; a session is asked for as its clients do."""
    headers = {"Authorization": f"Bearer {token}"}
    if url.endswith("/session"):
        headers |= {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        headers["Sec-WebSocket-Key"] = "AAAAAAAAAAAAAAAAAAAAAA=="
    try:
        async with asyncio.timeout(60), http.get(url, headers=headers) as answer:
            body: dict[str, Any] = await answer.json(content_type=None) if answer.status != 101 else {}
    except ValueError:  # aiohttp does not send it
        return 400, "not sent"
    return answer.status, str((body or {}).get("code"))


class Mutator:
    """Tokens by chance: the same ones for the same seed, but for the keys and the time in them."""

    def __init__(self, seed: int, issuer: Issuer, attacker: str) -> None:
        self._chance = random.Random(seed)
        self._issuer, self._attacker = issuer, attacker
        self._stranger = Keyring()
        self._names = list(HOSTILE)

    def token(self) -> tuple[str, str]:
        """What was done, and what came of it: never a good token."""
        chance, good = self._chance, self._issuer.good()
        kind = chance.choice([self._bits, self._letters, self._parts, self._cut, self._header, self._claims])
        made = kind(good)
        return kind.__name__.strip("_"), made if made != good else made + "."

    def _bits(self, good: str) -> str:
        raw = bytearray(good.encode())
        for _ in range(self._chance.randint(1, 3)):
            raw[self._chance.randrange(len(raw))] ^= 1 << self._chance.randrange(7)
        return raw.decode()

    def _letters(self, good: str) -> str:
        at = self._chance.randrange(len(good))
        letter = self._chance.choice("ABCZabcz019-_=.+/~ ")
        return good[:at] + letter + good[at + self._chance.randint(0, 1) :]

    def _parts(self, good: str) -> str:
        other = HOSTILE[self._chance.choice(self._names)](self._issuer, self._attacker)
        parts = [*good.split("."), *other.split(".")]
        return ".".join(self._chance.choice(parts) for _ in range(self._chance.choice([2, 3, 3, 3, 4])))

    def _cut(self, good: str) -> str:
        first, last = sorted(self._chance.sample(range(len(good)), 2))
        return self._chance.choice([good[:first], good[first:], good[:first] + good[last:], good + good[first:last]])

    def _header(self, _: str) -> str:
        """Signed by a stranger, whatever the header says."""
        member = self._chance.choice(["alg", "kid", "typ", "jku", "x5u", "crit", "cty", "b64", "jwk"])
        values = ["none", "", "RS256", "HS256", "rsa-1", "ec-1", self._attacker, 0, None, True, [], {}, ["b64"]]
        header = {"alg": "RS256", "kid": "rsa-1", member: self._chance.choice(values)}
        return self._issuer.sign(self._issuer.claims(), key=self._stranger.rsa, header=json.dumps(header))

    def _claims(self, _: str) -> str:
        """Signed by the issuer itself, with a claim that must not be believed."""
        claim = self._chance.choice(["iss", "aud", "exp"])
        values = ["", "x", 0, -1, None, True, [], {}, ["x"], {"x": 1}, 1.5, 10**20, "ferryline ", [["ferryline"]]]
        return self._issuer.sign({**self._issuer.claims(), claim: self._chance.choice(values)})


async def campaign(folder: Path, seed: int, count: int) -> dict[str, Any]:
    """Run all of it, and return what is written down."""
    keyring, tally = Keyring(), Tally()
    async with Issuer(keyring) as issuer, Issuer(keyring) as attacker:
        issuer.extra = weak_keys()
        (folder / "access.toml").write_text(ACCESS.format(issuer=issuer.url, audience=AUDIENCE))
        arguments = ["--access", str(folder / "access.toml")]
        cluster = ProcessCluster(folder / "cluster", brokers=1, coordinator_args=arguments)
        await cluster.start()
        try:
            found = await _at(cluster, issuer, attacker, tally, Mutator(seed, issuer, attacker.url), count)
        finally:
            await cluster.kill_all()
        asked = attacker.requests
    good = not tally.odd and not asked and tally.slowest_s < SLOWEST_S and found["growth_bytes"] < GROWTH_BYTES
    return {
        "seed": seed,
        "table": len(HOSTILE),
        "by_chance": count,
        "shown": tally.shown,
        "answers": tally.answers,
        "slowest_s": round(tally.slowest_s, 3),
        "good_ones_between": tally.good,
        "attacker_asked": len(asked),
        **found,
        "odd": tally.odd,
        "good": good,
    }


async def _at(
    cluster: ProcessCluster, issuer: Issuer, attacker: Issuer, tally: Tally, mutator: Mutator, count: int
) -> dict[str, Any]:
    urls = [cluster.url, cluster.url_of(cluster.brokers[0])]
    connector = aiohttp.TCPConnector(ssl=ssl_context(str(cluster.ca)), limit=AT_ONCE)
    async with aiohttp.ClientSession(connector=connector) as http:

        async def one(name: str, token: str, url: str) -> None:
            began = time.perf_counter()
            status, code = await show(http, url, token)
            tally.note(name, token, status, code, time.perf_counter() - began)

        for url in urls:
            await _good(http, url, issuer, tally)
        for name, make in HOSTILE.items():
            token = make(issuer, attacker.url)
            await asyncio.gather(*(one(name, token, url + path) for url in urls for path in PATHS))
        memory = [_resident(cluster)]
        for start in range(0, count, AT_ONCE):
            made = [(number, mutator.token()) for number in range(start, min(start + AT_ONCE, count))]
            await asyncio.gather(*(one(kind, token, urls[n % 2] + PATHS[n // 2 % 2]) for n, (kind, token) in made))
            if start % GOOD_EVERY < AT_ONCE:
                await _good(http, urls[start // AT_ONCE % 2], issuer, tally)
            if start * SAMPLES // count > len(memory) - 1:
                memory.append(_resident(cluster))
        memory.append(_resident(cluster))
    # The first half fills what has a bound: caches, buffers of connections, the heap of the interpreter.
    growth = memory[-1] - memory[len(memory) // 2]
    return {"memory_bytes": memory, "growth_bytes": growth, "issuer_asked": len(issuer.requests)}


async def _good(http: aiohttp.ClientSession, url: str, issuer: Issuer, tally: Tally) -> None:
    status, code = await show(http, f"{url}/v1/whoami", issuer.good())
    tally.good += 1
    if status != 200:
        tally.odd.append(f"a good token: {status} {code}")


def _resident(cluster: ProcessCluster) -> int:
    return sum(
        psutil.Process(service.pid).memory_info().rss
        for service in cluster.local.services.values()
        if service.pid is not None
    )


def main() -> int:
    """Run the campaign, write its result, and return 1 if a token was believed or something grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=20_000, help="made by chance")
    parser.add_argument("--out", type=Path, default=None, help="file for the result, as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ferryline-jwt-") as folder:
        result = asyncio.run(campaign(Path(folder), args.seed, args.tokens))
    text = json.dumps(result, indent=2) + "\n"
    if args.out is not None:
        args.out.write_text(text)
    sys.stdout.write(text)
    return 0 if result["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
