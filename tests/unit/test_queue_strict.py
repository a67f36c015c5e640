"""Receivers that ask strictly by priority: of all that is committed, however long others have waited."""

from __future__ import annotations

from pathlib import Path

from ferryline.protocol.frames import Kind, decode_header
from ferryline.protocol.messages import ProduceEntry
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.queue_messages import HEADER_PRIORITY, Receive, ReceiveAnswer
from ferryline.protocol.records import decode_batch, encode_batch
from ferryline_broker.core.queue_events import Scanned
from ferryline_broker.core.window import Window
from ferryline_service.node import raise_error
from unit.broker_world import BrokerWorld, RawClient

OVERDUE_MS = 10_000


def test_a_record_that_has_waited_for_long_still_comes_after_higher_ones() -> None:
    window = Window(0, OVERDUE_MS)
    window.scan(Scanned(0, None), 0)
    window.scan(Scanned(1, None, 9), OVERDUE_MS)
    window.scan(Scanned(2, None, 9), OVERDUE_MS)
    assert window.pick(OVERDUE_MS, strict=True) == 1
    assert window.pick(OVERDUE_MS) == 0, "nobody else is kept from helping it"
    assert window.pick(OVERDUE_MS, strict=True) == 2
    assert window.pick(OVERDUE_MS, strict=True) is None


def test_what_waits_for_ever_at_the_end_of_the_line_does_not_make_it_grow() -> None:
    window = Window(0, OVERDUE_MS)
    window.scan(Scanned(0, None), 0)
    for offset in range(1, 10_000):
        window.scan(Scanned(offset, None, 9), offset)
        assert window.pick(offset, strict=True) == offset
    assert window._ageing is not None
    assert len(window._ageing) < 2_000
    assert window.pick(OVERDUE_MS * 2) == 0, "it is still known to be overdue"


async def produce(client: RawClient, topic: TopicMeta, *rows: tuple[bytes, bytes | None]) -> None:
    data = bytes(encode_batch([(None, value, [(HEADER_PRIORITY, level)] if level else []) for value, level in rows]))
    entry = ProduceEntry(topic.id, 0, topic.config.partitions, len(data))
    assert (await client.produce_raw([(entry, data)]))[0].error is None


async def test_what_was_committed_before_the_question_is_looked_at_before_the_answer(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("jobs", [(broker.id,)])
        client = await world.client(broker.url)

        async def receive() -> list[bytes | None]:
            ask = Receive("g", "m", [(topic.id, 0)], records_max=1, wait_ms=5_000, ordering="none", strict=True)
            frame = await client.ask(Kind.RECEIVE, ask)
            raise_error(frame)
            (delivery,) = decode_header(frame.header, ReceiveAnswer).deliveries
            assert delivery.error is None
            return [record.value for record in decode_batch(frame.payload)]

        await produce(client, topic, (b"low 1", None), (b"low 2", None), (b"low 3", None))
        assert await receive() == [b"low 1"]
        for number in range(20):
            await produce(client, topic, (b"high %d" % number, b"9"))
            assert await receive() == [b"high %d" % number]
        assert await receive() == [b"low 2"]
