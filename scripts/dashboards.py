"""Write the Grafana dashboards (``make docs``); a test compares the files with what this makes.

A dashboard is rows of panels, 24 columns wide; a panel is a title, what it means, a unit and its queries. All of them
have the same look, so only that is said here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent.parent / "docker_volumes" / "grafana" / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
WIDTH = 24
HEIGHTS = {"stat": 4, "timeseries": 8, "table": 8}
RATE = "$__rate_interval"
REFUSED = "FORBIDDEN|BAD_CREDENTIALS|UNAUTHORIZED|QUOTA_EXCEEDED|THROTTLED"


class Panel(NamedTuple):
    """``queries``: (expression, legend). ``bad``: from this value on a stat is red."""

    title: str
    about: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    width: int = 8
    bad: float | None = None
    stacked: bool = False


class Dashboard(NamedTuple):
    """``variables``: (name, metric that has the label, its label)."""

    uid: str
    title: str
    about: str
    panels: tuple[Panel, ...]
    variables: tuple[tuple[str, str, str], ...] = ()


def stat(title: str, about: str, unit: str, expr: str, bad: float | None = None, width: int = 4) -> Panel:
    """One number."""
    return Panel(title, about, unit, ((expr, title.lower()),), "stat", width, bad)


def quantiles(title: str, about: str, metric: str, labels: str = "") -> Panel:
    """Median, 99th percentile of a histogram, over all that the variables choose."""
    made = tuple(
        (f"histogram_quantile({q}, sum by (le) (rate({metric}_bucket{labels}[{RATE}])))", f"p{q * 100:g}")
        for q in (0.5, 0.95, 0.99)
    )
    return Panel(title, about, "s", made)


OVERVIEW = Dashboard(
    "ferryline-overview",
    "Ferryline: overview",
    "Whether the cluster is well, and how much goes through it.",
    (
        stat("Brokers running", "Brokers that the coordinator counts on.", "short", "max(ferryline_brokers_running)"),
        stat(
            "Brokers down", "Registered brokers that do not serve.", "short",
            "max(ferryline_brokers_registered) - max(ferryline_brokers_running)", 1,
        ),
        stat("Active coordinators", "Should be 1.", "short", "sum(ferryline_coordinator_active)"),
        stat("Offline partitions", "Partitions without a primary: neither written nor read.", "short",
             "max(ferryline_partitions_offline)", 1),
        stat("Under-replicated", "Partitions with a copy missing.", "short",
             "max(ferryline_partitions_under_replicated)", 1),
        stat("Alerts firing", "Alerts of alerts.rules.yml that fire now.", "short",
             'count(ALERTS{alertstate="firing",alertname=~"Ferryline.*"}) or vector(0)', 1),
        Panel("Records in", "Records appended by producers, by topic.", "wps",
              ((f"sum by (topic) (rate(ferryline_records_in_total[{RATE}]))", "{{topic}}"),), stacked=True),
        Panel("Records out", "Records handed to readers, by topic.", "rps",
              ((f"sum by (topic) (rate(ferryline_records_out_total[{RATE}]))", "{{topic}}"),), stacked=True),
        Panel("Bytes", "Bytes appended by producers and handed to readers, replication not counted.", "Bps",
              ((f"sum(rate(ferryline_bytes_in_total[{RATE}]))", "in"),
               (f"sum(rate(ferryline_bytes_out_total[{RATE}]))", "out"))),
        Panel("Consumer lag", "Records that log groups have not committed.", "short",
              (("sum by (topic, group) (ferryline_group_lag_records)", "{{group}} in {{topic}}"),)),
        Panel("Queue depth", "Records of queue groups that are not settled.", "short",
              (('sum by (topic, group) (ferryline_queue_records{state="unsettled"})', "{{group}} in {{topic}}"),)),
        Panel("Dead letters", "Dead letters that nobody has redriven or removed, by the topic that they come from.",
              "short", (("sum by (origin) (ferryline_dead_letter_records)", "{{origin}}"),)),
        quantiles("Produce latency", "From the frame of a batch to its acknowledgement.", "ferryline_produce_seconds"),
        Panel("Errors", "Error answers a second, by code.", "reqps",
              ((f"sum by (code) (rate(ferryline_errors_total[{RATE}]))", "{{code}}"),), stacked=True),
        Panel("Free disk", "Free part of the data file system of each broker.", "percentunit",
              (("ferryline_disk_free_bytes / ferryline_disk_total_bytes", "{{instance}}"),)),
        Panel("Refused", "Requests refused for want of a token, a permission or quota.", "reqps",
              ((f'sum by (code) (rate(ferryline_errors_total{{code=~"{REFUSED}"}}[{RATE}]))', "{{code}}"),)),
        Panel("Certificates", "Until they end. Services renew their own; that of the authority is for people.", "s",
              (("min by (service, certificate) (ferryline_certificate_expires_in_seconds)",
                "{{certificate}} of {{service}}"),)),
        Panel("Receivers", "Receivers of queues that have asked within 30 s, or hold leases.", "short",
              (("max by (topic, group) (ferryline_queue_receivers)", "{{group}} in {{topic}}"),)),
    ),
)  # fmt: skip

TOPIC = Dashboard(
    "ferryline-topic",
    "Ferryline: topic",
    "What goes in and out of a topic, how much it holds, and who is behind.",
    (
        stat("Retained records", "Committed records that retention has not taken.", "short",
             'sum(ferryline_queued_records{topic=~"$topic"})'),
        stat("Bytes on disk", "Both logs, of all copies.", "bytes", 'sum(ferryline_log_bytes{topic=~"$topic"})'),
        stat("Smallest in-sync set", "Of all partitions.", "short", 'min(ferryline_in_sync_replicas{topic=~"$topic"})'),
        stat("Producers", "Producers whose records are deduplicated.", "short",
             'max(ferryline_producers{topic=~"$topic"})'),
        stat("Largest lag", "Of all log groups that read it.", "short",
             'max(sum by (topic, group) (ferryline_group_lag_records{topic=~"$topic"}))'),
        stat("Oldest uncommitted", "Age of the first record that some log group has not committed.", "s",
             'max(ferryline_group_lag_seconds{topic=~"$topic"})'),
        Panel("Records in", "Records appended by producers.", "wps",
              ((f'sum by (topic) (rate(ferryline_records_in_total{{topic=~"$topic"}}[{RATE}]))', "{{topic}}"),)),
        Panel("Records out", "Records handed to readers; each group counts.", "rps",
              ((f'sum by (topic) (rate(ferryline_records_out_total{{topic=~"$topic"}}[{RATE}]))', "{{topic}}"),)),
        Panel("Bytes", "Appended by producers, and handed to readers.", "Bps",
              ((f'sum by (topic) (rate(ferryline_bytes_in_total{{topic=~"$topic"}}[{RATE}]))', "{{topic}} in"),
               (f'sum by (topic) (rate(ferryline_bytes_out_total{{topic=~"$topic"}}[{RATE}]))', "{{topic}} out"))),
        Panel("Lag by group", "High watermark minus committed offset.", "short",
              (('sum by (topic, group) (ferryline_group_lag_records{topic=~"$topic"})', "{{group}} in {{topic}}"),)),
        Panel("Lag by partition", "Where it is: one slow partition often is one busy key.", "short",
              (('max by (topic, partition) (ferryline_group_lag_records{topic=~"$topic"})',
                "{{topic}}/{{partition}}"),)),
        Panel("Age of the first uncommitted record", "By the clock of whoever sent it.", "s",
              (('max by (topic, group) (ferryline_group_lag_seconds{topic=~"$topic"})', "{{group}} in {{topic}}"),)),
        Panel("Bytes by partition", "On the disk of the largest copy.", "bytes",
              (('max by (topic, partition) (ferryline_log_bytes{topic=~"$topic"})', "{{topic}}/{{partition}}"),)),
        Panel("In-sync copies", "Fewer than there are copies: the death of a broker hurts more.", "short",
              (('min by (topic, partition) (ferryline_in_sync_replicas{topic=~"$topic"})',
                "{{topic}}/{{partition}}"),)),
        Panel("Secondaries behind", "Records that a secondary has not fetched.", "short",
              (('max by (topic, broker) (ferryline_secondary_lag_records{topic=~"$topic"})',
                "{{topic}} on broker {{broker}}"),)),
    ),
    (("topic", "ferryline_records_in_total", "topic"),),
)  # fmt: skip

_Q = '{topic=~"$topic",group=~"$group"}'
QUEUES = Dashboard(
    "ferryline-queues",
    "Ferryline: queues and dead letters",
    "What waits in queues, who works on it, how long that takes, and what was given up.",
    (
        stat("Depth", "Records that wait, are delayed or are being worked on.", "short",
             'sum(ferryline_queue_records{state="unsettled",topic=~"$topic",group=~"$group"})'),
        stat("Oldest", "Age of the first record that is not settled.", "s", f"max(ferryline_queue_oldest_seconds{_Q})"),
        stat("Receivers", "That have asked within 30 s or hold leases, of the group that has most.", "short",
             f"max(ferryline_queue_receivers{_Q})"),
        stat("Being worked on", "Records that are leased.", "short",
             'sum(ferryline_queue_records{state="leased",topic=~"$topic",group=~"$group"})'),
        stat("Parked", "Records that were given up where they stand; their keys wait.", "short",
             'sum(ferryline_queue_records{state="parked",topic=~"$topic",group=~"$group"})', 1),
        stat("Dead letters", "That nobody has redriven or removed.", "short",
             'sum(ferryline_dead_letter_records{origin=~"$topic"}) or vector(0)', 1),
        Panel("By state", "Waiting: behind another record of the same key.", "short",
              (('sum by (state) (ferryline_queue_records{state!="unsettled",topic=~"$topic",group=~"$group"})',
                "{{state}}"),), stacked=True),
        Panel("Depth by group", "Records that are not settled.", "short",
              (('sum by (topic, group) (ferryline_queue_records{state="unsettled",topic=~"$topic",group=~"$group"})',
                "{{group}} in {{topic}}"),)),
        Panel("Age of the oldest record", "It grows while nobody settles the first record of some partition.", "s",
              ((f"max by (topic, group) (ferryline_queue_oldest_seconds{_Q})", "{{group}} in {{topic}}"),)),
        Panel("Handed out and acknowledged", "Handed out more than acknowledged: attempts fail.", "rps",
              ((f"sum(rate(ferryline_queue_leased_records_total{_Q}[{RATE}]))", "handed out"),
               (f"sum(rate(ferryline_queue_redelivered_records_total{_Q}[{RATE}]))", "of them again"),
               (f"sum(rate(ferryline_queue_acknowledged_records_total{_Q}[{RATE}]))", "acknowledged"))),
        quantiles("Handling time", "From the lease of a record to its acknowledgement.",
                  "ferryline_queue_handling_seconds", _Q),
        Panel("Failures", "Attempts given up, and records rejected.", "rps",
              ((f"sum by (topic, group) (rate(ferryline_queue_failed_records_total{_Q}[{RATE}]))",
                "failed: {{group}} in {{topic}}"),
               (f"sum by (topic, group) (rate(ferryline_queue_rejected_records_total{_Q}[{RATE}]))",
                "rejected: {{group}} in {{topic}}"))),
        Panel("Receivers", "That have asked within 30 s, or hold leases.", "short",
              ((f"max by (topic, group) (ferryline_queue_receivers{_Q})", "{{group}} in {{topic}}"),)),
        Panel("Dead letters copied", "Records that all attempts failed for, or that were rejected.", "rps",
              ((f"sum by (topic, group) (rate(ferryline_queue_dead_letters_total{_Q}[{RATE}]))",
                "{{group}} in {{topic}}"),)),
        Panel("Dead letters that wait", "By the topic that they come from.", "short",
              (('sum by (origin) (ferryline_dead_letter_records{origin=~"$topic"})', "{{origin}}"),)),
    ),
    (("topic", "ferryline_queue_records", "topic"), ("group", "ferryline_queue_records", "group")),
)  # fmt: skip

_B = '{job="broker",instance=~"$instance"}'
BROKER = Dashboard(
    "ferryline-broker",
    "Ferryline: broker",
    "How a broker is doing: its disk, its loop, its partitions.",
    (
        stat("Serving", "1: the coordinator counts on every broker chosen.", "short",
             f"1 - max(ferryline_broker_fenced{_B})"),
        stat("Sessions", "Of clients and of other brokers.", "short", f"sum(ferryline_sessions{_B})"),
        stat("Free disk", "Of the fullest.", "percentunit",
             f"min(ferryline_disk_free_bytes{_B} / ferryline_disk_total_bytes{_B})"),
        stat("Refuses records", "Brokers whose disk is full.", "short", f"sum(ferryline_disk_full{_B})", 1),
        stat("Certificate", "Until the first certificate ends.", "s",
             f"min(ferryline_certificate_expires_in_seconds{_B})"),
        stat("Topics left out", "Counted together as (others); see metrics_topics_max.", "short",
             f"max(ferryline_metrics_topics_left_out{_B})"),
        Panel("Partitions by role", "Stopped: after an error, or for want of space.", "short",
              ((f"sum by (role) (ferryline_partition_replicas{_B})", "{{role}}"),), stacked=True),
        Panel("Records in", "Appended by producers.", "wps",
              ((f"sum by (instance) (rate(ferryline_records_in_total{_B}[{RATE}]))", "{{instance}}"),)),
        Panel("Records out", "Handed to readers.", "rps",
              ((f"sum by (instance) (rate(ferryline_records_out_total{_B}[{RATE}]))", "{{instance}}"),)),
        quantiles("Flush", "One group commit: fdatasync of every log that is due.", "ferryline_flush_seconds", _B),
        quantiles("Commit", "From the append at the primary until all in-sync replicas have it.",
                  "ferryline_commit_seconds", _B),
        quantiles("Produce", "From the frame to the acknowledgement.", "ferryline_produce_seconds", _B),
        Panel("Requests", "Frames and REST requests a second, by what was asked.", "reqps",
              ((f"sum by (kind) (rate(ferryline_requests_total{_B}[{RATE}]))", "{{kind}}"),), stacked=True),
        Panel("Errors", "Error answers a second, by code.", "reqps",
              ((f"sum by (code) (rate(ferryline_errors_total{_B}[{RATE}]))", "{{code}}"),)),
        quantiles("REST requests", "Duration.", "ferryline_http_request_seconds", _B),
        Panel("CPU", "Cores in use.", "short",
              ((f"rate(process_cpu_seconds_total{_B}[{RATE}])", "{{instance}}"),)),
        Panel("Memory", "Resident.", "bytes", ((f"process_resident_memory_bytes{_B}", "{{instance}}"),)),
        Panel("Loop", "Longest delay of the event loop since the last scrape, and what a scrape costs.", "s",
              ((f"ferryline_loop_lag_seconds{_B}", "{{instance}} delay"),
               (f"ferryline_scrape_seconds{_B}", "{{instance}} scrape"))),
        Panel("Disk", "Free bytes of the data file system, and what the logs take.", "bytes",
              ((f"ferryline_disk_free_bytes{_B}", "{{instance}} free"),
               (f"sum by (instance) (ferryline_log_bytes{_B})", "{{instance}} logs"))),
        Panel("Produced bytes in flight", "Not acknowledged yet; bounded by produce_bytes_max.", "bytes",
              ((f"ferryline_produce_bytes_in_flight{_B}", "{{instance}}"),)),
        Panel("Parked fetches", "That wait for data.", "short",
              ((f"ferryline_parked_fetches{_B}", "{{instance}}"),)),
        Panel("Open files", "Of those that the process may open.", "percentunit",
              ((f"process_open_fds{_B} / process_max_fds{_B}", "{{instance}}"),)),
        quantiles("Fetch", "From the frame to the answer, parked time included.", "ferryline_fetch_seconds", _B),
        Panel("Under-replicated", "Partitions led here whose in-sync set is not complete.", "short",
              ((f"ferryline_under_replicated_partitions{_B}", "{{instance}}"),)),
    ),
    (("instance", "ferryline_broker_fenced", "instance"),),
)  # fmt: skip

COORDINATOR = Dashboard(
    "ferryline-coordinator",
    "Ferryline: coordinator",
    "Who is active, what it decided, and how long its store takes.",
    (
        stat("Active", "Coordinators that are active; should be 1.", "short", "sum(ferryline_coordinator_active)"),
        stat("Term", "Epoch of the active coordinator; rises with each take-over.", "short",
             "max(ferryline_coordinator_epoch)"),
        stat("Brokers", "Running.", "short", "max(ferryline_brokers_running)"),
        stat("Topics", "All that there are.", "short", "max(ferryline_topics)"),
        stat("Partitions", "Of all topics.", "short", "max(ferryline_partitions)"),
        stat("Frozen", "Partitions that wait for `ferryline recover` or for a broker.", "short",
             "max(ferryline_partitions_frozen)", 1),
        Panel("Active coordinator", "1 for the one that is.", "short",
              (("ferryline_coordinator_active", "{{instance}}"),)),
        quantiles("Store commit", "One commit of SQLite or etcd.", "ferryline_store_commit_seconds"),
        Panel("Brokers", "1 while a broker serves.", "short",
              (("max by (broker) (ferryline_broker_running)", "broker {{broker}}"),)),
        Panel("Elections and fencings", "Changes of primaries; brokers that were given up.", "short",
              ((f"sum(increase(ferryline_elections_total[{RATE}]))", "elections"),
               (f"sum(increase(ferryline_fencings_total[{RATE}]))", "fencings"),
               (f"sum(increase(ferryline_registrations_total[{RATE}]))", "registrations"))),
        Panel("In-sync sets", "That became smaller or larger, as primaries asked.", "short",
              ((f"sum(increase(ferryline_isr_shrinks_total[{RATE}]))", "smaller"),
               (f"sum(increase(ferryline_isr_expands_total[{RATE}]))", "larger"))),
        Panel("Primaries by broker", "Should be about equal.", "short",
              (("max by (broker) (ferryline_primaries)", "broker {{broker}}"),), stacked=True),
        Panel("Partitions in trouble", "Offline: no primary. Under-replicated: a copy missing.", "short",
              (("max(ferryline_partitions_offline)", "offline"),
               ("max(ferryline_partitions_under_replicated)", "under-replicated"),
               ("max(ferryline_partitions_moving)", "moving"))),
        Panel("Moves", "Replicas that move to other brokers.", "short",
              ((f"sum(increase(ferryline_moves_started_total[{RATE}]))", "begun"),
               (f"sum(increase(ferryline_moves_finished_total[{RATE}]))", "finished"),
               (f"sum(increase(ferryline_moves_cancelled_total[{RATE}]))", "given up"))),
        Panel("Consumers", "Members of groups.", "short",
              (("max by (group) (ferryline_group_members)", "{{group}}"),), stacked=True),
        Panel("Requests", "Frames and REST requests a second, by what was asked.", "reqps",
              ((f'sum by (kind) (rate(ferryline_requests_total{{job="coordinator"}}[{RATE}]))', "{{kind}}"),),
              stacked=True),
        Panel("Errors", "Error answers a second, by code.", "reqps",
              ((f'sum by (code) (rate(ferryline_errors_total{{job="coordinator"}}[{RATE}]))', "{{code}}"),)),
        Panel("Process", "Cores in use, and resident memory in GiB.", "short",
              ((f'rate(process_cpu_seconds_total{{job="coordinator"}}[{RATE}])', "{{instance}} cores"),
               ('process_resident_memory_bytes{job="coordinator"} / 2^30', "{{instance}} GiB"))),
    ),
)  # fmt: skip

DASHBOARDS = (OVERVIEW, TOPIC, QUEUES, BROKER, COORDINATOR)


def rendered(dashboard: Dashboard) -> str:
    """The JSON that Grafana provisions."""
    made: dict[str, Any] = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.about,
        "tags": ["ferryline"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["ferryline"], "title": "Ferryline", "asDropdown": True}],
        "templating": {"list": [_variable(*variable) for variable in dashboard.variables]},
        "panels": _placed(dashboard.panels),
    }
    return json.dumps(made, indent=1) + "\n"


def _variable(name: str, metric: str, label: str) -> dict[str, Any]:
    query = f"label_values({metric}, {label})"
    return {
        "name": name, "label": name, "type": "query", "datasource": DATASOURCE, "definition": query,
        "query": {"query": query, "refId": "V"}, "refresh": 2, "sort": 1, "multi": True, "includeAll": True,
        "allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]},
    }  # fmt: skip


def _placed(panels: tuple[Panel, ...]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    x = y = height = 0
    for number, panel in enumerate(panels, 1):
        if x + panel.width > WIDTH or (x and HEIGHTS[panel.kind] != height):
            x, y = 0, y + height
        height = HEIGHTS[panel.kind]
        made.append(_panel(number, panel, {"x": x, "y": y, "w": panel.width, "h": height}))
        x += panel.width
    return made


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.bad is not None:
        steps.append({"color": "red", "value": panel.bad})
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    options: dict[str, Any] = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    if panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "none"}
    else:
        defaults["min"] = 0
        defaults["custom"] = {
            "fillOpacity": 20 if panel.stacked else 0,
            "stacking": {"mode": "normal" if panel.stacked else "none"},
        }
    return {
        "id": number, "title": panel.title, "description": panel.about, "type": panel.kind, "gridPos": place,
        "datasource": DATASOURCE, "fieldConfig": {"defaults": defaults, "overrides": []}, "options": options,
        "targets": [
            {"refId": chr(ord("A") + index), "expr": expr, "legendFormat": legend, "datasource": DATASOURCE}
            for index, (expr, legend) in enumerate(panel.queries)
        ],
    }  # fmt: skip


def files() -> dict[Path, str]:
    """What belongs into the folder, by path."""
    return {FOLDER / f"{one.uid.removeprefix('ferryline-')}.json": rendered(one) for one in DASHBOARDS}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
        sys.stderr.write(f"{path}: written\n")
