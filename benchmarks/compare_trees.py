"""Two trees of this repository beside each other: `python -m benchmarks.compare_trees A B [--rounds 5] [--what ...]`.

For the log of changes: one change, measured against the tree without it. Each tree gets a cluster of its own for each
round (three brokers and a coordinator, TLS, replication 2, flushed), the trees take turns, and every measurement tells
the processor time of each process, so a change shows even where the machine's speed drifts. A and B are folders of
check-outs; ``--env-b NAME=VALUE`` changes only the environment of B, then A and B may be the same folder.

    git clone . /tmp/before && python -m benchmarks.compare_trees /tmp/before .
    python -m benchmarks.compare_trees . . --env-a FERRYLINE_CODEC=python --what produce consume
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

PACKAGES = ("sdk", "services/common", "services/coordinator", "services/broker", ".")
WHAT = ("produce", "produce-1KiB", "consume", "consume-1KiB", "latency", "end-to-end")


def probe(what: list[str], records: int, partitions: int, replication: int) -> dict[str, dict[str, float]]:
    """All measurements of the tree that this process runs from, one after another on one cluster."""
    from ferryline.cli.processes import LocalCluster

    found: dict[str, dict[str, float]] = {}
    env = {name: os.environ[name] for name in ("FERRYLINE_CODEC",) if name in os.environ}
    with tempfile.TemporaryDirectory() as folder, LocalCluster(Path(folder), env=env) as cluster:
        for name in what:
            found[name] = _measure(cluster, name, records, partitions, replication)
    return found


def _measure(cluster: Any, name: str, records: int, partitions: int, replication: int) -> dict[str, float]:
    import asyncio

    import ferryline as fl
    from ferryline.cli.bench.load import Load
    from ferryline.cli.drill import healed

    scenario, _, size = name.partition("-") if name.endswith("KiB") else (name, "", "")
    load = Load(url=",".join(cluster.urls), ca=str(cluster.ca), topic=f"bench-{name.lower()}", records=records)
    load = replace(load, partitions=partitions, replication=replication)
    if size:
        load = replace(load, value_bytes=1024, records=records // 4)
    if scenario in ("latency", "end-to-end"):
        load = replace(load, records=3_000, warm_up=300)

    async def topic() -> None:
        async with fl.connect(load.url, ca=load.ca) as client:
            await client.admin.create_topic(load.topic, partitions=partitions, replication=replication)
            assert await healed(client, load.topic, partitions, replication, 30.0)

    async def forget() -> None:
        async with fl.connect(load.url, ca=load.ca) as client:
            await client.admin.delete_topic(load.topic)

    asyncio.run(topic())
    if scenario == "consume":
        _work("produce", replace(load, warm_up=0))
    before = _cpu_of(cluster)
    measured = _work(scenario.replace("-", "_"), load)
    spent = {service: used - before[service] for service, used in _cpu_of(cluster).items()}
    asyncio.run(forget())
    counted = measured["records"] + (load.warm_up if scenario != "consume" else 0)
    row = {"rate": measured["records_per_s"], "client_us": measured["cpu_s"] / measured["records"] * 1e6}
    brokers = sum(used for service, used in spent.items() if service != "coordinator")
    row |= {"brokers_us": brokers / counted * 1e6, "coordinator_us": spent["coordinator"] / counted * 1e6}
    row["all_us"] = row["client_us"] + row["brokers_us"] + row["coordinator_us"]
    return row | {key: measured["latency_ms"][key] for key in ("p50", "p99") if key in measured["latency_ms"]}


def _work(what: str, load: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "ferryline.cli.bench.worker", "ferryline", what, json.dumps(asdict(load))]
    done = subprocess.run(command, capture_output=True, check=False, timeout=150)
    if done.returncode:
        raise SystemExit(f"{what}: {done.stderr.decode()[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _cpu_of(cluster: Any) -> dict[str, float]:
    import psutil

    times = {name: psutil.Process(service.pid).cpu_times() for name, service in cluster.services.items()}
    return {name: float(used.user + used.system) for name, used in times.items()}


def run_in(tree: str, options: argparse.Namespace, env: list[str]) -> dict[str, dict[str, float]]:
    """`probe` in a process whose imports come from ``tree``."""
    root = Path(tree).resolve()
    path = ":".join(str(root / part) for part in PACKAGES)
    environment = {**os.environ, "PYTHONPATH": path, **dict(pair.split("=", 1) for pair in env)}
    command = [sys.executable, str(Path(__file__).resolve()), "--probe", *options.what]
    command += ["--records", str(options.records), "--partitions", str(options.partitions)]
    command += ["--replication", str(options.replication)]
    done = subprocess.run(command, capture_output=True, check=False, env=environment, cwd=root)
    if done.returncode:
        raise SystemExit(f"{tree}: {done.stderr.decode()[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(rounds: dict[str, list[dict[str, dict[str, float]]]], what: list[str]) -> str:
    """Medians of A and B with the range, and B/A as the median of the rounds' own ratios."""
    lines = [f"{'':14} {'':15} {'A':>11} {'B':>11} {'B/A':>6}   range A | range B"]
    for name in what:
        for figure in rounds["a"][0][name]:
            a = [one[name][figure] for one in rounds["a"]]
            b = [one[name][figure] for one in rounds["b"]]
            ratio = statistics.median(y / x if x else 0.0 for x, y in zip(a, b, strict=True))
            spread = f"{min(a):,.4g} .. {max(a):,.4g} | {min(b):,.4g} .. {max(b):,.4g}"
            lines.append(
                f"{name:14} {figure:15} {statistics.median(a):>11,.2f} {statistics.median(b):>11,.2f} {ratio:>6.2f}"
                f"   {spread}"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("trees", nargs="*")
    parser.add_argument("--probe", nargs="*", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--what", nargs="+", default=list(WHAT), choices=WHAT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--records", type=int, default=400_000)
    parser.add_argument("--partitions", type=int, default=12)
    parser.add_argument("--replication", type=int, default=2)
    parser.add_argument("--env-a", nargs="*", default=[])
    parser.add_argument("--env-b", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.probe is not None:
        print(json.dumps(probe(options.probe, options.records, options.partitions, options.replication)))
        return 0
    tree_a, tree_b = options.trees
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {"a": [], "b": []}
    for number in range(options.rounds):
        order = [("a", tree_a, options.env_a), ("b", tree_b, options.env_b)]
        for side, tree, env in order if number % 2 == 0 else reversed(order):
            rounds[side].append(run_in(tree, options, env))
    print(table(rounds, options.what))
    if options.json:
        options.json.write_text(json.dumps({"options": options.trees, **rounds}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
