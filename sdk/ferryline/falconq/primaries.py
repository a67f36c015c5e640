"""Questions of the gateway to the primary of one partition, each until it is answered or its deadline has come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ferryline.core.retry import Backoff, Jitter, told_ms
from ferryline.protocol.errors import (
    ErrorInfo,
    FerrylineError,
    PrimaryNotAvailable,
    RequestTimedOut,
    UnknownTopic,
    from_info,
)
from ferryline.protocol.frames import Kind
from ferryline.protocol.messages import Fetch, FetchAnswer, FetchEntry, FetchResult
from ferryline.protocol.metadata import NO_BROKER
from ferryline.protocol.queue_messages import (
    Delivery,
    Keep,
    KeepEntry,
    QueueAnswer,
    QueueAsk,
    QueueResult,
    Receive,
    ReceiveAnswer,
    Settle,
    SettleAnswer,
    SettleEntry,
    SettleResult,
)
from ferryline.requests import ATTEMPT_S, Key

if TYPE_CHECKING:
    from ferryline.client import Client

A = TypeVar("A")
_BACKOFF = Backoff(10, 300)


class Primaries:
    """Every call ends within ``timeout_s`` seconds, with its answer or a FerrylineError."""

    def __init__(self, client: Client, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._jitter = Jitter(id(self))

    async def receive(self, key: Key, ask: Receive) -> tuple[Delivery | None, memoryview]:
        """Sent again only after a refusal: an error that is not definite may have leased records."""
        answer, payload = await self._ask(key, Kind.RECEIVE, ask, ReceiveAnswer, _of_deliveries, repeat=False)
        return (answer.deliveries[0] if answer.deliveries else None), payload

    async def settle(self, key: Key, group: str, member: str, entries: list[SettleEntry]) -> list[SettleResult]:
        answer, _ = await self._ask(key, Kind.SETTLE, Settle(group, member, entries), SettleAnswer, _of_results)
        return answer.results

    async def keep(self, key: Key, group: str, member: str, leases: list[int]) -> None:
        ask = Keep(group, member, [KeepEntry(*key, leases)])
        await self._ask(key, Kind.KEEP, ask, SettleAnswer, _of_results)

    async def stats(self, key: Key, group: str) -> QueueResult:
        answer, _ = await self._ask(key, Kind.QUEUE, QueueAsk(group, "stats", [key]), QueueAnswer, _of_results)
        return answer.results[0]

    async def fetch(self, key: Key, offset: int, bytes_max: int) -> tuple[FetchResult, memoryview]:
        ask = Fetch(0, bytes_max, [FetchEntry(*key, offset, bytes_max=bytes_max)])
        answer, payload = await self._ask(key, Kind.FETCH, ask, FetchAnswer, _of_results)
        return answer.results[0], payload

    async def _ask(
        self,
        key: Key,
        kind: int,
        header: Any,
        answer: type[A],
        error_of: Callable[[A], ErrorInfo | None],
        *,
        repeat: bool = True,
    ) -> tuple[A, memoryview]:
        client, loop = self._client, asyncio.get_running_loop()
        deadline, failures = loop.time() + self._timeout_s, 0
        while True:
            changed = client.watch.change()
            try:
                return await self._once(key, kind, header, answer, error_of, min(ATTEMPT_S, deadline - loop.time()))
            except FerrylineError as error:
                if "primary" in error.details:
                    client.routing.hint(key, error.details.get("primary"), error.details.get("epoch"))
                if not client.routing.exists(key):
                    raise UnknownTopic("the topic was deleted") from error
                again = error.retriable or error.refresh_metadata or isinstance(error, RequestTimedOut)
                if not again or not (repeat or error.definite):
                    raise
                failures += 1
                pause = _BACKOFF.pause_ms(failures, self._jitter.next(), error) / 1000
                if loop.time() + pause >= deadline:
                    raise
                if told_ms(error):
                    await asyncio.sleep(pause)
                    continue
                client.watch.refresh()
                await client.watch.wait_for(changed, pause)

    async def _once(
        self,
        key: Key,
        kind: int,
        header: Any,
        answer: type[A],
        error_of: Callable[[A], ErrorInfo | None],
        timeout: float,
    ) -> tuple[A, memoryview]:
        broker = self._client.routing.route(key).broker
        if broker == NO_BROKER:
            raise PrimaryNotAvailable("the partition has no primary at the moment")
        session = await self._client.connections.session(broker, timeout=timeout)
        found, payload = await session.request(kind, header, answer, timeout=timeout)
        error = error_of(found)
        if error is not None:
            raise from_info(error)
        return found, payload


def _of_deliveries(answer: ReceiveAnswer) -> ErrorInfo | None:
    return answer.deliveries[0].error if answer.deliveries else None


def _of_results(answer: Any) -> ErrorInfo | None:
    """The first error of an answer about one partition: where one entry is refused, the others are."""
    return next((result.error for result in answer.results if result.error is not None), None)
