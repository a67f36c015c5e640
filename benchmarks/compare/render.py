"""A report as Markdown: machine, what was left out, one table per measurement, the limits, the goals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.compare.goals import verdicts
from benchmarks.compare.plan import VARIANTS, WARM_UP_MAX_S, WORKLOADS
from benchmarks.compare.queue_goals import queue_verdicts
from benchmarks.compare.queue_plan import QUEUE_VARIANTS, QUEUE_WORKLOADS, TASK_VARIANTS
from benchmarks.compare.spec import KEY_BYTES
from benchmarks.compare.stats import LATENCIES, Row, Spread, Table, table

QUEUE_KINDS = ("queue", "queue-drain", "queue-pace", "tasks")
TITLES = {
    "queue": "sent, and received meanwhile; from the first send to the last acknowledgement",
    "queue-drain": "a backlog received and acknowledged, nothing sent meanwhile",
    "queue-pace": "1,000 records a second, send to a handler in another process",
    "tasks": "from the first call to the end of the last one; 16 at once, results off where they can be",
    "produce": "all confirmed before the clock stops",
    "consume": "one process, group offsets kept",
    "latency": "one record at a time, send to confirmation",
    "end-to-end": "1,000 records a second, send to a consumer in another process",
    "fan-out": "one producer, five groups, records delivered to all of them together",
    "backlog": "a backlog worked off while a producer goes on at 1,000 a second",
}


def render(report: dict[str, Any]) -> str:
    """The whole report."""
    found = table(report["rounds"])
    lines = [*_head(report), *_not_measured(found), *_acknowledgements(found), *_settlements(found)]
    for (workload, what), rows in found.items():
        lines += [f"### {workload}: {what} ({TITLES.get(what, '')})", ""]
        lines += _latency_table(rows) if what in LATENCIES else _rate_table(rows)
        lines.append("")
        if what in QUEUE_KINDS:
            lines += _parts_table(rows)
    lines += [*_cost_table(found), *_limits(report["limits"], found), *_goals(found)]
    return "\n".join(lines)


def write_all(report: dict[str, Any], folder: Path, name: str) -> None:
    """Markdown, and PNG where matplotlib is installed."""
    (folder / f"{name}.md").write_text(render(report) + "\n")
    try:
        from benchmarks.compare.plots import plot_all
    except ImportError as error:
        (folder / f"{name}.md").open("a").write(f"\nNo plots: {error}.\n")
        return
    plot_all(table(report["rounds"]), folder, name)


def _head(report: dict[str, Any]) -> list[str]:
    machine, settings = report["machine"], report["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "## Ferryline and its peers in one run",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}, Python "
        f"{machine['python']}, {machine['java']}; load average {machine['load_average'][0]:.1f} before, "
        f"{machine['load_average_after'][0]:.1f} after; commit {machine['commit']}.",
        "",
        f"{settings['rounds']} rounds, scale {settings['scale']:.2f}, {settings['minutes']} minutes. Medians, with the "
        "range over the rounds. Ferryline over TLS 1.3, the others over plain TCP. Keys of 12 bytes, distinct; "
        f"the same value bytes for all. {versions}.",
        "",
    ]
    if settings["warm_up_s"] < WARM_UP_MAX_S:
        lines += ["**Servers were hardly warmed up: these figures flatter us beside a JVM.**", ""]
    if report["left_out"]:
        lines += ["Left out:", "", *(f"* {name}: {_first(reason)}" for name, reason in report["left_out"].items()), ""]
    if report["failures"]:
        lines += ["Failed:", "", *(f"* {_first(one)}" for one in report["failures"]), ""]
    return lines


def _not_measured(found: Table) -> list[str]:
    """Servers that a workload was not meant for, with the reason."""
    measured = {name for name, _ in found}
    every = {one.system for one in VARIANTS}
    lines = [
        f"* {one.name}: without {', '.join(sorted(every - one.systems))}: {one.left_out}"
        for one in WORKLOADS
        if one.left_out and one.name in measured
    ]
    if measured - {one.name for one in QUEUE_WORKLOADS}:
        lines.append("* workloads that are not central, only with the main rows of each system.")
    return [*lines, ""]


def _first(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no reason was given"


def _acknowledgements(found: Table) -> list[str]:
    measured = {name for rows in found.values() for name in rows}
    lines = ["| row | copies | what a confirmation means |", "|---|---|---|"]
    known = {one.name: one for one in (*VARIANTS, *QUEUE_VARIANTS, *TASK_VARIANTS)}
    lines += [f"| {one.name} | {one.copies} | {one.ack} |" for one in known.values() if one.name in measured]
    return [*lines, ""]


def _settlements(found: Table) -> list[str]:
    """How those who receive acknowledge."""
    lines: list[str] = []
    for title, variants, kinds in (
        ("receivers", QUEUE_VARIANTS, QUEUE_KINDS[:3]),
        ("tasks", TASK_VARIANTS, QUEUE_KINDS[3:]),
    ):
        measured = {name for (_, what), rows in found.items() if what in kinds for name in rows}
        if measured:
            lines += [f"| row, {title} | how it acknowledges |", "|---|---|"]
            lines += [f"| {one.name} | {one.settles} |" for one in variants if one.name in measured]
            lines.append("")
    return lines


def _span(spread: Spread, form: str) -> str:
    return f"{spread.median:{form}} ({spread.lowest:{form}} .. {spread.highest:{form}})"


def _rate_table(rows: dict[str, Row]) -> list[str]:
    lines = ["| row | records/s (range) | MB/s | client us/record | servers us/record | records a round | errors |"]
    lines.append("|---|---|---|---|---|---|---|")
    lines += [
        f"| {one.variant} | {_span(one.rate, ',.0f')} | {one.mb_per_s:,.0f} | {one.client_us.median:.2f} | "
        f"{one.server_us.median:.2f} | {one.records:,} | {one.errors} |"
        for one in sorted(rows.values(), key=lambda one: -one.rate.median)
    ]
    return lines


def _latency_table(rows: dict[str, Row]) -> list[str]:
    lines = ["| row | p50 ms (range) | p99 ms (range) | p99.9 ms | max ms | records/s | records a round | errors |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    lines += [
        f"| {one.variant} | {_span(one.latency_ms['p50'], '.2f')} | {_span(one.latency_ms['p99'], '.2f')} | "
        f"{one.latency_ms['p999'].median:.2f} | {one.latency_ms['max'].median:.2f} | {one.rate.median:,.0f} | "
        f"{one.records:,} | {one.errors} |"
        for one in sorted(rows.values(), key=lambda one: one.latency_ms["p50"].median)
    ]
    return lines


def _parts_table(rows: dict[str, Row]) -> list[str]:
    """Processor time by process."""
    roles = [name for name in next(iter(rows.values())).parts_us if all(name in one.parts_us for one in rows.values())]
    lines = [f"| row | {' | '.join(f'{one} us/record' for one in roles)} | servers us/record | all |"]
    lines.append("|---" * (len(roles) + 3) + "|")
    lines += [
        f"| {one.variant} | {' | '.join(f'{one.parts_us[role].median:.1f}' for role in roles)} | "
        f"{one.server_us.median:.1f} | {one.total_us:.1f} |"
        for one in sorted(rows.values(), key=lambda one: one.total_us)
    ]
    return [*lines, ""]


def _cost_table(found: Table) -> list[str]:
    """Per million records, produced once and consumed once."""
    lines: list[str] = []
    for size in sorted({workload for workload, what in found if what == "consume"}, key=len):
        produced, consumed = found.get((size, "produce"), {}), found[size, "consume"]
        lines += [f"### cost of a million records of {size}, produced and consumed once", ""]
        lines += [
            "| row | processor s, all | clients | servers | GB written | servers' memory MB | client's memory MB |"
        ]
        lines.append("|---|---|---|---|---|---|---|")
        both = [(produced[name], consumed[name]) for name in produced if name in consumed]
        for one, two in sorted(both, key=lambda pair: pair[0].total_us + pair[1].total_us):
            client, server = (
                one.client_us.median + two.client_us.median,
                one.server_us.median + two.server_us.median,
            )
            lines.append(
                f"| {one.variant} | {client + server:.2f} | {client:.2f} | {server:.2f} | "
                f"{(one.written + two.written) / 1e3:.2f} | {max(one.server_rss, two.server_rss) / 1e6:,.0f} | "
                f"{max(one.client_rss, two.client_rss) / 1e6:,.0f} |"
            )
        lines.append("")
    return lines


def _limits(limits: dict[str, Any], found: Table) -> list[str]:
    """What no queue on this machine can beat with one stream."""
    names = {"100": "100B", "1024": "1KiB", "16384": "16KiB"}
    lines = ["### the physical limit", "", "| value | raw TLS sockets, records/s | write + fdatasync, records/s |"]
    lines.append("|---|---|---|")
    for size, rates in limits["sockets"].items():
        spreads = (Spread.of(rates), Spread.of(limits["disk"][size]))
        bytes_each = int(size) + KEY_BYTES
        cells = (f"{_span(one, ',.0f')}, {one.median * bytes_each / 1e6:,.0f} MB/s" for one in spreads)
        lines.append(f"| {names.get(size, size)} | {' | '.join(cells)} |")
    floor = {share: Spread.of([one[share] for one in limits["one_at_a_time_ms"]]) for share in ("p50", "p99")}
    lines += ["", "One record over TLS to another process, written, flushed, answered: "
              f"p50 {_span(floor['p50'], '.2f')} ms, p99 {_span(floor['p99'], '.2f')} ms.", ""]  # fmt: skip
    return lines


def _goals(found: Table) -> list[str]:
    judged = verdicts(found) + queue_verdicts(found)
    lines = ["### goals, as ratios in this run", ""]
    lines += [f"* {one}" for one in judged] or ["* nothing to compare with was measured"]
    counted = [one for one in judged if one.counts]
    lines += ["", f"{sum(one.met for one in counted)} of {len(counted)} goals met."]
    return lines
