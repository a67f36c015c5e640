"""Write docs/metrics.md (``make docs``): every metric of coordinator, broker and worker, every recording and alert
rule, and what the campaign measured. Tests compare the page with this, and its tables with a running cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import yaml

from ferryline.app.metrics import LABELS, TABLE
from ferryline_broker.metrics import BrokerMetrics
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.coordinator import CoordinatorCore
from ferryline_coordinator.metrics import CoordinatorMetrics
from ferryline_service.access.shared_quotas import QuotaCounts
from ferryline_service.metrics import ServiceMetrics

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "metrics.md"
RULES = ROOT / "docker_volumes" / "prometheus"
DASHBOARDS = ROOT / "docker_volumes" / "grafana" / "dashboards"
RESULT = ROOT / "benchmarks" / "results" / "monitoring.json"

HEAD = """\
# Metrics, dashboards and alerts

Written by `make docs` from the code and the rules; do not edit.

Coordinator and brokers serve Prometheus metrics at `/metrics` over TLS, on the port that serves everything else. With
access control that needs `read` on the cluster, unless the access file says `open_metrics`. Nothing is computed per
record: counters are numbers on small objects, states are read when Prometheus asks.

`docker_volumes/prometheus` has a configuration, recording rules and alerts with their tests; `docker_volumes/grafana`
has five dashboards. `make up MONITORING=1` starts both beside a cluster in containers. Beside a cluster that runs
elsewhere, copy the folder and change three things in `prometheus.yml`: `ca_file` (the cluster's CA),
`credentials_file` (a file with an API key of a principal that may read the cluster; the two lines with
`authorization` can go where there is no access control) and the targets.

**How many series.** Partitions are shown one by one up to 1,000 of them, or of groups in them, on a broker; beyond
that by topic, with the role in the place of the partition. The first `metrics_topics_max` topics (200) have series of
their own, all others are summed under the topic `(others)`, and `ferryline_metrics_topics_left_out` says how many
they are. Groups beyond 100 of a topic, or 1,000 at the coordinator, are summed in the same way.

**Where a number is.** What belongs to a partition is told by its primary: add over brokers. What belongs to the
cluster is told by the active coordinator only: take `max`. Every receiver of a queue asks every broker that leads a
partition: take `max` of `ferryline_queue_receivers`. Ages are by the clock of whoever sent the record.

"""

PROCESS = {
    "process_virtual_memory_bytes": "Virtual memory",
    "process_resident_memory_bytes": "Resident memory",
    "process_start_time_seconds": "When the process began, in seconds since the Unix epoch",
    "process_cpu_seconds_total": "Time on processors",
    "process_open_fds": "Open file descriptors",
    "process_max_fds": "How many it may open",
}


class Row(NamedTuple):
    """One metric as the table has it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    about: str


def rows(metrics: ServiceMetrics) -> dict[str, Row]:
    """Every metric of a registry, by name as it is served."""
    QuotaCounts(cast(Any, SimpleNamespace(shared=False, refused={})), metrics)
    found = {}
    for family in metrics.registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = tuple(sorted(getattr(family, "_labelnames", ())))
        found[name] = Row(name, family.type, labels, PROCESS.get(name, family.documentation))
    return found


def services() -> dict[str, dict[str, Row]]:
    """Title -> metrics: what both services have, and what only one has."""
    core = CoordinatorCore(CoreConfig())
    core.load([], 1, 0)
    core.apply(core.handle(ev.Founded("c" * 32, b"k" * 32), 0))
    coordinator = CoordinatorMetrics(lambda: core)
    coordinator.active = lambda: True
    both, one, other = {}, rows(BrokerMetrics()), rows(coordinator)
    for name in sorted(one.keys() & other.keys()):
        if one[name] == other[name]:
            both[name] = one.pop(name)
            del other[name]
    return {"Both services": both, "Broker": one, "Coordinator": other}


def workers() -> dict[str, Row]:
    """What `ferryline worker run --metrics-port` serves."""
    return {name: Row(name, kind, LABELS, about) for name, kind, about in TABLE}


def _table(found: dict[str, Row]) -> Iterator[str]:
    yield "| metric | type | labels | meaning |"
    yield "|---|---|---|---|"
    for name in sorted(found):
        row = found[name]
        yield f"| `{name}` | {row.kind} | {', '.join(row.labels)} | {row.about} |"
    yield ""


def _rules(kind: str) -> Iterator[dict[str, Any]]:
    for path in sorted(RULES.glob("*.rules.yml")):
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]:
            yield from (rule for rule in group["rules"] if kind in rule)


def _recorded() -> Iterator[str]:
    yield "## Names that other programs look for"
    yield ""
    yield "Recording rules give what programs written for RabbitMQ's metrics ask for. `queue` is the topic; where"
    yield "several groups receive from it, `group` tells them apart. Counters keep `instance`: use"
    yield "`sum by (queue) (rate(...))`."
    yield ""
    yield "| name | labels | made from |"
    yield "|---|---|---|"
    made: dict[str, tuple[list[str], str]] = {}
    for rule in _rules("record"):
        labels, expression = made.setdefault(rule["record"], ([], " ".join(rule["expr"].split())))
        labels += [f'{name}="{value}"' for name, value in rule.get("labels", {}).items()]
    for name, (labels, expression) in made.items():
        shown = expression.replace("|", "\\|")
        yield f"| `{name}` | {' '.join(f'`{label}`' for label in labels)} | `{shown}` |"
    yield ""


def _alerts() -> Iterator[str]:
    yield "## Alerts"
    yield ""
    yield "Each has a test that it fires and that it does not (`promtool test rules`, on"
    yield "`docker_volumes/prometheus/alerts.test.yml`), and names the section of"
    yield "[operations](operations.md#monitoring) that says what to do."
    yield ""
    yield "| alert | severity | fires when | for |"
    yield "|---|---|---|---|"
    for rule in _rules("alert"):
        expression = rule["expr"].replace("|", "\\|")
        yield f"| `{rule['alert']}` | {rule['labels']['severity']} | `{expression}` | {rule.get('for', 'at once')} |"
    yield ""


def _dashboards() -> Iterator[str]:
    yield "## Dashboards"
    yield ""
    yield "Made by `scripts/dashboards.py`, provisioned from `docker_volumes/grafana`. Each panel says what it means."
    yield ""
    yield "| dashboard | panels | shows |"
    yield "|---|---|---|"
    for path in sorted(DASHBOARDS.glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        yield f"| {told['title']} | {len(told['panels'])} | {told['description']} |"
    yield ""


def _campaign() -> Iterator[str]:
    if not RESULT.exists():
        return
    told = json.loads(RESULT.read_text(encoding="utf-8"))
    yield "## Shown against real data"
    yield ""
    queries = ", ".join(f"{name} {count}" for name, count in sorted(told["queries"].items()))
    number, rules, by = sum(told["queries"].values()), told["recording_rules"], told["durations_divided_by"]
    yield f"`python -m tests.integration.monitoring_campaign`, {told['date']}: a real Prometheus scraped a"
    yield f"coordinator and three brokers over TLS for {told['seconds']:g} s of work. All {number} queries of the"
    yield f"dashboards ({queries}) and all {rules} recording rules had data. Then each alert was made to fire."
    yield f"Durations in the rules were divided by {by:g}; expressions were as shipped."
    yield ""
    yield "| alert | what was done | fired after | ended after it was mended |"
    yield "|---|---|---|---|"
    for name, alert in told["alerts"].items():
        ended = f"{alert['ended_after_s']:g} s" if "ended_after_s" in alert else "not waited for"
        yield f"| `{name}` | {alert['what']} | {alert['fired_after_s']:g} s | {ended} |"
    yield ""
    if told["alerts_not_tried_here"]:
        yield f"Not part of it: {', '.join(f'`{name}`' for name in told['alerts_not_tried_here'])}."
        yield ""


def render() -> str:
    """The whole page."""
    lines: list[str] = []
    for title, found in services().items():
        lines += [f"## {title}", "", *_table(found)]
    lines += [
        "## Workers",
        "",
        "`ferryline worker run --metrics-port 9180` serves these on loopback, without TLS; in a program of your own",
        "`app.run(metrics_port=9180)` does. Of several processes each takes the next port that is free.",
        "",
        *_table(workers()),
    ]
    lines += [*_recorded(), *_alerts(), *_dashboards(), *_campaign()]
    return HEAD + "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
    sys.stderr.write(f"{TARGET}: written\n")
