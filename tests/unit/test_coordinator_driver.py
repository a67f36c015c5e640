"""The driver on a store with faults: effects only when durable, group commit, new terms, failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from ferryline.protocol.access import AccessPolicy
from ferryline.protocol.errors import CoordinatorUnavailable, ShuttingDown, TopicExists
from ferryline.protocol.messages import Heartbeat, Register, RegisterOk
from ferryline.protocol.metadata import MetadataAnswer, MetadataRequest
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.coordinator import CoreBroken
from ferryline_coordinator.driver import Driver
from ferryline_coordinator.store.interface import Committed, StoreUnusable
from ferryline_coordinator.store.memory import MemoryDisk, MemoryStore
from tests.polling import SOON_S

Eventually = Callable[..., Awaitable[Any]]


class Outside:
    """Surroundings that only remember; brokers answer probes as ``alive`` says."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, Any]] = []
        self.notes: list[ev.Note] = []
        self.policies: list[AccessPolicy] = []
        self.terms = 0
        self.driver: Driver | None = None

    def tell(self, broker_id: int, kind: int, message: Any) -> None:
        self.told.append((broker_id, kind, message))

    def probe(self, probe: ev.Probe) -> None:
        assert self.driver is not None
        asyncio.get_running_loop().call_soon(self.driver.post, ev.ProbeEnded(probe.probe, probe.broker_id, False))

    def noted(self, note: ev.Note) -> None:
        self.notes.append(note)

    def access_changed(self, policy: AccessPolicy) -> None:
        self.policies.append(policy)

    def term_ended(self) -> None:
        self.terms += 1


class Fixture:
    """A driver on a shared disk; ``faults`` are used up one per commit."""

    def __init__(self) -> None:
        self.disk = MemoryDisk()
        self.faults: list[str] = []
        self.commits = 0
        self.hold = asyncio.Event()
        self.hold.set()
        self.store = HeldStore(self)
        self.outside = Outside()
        self.driver = Driver(self.store, CoreConfig(), self.outside)
        self.outside.driver = self.driver

    async def broker(self, broker_id: int) -> None:
        await self.driver.ask(lambda reply: ev.BrokerAdmitted(reply, f"s-{broker_id}", "https://b:1", "https://b:1"))
        self.driver.post(ev.SessionOpened(broker_id, broker_id))
        register = Register(broker_id, f"s-{broker_id}", 1, "clean", "https://b:1", "https://b:1", 0)
        answer = await self.driver.ask(lambda reply: ev.RegisterReceived(reply, broker_id, register))
        assert isinstance(answer, RegisterOk)
        beat = Heartbeat(broker_id, answer.broker_epoch, 1, "run", answer.coord_epoch, answer.revision)
        await self.driver.ask(lambda reply: ev.HeartbeatReceived(reply, broker_id, beat))

    async def create(self, name: str) -> Any:
        settings = {"replication": 1, "partitions": 1}
        return await self.driver.ask(lambda reply: ev.TopicCreated(reply, name, f"{name}-id", settings))


class HeldStore(MemoryStore):
    def __init__(self, fixture: Fixture) -> None:
        super().__init__(fixture.disk, self._next_fault)
        self._fixture = fixture
        self.broken = ""

    def _next_fault(self) -> str:
        return self._fixture.faults.pop(0) if self._fixture.faults else ""

    async def commit(self, *args: Any, **kwargs: Any) -> Committed:
        await self._fixture.hold.wait()
        if self.broken:
            raise StoreUnusable(self.broken)
        self._fixture.commits += 1
        return await super().commit(*args, **kwargs)


@pytest.fixture
async def fixture() -> AsyncIterator[Fixture]:
    made = Fixture()
    await made.driver.start()
    await made.broker(1)
    yield made
    made.hold.set()
    await made.driver.close()


async def test_no_answer_leaves_before_its_commit_and_reads_show_nothing_earlier(fixture: Fixture) -> None:
    fixture.hold.clear()
    creating = asyncio.create_task(fixture.create("t"))
    reading = asyncio.create_task(fixture.driver.settled())
    polling = asyncio.create_task(_metadata(fixture))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not creating.done()
    assert not reading.done()
    assert not polling.done(), "an answer that needs no commit waits behind one that does"
    fixture.hold.set()
    assert (await creating).name == "t"
    await reading
    assert [t.name for t in (await polling).topics] == ["t"]


async def _metadata(fixture: Fixture) -> MetadataAnswer:
    answer = await fixture.driver.ask(lambda reply: ev.MetadataAsked(reply, MetadataRequest()))
    assert isinstance(answer, MetadataAnswer)
    return answer


async def test_decisions_that_wait_share_one_commit_and_keep_their_order(fixture: Fixture) -> None:
    fixture.hold.clear()
    before = fixture.commits
    tasks = [asyncio.create_task(fixture.create(f"t{n}")) for n in range(50)]
    twice = asyncio.create_task(fixture.create("t7"))
    for _ in range(5):
        await asyncio.sleep(0)
    fixture.hold.set()
    assert [topic.name for topic in await asyncio.gather(*tasks)] == [f"t{n}" for n in range(50)]
    with pytest.raises(TopicExists):
        await twice
    assert fixture.commits - before <= 2
    assert sum(key.startswith("topic/") for key in fixture.disk.records) == 50


@pytest.mark.parametrize("fault", ["unknown-before", "unknown-after"])
async def test_after_an_unknown_outcome_a_new_term_knows_what_is_true(fixture: Fixture, fault: str) -> None:
    epoch = fixture.driver.core.coord_epoch
    fixture.faults.append(fault)
    with pytest.raises(CoordinatorUnavailable) as unknown:
        await fixture.create("t")
    assert not unknown.value.definite
    while not fixture.driver.serving:  # noqa: ASYNC110 - the new term begins within a few turns of the loop
        await asyncio.sleep(0)
    assert fixture.outside.terms == 1
    assert fixture.driver.core.coord_epoch == epoch + 1
    exists = fixture.driver.state.topic("t") is not None
    assert exists is (fault == "unknown-after")
    assert ("topic/t-id" in fixture.disk.records) is exists
    if not exists:
        await fixture.create("t")


async def test_a_zombie_finds_out_at_its_next_commit_and_its_decision_is_not_told(fixture: Fixture) -> None:
    await MemoryStore(fixture.disk).campaign()
    with pytest.raises(CoordinatorUnavailable):
        await fixture.create("t")
    assert "topic/t-id" not in fixture.disk.records


async def test_a_store_that_fails_ends_the_process_and_answers_whoever_waits(fixture: Fixture) -> None:
    fixture.store.broken = "disk I/O error"
    waiting = asyncio.create_task(fixture.create("t"))
    assert isinstance(await fixture.driver.failed, StoreUnusable)
    with pytest.raises(CoordinatorUnavailable):
        await waiting
    with pytest.raises(ShuttingDown):
        await fixture.create("u")


async def test_a_broken_invariant_ends_the_process_with_its_story(fixture: Fixture) -> None:
    with pytest.raises(CoreBroken) as broken:
        fixture.driver.post(ev.Event())
    assert broken.value.story[-1][1] == ev.Event()
    assert isinstance(await fixture.driver.failed, CoreBroken)
    with pytest.raises(ShuttingDown):
        fixture.driver.post(ev.Tick())


async def test_a_restart_finds_everything_and_starts_a_later_epoch(fixture: Fixture) -> None:
    await fixture.create("t")
    epoch, cluster = fixture.driver.core.coord_epoch, fixture.driver.state.cluster
    await fixture.driver.close()
    again = Driver(MemoryStore(fixture.disk), CoreConfig(), Outside())
    await again.start()
    assert again.core.coord_epoch == epoch + 1
    assert again.state.cluster == cluster
    assert again.state.topic("t") is not None
    await again.close()


async def test_a_store_restored_from_a_backup_starts_again_above_what_brokers_saw(
    fixture: Fixture, eventually: Eventually
) -> None:
    fixture.driver.post(ev.SessionOpened(9, 1))
    ahead = Register(1, "s-1", 1, "clean", "https://b:1", "https://b:1", 41)
    with pytest.raises(Exception, match="starts again"):
        await fixture.driver.ask(lambda reply: ev.RegisterReceived(reply, 9, ahead))
    await eventually(lambda: fixture.driver.serving and fixture.driver.core.coord_epoch >= 42)


async def test_deadlines_of_the_core_are_kept(fixture: Fixture) -> None:
    answer = await _metadata(fixture)
    request = MetadataRequest(answer.cluster_id, answer.coord_epoch, answer.revision, 80)
    started = asyncio.get_running_loop().time()
    nothing = await fixture.driver.ask(lambda reply: ev.MetadataAsked(reply, request))
    assert 0.07 <= asyncio.get_running_loop().time() - started < SOON_S
    assert nothing.revision == answer.revision


async def test_a_stop_answers_parked_polls(fixture: Fixture) -> None:
    answer = await _metadata(fixture)
    request = MetadataRequest(answer.cluster_id, answer.coord_epoch, answer.revision, 60_000)
    parked = asyncio.create_task(fixture.driver.ask(lambda reply: ev.MetadataAsked(reply, request)))
    await asyncio.sleep(0)
    fixture.driver.answer_parked()
    assert (await asyncio.wait_for(parked, SOON_S)).revision == answer.revision


async def test_a_cancelled_wait_is_forgotten(fixture: Fixture) -> None:
    answer = await _metadata(fixture)
    request = MetadataRequest(answer.cluster_id, answer.coord_epoch, answer.revision, 60_000)
    parked = asyncio.create_task(fixture.driver.ask(lambda reply: ev.MetadataAsked(reply, request)))
    await asyncio.sleep(0)
    assert fixture.driver.core.polls.parked == 1
    parked.cancel()
    await asyncio.gather(parked, return_exceptions=True)
    assert fixture.driver.core.polls.parked == 0
