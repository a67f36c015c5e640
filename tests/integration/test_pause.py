"""A primary that is stopped (SIGSTOP) and comes back believing that it still is one."""

from __future__ import annotations

import asyncio
import time

import pytest

from ferryline.cli.driver import ProcessCluster
from ferryline.protocol.frames import Kind, decode_header, encode_frame
from ferryline.protocol.messages import Produce, ProduceAnswer, ProduceEntry
from ferryline.protocol.records import decode_batch, encode_batch, split_batches
from tests.integration.steady import Steady
from tests.integration.wire import Wire, code_of

pytestmark = pytest.mark.process

PAUSE_S = 10.0
REFUSALS = {"NOT_PRIMARY", "STALE_EPOCH", "COMMIT_UNKNOWN", "STALE_BROKER_EPOCH", "PRIMARY_NOT_AVAILABLE"}
REFUSALS |= {"NOT_ENOUGH_REPLICAS", "REQUEST_TIMED_OUT", "SHUTTING_DOWN", "(closed)"}
LATE = b"sent to a primary that was asleep"


async def test_clients_leave_a_stopped_primary_and_what_it_accepts_later_is_not_acknowledged(
    cluster: ProcessCluster,
) -> None:
    """1. a client holds an open session to the primary  2. the primary is stopped  3. the stream moves on
    4. a record is sent on the open session  5. the primary continues  6. the record is refused or of unknown outcome,
    the old primary follows the new one, its tail is gone, and nothing acknowledged is missing.
    """
    async with Steady(cluster) as steady:
        victim = steady.primary_name()
        part = next(p for p in steady.partitions() if cluster.name_of(p.primary) == victim)
        async with await Wire.connect(cluster.url_of(victim), cluster.ca) as wire:
            await cluster.pause(victim)
            stopped = time.monotonic()
            steady.traffic.mark()
            try:
                batch = bytes(encode_batch([(None, LATE, [])]))
                entry = ProduceEntry(part.topic_id, part.partition, len(steady.partitions()), len(batch))
                await wire.ws.send_bytes(encode_frame(Kind.PRODUCE, 7, Produce(30_000, [entry]), batch))
                await steady.flows(30.0)
                assert steady.traffic.by_key.worst() < PAUSE_S, "it moves on while the primary is stopped"
                await asyncio.sleep(max(0.0, stopped + PAUSE_S - time.monotonic()))
            finally:
                await cluster.resume(victim)
            code = await _outcome(wire)
        assert await steady.healed(60.0), steady.partitions()
        await steady.flows()
        stored = await _stored(steady, part.partition)
        assert code in REFUSALS, f"{code}: a deposed primary acknowledged a record"
        assert LATE not in stored, "the tail of a deposed primary came back"
    assert steady.traffic.send_errors == {}
    strangers = {**steady.verdict.examples, **steady.stored.examples}
    assert not strangers, strangers
    steady.assert_kept()


async def _outcome(wire: Wire) -> str:
    """What became of the late record: an error code, "(closed)", or "" if it was acknowledged."""
    try:
        frame = await wire.answer(7, timeout_s=35.0)
    except ConnectionError:
        return "(closed)"
    code = code_of(frame)
    if not code:
        assert decode_header(frame.header, ProduceAnswer).results
    return code


async def _stored(steady: Steady, partition: int) -> set[bytes]:
    """Values in the log of a partition, read from its present primary."""
    part = steady.partitions()[partition]
    url = steady.client.routing.cluster.brokers[part.primary].external
    found: set[bytes] = set()
    async with await Wire.connect(url, steady.cluster.ca) as wire:
        offset = 0
        while True:
            result, payload = await wire.fetch(part.topic_id, partition, offset, wait_ms=0)
            assert result.error is None, result
            if not payload:
                return found
            for at, header in split_batches(payload):
                if not header.is_control:
                    found |= {r.value or b"" for r in decode_batch(payload[at : at + header.size], header)}
                offset = header.next_offset
