"""One of several coordinators: when it may answer, when it steps down, what it shares with the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from ferryline.protocol.access import AccessPolicy
from ferryline.protocol.errors import CoordinatorLoading, CoordinatorStandby, CoordinatorUnavailable, Forbidden
from ferryline.protocol.metadata import MetadataAnswer, MetadataRequest
from ferryline_coordinator.authority import Authority
from ferryline_coordinator.config import CoordinatorConfig, load_config
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.driver import Driver
from ferryline_coordinator.store.interface import Primaryship, StoreUnusable
from ferryline_coordinator.store.memory import MemoryStore
from ferryline_coordinator.store.vault import Seal, read_secret
from tests.polling import SOON_S

Eventually = Callable[..., Awaitable[Any]]


class LeasedStore(MemoryStore):
    """Primaryship that ends when the test says so, and a campaign that waits for its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = asyncio.Event()
        self.over = asyncio.Event()
        self.valid = True
        self.holder = ""

    async def campaign(self, at_least: int = 0) -> Primaryship:
        await self.turn.wait()
        self.over, self.valid, self.holder = asyncio.Event(), True, ""
        return await super().campaign(at_least)

    def holds(self) -> bool:
        return self.valid and super().holds()

    def active(self) -> str:
        return self.holder

    async def watch(self) -> None:
        await self.over.wait()


class Outside:
    terms = 0

    def tell(self, broker_id: int, kind: int, message: Any) -> None: ...

    def probe(self, probe: ev.Probe) -> None: ...

    def noted(self, note: ev.Note) -> None: ...

    def access_changed(self, policy: AccessPolicy) -> None: ...

    def term_ended(self) -> None:
        self.terms += 1


class World:
    def __init__(self) -> None:
        self.store, self.outside = LeasedStore(), Outside()
        self.driver = Driver(self.store, CoreConfig(coordinators=("https://me:1",)), self.outside)

    async def metadata(self, revision: int = -1, wait_ms: int = 0) -> MetadataAnswer:
        epoch = self.driver.core.coord_epoch if revision >= 0 else 0
        asked = MetadataRequest("", epoch, revision, wait_ms)
        answer = await self.driver.ask(lambda reply: ev.MetadataAsked(reply, asked))
        assert isinstance(answer, MetadataAnswer)
        return answer


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    made.store.turn.set()
    await made.driver.start()
    yield made
    await asyncio.wait_for(made.driver.close(), SOON_S)


async def test_nothing_is_answered_once_the_lease_may_have_ended_even_before_anybody_noticed(world: World) -> None:
    assert (await world.metadata()).coord_epoch == 1
    world.store.valid = False  # the clock says so; no event, no timer, no watch has told yet
    assert not world.driver.serving
    with pytest.raises(CoordinatorLoading):
        await world.metadata()
    world.store.holder = "https://other:1"
    with pytest.raises(CoordinatorStandby) as refused:
        await world.metadata()
    assert refused.value.details == {"active": "https://other:1"}
    assert refused.value.definite
    assert refused.value.retriable


async def test_an_end_of_primaryship_is_one_step_down_and_whoever_waits_is_told(
    world: World, eventually: Eventually
) -> None:
    revision = (await world.metadata()).revision
    parked = asyncio.create_task(world.metadata(revision, wait_ms=30_000))
    await asyncio.sleep(0)
    world.store.turn.clear()
    world.store.valid = False
    world.store.over.set()
    with pytest.raises(CoordinatorUnavailable):
        await asyncio.wait_for(parked, SOON_S)
    assert (world.outside.terms, world.driver.terms_lost) == (1, 1)
    with pytest.raises(CoordinatorLoading):
        await world.metadata()
    world.store.turn.set()
    await eventually(lambda: world.driver.serving)
    again = await world.metadata()
    assert (again.coord_epoch, again.revision) == (2, revision)
    assert (world.outside.terms, world.driver.terms_lost) == (1, 1)


async def test_a_store_that_fails_in_an_unforeseen_way_ends_the_process(world: World) -> None:
    async def broken(*_: Any) -> Any:
        raise KeyError("responses")

    world.store.commit = broken  # type: ignore[method-assign]
    world.driver.post(ev.CoordinatorsKnown(("https://a:1",)))
    failure = await asyncio.wait_for(asyncio.shield(world.driver.failed), SOON_S)
    assert isinstance(failure, KeyError)
    assert not world.driver.serving


async def test_a_standby_that_waits_for_its_turn_can_be_closed() -> None:
    world = World()
    world.driver.begin()
    await asyncio.sleep(0)
    assert not world.driver.serving
    await asyncio.wait_for(world.driver.close(), SOON_S)
    assert not world.driver.failed.done()


async def test_everybody_learns_of_other_coordinators_once(world: World) -> None:
    before = await world.metadata()
    assert before.coordinators == ["https://me:1"]
    parked = asyncio.create_task(world.metadata(before.revision, wait_ms=30_000))
    await asyncio.sleep(0)
    urls = ("https://a:1", "https://b:1")
    world.driver.post(ev.CoordinatorsKnown(urls))
    told = await asyncio.wait_for(parked, SOON_S)
    assert (told.revision, told.coordinators) == (before.revision + 1, list(urls))
    world.driver.post(ev.CoordinatorsKnown(urls))
    await world.driver.settled()
    after = await world.metadata()
    assert (after.revision, after.coordinators) == (told.revision, list(urls))
    world.store.over.set()
    for _ in range(20):
        await asyncio.sleep(0)
    assert (await world.metadata()).coordinators == list(urls), "the next term knows them, too"


# -- what they share --------------------------------------------------------------------------------


class DictVault:
    def __init__(self) -> None:
        self.things: dict[str, bytes] = {}

    async def create(self, name: str, value: bytes) -> bytes:
        await asyncio.sleep(0)
        return self.things.setdefault(name, value)

    async def read(self, name: str) -> bytes | None:
        await asyncio.sleep(0)
        return self.things.get(name)

    async def replace(self, name: str, old: bytes, new: bytes) -> bool:
        await asyncio.sleep(0)
        if self.things[name] == old:
            self.things[name] = new
        return self.things[name] == new


async def test_several_coordinators_are_one_authority_and_none_keeps_its_key_on_disk(tmp_path: Path) -> None:
    vault = DictVault()
    one, two = await asyncio.gather(Authority.shared(tmp_path / "1", vault), Authority.shared(tmp_path / "2", vault))
    assert one.ca_pem == two.ca_pem == (tmp_path / "2/tls/ca.crt").read_text()
    certificate, _ = two.coordinator_files("c" * 32, ["two.example"])
    x509.load_pem_x509_certificate(certificate.read_bytes()).verify_directly_issued_by(one.ca)
    token = one.new_token()
    await two.use_token(token, "storage-1")
    await one.use_token(token, "storage-1")
    for authority in (one, two, await Authority.shared(tmp_path / "3", vault)):
        with pytest.raises(Forbidden, match="used already"):
            await authority.use_token(token, "storage-2")
    for name in ("1", "2", "3"):
        assert not (tmp_path / name / "tls/ca.key").exists()
        assert not (tmp_path / name / "tls/join.key").exists()


def test_what_was_sealed_opens_only_with_its_secret_and_under_its_name() -> None:
    seal = Seal(b"s" * 32)
    sealed = seal.seal(b"the key", "ca")
    assert b"the key" not in sealed
    assert seal.unseal(sealed, "ca") == b"the key"
    assert seal.seal(b"the key", "ca") != sealed
    flipped = bytes([sealed[0] ^ 1]) + sealed[1:]
    for opener, bytes_, name in (
        (seal, sealed, "join.key"),
        (seal, flipped, "ca"),
        (seal, b"", "ca"),
        (Seal(b"t" * 32), sealed, "ca"),
    ):
        with pytest.raises(StoreUnusable, match="another cluster secret"):
            opener.unseal(bytes_, name)


def test_a_secret_that_is_short_or_missing_stops_the_coordinator(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable, match="cluster secret"):
        read_secret(tmp_path / "missing")
    (tmp_path / "short").write_text("x" * 31 + "\n")
    with pytest.raises(StoreUnusable, match="31 bytes"):
        read_secret(tmp_path / "short")


# -- settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "etcd_endpoints"),
        ({"etcd_endpoints": ["https://e:1"]}, "cluster_secret_file"),
        ({"etcd_endpoints": ["http://e.example:1"], "cluster_secret_file": "s"}, "in clear"),
        ({"etcd_endpoints": ["e:1"], "cluster_secret_file": "s"}, "no https URL"),
        ({"etcd_endpoints": ["https://e:1"], "cluster_secret_file": "s", "etcd_cert": "c"}, "etcd_key"),
        ({"etcd_endpoints": ["https://e:1"], "cluster_secret_file": "s", "etcd_lease_ms": 1_000}, "etcd_lease_ms"),
    ],
)
def test_settings_that_would_be_unsafe_are_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        load_config({"data_dir": tmp_path, "store": "etcd", **settings})


def test_endpoints_may_be_given_as_one_text(tmp_path: Path) -> None:
    given = {"etcd_endpoints": "https://e1:1, http://127.0.0.1:2", "cluster_secret_file": tmp_path / "s"}
    config = load_config({"data_dir": tmp_path, "store": "etcd", **given})
    assert isinstance(config, CoordinatorConfig)
    assert config.etcd_endpoints == ["https://e1:1", "http://127.0.0.1:2"]
