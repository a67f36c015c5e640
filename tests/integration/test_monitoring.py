"""A real Prometheus looks at a real cluster: what is served is documented, what is asked for has data, alerts fire.

The short version of `monitoring_campaign`, which makes every alert fire.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import subprocess
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ferryline.cli.driver import ProcessCluster
from tests.integration.monitoring_campaign import Campaign, campaign
from tests.integration.prometheus import REPOSITORY, filled_in, panels, rules

pytestmark = [pytest.mark.process, pytest.mark.prometheus]

WITHIN_S = 60.0
SCALE, INTERVAL_MS = 60, 1000
_ROW = re.compile(r"^\| `([a-z_:]+)` \| ([a-z]+) \| ([a-z, ]*) \|", re.MULTILINE)
Eventually = Callable[..., Awaitable[Any]]


def documented(*titles: str) -> dict[str, tuple[str, set[str]]]:
    """name -> (type, labels), as the sections of docs/metrics.md have it."""
    found: dict[str, tuple[str, set[str]]] = {}
    for section in (REPOSITORY / "docs/metrics.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        if title in titles:
            found |= {name: (kind, set(labels.split(", ")) - {""}) for name, kind, labels in _ROW.findall(text)}
    return found


def page(cluster: ProcessCluster, name: str, token: str) -> bytes:
    """/metrics of a service."""
    context = ssl.create_default_context(cafile=str(cluster.ca))
    request = urllib.request.Request(f"{cluster.url_of(name)}/metrics", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, context=context, timeout=30) as answer:
        return bytes(answer.read())


def check_page(text: bytes, wanted: dict[str, tuple[str, set[str]]]) -> None:
    """Exactly what is documented, with these types and labels, and clean for promtool."""
    served = {}
    labels_of: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text.decode()):
        name = family.name + ("_total" if family.type == "counter" else "")
        served[name] = family.type
        labels_of[name] = {label for sample in family.samples for label in sample.labels} - {"le"}
    assert served == {name: kind for name, (kind, _) in wanted.items()}
    for name, (_, labels) in wanted.items():
        assert labels_of[name] in (labels, set()), name
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


async def empty(run: Campaign) -> list[str]:
    """Queries and recorded names that have had no data yet."""
    asked = [filled_in(expression, "10s") for _, _, expression in panels()]
    asked += [rule["record"] for kind, rule in rules() if kind == "record"]
    counts = await asyncio.gather(*(run.prometheus.seen(one) for one in asked))
    return [one for one, count in zip(asked, counts, strict=True) if not count]


async def test_every_panel_has_data_every_metric_is_documented_and_alerts_fire_when_a_broker_dies(
    tmp_path: Path, eventually: Eventually
) -> None:
    async with campaign(tmp_path, by=SCALE, interval_ms=INTERVAL_MS, own_disk=False) as (run, _):
        await run.load.poison()
        run.load.rejecting = True

        async def all_there() -> bool:
            missing = await empty(run)
            assert not missing
            return True

        await eventually(all_there, within_s=WITHIN_S)
        run.load.rejecting = False
        check_page(page(run.cluster, "coordinator", run.prometheus.token), documented("Both services", "Coordinator"))
        for name in run.cluster.brokers:
            check_page(page(run.cluster, name, run.prometheus.token), documented("Both services", "Broker"))
        names = ("FerrylineBrokerDown", "FerrylineUnderReplicated", "FerrylineOfflinePartitions")
        await run.fires("kill -9", *names, by=lambda: run.cluster.kill("broker-2"), within_s=WITHIN_S)
        firing = {labels["alertname"] for labels in await run.prometheus.firing()}
        assert "FerrylineParkedLanes" in firing, "it was poisoned, and nobody has looked after it"
        assert "FerrylineCoordinatorDown" not in firing
        assert run.wrong == []
