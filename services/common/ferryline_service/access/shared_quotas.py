"""Quotas that the services of a cluster share through Redis: settled in the background, no request waits for it.

Each service lets in what its own copy of a bucket allows. Every SETTLE_S it tells Redis what was spent since, for all
principals in one call, and is told how far behind the shared bucket is then, which its copy takes over. In between
services can overspend, each by what it lets in meanwhile; all of them then wait for that.

When Redis is away, each service goes on with its share of the rate. When it is back, each hands in what its own bucket
is behind: a Redis that has forgotten everything does not give a burst away.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any, cast

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from ferryline.protocol.errors import InvalidArgument
from ferryline_service.access.quotas import Meter, Quotas
from ferryline_service.access.redis_link import RedisAway, RedisLink
from ferryline_service.logs import get_logger
from ferryline_service.metrics import ServiceMetrics

SETTLE_S = 0.05
LOOK_S = 1.0  # with nothing to settle: is it still, or again, there?
METERS_PER_CALL = 500  # of them, all at once: Redis serves others between two calls
# KEYS: buckets of one principal. ARGV: what was spent of each, in µs at its rate; 0 only asks, less gives back. Answers
# how many µs each is behind. The time is the same for all services; a key ends with what it remembers.
SCRIPT = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local behind = {}
for i, key in ipairs(KEYS) do
  local arrival = math.max(math.max(tonumber(redis.call('GET', key) or 0), now) + ARGV[i], now)
  if tonumber(ARGV[i]) ~= 0 then
    redis.call('SET', key, string.format('%.0f', arrival), 'PX', math.ceil((arrival - now) / 1000) + 1000)
  end
  behind[i] = arrival - now
end
return behind
"""
_SHA = hashlib.sha1(SCRIPT.encode()).hexdigest()  # as Redis names it
_log = get_logger()

Spent = tuple[Meter, dict[str, float]]  # by rate, in ms


class SharedQuotas:
    """Settles `Quotas` while the policy names a Redis. `start` and `close` once."""

    def __init__(self, quotas: Quotas, cluster_id: str, *, settle_s: float = SETTLE_S) -> None:
        self._quotas = quotas
        self._prefix = f"ferryline:{cluster_id}:quota"
        self._settle_s = settle_s
        self._link: RedisLink | None = None
        self._url = ""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """What was spent since the last settlement is forgotten."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._use("")

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        look_at = 0.0
        while True:
            await asyncio.sleep(self._settle_s)
            try:
                if self._quotas.redis_url != self._url:
                    await self._use(self._quotas.redis_url)
                    look_at = 0.0
                if self._link is None:
                    self._quotas.drained()
                elif self._quotas.touched or loop.time() >= look_at:
                    look_at = loop.time() + LOOK_S
                    await self.settle()
            except Exception:
                _log.exception("quotas could not be settled")

    async def _use(self, url: str) -> None:
        link, self._link, self._url = self._link, None, url
        self._share(False)
        if link is not None:
            await link.close()
        if url:
            try:
                self._link = RedisLink(url)
            except InvalidArgument as error:
                _log.error("quotas are not shared", error=error.message)

    async def settle(self) -> None:
        """Tell Redis what was spent, and take over how far behind the buckets are. Never raises for want of Redis."""
        assert self._link is not None
        if not self._quotas.shared:
            try:
                await self._link.run(_ping)
            except RedisAway:
                self._quotas.drained()
                return
            self._quotas.hand_in()
            self._share(True)
        spent = self._quotas.drained()
        try:
            for first in range(0, len(spent), METERS_PER_CALL):
                await self._settle(spent[first : first + METERS_PER_CALL])
            if not spent:
                await self._link.run(_ping)
        except RedisAway:
            self._share(False)

    async def _settle(self, spent: list[Spent]) -> None:
        assert self._link is not None
        calls: list[list[Any]] = []
        for meter, amounts in spent:
            keys = [f"{self._prefix}:{{{meter.name}}}:{name}" for name in amounts]
            calls.append([_SHA, len(keys), *keys, *(round(ms * 1_000) for ms in amounts.values())])
        answers = await self._link.run(lambda redis: _evaluated(redis, calls))
        for (meter, amounts), behind in zip(spent, answers, strict=True):
            self._quotas.settled(meter, {name: us / 1_000 for name, us in zip(amounts, behind, strict=True)})

    def _share(self, shared: bool) -> None:
        if self._quotas.shared == shared:
            return
        self._quotas.share(shared)
        if shared:
            _log.info("quotas are shared through redis")
        else:
            _log.warning("quotas are not shared: this service goes on with its share", services=self._quotas.services)


async def _ping(redis: Redis) -> None:
    await cast(Any, redis.ping())


async def _evaluated(redis: Redis, calls: list[list[Any]]) -> list[list[int]]:
    """The answers to all calls, from one round trip; two where Redis does not know the script yet."""
    answers = await _pipelined(redis, calls)
    if any(isinstance(answer, NoScriptError) for answer in answers):
        await redis.script_load(SCRIPT)  # what it refused for want of the script, it has not done
        again = [number for number, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        for number, answer in zip(again, await _pipelined(redis, [calls[number] for number in again]), strict=True):
            answers[number] = answer
    for answer in answers:
        if isinstance(answer, RedisError):
            raise answer
    return answers


async def _pipelined(redis: Redis, calls: list[list[Any]]) -> list[Any]:
    async with redis.pipeline(transaction=False) as pipeline:
        for call in calls:
            pipeline.evalsha(*call)
        return list(await pipeline.execute(raise_on_error=False))


class QuotaCounts(Collector):
    """What an operator sees of quotas."""

    def __init__(self, quotas: Quotas, metrics: ServiceMetrics) -> None:
        self._quotas = quotas
        self._service = metrics.service
        metrics.registry.register(self)

    def collect(self) -> list[Metric]:
        shared = GaugeMetricFamily(
            "ferryline_quota_shared",
            "1 while quotas are shared through Redis, 0 while this service gives its share",
            labels=["service"],
        )
        shared.add_metric([self._service], float(self._quotas.shared))
        refused = CounterMetricFamily(
            "ferryline_quota_refused", "Requests over a quota, by quota", labels=["service", "quota"]
        )
        for name, count in self._quotas.refused.items():
            refused.add_metric([self._service, name], count)
        return [shared, refused]
