"""The last look: every copy of every partition, read from its broker from the beginning by a fresh client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ferryline.cli.chaos.record import Place, Recorder, now_us, number_of
from ferryline.cli.chaos.traffic import Topic
from ferryline.protocol.errors import CorruptBatch, FerrylineError, from_info
from ferryline.protocol.frames import Kind
from ferryline.protocol.messages import Fetch, FetchAnswer, FetchEntry, FetchResult
from ferryline.protocol.records import decode_batch, split_batches

if TYPE_CHECKING:
    from ferryline.client import Client

READ_BYTES = 4 * 1024 * 1024
WAIT_MS = 500
PAUSE_S = 0.2


class CopyReader:
    """Reads the copies of one cluster. What cannot be read within the time stands in ``trouble``."""

    def __init__(self, client: Client, recorder: Recorder, within_s: float) -> None:
        self._client = client
        self._recorder = recorder
        self._end = time.monotonic() + within_s
        self.records = 0
        self.trouble: list[str] = []

    async def read_all(self, topics: Sequence[Topic], highest: dict[Place, int]) -> None:
        """Read every copy up to the highest acknowledged offset, and whatever lies beyond it by then."""
        for topic in topics:
            meta = self._client.routing.topic(topic.name)
            parts = self._client.routing.cluster.partitions_of(meta.id) if meta is not None else []
            for part in parts:
                place = (topic.name, part.partition)
                for broker in part.replicas:
                    await self._read(broker, place, part.topic_id, highest.get(place, -1))

    async def _read(self, broker: int, place: Place, topic_id: str, highest: int) -> None:
        self._recorder.replica(broker, place, now_us(), [], [])  # even if it holds nothing, it was asked
        offset, last = 0, ""
        while True:
            if time.monotonic() > self._end:
                self.trouble.append(f"{place[0]}/{place[1]} on broker {broker}: read up to {offset} only; {last}")
                return
            t0 = now_us()
            try:
                result, payload = await self._fetch(broker, topic_id, place[1], offset)
            except FerrylineError as error:
                last = str(error)
                await asyncio.sleep(PAUSE_S)
                continue
            if payload:
                try:
                    offset = self._take(broker, place, t0, offset, payload)
                except CorruptBatch as error:  # never to be served: a finding by itself
                    self.trouble.append(f"{place[0]}/{place[1]}: broker {broker} serves at {offset}: {error}")
                    return
            elif offset > highest and offset >= result.high_watermark:
                return
            else:
                last = f"it says that it ends at {result.high_watermark}"

    async def _fetch(self, broker: int, topic_id: str, partition: int, offset: int) -> tuple[FetchResult, memoryview]:
        session = await self._client.connections.session(broker, timeout=5.0)
        wait_ms = 0 if not offset else WAIT_MS
        request = Fetch(wait_ms, READ_BYTES, [FetchEntry(topic_id, partition, offset, -1, READ_BYTES)], secondary=True)
        answer, payload = await session.request(Kind.FETCH, request, FetchAnswer, timeout=10.0)
        if not answer.results:
            return FetchResult(topic_id, partition), payload
        result = answer.results[0]
        if result.error is not None:
            raise from_info(result.error)
        return result, payload

    def _take(self, broker: int, place: Place, t0: int, offset: int, payload: memoryview) -> int:
        """Write down what came; the next offset to read. Raises CorruptBatch: a broker must never serve that."""
        values: list[int] = []
        offsets: list[int] = []
        for at, header in split_batches(payload):
            if not header.is_control:
                for record in decode_batch(payload[at : at + header.size], header):
                    if record.offset >= offset:
                        values.append(number_of(record.value))
                        offsets.append(record.offset)
            offset = max(offset, header.next_offset)
        self.records += len(values)
        self._recorder.replica(broker, place, t0, values, offsets)
        return offset
