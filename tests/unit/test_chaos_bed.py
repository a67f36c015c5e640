"""The bed of a chaos run, before anything is started: who calls whom through the proxy, and who is meant by a step."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from ferryline.cli.chaos.bed import ProcessBed
from ferryline.cli.chaos.schedule import ACTIVE, ANY, Step
from ferryline.cli.chaos.wiring import active_among, wire
from tests.unit.broker_world import TestCa

PORT = re.compile(r"https://127\.0\.0\.1:(\d+)")
LISTENING = ("--listen-client-urls", "--listen-peer-urls")


def bed(root: Path, coordinators: int = 1) -> ProcessBed:
    return ProcessBed(root, brokers=3, faults=["kill"], coordinators=coordinators)


def test_a_broker_keeps_its_id_while_it_is_started_again(tmp_path: Path) -> None:
    """Moves and failing disks were left out after the first kill: nobody had read who the new process was."""
    made = bed(tmp_path)
    service = made.cluster.local.services["broker-2"]
    assert made.broker_id("broker-2") == 0
    service.ready = {"broker_id": 7}
    assert made.broker_id("broker-2") == 7
    service.ready = {}  # as `Service.spawn` leaves it
    assert made.broker_id("broker-2") == 7


@pytest.mark.parametrize("coordinators", [1, pytest.param(3, marks=pytest.mark.etcd)])
def test_every_call_between_nodes_goes_through_the_proxy(tmp_path: Path, coordinators: int) -> None:
    local = bed(tmp_path, coordinators).cluster.local
    links = wire(local)
    behind, true = {link.port for link in links}, {link.target_port for link in links}
    assert not behind & true
    for service in local.services.values():
        args = service.program or service.args
        called = [
            int(port)
            for option, value in pairwise(args)
            if option.startswith("--") and option not in LISTENING
            for port in PORT.findall(value)
        ]
        assert called, service.name
        assert set(called) <= behind, (service.name, args)
    assert {link.target for link in links} == set(local.services)


async def test_a_step_ends_with_the_coordinator_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bed(tmp_path)
    turns = iter(["coordinator-2", "coordinator-3"])

    async def active() -> str:
        return next(turns)

    monkeypatch.setattr(made, "_active", active)
    one, other = Step(0.0, "cut", ACTIVE, 1.0, ANY), Step(0.0, "cut", ACTIVE, 1.0, ANY)
    assert one == other
    assert (await made._named(one)).target == "coordinator-2"
    assert (await made._named(other)).target == "coordinator-3"
    assert made._meant[id(one)].target == "coordinator-2"


def test_nobody_who_does_not_answer_is_active(tmp_path: Path) -> None:
    ca = TestCa(tmp_path, "c")
    assert active_among([("coordinator", 1)], ca.file) == ""
