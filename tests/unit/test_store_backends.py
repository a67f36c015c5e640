"""One suite for every `MetaStore`: memory, memory with faults, SQLite, etcd. What one alone promises comes after.

Where faults are possible, `Writer` does what the interface says: after LOST or UNKNOWN it campaigns and loads again.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import pytest

from ferryline_coordinator.store.interface import Committed, Loaded, MetaStore, Outcome, StoreUnusable
from ferryline_coordinator.store.memory import Crashed, FaultyStore, MemoryDisk, MemoryStore
from ferryline_coordinator.store.sqlite import SqliteStore
from tests.polling import SOON_S
from unit.store_etcd import EtcdProcesses

Reopen = Callable[[], Awaitable[MetaStore]]
BACKENDS = ["memory", "faulty", "sqlite", pytest.param("etcd", marks=pytest.mark.etcd)]


@pytest.fixture(params=BACKENDS)
async def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Reopen]:
    """Closes the store of the last life and opens one of the next."""
    disk, lives = MemoryDisk(), 0
    opened: list[MetaStore] = []
    prefix = f"suite-{uuid.uuid4().hex}"
    etcd: EtcdProcesses | None = request.getfixturevalue("etcd") if request.param == "etcd" else None
    if etcd is not None:
        await asyncio.to_thread(etcd.settle)

    async def again() -> MetaStore:
        nonlocal lives
        lives += 1
        if opened:
            await opened.pop().close()
        if etcd is not None:
            opened.append(etcd.store(prefix))
        elif request.param == "faulty":
            opened.append(FaultyStore(disk, seed=lives))
        else:
            opened.append(MemoryStore(disk) if request.param == "memory" else SqliteStore(tmp_path / "meta"))
        return opened[0]

    yield again
    for store in opened:
        await store.close()


class Writer:
    """A coordinator's way with a store, as short as it can be. ``known`` is what it loaded last."""

    def __init__(self, store: MetaStore) -> None:
        self.store = store
        self.known = Loaded(0, {})
        self.epochs: list[int] = []

    async def begin(self, at_least: int = 0) -> Writer:
        primaryship = await self.store.campaign(at_least)
        self.epochs.append(primaryship.coord_epoch)
        self.known = await self.store.load(max(primaryship.revision, self.known.revision))
        return self

    async def commit(
        self, puts: Mapping[str, bytes], deletes: Sequence[str] = (), guards: Sequence[tuple[str, int]] = ()
    ) -> Committed:
        """Until it is known how it ended: OK or CONFLICT."""
        for _ in range(100):
            committed = await self.store.commit(puts, deletes, guards)
            if committed.outcome is Outcome.OK:
                self.known = Loaded(committed.revision, self.known.records)
            if committed.outcome in (Outcome.OK, Outcome.CONFLICT):
                return committed
            before = self.known.revision
            await self.store.resign()
            await self.begin()
            if committed.outcome is Outcome.UNKNOWN and self._written(puts, deletes, before):
                versions = {self.known.records[key][1] for key in puts}
                return Committed(Outcome.OK, max(versions, default=self.known.revision))
        raise AssertionError("a hundred faults in a row")

    def _written(self, puts: Mapping[str, bytes], deletes: Sequence[str], before: int) -> bool:
        there = self.known.records
        put = all(key in there and there[key][0] == value and there[key][1] > before for key, value in puts.items())
        return put and not any(key in there for key in deletes)

    async def values(self) -> dict[str, bytes]:
        loaded = await self.store.load(self.known.revision)
        return {key: value for key, (value, _) in loaded.records.items()}


async def values(store: MetaStore) -> dict[str, bytes]:
    return {key: value for key, (value, _) in (await store.load(0)).records.items()}


async def test_an_empty_store_gives_the_first_epoch_and_no_records(reopen: Reopen) -> None:
    store = await reopen()
    primaryship = await store.campaign()
    assert primaryship.coord_epoch == 1
    assert (await store.load(primaryship.revision)).records == {}
    assert store.holds()


async def test_each_campaign_has_a_higher_epoch_also_after_reopening(reopen: Reopen) -> None:
    epochs = []
    for _ in range(3):
        store = await reopen()
        epochs += [(await store.campaign()).coord_epoch, (await store.campaign()).coord_epoch]
    assert epochs == [1, 2, 3, 4, 5, 6]


async def test_a_campaign_can_ask_for_a_floor(reopen: Reopen) -> None:
    store = await reopen()
    assert (await store.campaign(at_least=9)).coord_epoch == 9
    assert (await store.campaign(at_least=5)).coord_epoch == 10


async def test_what_was_committed_is_there_after_reopening(reopen: Reopen) -> None:
    writer = await Writer(await reopen()).begin()
    first = await writer.commit({"a": b"1", "b": b"2"})
    second = await writer.commit({"b": b"3", "c": b"\x00\xff"}, ["a", "never"])
    assert second.revision > first.revision
    store = await reopen()
    await store.campaign()
    loaded = await store.load(second.revision)
    assert loaded.records == {"b": (b"3", second.revision), "c": (b"\x00\xff", second.revision)}
    assert loaded.revision >= second.revision


async def test_guards_hold_all_or_nothing_is_written(reopen: Reopen) -> None:
    writer = await Writer(await reopen()).begin()
    made = await writer.commit({"a": b"1"}, [], [("a", 0)])
    assert made.outcome is Outcome.OK
    assert (await writer.commit({"a": b"x", "b": b"x"}, [], [("a", 0)])) == Committed(Outcome.CONFLICT)
    assert (await writer.commit({"b": b"x"}, ["a"], [("a", made.revision), ("b", 7)])) == Committed(Outcome.CONFLICT)
    assert await writer.values() == {"a": b"1"}
    after = await writer.commit({"a": b"2"}, [], [("a", made.revision)])
    assert after.outcome is Outcome.OK
    assert (await writer.commit({}, ["a"], [("a", made.revision)])).outcome is Outcome.CONFLICT
    assert (await writer.commit({"b": b"y"}, ["a"], [("a", after.revision)])).outcome is Outcome.OK
    assert (await writer.commit({"a": b"new"}, [], [("a", 0)])).outcome is Outcome.OK
    assert await writer.values() == {"a": b"new", "b": b"y"}


async def test_nobody_commits_without_or_after_primaryship(reopen: Reopen) -> None:
    store = await reopen()
    assert not store.holds()
    refused = (Outcome.LOST, Outcome.UNKNOWN) if isinstance(store, FaultyStore) else (Outcome.LOST,)
    assert (await store.commit({"a": b"1"}, [])).outcome in refused
    await store.campaign()
    await store.resign()
    assert not store.holds()
    assert (await store.commit({"b": b"1"}, [])).outcome in refused
    if not isinstance(store, FaultyStore):
        await store.campaign()
        assert await values(store) == {}


async def test_watch_returns_when_primaryship_is_given_up(reopen: Reopen) -> None:
    store = await reopen()
    await store.campaign()
    watching = asyncio.create_task(store.watch())
    await asyncio.sleep(0)
    assert not watching.done()
    await store.resign()
    if isinstance(store, MemoryStore):
        await MemoryStore(store.disk).campaign()
    await asyncio.wait_for(watching, SOON_S)


@pytest.mark.parametrize("count", [130, 2500])
async def test_many_records_are_one_commit_and_change_in_the_next(reopen: Reopen, count: int) -> None:
    writer = await Writer(await reopen()).begin()
    many = {f"part/t/{number}": b"x" * 100 for number in range(count)}
    made = await writer.commit(many, [], [(key, 0) for key in many])
    assert await writer.values() == many
    versions = {key: version for key, (_, version) in (await writer.store.load(made.revision)).records.items()}
    assert min(versions.values()) >= made.revision  # a load may tell them anew: etcd copies large commits into place
    wrong = [(key, versions[key]) for key in many if key != "part/t/0"]
    wrong.append(("part/t/0", made.revision - 1))
    assert (await writer.commit({key: b"no" for key in many}, [], wrong)).outcome is Outcome.CONFLICT
    one = await writer.commit({"part/t/7": b"y"}, [], [("part/t/7", versions["part/t/7"])])
    assert one.outcome is Outcome.OK
    rest = [key for key in many if key != "part/t/7"]
    guards = [("part/t/7", one.revision), *((key, versions[key]) for key in rest)]
    gone = await writer.commit({"part/t/7": b"z"}, rest, guards)
    assert gone.outcome is Outcome.OK
    assert await writer.values() == {"part/t/7": b"z"}
    store = await reopen()
    loaded = await store.load((await store.campaign()).revision)
    assert {key: value for key, (value, _) in loaded.records.items()} == {"part/t/7": b"z"}


@pytest.mark.parametrize("seed", range(3))
async def test_any_sequence_of_commits_is_what_a_dictionary_makes_of_it(reopen: Reopen, seed: int) -> None:
    """Guards right and wrong, deletions, large commits, lives that end in between."""
    rng = random.Random(seed)
    writer = await Writer(await reopen()).begin()
    model: dict[str, tuple[bytes, int]] = {}
    for step in range(40):
        if rng.random() < 0.1:
            known = writer.known.revision
            writer = Writer(await reopen())
            writer.known = Loaded(known, {})
            await writer.begin()
            loaded = writer.known.records
            assert {k: v for k, (v, _) in loaded.items()} == {k: v for k, (v, _) in model.items()}
            model = dict(loaded)
        chosen = rng.sample([f"k{number}" for number in range(300)], rng.choice([1, 2, 5, 250]))
        deletes = [key for key in chosen if rng.random() < 0.3]
        puts = {key: b"%d" % step + bytes(rng.randrange(200)) for key in chosen if key not in deletes}
        puts["step"] = b"%d" % step
        right = rng.random() < 0.8
        versions = {key: model.get(key, (b"", 0))[1] for key in (*chosen, "step")}
        committed = await writer.commit(puts, deletes, [(key, versions[key] + (not right)) for key in versions])
        assert (committed.outcome is Outcome.OK) is right, (step, committed)
        if committed.outcome is Outcome.OK:
            for key in deletes:
                model.pop(key, None)
            model.update({key: (value, committed.revision) for key, value in puts.items()})
    assert await writer.values() == {key: value for key, (value, _) in model.items()}


# -- memory with faults -----------------------------------------------------------------------------


async def test_faults_are_drawn_and_stale_copies_are_not_shown() -> None:
    store = FaultyStore(MemoryDisk(), seed=5)
    writer = await Writer(store).begin()
    for number in range(60):
        await writer.commit({f"k{number}": b"v"})
        assert (await store.load(writer.known.revision)).revision >= writer.known.revision
    assert len(await writer.values()) == 60
    assert len(writer.epochs) > 10, "a store without faults would prove nothing"
    assert store.stale_refused > 0
    assert writer.epochs == sorted(set(writer.epochs))


# -- memory: rivals and faults ----------------------------------------------------------------------


async def test_a_zombie_never_commits() -> None:
    disk = MemoryDisk()
    zombie, successor = MemoryStore(disk), MemoryStore(disk)
    await zombie.campaign()
    await successor.campaign()
    assert (await zombie.commit({"a": b"zombie"}, [])).outcome is Outcome.LOST
    assert (await successor.commit({"a": b"1"}, [])).outcome is Outcome.OK
    assert await values(successor) == {"a": b"1"}


@pytest.mark.parametrize(("fault", "written"), [("unknown-before", False), ("unknown-after", True)])
async def test_an_unknown_outcome_is_either(fault: str, written: bool) -> None:
    store = MemoryStore(fault=lambda: fault)
    await store.campaign()
    assert (await store.commit({"a": b"1"}, [])).outcome is Outcome.UNKNOWN
    assert bool(await values(store)) is written


@pytest.mark.parametrize(("fault", "written"), [("crash-before", False), ("crash-after", True)])
async def test_a_crash_is_on_either_side_of_a_commit(fault: str, written: bool) -> None:
    store = MemoryStore(fault=lambda: fault)
    await store.campaign()
    with pytest.raises(Crashed):
        await store.commit({"a": b"1"}, [])
    assert bool(await values(store)) is written


# -- SQLite -----------------------------------------------------------------------------------------


async def test_a_second_coordinator_on_the_same_directory_is_kept_out(tmp_path: Path) -> None:
    first, second = SqliteStore(tmp_path), SqliteStore(tmp_path)
    await first.campaign()
    try:
        with pytest.raises(StoreUnusable, match="in use"):
            await second.campaign()
        assert (await first.commit({"a": b"1"}, [])).outcome is Outcome.OK
        await first.close()
        assert (await second.campaign()).coord_epoch == 2
    finally:
        await first.close()
        await second.close()


async def test_a_takeover_past_the_lock_is_noticed_at_the_next_commit(tmp_path: Path) -> None:
    """A directory on a file system that loses locks."""
    store = SqliteStore(tmp_path)
    await store.campaign()
    database = sqlite3.connect(tmp_path / "meta.sqlite")
    database.execute("UPDATE meta SET number = number + 1 WHERE name = 'coord_epoch'")
    database.commit()
    database.close()
    assert (await store.commit({"a": b"zombie"}, [])).outcome is Outcome.LOST
    assert await values(store) == {}
    await store.close()


async def test_commits_are_synced_in_full_and_logged_ahead(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.campaign()
    database = store._database
    assert database is not None
    assert database.execute("PRAGMA synchronous").fetchone() == (2,)
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    await store.close()


async def test_a_copy_taken_at_any_moment_holds_every_reported_commit(tmp_path: Path) -> None:
    """What kill -9 leaves behind: the files as they are, without a clean close."""
    store = SqliteStore(tmp_path / "live")
    await store.campaign()
    for number in range(20):
        assert (await store.commit({f"k{number}": b"v"}, [])).outcome is Outcome.OK
        copy = tmp_path / f"copy-{number}"
        copy.mkdir()
        for file in (tmp_path / "live").iterdir():
            if file.name != "lock" and not file.name.endswith("-shm"):
                (copy / file.name).write_bytes(file.read_bytes())
        restored = SqliteStore(copy)
        await restored.campaign()
        assert len(await values(restored)) == number + 1
        await restored.close()
    await store.close()


async def test_damage_is_told_and_never_guessed_at(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.campaign()
    await store.commit({f"k{number}": bytes(500) for number in range(200)}, [])
    await store.close()
    file = tmp_path / "meta.sqlite"
    content = bytearray(file.read_bytes())
    content[4096 * 3 : 4096 * 9] = bytes([0xA5]) * (4096 * 6)
    file.write_bytes(content)
    damaged = SqliteStore(tmp_path)
    with pytest.raises(StoreUnusable):
        await damaged.campaign()
    await damaged.close()


async def test_a_format_of_a_later_release_is_refused(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.campaign()
    await store.close()
    database = sqlite3.connect(tmp_path / "meta.sqlite")
    database.execute("UPDATE meta SET number = 99 WHERE name = 'format'")
    database.commit()
    database.close()
    later = SqliteStore(tmp_path)
    with pytest.raises(StoreUnusable, match="format 99"):
        await later.campaign()
    await later.close()


async def test_a_store_whose_disk_failed_stays_failed(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.campaign()
    assert store._database is not None
    store._database.execute("PRAGMA max_page_count=4")  # a full disk
    with pytest.raises(StoreUnusable, match="full"):
        await store.commit({f"k{number}": bytes(4000) for number in range(50)}, [])
    with pytest.raises(StoreUnusable):
        await store.commit({"a": b"1"}, [])
    await store.close()
