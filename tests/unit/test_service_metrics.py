"""What both services share for Prometheus: histograms, the end of certificates, bounded names."""

from __future__ import annotations

import asyncio
import datetime
import os
import re
from pathlib import Path

from prometheus_client.exposition import generate_latest

from ferryline_service.expiry import Expiry
from ferryline_service.histogram import Buckets, family_of
from ferryline_service.metrics import KINDS_MAX, ServiceMetrics
from unit.broker_world import TestCa


def text_of(metrics: ServiceMetrics) -> str:
    return generate_latest(metrics.registry).decode()


def test_a_bound_belongs_to_its_bucket_and_all_are_cumulative() -> None:
    buckets = Buckets((0.1, 1.0))
    buckets.observe(0.1)
    buckets.observe(0.5, 3)
    buckets.observe(7.0)
    more = Buckets((0.1, 1.0))
    more.observe(0.05, 2)
    buckets.take(more)
    family = family_of("x_seconds", "x", ["a"], [(["1"], buckets)])
    found = {(s.name, s.labels.get("le")): s.value for s in family.samples}
    assert found == {
        ("x_seconds_bucket", "0.1"): 3, ("x_seconds_bucket", "1.0"): 6, ("x_seconds_bucket", "+Inf"): 7,
        ("x_seconds_count", None): 7, ("x_seconds_sum", None): 0.1 + 1.5 + 7.0 + 0.1,
    }  # fmt: skip
    assert buckets.count == 7


def test_a_certificate_that_is_replaced_is_read_again_and_one_that_is_gone_is_left_out(tmp_path: Path) -> None:
    authority = TestCa(tmp_path, "c" * 32)
    path = tmp_path / "node.crt"
    expiry = Expiry({"node": path, "none": tmp_path / "none.crt"})
    assert expiry.seconds() == {}
    path.write_bytes(authority.pem)
    (left,) = expiry.seconds().values()
    assert left > 0
    bundle = tmp_path / "bundle"
    bundle.write_bytes(authority.pem + TestCa(tmp_path / "other", "d" * 32).pem)
    os.replace(bundle, path)
    assert abs(expiry.seconds()["node"] - left) < datetime.timedelta(days=1).total_seconds()
    path.write_text("no certificate")
    assert expiry.seconds() == {}


def test_methods_that_somebody_invents_do_not_become_series_without_end() -> None:
    metrics = ServiceMetrics("broker")
    for number in range(KINDS_MAX + 100):
        metrics.request(f"M{number} unmatched")
    metrics.request("M0 unmatched")
    text = text_of(metrics)
    assert text.count("ferryline_requests_total{") == KINDS_MAX + 1
    assert 'ferryline_requests_total{kind="other",service="broker"} 100.0' in text
    assert 'ferryline_requests_total{kind="M0 unmatched",service="broker"} 2.0' in text


def test_refusals_are_shown_before_the_first_so_that_the_first_is_an_increase() -> None:
    text = text_of(ServiceMetrics("broker"))
    for code in ("FORBIDDEN", "BAD_CREDENTIALS", "QUOTA_EXCEEDED", "INTERNAL"):
        assert f'ferryline_errors_total{{code="{code}",service="broker"}} 0.0' in text


def test_every_name_is_one_that_prometheus_likes() -> None:
    for line in text_of(ServiceMetrics("broker")).splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            assert re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", name)
            assert (kind == "counter") == name.endswith("_total")


async def test_a_scrape_lets_the_loop_turn_and_leaves_nothing_out() -> None:
    metrics = ServiceMetrics("broker")
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    page = (await metrics.page()).decode()
    task.cancel()
    names = {family.name for family in metrics.registry.collect()}
    assert turns >= len(names)
    assert {line.split()[2].removesuffix("_total") for line in page.splitlines() if line.startswith("# TYPE")} == names
    assert metrics.scrape_s > 0
