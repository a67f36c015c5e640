"""kill -9 of a primary, of everything, and a primary that is told to end: nothing acknowledged is ever lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ferryline.cli.drill import Plan, run_drill
from ferryline.cli.driver import ProcessCluster
from tests.integration.failover_timing import measure
from tests.integration.kill_campaign import fits

pytestmark = pytest.mark.process

RECORDS = 60_000
TRIES = 3  # on a busy machine next to nothing may be on its way when a broker dies


def plan(**changes: Any) -> Plan:
    """Eight keys, half of them on the victim."""
    return Plan(**{"records": RECORDS, "keys": 8, "victim_share": 0.5, "partitions": 8, "seed": 1, **changes})


async def test_a_killed_primary_loses_nothing_and_its_copies_come_back_by_themselves(cluster: ProcessCluster) -> None:
    account = await run_drill(plan(), cluster)
    assert fits(account), account
    assert account.verdict.acknowledged == RECORDS, account
    assert account.failover_s < 20.0, account.failover_s


async def test_a_primary_that_is_told_to_end_hands_over_and_no_client_notices(cluster: ProcessCluster) -> None:
    account = await run_drill(plan(fault="terminate"), cluster)
    assert fits(account), account
    assert account.send_errors == {}
    assert account.verdict.acknowledged == RECORDS
    assert account.failover_s < 20.0, account.failover_s


async def test_everything_acknowledged_is_there_after_kill_9_of_all_processes_at_once(cluster: ProcessCluster) -> None:
    account = await run_drill(plan(fault="kill-all", records=30_000), cluster)
    assert account.good, account
    assert account.healed_s is not None


async def test_a_primary_that_dies_while_its_secondaries_are_held_back_has_promised_nothing(
    cluster: ProcessCluster,
) -> None:
    account = await run_drill(plan(fault="kill-ahead"), cluster)
    assert fits(account), account
    assert account.verdict.acknowledged == RECORDS


async def test_three_killings_in_a_row_each_heal(cluster: ProcessCluster) -> None:
    timing = await measure(cluster, 3, "KILL", rate=500)
    assert timing.good, timing
    assert timing.gaps
    assert min(timing.gaps) < 3.0, timing.gaps  # nobody waits for the silence after which a broker is fenced
    assert max(timing.gaps) < 20.0, timing.gaps


@pytest.mark.parametrize(
    ("sabotage", "fault"), [("ack-before-replicate", "kill-ahead"), ("ack-before-flush", "kill-all")], ids=str
)
async def test_a_broker_that_acknowledges_too_early_is_found_out(
    tmp_path: Path, start_cluster: Any, sabotage: str, fault: str
) -> None:
    """The proof of the proof: with the rule switched off, the account must see the loss."""
    env = {"FERRYLINE_ALLOW_SABOTAGE": "1", "FERRYLINE_SABOTAGE": sabotage}
    if fault == "kill-all":
        env["FERRYLINE_TEST_LOSSY_STORAGE"] = "1"
    for _ in range(TRIES):
        cluster = await start_cluster(brokers=3, env=env)
        drill = plan(fault=fault, records=30_000, rate=8_000, delivery_s=6.0, recovery_s=6.0)
        account = await run_drill(drill, cluster)
        await cluster.kill_all()
        if not account.good:
            break
    assert not account.good, account
    assert account.lost > 0 or account.out_of_order > 0, account
