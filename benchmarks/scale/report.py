"""The results as a table and as plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Series = dict[str, list[tuple[float, float]]]


def write(folder: Path) -> str:
    """Write ``summary.md`` and, where matplotlib is installed, PNGs from the JSON in ``folder``; returns the table."""
    lines: list[str] = []
    charts: dict[str, tuple[str, str, Series]] = {}
    makers = {"partitions": _partitions, "connections": _connections, "log": _log, "core": _core}
    for part, make in makers.items():
        path = folder / f"{part}.json"
        if path.exists():
            found = json.loads(path.read_text())
            rows = [row for row in found["rows"] if "failed" not in row]
            lines += [f"### {part}", "", *make(rows, charts), ""]
            lines += [f"failed: {row['point']}: {row['failed']}" for row in found["rows"] if "failed" in row]
            if found["left_out"]:
                lines += [f"left out for lack of time: {found['left_out']}", ""]
            facts = found["machine"]
            lines += [f"{facts['cores']} cores, {facts['memory_gib']} GiB, Python {facts['python']}, {facts['date']}, "
                      f"load average at the end {facts['load_average'][0]:.1f}", ""]  # fmt: skip
    text = "\n".join(lines)
    (folder / "summary.md").write_text(text + "\n")
    _draw(folder, charts)
    return text


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows),
    ]


def _brokers(row: Row, field: str) -> float:
    values = [one[field] for name, one in row["idle"].items() if name.startswith("broker")]
    return float(max(values))


def _partitions(rows: list[Row], charts: dict[str, tuple[str, str, Series]]) -> list[str]:
    head = ["partitions", "create, all online s", "idle CPU % broker / coordinator", "broker RSS MiB",
            "KiB / partition", "descriptors", "full metadata KiB / ms", "change B",
            "fail-over gap p50 / p99 / worst s", "others worst s",
            "broker back: ready / in sync s", "all killed: online s"]  # fmt: skip
    table, seconds, memory, cpu = [], {}, [], {}
    for row in rows:
        gap, whole, count = row["fail_over"]["gap_s"], row["metadata"], row["partitions"]
        table.append([
            f"{count:,}", row["create"]["all_online_s"],
            f"{_brokers(row, 'cpu_percent'):.1f} / {row['idle']['coordinator']['cpu_percent']:.1f}",
            f"{_brokers(row, 'rss') / 2**20:.0f}", f"{row['bytes_per_partition']['brokers'] / 1024:.0f}",
            f"{_brokers(row, 'descriptors'):.0f}",
            f"{whole['broker']['full_bytes'] / 1024:.0f} / {whole['broker']['full_s']['p50'] * 1000:.1f}",
            whole["broker"]["change_bytes"], f"{gap['p50']} / {gap['p99']} / {gap['worst']}",
            row["fail_over"]["gap_of_others_s"].get("worst", ""),
            f"{row['fail_over']['restart_ready_s']} / {row['fail_over']['restart_in_sync_s']}",
            row["restart_all"]["all_online_s"],
        ])  # fmt: skip
        for name, value in (
            ("fail-over gap, p50", gap["p50"]),
            ("fail-over gap, worst", gap["worst"]),
            ("create, all online", row["create"]["all_online_s"]),
            ("killed broker ready again", row["fail_over"]["restart_ready_s"]),
            ("everything killed, all online", row["restart_all"]["all_online_s"]),
        ):
            seconds.setdefault(name, []).append((count, value))
        memory.append((count, row["bytes_per_partition"]["brokers"] / 1024))
        cpu.setdefault("a broker", []).append((count, _brokers(row, "cpu_percent")))
        cpu.setdefault("the coordinator", []).append((count, row["idle"]["coordinator"]["cpu_percent"]))
    charts["partitions-seconds"] = ("partitions", "seconds", seconds)
    charts["partitions-memory"] = ("partitions", "KiB of all brokers per partition", {"both replicas": memory})
    charts["partitions-idle-cpu"] = ("partitions", "idle CPU, percent of one core", cpu)
    return _table(head, table)


def _connections(rows: list[Row], charts: dict[str, tuple[str, str, Series]]) -> list[str]:
    table, seconds = [], {}
    for row in rows:
        told = row["told_of_a_change_s"]
        table.append([
            f"{row['connections']:,}", f"{row['connect_s']['p50']} / {row['connect_s']['p99']}",
            f"{row['broker_bytes_per_connection'] / 1024:.0f}", f"{_brokers(row, 'cpu_percent'):.1f}",
            f"{_brokers(row, 'descriptors'):.0f}", f"{told['p50']} / {told['worst']}",
            row.get("fail_over", {}).get("told_s", {}).get("worst", ""),
        ])  # fmt: skip
        seconds.setdefault("told of a change, worst", []).append((row["connections"], told["worst"]))
        seconds.setdefault("to connect, p50", []).append((row["connections"], row["connect_s"]["p50"]))
    charts["connections-seconds"] = ("connections", "seconds", seconds)
    head = ["connections", "connect p50 / p99 s", "KiB / connection", "idle CPU % broker", "descriptors",
            "told of a change p50 / worst s", "told of a kill -9, worst s"]  # fmt: skip
    return _table(head, table)


def _log(rows: list[Row], charts: dict[str, tuple[str, str, Series]]) -> list[str]:
    ways = ("first_start", "after_kill", "after_clean_stop", "after_kill_cold")
    series: Series = {way.replace("_", " "): [(row["gib"], row[way]["all_online_s"]) for row in rows] for way in ways}
    charts["log-start"] = ("GiB of log on one broker", "seconds until every partition is served", series)
    head = ["GiB", *(f"{way.replace('_', ' ')}: ready / all online s" for way in ways), "RSS MiB", "descriptors"]
    table = [
        [
            row["gib"],
            *(f"{row[way]['ready_s']} / {row[way]['all_online_s']}" for way in ways),
            f"{row['rss'] / 2**20:.0f}",
            row["descriptors"],
        ]
        for row in rows
    ]
    return _table(head, table)


def _core(rows: list[Row], charts: dict[str, tuple[str, str, Series]]) -> list[str]:
    head = ["brokers", "partitions", "replication", "heartbeat us", "placement look ms",
            "create 10,000 partitions ms", "B / partition", "full metadata MB / ms",
            "one broker dies: replicas, primaries", "decision ms", "records, MB", "told MB",
            "SQLite commit ms"]  # fmt: skip
    table, series = [], {}
    for row in rows:
        fence, whole = row["fence"], row["full_metadata"]
        table.append([
            row["brokers"], f"{row['partitions']:,}", row["replication"], f"{row['heartbeat_s'] * 1e6:.0f}",
            f"{row['look_at_placement_s'] * 1e3:.1f}", f"{row['create_topic']['last_s'] * 1e3:.0f}",
            row["bytes_per_partition"], f"{whole['bytes'] / 1e6:.1f} / {whole['encode_s'] * 1e3:.0f}",
            f"{fence['replicas']:,}, {fence['primaries']:,}", f"{fence['decision_s'] * 1e3:.0f}",
            f"{fence['records']:,}, {fence['record_bytes'] / 1e6:.1f}", f"{fence['told_bytes'] / 1e6:.1f}",
            f"{fence['sqlite']['changed_s'] * 1e3:.0f}" if "sqlite" in fence else "",
        ])  # fmt: skip
        series.setdefault("decision", []).append((fence["replicas"], fence["decision_s"] * 1e3))
        if "sqlite" in fence:
            series.setdefault("commit", []).append((fence["replicas"], fence["sqlite"]["changed_s"] * 1e3))
    charts["core-fence"] = ("replicas of the broker that died", "ms", series)
    return _table(head, table)


def _draw(folder: Path, charts: dict[str, tuple[str, str, Series]]) -> None:
    try:
        import matplotlib as mpl
    except ImportError:
        print("matplotlib is not installed: no plots")
        return
    mpl.use("Agg")
    from matplotlib import pyplot

    for name, (x_label, y_label, series) in charts.items():
        figure, axes = pyplot.subplots(figsize=(7, 4))
        for label, points in series.items():
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=label)
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=100)
        pyplot.close(figure)
