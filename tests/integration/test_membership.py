"""Brokers come and go under load: primaries and copies spread out, data stays, the stream never stops."""

from __future__ import annotations

from collections import Counter

import pytest

from ferryline.cli.driver import ProcessCluster
from tests.integration.steady import Steady

pytestmark = pytest.mark.process

GAP_MAX_S = 10.0  # on a machine that is busy with other tests; a request alone would wait for half a minute


def spread(steady: Steady) -> tuple[Counter[int], Counter[int]]:
    """How many partitions each broker is primary of, and replicates."""
    parts = steady.partitions()
    return Counter(part.primary for part in parts), Counter(broker for part in parts for broker in part.replicas)


def even(counts: Counter[int], brokers: set[int]) -> bool:
    found = [counts[broker] for broker in brokers]
    return set(counts) <= brokers and max(found) - min(found) <= 1


async def test_a_fourth_broker_takes_its_share_and_a_drained_one_gives_it_up(cluster: ProcessCluster) -> None:
    """1. a stream over 12 partitions on three brokers  2. a fourth joins: primaries and copies spread to within one
    3. one is drained: it ends with nothing, the others spread to within one  4. the stream never stopped.
    """
    async with Steady(cluster, partitions=12, keys=36, rate=1_500) as steady:
        await steady.run_for(1.0)
        steady.traffic.mark()
        joined = cluster.broker_id(await cluster.add_broker())
        four = {cluster.broker_id(name) for name in cluster.brokers}
        assert joined in four
        assert len(four) == 4

        def spread_out() -> bool:
            primaries, copies = spread(steady)
            return even(primaries, four) and even(copies, four)

        await steady.until(spread_out, 60.0, "primaries and copies are not even over four brokers")
        assert await steady.healed(60.0)
        await steady.flows()

        leaving = next(iter(sorted(four - {joined})))
        await steady.client.admin.drain_broker(leaving)

        def gone() -> bool:
            primaries, copies = spread(steady)
            return even(primaries, four - {leaving}) and even(copies, four - {leaving})

        await steady.until(gone, 60.0, f"broker {leaving} still holds something")
        assert await steady.healed(60.0)
        await steady.flows()
        assert await cluster.terminate(cluster.name_of(leaving)) == 0
        await steady.flows()
    steady.assert_kept()
    assert steady.traffic.send_errors == {}
    assert steady.traffic.by_key.worst() < GAP_MAX_S, steady.traffic.by_key.longest
