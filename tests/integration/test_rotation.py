"""Certificates and the CA change while everything goes on: a short piece of the campaign, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import ferryline as fl
from ferryline.cli.driver import ProcessCluster
from ferryline.cli.failures import Failed
from ferryline.cli.rotation import FINISH, ISSUE, TRUST, Rotation
from ferryline.protocol.errors import Conflict
from tests.integration import rotation_campaign
from tests.integration.conftest import Start
from tests.integration.takeovers import Watch
from tests.polling import poll

pytestmark = pytest.mark.process


@pytest.mark.timeout(180)
async def test_certificates_and_the_ca_change_under_load_without_a_failed_request(tmp_path: Path) -> None:
    options = rotation_campaign.options_of(["--leaves", "2", "--pause", "0.4", "--rate", "100"])
    found = await rotation_campaign.run(options, tmp_path)
    assert rotation_campaign.good(found), found


@pytest.mark.etcd
@pytest.mark.timeout(240)
async def test_coordinators_that_share_their_ca_change_it_under_load_and_the_standby_goes_on_with_it(
    tmp_path: Path,
) -> None:
    flags = ["--coordinators", "2", "--leaves", "1", "--pause", "0.4", "--rate", "50"]
    found = await rotation_campaign.run(rotation_campaign.options_of(flags), tmp_path)
    assert rotation_campaign.good(found), found


@pytest.mark.etcd
@pytest.mark.timeout(240)
async def test_nothing_is_done_to_the_ca_while_a_coordinator_cannot_be_asked(tmp_path: Path) -> None:
    """1. two coordinators  2. the standby stands still: no step  3. it goes on: the step is taken, and the standby
    trusts both when the command returns."""
    cluster = ProcessCluster(tmp_path, brokers=1, coordinators=2, store="etcd", etcd_members=1)
    try:
        await cluster.start()
        async with Watch(cluster) as watch:
            active, _ = await watch.until_active(0, 60.0)
        standby = next(name for name in cluster.coordinators if name != active)
        before = cluster.ca.read_text()
        async with fl.connect(cluster.urls, ca=cluster.ca) as client:
            await poll(lambda: len(client.routing.cluster.coordinators) == 2, within_s=30)
            rotation = Rotation(client)
            await cluster.pause(standby)
            with pytest.raises(Failed, match="cannot be asked"):
                await rotation.change_ca(TRUST)
            assert cluster.ca.read_text() == before
            await cluster.resume(standby)
            rows, pem = await rotation.change_ca(TRUST)
            assert [len(row["trusts"]) for row in rows] == [2] * 4, "as asked, each coordinator, and the broker"
            assert pem.count("BEGIN CERTIFICATE") == 2
    finally:
        await cluster.kill_all()


async def test_a_step_out_of_turn_or_with_a_broker_away_changes_nothing(start_cluster: Start) -> None:
    cluster = await start_cluster(brokers=2)
    before = cluster.ca.read_text()
    async with fl.connect(cluster.urls, ca=cluster.ca) as client:
        rotation = Rotation(client)
        for step in (ISSUE, FINISH):
            with pytest.raises((Conflict, Failed)):
                await rotation.change_ca(step)
        await cluster.kill("broker-2")
        await poll(lambda: any(b.fenced for b in client.routing.cluster.brokers.values()), within_s=20)
        with pytest.raises(Failed, match="down"):
            await rotation.change_ca(TRUST)
        assert cluster.ca.read_text() == before
