"""Certificates and the CA change while everything goes on: a short piece of the campaign, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import ferryline as fl
from ferryline.cli.failures import Failed
from ferryline.cli.rotation import FINISH, ISSUE, TRUST, Rotation
from ferryline.protocol.errors import Conflict
from tests.integration import rotation_campaign
from tests.integration.conftest import Start
from tests.polling import poll

pytestmark = pytest.mark.process


@pytest.mark.timeout(180)
async def test_certificates_and_the_ca_change_under_load_without_a_failed_request(tmp_path: Path) -> None:
    options = rotation_campaign.options_of(["--leaves", "2", "--pause", "0.4", "--rate", "100"])
    found = await rotation_campaign.run(options, tmp_path)
    assert rotation_campaign.good(found), found


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
