"""Requests that move the bytes of logs, and patience with brokers that die, restart and hand over meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from ferryline.calls import BROKER_ANSWER_S, CoordinatorCalls, ask_broker
from ferryline.core.retry import told_ms
from ferryline.protocol.errors import FerrylineError, NotPrimary, NotReady, RequestTimedOut

if TYPE_CHECKING:
    from ferryline.client import Client

AGAIN_S = 0.2
T = TypeVar("T")


class Standing(msgspec.Struct, frozen=True):
    """Where a log stands, as a broker tells it, and what it gave out of it."""

    log_start: int
    log_end: int
    high_watermark: int
    epoch: int
    epoch_before: int
    tail_epoch: int
    data: bytes = b""


class BackupCalls(CoordinatorCalls):
    """Coordinator and brokers of one cluster. ``patience_s``: how long one thing may go on failing."""

    def __init__(self, client: Client, patience_s: float) -> None:
        super().__init__(client)
        self.patience_s = patience_s

    async def coordinator(self, method: str, path: str, body: Any = None) -> Any:
        """One request to the active coordinator; a change is made once, and asking for it again changes nothing."""
        return await self.patiently(lambda: self._request(method, path, body, BROKER_ANSWER_S, again=_retriable))

    async def coordinator_at(self, url: str, path: str) -> Any:
        """One look at that coordinator, active or not."""
        return await self._send(url, "GET", path, None)

    async def read(self, topic_id: str, partition: int, log: str, **query: int) -> Standing:
        """Of the primary, whoever that is at the time."""

        async def once() -> Standing:
            part = self._client.routing.cluster.partition(topic_id, partition)
            if part is None or not part.primary:
                raise NotReady(f"{topic_id}/{partition} has no primary")
            return await self.read_of(part.primary, topic_id, partition, log, **query)

        return await self.patiently(once)

    async def read_of(self, broker: int, topic_id: str, partition: int, log: str, **query: int) -> Standing:
        """Of one broker's copy. ``query``: from, limit."""
        path = f"/v1/replicas/{topic_id}/{partition}/logs/{log}"
        headers, data = await self._broker(broker, "GET", path, None, query)
        told = {
            name: int(headers[f"Ferryline-{name.replace('_', '-').title()}"])
            for name in Standing.__struct_fields__[:-1]
        }
        return Standing(**told, data=data)

    async def put(
        self, broker: int, key: tuple[str, int], log: str, data: bytes, base: int, epoch_before: int = -1
    ) -> None:
        """Batches from offset ``base`` on, onto the end of a log that is being restored."""
        query = {"from": base} | ({"epoch_before": epoch_before} if epoch_before >= 0 else {})
        await self._broker(broker, "PUT", f"/v1/replicas/{key[0]}/{key[1]}/logs/{log}", data, query)

    async def restored(self, broker: int, topic_id: str, partition: int) -> None:
        await self._broker(broker, "POST", f"/v1/replicas/{topic_id}/{partition}/restored", b"", {})

    async def patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until it works, as long as what goes wrong may pass. Raises the last error."""
        end = time.monotonic() + self.patience_s
        while True:
            try:
                return await ask()
            except FerrylineError as error:
                if not _retriable(error) or time.monotonic() > end:
                    raise
                pause_s = max(AGAIN_S, told_ms(error) / 1000)
            await asyncio.sleep(pause_s)
            try:
                await self._refresh(5.0)
            except FerrylineError:
                continue  # the next try says what is wrong

    async def _broker(
        self, broker: int, method: str, path: str, body: bytes | None, query: dict[str, int]
    ) -> tuple[Mapping[str, str], bytes]:
        params = {name.rstrip("_"): str(value) for name, value in query.items()}
        return await ask_broker(self._client, broker, method, path, params=params, data=body)


def _retriable(error: BaseException) -> bool:
    return isinstance(error, FerrylineError) and (error.retriable or isinstance(error, NotPrimary | RequestTimedOut))
