"""`ferryline bench`: throughput and latency, beside confluent-kafka if it is installed."""

from __future__ import annotations

import importlib.util
import json
import platform
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.failures import Failed
from ferryline.cli.invocation import of
from ferryline.cli.output import Output, say, stderr, warn
from ferryline.cli.settings import UsageError

if TYPE_CHECKING:
    from ferryline.cli.bench.load import Load
    from ferryline.cli.settings import Settings

UNSHOWN = ("url", "ca", "token", "topic")


def app(
    ctx: typer.Context,
    what: Annotated[
        list[str] | None, typer.Argument(help="produce, consume, latency, end-to-end; nothing is all of them.")
    ] = None,
    records: Annotated[int, typer.Option(help="Records of a round.", min=1_000)] = 500_000,
    rounds: Annotated[int, typer.Option(help="Rounds of each client.", min=1, max=100)] = 5,
    value_bytes: Annotated[int, typer.Option(help="Size of a value.", min=1)] = 100,
    partitions: Annotated[int, typer.Option(help="Of the topic.", min=1)] = 12,
    replication: Annotated[int, typer.Option(help="Copies of each partition.", min=1)] = 2,
    linger_ms: Annotated[float, typer.Option(help="How long a batch waits for more.", min=0)] = 5.0,
    compression: Annotated[str, typer.Option("--compression", "-z", help="none, gzip, snappy, lz4, zstd.")] = "none",
    rate: Annotated[float, typer.Option(help="Records a second of end-to-end.", min=1)] = 1_000.0,
    compare_confluent: Annotated[
        bool | None, typer.Option(help="Take turns with confluent-kafka on librdkafka's mock. [if installed]")
    ] = None,
    brokers: Annotated[int, typer.Option(help="Of the cluster that is started for this.", min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, each round included.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the JSON to this file as well.")] = None,
) -> None:
    """Measure what one Python process gets: one producer process, one consumer process, over TLS.

    Against the cluster that --url or a context names, otherwise against one that is started for it in a temporary
    folder. Each round is a process of its own on a topic of its own; clients take turns; shown are medians and the
    range over the rounds. The mock cluster of librdkafka stores and replicates nothing: it bounds the client.

    Examples:

      ferryline bench

      ferryline bench produce --records 1000000 --rounds 3 --no-compare-confluent

      ferryline bench latency end-to-end --json
    """
    from ferryline.cli.bench.load import Load
    from ferryline.cli.bench.runner import SCENARIOS, Bench

    scenarios = what or list(SCENARIOS)
    if unknown := [name for name in scenarios if name not in SCENARIOS]:
        raise UsageError(f"{unknown[0]!r} cannot be measured; known: {', '.join(SCENARIOS)}")
    compare = _comparing(compare_confluent)
    settings = of(ctx).settings
    output = Output("json" if as_json else settings.output)
    load = Load(
        topic=f"bench-{random.getrandbits(32):08x}",
        records=records,
        value_bytes=value_bytes,
        linger_ms=linger_ms,
        compression=compression,
        partitions=partitions,
        replication=replication,
        rate=rate,
        warm_up=min(20_000, records // 10),
    )
    with _cluster(settings, load, brokers) as aimed, stderr().status("starting") as status:

        def tell(line: str) -> None:
            status.update(line)
            if not sys.stderr.isatty():
                warn(line)

        report = {
            "machine": machine(),
            "load": {name: value for name, value in asdict(load).items() if name not in UNSHOWN},
            "rounds": rounds,
            "brokers": brokers if _own_cluster(settings) else None,
            "results": Bench(aimed, rounds, compare=compare, tell=tell).run(scenarios),
        }
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps(report, indent=2) + "\n")
    if output.for_people:
        _report(report, output)
    else:
        output.one(report)


def _comparing(asked: bool | None) -> bool:
    installed = importlib.util.find_spec("confluent_kafka") is not None
    if asked and not installed:
        raise Failed("confluent-kafka is not installed", remedy="pip install confluent-kafka")
    return installed if asked is None else asked


def _own_cluster(settings: Settings) -> bool:
    """Nobody said where: start one. What happens to run on the default port must not be measured by accident."""
    return "url" not in settings.sources


@contextmanager
def _cluster(settings: Settings, load: Load, brokers: int) -> Iterator[Load]:
    from dataclasses import replace

    if not _own_cluster(settings):
        yield replace(load, url=",".join(settings.url), ca=str(settings.ca or ""), token=settings.token)
        return
    from ferryline.cli.processes import LocalCluster

    root = Path(tempfile.mkdtemp(prefix="ferryline-bench-"))
    try:
        with LocalCluster(root, brokers=brokers) as cluster:
            yield replace(load, url=",".join(cluster.urls), ca=str(cluster.ca))
    finally:
        shutil.rmtree(root, ignore_errors=True)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import psutil

    from ferryline.cli.bench.load import cores

    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as stream:
            model = next((line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")), model)
    except OSError:
        pass
    return {
        "processor": model,
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": list(psutil.getloadavg()),
    }


def _report(report: dict[str, Any], output: Output) -> None:
    from ferryline.cli.bench.runner import RATES

    facts = report["machine"]
    say(f"{facts['processor']}, {facts['cores']} cores, Python {facts['python']}, {report['rounds']} rounds\n")
    rates: list[dict[str, Any]] = []
    latencies: list[dict[str, Any]] = []
    for scenario, found in report["results"].items():
        for client in ("ferryline", "confluent"):
            if client not in found:
                continue
            one = found[client]
            ratio = found.get("ratio") if client == "ferryline" else None
            row: dict[str, Any] = {"scenario": scenario, "client": client}
            if scenario in RATES:
                span = f"{one['lowest']:,.0f} .. {one['highest']:,.0f}"
                row.update({"records/s": f"{one['median']:,.0f}", "range": span})
                rates.append({**row, "ratio": f"{ratio:.2f}" if ratio else "", "errors": one["errors"]})
            else:
                row.update({name: f"{one[name]:.2f}" for name in ("p50", "p90", "p99", "p999", "max")})
                latencies.append({**row, "errors": one["errors"]})
    if rates:
        output.rows(rates, title="throughput")
    if latencies:
        output.rows(latencies, title="\nlatency in ms")
