"""Where a client spends its time: `python -m benchmarks.profile_client produce|consume [--records N]`.

Runs one measurement of `ferryline bench` under cProfile against a cluster of its own and prints the heaviest functions.
cProfile makes calls of small Python functions look dearer than they are; compare shares, not seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import ferryline as fl
from ferryline.cli.bench import client
from ferryline.cli.bench.load import Load
from ferryline.cli.connection import run
from ferryline.cli.drill import healed
from ferryline.cli.processes import LocalCluster


async def _topic(load: Load) -> None:
    async with fl.connect(load.url, ca=load.ca) as connected:
        await connected.admin.create_topic(load.topic, partitions=load.partitions, replication=load.replication)
        assert await healed(connected, load.topic, load.partitions, load.replication, 30.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("produce", "consume", "latency"))
    parser.add_argument("--records", type=int, default=300_000)
    parser.add_argument("--lines", type=int, default=25)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, LocalCluster(Path(folder)) as cluster:
        load = Load(url=",".join(cluster.urls), ca=str(cluster.ca), records=options.records)
        asyncio.run(_topic(load))
        fl.tune_process()
        if options.what == "consume":
            run(client.produce(replace(load, warm_up=0)))
        profile = cProfile.Profile()
        profile.enable()
        measured = run(getattr(client, options.what)(load))
        profile.disable()
    print(measured)
    pstats.Stats(profile).sort_stats("tottime").print_stats(options.lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
