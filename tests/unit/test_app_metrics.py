"""What a worker counts, and the page on which Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

import ferryline as fl
from ferryline.app.errors import Reject
from ferryline.app.metrics import TABLE, MetricsPage, WorkerMetrics
from ferryline.protocol.errors import InvalidArgument
from ferryline.protocol.queue_messages import ACK, NACK
from tests.polling import poll


def samples(text: str) -> dict[tuple[str, str], float]:
    """(name, handler) -> value, of everything that has one handler and no bucket."""
    return {
        (sample.name, sample.labels.get("handler", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


async def test_each_outcome_of_a_handler_is_counted_and_its_time_is_taken() -> None:
    app = fl.App(name="shop")

    @app.subscriber("orders", group="billing", retry=fl.Retry(3, fl.exponential(0.1, 3)))
    async def handle(order: int, context: fl.Context) -> None:
        if order == 1 and context.attempt == 1:
            raise ValueError("not yet")
        if order == 2:
            raise Reject("never")

    async with (
        fl.testing.Cluster(brokers=1, topics={"orders": 1}) as cluster,
        cluster.client() as client,
        app.connected(client),
        app.worker() as worker,
    ):
        for number in range(3):
            await app.producer.send("orders", number)

        def done() -> bool:
            return samples(worker.metrics.text()).get(("ferryline_worker_handled_total", "handle"), 0) == 2

        await poll(done, within_s=60)
        text = worker.metrics.text()
    found = samples(text)
    assert found["ferryline_worker_failed_total", "handle"] == 1
    assert found["ferryline_worker_rejected_total", "handle"] == 1
    assert found["ferryline_worker_in_flight", "handle"] == 0
    assert found["ferryline_worker_handling_seconds_count", "handle"] == 4
    assert 'queue="orders"' in text


def test_the_page_has_every_metric_of_the_table_and_escapes_names() -> None:
    metrics = WorkerMetrics()
    metrics.of("orders", 'a "b"\\\n').ended(ACK)
    metrics.of("orders", 'a "b"\\\n').took(0.3)
    metrics.of("orders", "other").ended(NACK)
    families = {family.name: family for family in text_string_to_metric_families(metrics.text())}
    assert set(families) == {name.removesuffix("_total") for name, _, _ in TABLE}
    (handled, *_) = families["ferryline_worker_handled"].samples
    assert handled.labels == {"handler": 'a "b"\\\n', "queue": "orders"}
    buckets = [s for s in families["ferryline_worker_handling_seconds"].samples if s.labels["handler"] != "other"]
    assert [s.value for s in buckets if s.labels.get("le") in ("0.25", "0.5", "+Inf")] == [0, 1, 1]


async def test_processes_with_the_same_port_take_one_after_the_other(free_port: Callable[[], int]) -> None:
    metrics = WorkerMetrics()
    metrics.of("orders", "handle").ended(ACK)
    first, second = MetricsPage(metrics, free_port()), MetricsPage(metrics, 0)
    await first.start()
    second.port = first.port
    await second.start()
    try:
        assert second.port > first.port
        async with aiohttp.ClientSession() as http:
            for page in (first, second):
                async with http.get(f"http://127.0.0.1:{page.port}/metrics") as answer:
                    assert answer.status == 200
                    assert "ferryline_worker_handled_total" in await answer.text()
                async with http.get(f"http://127.0.0.1:{page.port}/") as other:
                    assert other.status == 404
    finally:
        await first.close()
        await second.close()


async def test_no_port_left_is_refused() -> None:
    taken = MetricsPage(WorkerMetrics(), 65_535)
    again = MetricsPage(WorkerMetrics(), 65_535)
    try:
        await taken.start()
    except InvalidArgument:
        pytest.skip("somebody else has the last port")
    try:
        with pytest.raises(InvalidArgument, match="none is free from 65535"):
            await again.start()
    finally:
        await taken.close()
