"""A principal limited to 1,000 records a second, over two brokers with one Redis: ``python -m
tests.integration.quota_campaign``.

Two brokers and a coordinator as processes, with access on. The principal sends as fast as it is let, through two
clients of the SDK and over REST, some of which does not wait as it is told. What is acknowledged is counted over
windows of time:

    first record on  with the second of the rate that a full bucket lets in at once
    shared           both brokers are busy, and share the rate through Redis
    one broker       all of it comes to one of them, which may give the whole rate
    redis killed     kill -9: each broker goes on with its half; one that is alone gives half of the rate
    back again       Redis starts, empty, at the same address

It must show the rate within 5 % in each, refusals that tell when to come again, and no request that failed otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import secrets
import socket
import ssl
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

import ferryline as fl
from ferryline.cli.driver import ProcessCluster
from tests.integration.conftest import LOG_LINES
from tests.redis_server import RedisServer

RATE = 1_000
WITHIN = 0.05
BOTH, ALONE = "both", "alone"  # a topic on both brokers, and one on a single broker
VALUE_BYTES = 200
BATCH_BYTES = 16 * 1024  # some 70 records: what a request may be too much, and what waits, is little of a window
LARGE_BYTES = 512 * 1024
REST_RECORDS = 20
SETTLED_S = 3.0  # after a change, until a window begins: the burst of a full bucket is used up by then
ACCESS = """
redis_url = "{redis}"

[[principals]]
name = "root"
grants = [{{resource = "cluster", actions = ["manage"]}}, {{resource = "topic", actions = ["manage"]}}]
keys = [{root}]

[[principals]]
name = "limited"
grants = [{{resource = "topic", actions = ["read", "write"]}}]
quota = {{records = {rate}}}
keys = [{limited}]
"""


@dataclass
class Key:
    """An API key that an access file may declare."""

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    @property
    def token(self) -> str:
        return f"fl_{self.id}_{self.secret}"

    @property
    def toml(self) -> str:
        return f'{{id = "{self.id}", sha256 = "{hashlib.sha256(self.secret.encode()).hexdigest()}"}}'


@dataclass
class Counted:
    """What became of everything that was sent. ``failed``: neither stored nor told to wait."""

    session: int = 0  # records acknowledged
    rest: int = 0
    refused: int = 0  # 429
    failed: Counter[str] = field(default_factory=Counter)
    retry_after_s: list[int] = field(default_factory=list)  # as the header said
    early_ms: list[int] = field(default_factory=list)  # retry_after_ms against the header: it must never say less

    @property
    def admitted(self) -> int:
        return self.session + self.rest


@dataclass
class Window:
    """One line of the result."""

    what: str
    seconds: float
    expected: int  # a second
    admitted: float
    over_session: float
    over_rest: float
    refused: int
    retry_after_s: str
    failed: dict[str, int]

    @property
    def good(self) -> bool:
        return abs(self.admitted - self.expected) <= self.expected * WITHIN and not self.failed


class Campaign:
    """The cluster, its load, and the windows that were counted."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.redis = RedisServer(folder, port)
        self.root, self.limited = Key(), Key()
        file = folder / "access.toml"
        file.write_text(ACCESS.format(redis=self.redis.url, rate=RATE, root=self.root.toml, limited=self.limited.toml))
        self.cluster = ProcessCluster(folder / "cluster", brokers=2, coordinator_args=["--access", str(file)])
        self.counted = Counted()
        self.windows: list[Window] = []
        self.topic = BOTH
        self._urls: dict[str, list[str]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self.redis.start()
        await self.cluster.start()
        async with fl.connect(self.cluster.url, ca=str(self.cluster.ca), token=self.root.token) as client:
            await client.admin.create_topic(BOTH, partitions=4, replication=1, flush="replicated")
            await client.admin.create_topic(ALONE, partitions=1, replication=1, flush="replicated")
            (part,) = (await client.admin.describe_topic(ALONE)).partitions
            urls = {broker.id: broker.url for broker in await client.admin.list_brokers()}
        self._urls = {BOTH: list(urls.values()), ALONE: [urls[part.primary]]}

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.cluster.kill_all()
        self.redis.kill()
        await asyncio.sleep(0.1)

    def logs(self) -> str:
        """The end of what each service said."""
        tails = ((name, self.cluster.logs(name).splitlines()[-LOG_LINES:]) for name in self.cluster.local.services)
        return "\n".join(f"--- {name}\n" + "\n".join(tail) for name, tail in tails)

    # -- load ---------------------------------------------------------------------------------------

    def load(self) -> None:
        """Begin to send; it goes on until `stop`."""
        large: dict[str, Any] = {"buffer_bytes": LARGE_BYTES}  # batches as large as the SDK makes them by itself
        small: dict[str, Any] = {"batch_bytes": BATCH_BYTES, "buffer_bytes": 4 * BATCH_BYTES, "linger": 0.02}
        self._tasks = [asyncio.create_task(self._produce(options)) for options in (large, small)]
        self._tasks += [asyncio.create_task(self._post(obeys)) for obeys in (True, False)]

    async def _produce(self, options: dict[str, Any]) -> None:
        """Through the SDK, which obeys: whatever is buffered waits until it is let in."""
        client = fl.connect(self.cluster.url, ca=str(self.cluster.ca), token=self.limited.token)
        async with client, client.producer(**options) as producer:
            value = bytes(VALUE_BYTES)
            while True:
                try:
                    future = producer.send_nowait(self.topic, value)
                except fl.BufferFull:
                    await asyncio.sleep(0.005)
                else:
                    future.add_done_callback(self._settled)

    def _settled(self, future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            self.counted.session += 1
        elif not isinstance(error, fl.ClientClosed):
            self.counted.failed[f"session: {error}"[:200]] += 1

    async def _post(self, obeys: bool) -> None:
        """Over REST, at one broker after the other; one that does not obey comes again at once."""
        context = ssl.create_default_context(cafile=self.cluster.ca)
        headers = {"Authorization": f"Bearer {self.limited.token}"}
        body = {"records": [{"value": "x" * VALUE_BYTES}] * REST_RECORDS}
        turn = 0
        async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(ssl=context)) as http:
            while True:
                turn += 1
                topic = self.topic
                url = self._urls[topic][turn % len(self._urls[topic])]
                try:
                    async with http.post(f"{url}/v1/topics/{topic}/records", json=body) as response:
                        answer = await response.json()
                        wait_s = self._answered(response, answer)
                except (aiohttp.ClientError, OSError, TimeoutError) as error:
                    self.counted.failed[f"rest: {type(error).__name__}"] += 1
                    wait_s = 0.1
                await asyncio.sleep(wait_s if obeys else 0.02)

    def _answered(self, response: aiohttp.ClientResponse, answer: Any) -> float:
        """Count it. Returns how long to wait."""
        counted = self.counted
        if response.status == 200:
            counted.rest += REST_RECORDS
            return 0.0
        if response.status != 429:
            counted.failed[f"rest: {response.status} {str(answer)[:150]}"] += 1
            return 0.1
        counted.refused += 1
        after_s, after_ms = int(response.headers["Retry-After"]), answer["details"]["retry_after_ms"]
        counted.retry_after_s.append(after_s)
        counted.early_ms.append(after_ms - after_s * 1_000)
        return float(after_ms) / 1_000

    # -- counting -----------------------------------------------------------------------------------

    async def shared(self, shared: bool, within_s: float = 60.0) -> None:
        """Return once every broker says that quotas are shared, or are not."""
        context = ssl.create_default_context(cafile=self.cluster.ca)
        headers = {"Authorization": f"Bearer {self.root.token}"}
        wanted = f'ferryline_quota_shared{{service="broker"}} {float(shared)}'
        end = time.monotonic() + within_s
        async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(ssl=context)) as http:
            for url in self._urls[BOTH]:
                while True:
                    async with http.get(f"{url}/metrics") as response:
                        if wanted in await response.text():
                            break
                    if time.monotonic() > end:
                        raise TimeoutError(f"{url} does not say within {within_s:g} s: {wanted}")
                    await asyncio.sleep(0.1)

    async def window(
        self, what: str, topic: str, expected: int, seconds: float, settled_s: float = SETTLED_S
    ) -> Window:
        """Count what is let in, once what came before has settled."""
        self.topic = topic
        await asyncio.sleep(settled_s)
        fresh = Counted()
        fresh.failed.update(self.counted.failed)  # what failed meanwhile counts, too
        self.counted = fresh
        began = time.monotonic()
        await asyncio.sleep(seconds)
        took, counted, self.counted = time.monotonic() - began, self.counted, Counted()
        told = counted.retry_after_s
        window = Window(
            what, round(took, 2), expected, round(counted.admitted / took, 1), round(counted.session / took, 1),
            round(counted.rest / took, 1), counted.refused, f"{min(told)} to {max(told)}" if told else "-",
            dict(counted.failed),
        )  # fmt: skip
        if any(late > 0 for late in counted.early_ms):
            window.failed["Retry-After is shorter than what the body tells"] = 1
        if any(not 1 <= after <= 10 for after in told):
            window.failed["a Retry-After that makes no sense"] = 1
        self.windows.append(window)
        told_s = f"{window.refused} refused, told {window.retry_after_s} s"
        print(f"{what:40} {window.admitted:8.1f}/s of {expected:5}, {told_s}", flush=True)
        return window


async def run(folder: Path, seconds: float, *, short: bool = False) -> Campaign:
    """The whole campaign, or one window of each kind; the caller judges them."""
    campaign = Campaign(folder)
    try:
        await campaign.start()
        await campaign.shared(True)
        campaign.load()
        if not short:
            await campaign.window("from the first record on", BOTH, RATE, seconds, 0.0)
        await campaign.window("shared, both brokers", BOTH, RATE, seconds)
        if not short:
            await campaign.window("shared, all of it at one broker", ALONE, RATE, seconds / 2)
        campaign.redis.kill()
        await campaign.shared(False)
        if not short:
            await campaign.window("redis killed, both brokers", BOTH, RATE, seconds / 2)
        await campaign.window("redis killed, all of it at one broker", ALONE, RATE // 2, seconds / 2)
        campaign.redis.start()
        await campaign.shared(True)
        await campaign.window("redis back, all of it at one broker", ALONE, RATE, seconds / 2)
        if not short:
            await campaign.window("redis back, both brokers", BOTH, RATE, seconds / 2)
    except BaseException:
        print(campaign.logs(), file=sys.stderr)
        raise
    finally:
        await campaign.stop()
    return campaign


def main() -> int:
    """Run it, write the result. Exit status 1 if a window is not as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of the first window; the others take half")
    parser.add_argument("--result", type=Path, help="write what was found to this file")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ferryline-quotas-") as folder:
        campaign = asyncio.run(run(Path(folder), asked.seconds))
    if asked.result:
        shown = {"rate": RATE, "within": WITHIN, "windows": [asdict(window) for window in campaign.windows]}
        asked.result.write_text(json.dumps(shown, indent=1) + "\n")
    bad = [window for window in campaign.windows if not window.good]
    for window in bad:
        print(f"BAD: {window}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
