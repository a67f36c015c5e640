"""One trace from `send` to the handler, and on to what the handler sends; nothing at all while tracing is off."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import ferryline as fl


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """Tracing is on, and this has the spans that ended."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    fl.tracing.enable(provider)
    yield exporter
    fl.tracing.disable()


def named(spans: InMemorySpanExporter, name: str) -> ReadableSpan:
    (found,) = [span for span in spans.get_finished_spans() if span.name == name]
    return found


async def test_a_trace_goes_from_the_sender_through_a_worker_to_the_next_one(spans: InMemorySpanExporter) -> None:
    app = fl.App()
    done: list[bytes] = []
    posted = asyncio.Event()

    @app.subscriber("orders", group="billing")
    async def bill(value: bytes, message: fl.QueueMessage[bytes]) -> None:
        await app.producer.send("bills", b"bill of " + value)

    @app.subscriber("bills", group="post")
    async def post(value: bytes) -> None:
        done.append(value)
        posted.set()

    async with fl.testing.Cluster(brokers=2) as cluster, cluster.client() as client:
        for topic in ("orders", "bills"):
            await client.admin.create_topic(topic)
        async with app.connected(client), app.worker(), client.producer() as producer:
            await producer.send("orders", b"1", headers={"own": "kept", "traceparent": "of somebody else"})
            await posted.wait()
    assert done == [b"bill of 1"]
    sent, worked, then = (named(spans, name) for name in ("send orders", "process orders", "send bills"))
    last = named(spans, "process bills")
    assert [span.kind for span in (sent, worked)] == [SpanKind.PRODUCER, SpanKind.CONSUMER]
    assert {span.context.trace_id for span in (sent, worked, then, last) if span.context} == {sent.context.trace_id}  # type: ignore[union-attr]
    for child, parent in ((worked, sent), (then, worked), (last, then)):
        assert child.parent is not None
        assert parent.context is not None
        assert child.parent.span_id == parent.context.span_id
    assert worked.attributes is not None
    assert worked.attributes["messaging.destination.name"] == "orders"
    assert worked.attributes["ferryline.delivery_count"] == 1


async def test_work_that_fails_is_an_error_on_its_span(spans: InMemorySpanExporter) -> None:
    async with fl.testing.Cluster(brokers=1) as cluster, cluster.client() as client:
        await client.admin.create_topic("jobs", replication=1)
        async with client.producer() as producer, client.receiver("jobs", group="g") as receiver:
            await producer.send("jobs", b"x")
            async for message in receiver:
                async with message.processing():
                    raise ValueError("out of ink")
                break
    failed = named(spans, "process jobs")
    assert failed.status.status_code is StatusCode.ERROR
    assert [event.name for event in failed.events] == ["exception"]


async def test_records_of_a_log_and_those_sent_without_a_span_carry_the_trace(spans: InMemorySpanExporter) -> None:
    async with fl.testing.Cluster(brokers=1) as cluster, cluster.client() as client:
        await client.admin.create_topic("log", partitions=1, replication=1)
        async with client.producer() as producer, client.consumer("log") as consumer:
            await producer.send("log", b"first")
            (first,) = await consumer.pull(1, 10.0)
            with fl.tracing.processing(first):
                await producer.send_nowait("log", b"second", headers=fl.tracing.inject({"a": "b"}))
                await producer.send_many("log", [b"third"])
            second, third = [message for message in await consumer.pull(2, 10.0)]
    trace_id = named(spans, "send log").context.trace_id  # type: ignore[union-attr]
    for message in (second, third):
        assert message.headers.text("traceparent").split("-")[1] == f"{trace_id:032x}"
    assert second.headers.text("a") == "b"


async def test_nothing_is_added_while_tracing_is_off() -> None:
    assert fl.tracing.inject({"a": "b"}) == [("a", b"b")]
    async with fl.testing.Cluster(brokers=1) as cluster, cluster.client() as client:
        await client.admin.create_topic("log", partitions=1, replication=1)
        async with client.producer() as producer, client.consumer("log") as consumer:
            await producer.send("log", b"x")
            (message,) = await consumer.pull(1, 10.0)
            with fl.tracing.processing(message):
                assert len(message.headers) == 0


def test_without_opentelemetry_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(fl.InvalidArgument, match="opentelemetry-api is not installed"):
        fl.tracing.enable()
    assert fl.tracing.active is None
