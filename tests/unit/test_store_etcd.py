"""What only etcd has: rivals, leases, members that fail, commits of many parts, secrets. Real etcd processes."""

from __future__ import annotations

import asyncio
import os
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from ferryline_coordinator.store.etcd import EtcdStore
from ferryline_coordinator.store.etcd_client import EtcdClient, EtcdUnavailable, text
from ferryline_coordinator.store.etcd_requests import after
from ferryline_coordinator.store.interface import Outcome, StoreUnusable
from tests.polling import SOON_S, poll
from unit.store_etcd import EtcdProcesses

pytestmark = pytest.mark.etcd
ELECTED_S = 60.0  # etcd itself may need several elections on a machine that is busy
Open = Callable[..., EtcdStore]


@pytest.fixture
async def prefix() -> str:
    return f"t-{uuid.uuid4().hex}"


@pytest.fixture
async def open_store(etcd: EtcdProcesses, prefix: str) -> AsyncIterator[Open]:
    """Stores of several coordinators of one cluster."""
    made: list[EtcdStore] = []
    await asyncio.to_thread(etcd.settle)

    def make(**options: Any) -> EtcdStore:
        made.append(etcd.store(prefix, **options))
        return made[-1]

    yield make
    for store in made:
        await store.close()


async def below(client: EtcdClient, key: str) -> int:
    """How many keys there are under a prefix."""
    body = {"key": text(key), "range_end": text(after(key)), "count_only": True}
    return int((await client.call("kv/range", body, within_s=5)).get("count", 0))


async def deposed(store: EtcdStore) -> EtcdStore:
    """Take primaryship from whoever has it, as a standby does that finds the process gone."""
    await asyncio.wait_for(store.campaign(), ELECTED_S)
    return store


async def gone(_: str) -> bool:
    return True


# -- rivals -----------------------------------------------------------------------------------------


async def test_a_deposed_coordinator_commits_nothing_although_its_lease_goes_on(open_store: Open) -> None:
    zombie = open_store(url="https://a:1", ttl_s=60)
    await zombie.campaign()
    assert (await zombie.commit({"a": b"1"}, [])).outcome is Outcome.OK
    successor = await deposed(open_store(url="https://b:1", refuses=gone))
    assert successor.deposed == 1
    assert zombie.holds(), "the clock alone would let it go on: only etcd's guards stop it here"
    assert (await zombie.commit({"a": b"zombie"}, [])).outcome is Outcome.LOST
    assert (await zombie.commit({f"z{n}": b"zombie" for n in range(300)}, [])).outcome is Outcome.LOST
    assert (await successor.commit({"b": b"2"}, [])).outcome is Outcome.OK
    assert (await zombie.commit({"b": b"zombie"}, ["a"], [("b", 0)])).outcome is Outcome.LOST
    loaded = await successor.load(0)
    assert {key: value for key, (value, _) in loaded.records.items()} == {"a": b"1", "b": b"2"}


async def test_a_deposed_coordinator_hears_of_it_at_once(open_store: Open) -> None:
    first = open_store(url="https://a:1", ttl_s=60)
    await first.campaign()
    watching = asyncio.create_task(first.watch())
    await deposed(open_store(url="https://b:1", refuses=gone))
    await asyncio.wait_for(watching, SOON_S)


async def test_a_resignation_lets_the_next_one_begin_at_once_under_a_higher_epoch(open_store: Open) -> None:
    first, second, third = (open_store(url=f"https://{name}:1", ttl_s=60) for name in "abc")
    epoch = (await first.campaign()).coord_epoch
    waiting = [asyncio.create_task(store.campaign()) for store in (second, third)]
    await poll(lambda: second.active() == third.active() == "https://a:1")

    async def everybody() -> bool:
        return set(await first.members() or ()) == {"https://a:1", "https://b:1", "https://c:1"}

    await poll(everybody)
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in waiting)
    await first.resign()
    done, pending = await asyncio.wait(waiting, timeout=ELECTED_S, return_when=asyncio.FIRST_COMPLETED)
    assert done, "well before the lease would have ended"
    assert [task.result().coord_epoch for task in done] == [epoch + 1]
    assert len(pending) == 1, "one is active at a time"
    for task in pending:
        task.cancel()


async def test_nobody_wins_before_the_silent_one_has_stopped_to_believe_in_itself(open_store: Open) -> None:
    silent, next_one = open_store(url="https://a:1", ttl_s=2), open_store(url="https://b:1", ttl_s=2)
    await silent.campaign()
    keeping = silent._candidate.lease._task
    assert keeping is not None
    keeping.cancel()  # as a process that is stopped: no more keep-alives
    won = asyncio.create_task(next_one.campaign())
    last_held = time.monotonic()
    while not won.done():
        if silent.holds():
            last_held = time.monotonic()
        await asyncio.sleep(0.005)
        assert time.monotonic() - last_held < ELECTED_S
    assert not silent.holds()
    assert time.monotonic() - last_held > 0.2, "there is room between the two for clocks that differ"
    assert (await silent.commit({"a": b"zombie"}, [])).outcome is Outcome.LOST


async def test_an_unreachable_standby_does_not_depose_again_and_again(open_store: Open) -> None:
    first = open_store(url="https://a:1", ttl_s=60, refuses=gone)
    await first.campaign()
    second = await deposed(open_store(url="https://b:1", ttl_s=60, refuses=gone))
    third = await deposed(first)
    assert (first.deposed, second.deposed) == (1, 1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(second.campaign(), 2)
    assert third.holds()


# -- answers that are lost --------------------------------------------------------------------------


class LossyClient(EtcdClient):
    """Loses requests before they are sent, and answers after they were applied, by a seed."""

    rng: random.Random
    loss = 0.0

    async def _post(self, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        if path == "kv/txn" and self.rng.random() < self.loss:
            raise EtcdUnavailable("the request was lost")
        answer = await super()._post(path, body, timeout_s)
        if path == "kv/txn" and self.rng.random() < self.loss:
            raise EtcdUnavailable("the answer was lost")
        return answer


@pytest.mark.parametrize("seed", range(3))
async def test_a_commit_whose_answers_are_lost_is_made_once(open_store: Open, seed: int) -> None:
    store = open_store()
    store._client.__class__ = LossyClient
    client = store._client
    assert isinstance(client, LossyClient)
    client.rng, client.loss = random.Random(seed), 0.0
    await store.campaign()
    client.loss = 0.3
    versions: dict[str, int] = {}
    for step in range(25):
        size = client.rng.choice([1, 3, 120, 230])
        puts = {f"k{number}": b"%d" % step for number in range(size)}
        committed = await store.commit(puts, [], [(key, versions.get(key, 0)) for key in puts])
        if committed.outcome is Outcome.UNKNOWN:  # a part of a large one: allowed, as long as nothing is wrong
            loaded = await store.load((await store.campaign()).revision)
            versions = {key: version for key, (_, version) in loaded.records.items()}
            written = {loaded.records.get(key, (b"", 0))[0] == value for key, value in puts.items()}
            assert len(written) == 1, "all or nothing"
            continue
        assert committed.outcome is Outcome.OK, step
        versions.update(dict.fromkeys(puts, committed.revision))
    client.loss = 0.0
    loaded = await store.load(0)
    assert loaded.records["k0"][0] == b"24" or versions["k0"] == loaded.records["k0"][1]


class SlowNetwork(EtcdClient):
    """Keeps one request back, which arrives later; its sender has sent it again meanwhile."""

    kept: tuple[str, dict[str, Any]] | None = None
    keep = False

    async def _post(self, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        if self.keep and path == "kv/txn":
            self.keep, self.kept = False, (path, body)
            raise EtcdUnavailable("no answer in time")
        return await super()._post(path, body, timeout_s)


async def test_a_commit_that_arrives_late_changes_nothing_even_without_guards_of_its_own(open_store: Open) -> None:
    store = open_store()
    store._client.__class__ = SlowNetwork
    client = store._client
    assert isinstance(client, SlowNetwork)
    await store.campaign()
    client.keep = True
    assert (await store.commit({"a": b"1"}, [])).outcome is Outcome.OK
    assert (await store.commit({"a": b"2"}, [])).outcome is Outcome.OK
    assert client.kept is not None
    answer = await client._post(*client.kept, 2.0)
    assert not answer.get("succeeded")
    assert (await store.load(0)).records["a"][0] == b"2"
    assert (await store.commit({"a": b"3"}, [])).outcome is Outcome.OK


# -- members that fail ------------------------------------------------------------------------------


async def test_commits_go_on_while_each_member_in_turn_is_down(etcd: EtcdProcesses, open_store: Open) -> None:
    store = open_store(url="https://a:1")
    await store.campaign()
    number, worst = 0, 0.0
    for name in etcd.names:
        etcd.kill(name)
        began_without, made = time.monotonic(), 0
        while time.monotonic() < began_without + 2.0 or made < 3:  # a member that led is missed for an election first
            assert time.monotonic() < began_without + 60, f"{made} commits without {name}"
            began = time.monotonic()
            committed = await store.commit({f"k{number}": b"v"}, [], [(f"k{number}", 0)])
            worst = max(worst, time.monotonic() - began)
            if committed.outcome is not Outcome.OK:  # an election took longer than a commit waits
                assert committed.outcome in (Outcome.UNKNOWN, Outcome.LOST)
                await store.campaign()
                loaded = await store.load(0)
                number = max(int(key[1:]) for key in loaded.records)
            else:
                made += 1
            number += 1
        etcd.spawn(name)
        await asyncio.to_thread(etcd.wait_ready, name)
    loaded = await store.load(0)
    assert sorted(loaded.records, key=lambda key: int(key[1:]))[:3] == ["k0", "k1", "k2"]
    assert len(loaded.records) >= number >= 9
    assert worst < 30.0, "a commit waits for a few seconds, then it says that its outcome is unknown"


async def test_without_a_majority_a_commit_is_unknown_and_primaryship_ends_by_the_clock(
    etcd: EtcdProcesses, open_store: Open
) -> None:
    store = open_store(url="https://a:1", ttl_s=2)
    await store.campaign()
    assert (await store.commit({"a": b"1"}, [])).outcome is Outcome.OK
    watching = asyncio.create_task(store.watch())
    for name in etcd.names[:2]:
        etcd.service(name).send_signal(19)
    try:
        began = time.monotonic()
        committed = await store.commit({"a": b"2"}, [])
        assert committed.outcome is Outcome.UNKNOWN
        assert time.monotonic() - began < ELECTED_S
        await asyncio.wait_for(watching, ELECTED_S)
        assert not store.holds()
        assert (await store.commit({"a": b"3"}, [])).outcome is Outcome.LOST
    finally:
        for name in etcd.names[:2]:
            etcd.service(name).send_signal(18)
    await asyncio.to_thread(etcd.settle)
    primaryship = await asyncio.wait_for(store.campaign(), ELECTED_S)
    assert primaryship.coord_epoch == 2
    assert (await store.load(primaryship.revision)).records["a"][0] in (b"1", b"2")
    assert (await store.commit({"a": b"4"}, [])).outcome is Outcome.OK


# -- commits of many parts --------------------------------------------------------------------------


async def test_a_large_commit_whose_copying_was_cut_short_is_whole_for_the_next_one(
    etcd: EtcdProcesses, open_store: Open, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_store()
    await first.campaign()
    assert (await first.commit({"k1": b"old", "gone": b"old"}, [])).outcome is Outcome.OK
    before = await first.load(0)

    async def cut_short(*_: Any) -> Any:
        raise EtcdUnavailable("the process ended here")

    monkeypatch.setattr(first._staging, "copy", cut_short)
    many = {f"k{number}": os.urandom(6_000) for number in range(500)}  # three parts of one megabyte
    guards = [("k1", before.records["k1"][1]), ("gone", before.records["gone"][1])]
    assert (await first.commit(many, ["gone"], guards)).outcome is Outcome.OK
    assert (await first.commit({"k2": b"later"}, [])).outcome is Outcome.UNKNOWN, "nothing overtakes it"
    await first.resign()
    client = etcd.client()
    try:
        assert await below(client, f"/{prefix}/stage/") == 3
        second = open_store()
        loaded = await second.load((await second.campaign()).revision)
        assert {key: value for key, (value, _) in loaded.records.items()} == many
        version = loaded.records["k3"][1]
        assert (await second.commit({"k3": b"new"}, [], [("k3", version)])).outcome is Outcome.OK
        assert await below(client, f"/{prefix}/stage/") == 0
    finally:
        await client.close()
    assert (await second.load(0)).records["k3"][0] == b"new"
    assert len((await second.load(0)).records) == 500


async def test_parts_of_a_commit_that_never_happened_are_removed(
    etcd: EtcdProcesses, open_store: Open, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_store()
    await first.campaign()

    async def cut_short(*_: Any) -> Any:
        raise EtcdUnavailable("the process ended here")

    monkeypatch.setattr(first, "_move_chain", cut_short)
    assert (await first.commit({f"k{number}": b"x" for number in range(300)}, [])).outcome is Outcome.UNKNOWN
    await first.resign()
    client = etcd.client()
    try:
        assert await below(client, f"/{prefix}/stage/") == 1
        second = open_store()
        assert (await second.load((await second.campaign()).revision)).records == {}
        assert await below(client, f"/{prefix}/stage/") == 0
    finally:
        await client.close()


async def test_records_of_any_size_that_can_be_are_kept_and_larger_ones_are_refused_before_anything_is_written(
    open_store: Open,
) -> None:
    store = open_store()
    await store.campaign()
    repeated, noise = b"m-0123456789abcdef" * 200_000, os.urandom(1_100_000)
    assert (await store.commit({"repeated": repeated, "noise": noise}, [])).outcome is Outcome.OK
    loaded = await store.load(0)
    assert (loaded.records["repeated"][0], loaded.records["noise"][0]) == (repeated, noise)
    with pytest.raises(StoreUnusable, match="over etcd's limit"):
        await store.commit({"small": b"x", "noise": os.urandom(1_300_000)}, [])
    assert "small" not in (await store.load(0)).records


# -- what is read -----------------------------------------------------------------------------------


async def test_a_store_that_went_back_is_not_read(open_store: Open) -> None:
    store = open_store()
    primaryship = await store.campaign()
    with pytest.raises(StoreUnusable, match="lost writes"):
        await store.load(primaryship.revision + 1_000_000)


async def test_history_can_be_given_up_at_any_time(etcd: EtcdProcesses, open_store: Open) -> None:
    store = open_store()
    await store.campaign()
    for number in range(5):
        await store.commit({"a": b"%d" % number}, [])
    client = etcd.client()
    try:
        revision = (await store.load(0)).revision
        await client.call("kv/compaction", {"revision": str(revision)}, within_s=5)
    finally:
        await client.close()
    assert (await store.load(0)).records["a"][0] == b"4"
    assert (await store.commit({"a": b"5"}, [])).outcome is Outcome.OK


async def test_the_record_with_the_claim_key_is_sealed_and_another_secret_does_not_open_it(
    etcd: EtcdProcesses, open_store: Open, prefix: str
) -> None:
    store = open_store()
    await store.campaign()
    await store.commit({"cluster": b"the claim key", "topic/1": b"a name"}, [])
    client = etcd.client()
    try:
        body = {"key": text(f"/{prefix}/rec/"), "range_end": text(after(f"/{prefix}/rec/"))}
        kvs = (await client.call("kv/range", body, within_s=5))["kvs"]
    finally:
        await client.close()
    stored = "".join(kv["value"] for kv in kvs)
    assert text(b"\0the claim key") not in stored
    assert text(b"\0a name") in stored
    assert (await store.load(0)).records["cluster"][0] == b"the claim key"
    with pytest.raises(StoreUnusable, match="sealed"):
        await open_store(sealed=False).load(0)


async def test_a_vault_keeps_what_came_first_and_opens_only_with_the_secret(etcd: EtcdProcesses, prefix: str) -> None:
    (one, first), (two, second), (stranger, third) = (
        etcd.vault(prefix),
        etcd.vault(prefix),
        etcd.vault(prefix, b"another secret of the same length"),
    )
    try:
        made = await asyncio.gather(one.create("ca", b"one"), two.create("ca", b"two"))
        assert len(set(made)) == 1
        assert made[0] in (b"one", b"two")
        assert await one.read("ca") == await two.read("ca") == await one.create("ca", b"late") == made[0]
        assert await one.read("nothing") is None
        won = await asyncio.gather(one.replace("ca", made[0], b"3"), two.replace("ca", made[0], b"4"))
        assert sorted(won) == [False, True], "one of two"
        now = b"3" if won[0] else b"4"
        assert await two.read("ca") == now
        assert not await one.replace("ca", made[0], b"5")
        assert await one.replace("ca", made[0], now), "asked again, because the answer was lost: it is done"
        assert not await one.replace("nothing", b"", b"6")
        with pytest.raises(StoreUnusable, match="another cluster secret"):
            await stranger.read("ca")
    finally:
        closing: list[Awaitable[None]] = [first.close(), second.close(), third.close()]
        await asyncio.gather(*closing)
