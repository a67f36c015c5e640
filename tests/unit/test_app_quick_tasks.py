"""Quick tasks: what is not written of them, what is stored together, and what is promised all the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

import ferryline as fl
from ferryline.app.depth import AHEAD_RECORDS_MAX, AHEAD_S, AHEAD_TIMES_MAX, STALL_S, Depth
from ferryline.app.statuses import new_id, results_partition
from ferryline.protocol.errors import InvalidArgument, UnknownTopic
from tests.polling import poll

State = fl.JobState
TWO = fl.Retry(2, backoff=fl.exponential(0, 0))


class Shop:
    """An app with a task that is quick, one whose results nobody wants, and one that takes as long as it is told."""

    def __init__(self, **options: Any) -> None:
        self.app = fl.App(name="shop", **options)
        self.ran: list[Any] = []

        @self.app.task(queue="media", retry=TWO)
        async def echo(value: int, *, context: fl.Context) -> int:
            self.ran.append(value)
            if value < 0 and context.attempt < 2:
                raise ValueError("negative")
            return value

        @self.app.task(queue="media", retry=TWO, results=False)
        async def forget(value: int) -> int:
            self.ran.append(value)
            if value < 0:
                raise ValueError("negative")
            return value

        @self.app.task(queue="media")
        async def sleep(seconds: float) -> None:
            self.ran.append(seconds)
            await asyncio.sleep(seconds)

        self.echo, self.forget, self.sleep = echo, forget, sleep


@pytest.fixture
async def cluster() -> AsyncIterator[fl.testing.Cluster]:
    async with fl.testing.Cluster(brokers=2) as cluster:
        yield cluster


@pytest.fixture
async def client(cluster: fl.testing.Cluster) -> AsyncIterator[fl.Client]:
    async with cluster.client() as client:
        yield client


async def written(client: fl.Client) -> list[str]:
    """The states that workers wrote, in order within each job."""
    async with client.consumer("media.results", start="start") as consumer:
        return [msgspec.json.decode(one.raw)["state"] for one in await consumer.pull(1_000, 2.0)]


# -- what is written -----------------------------------------------------------------------------------


async def test_of_a_quick_task_only_its_end_is_written(client: fl.Client) -> None:
    shop = Shop()
    async with shop.app.connected(client), shop.app.worker():
        assert await (await shop.echo.submit(1)).result(30) == 1
    assert await written(client) == ["done"]


async def test_what_still_runs_after_a_moment_is_said_to_be_running(client: fl.Client) -> None:
    shop = Shop()
    async with shop.app.connected(client), shop.app.worker():
        job = await shop.sleep.submit(20.0)
        told = [str(one) async for one in job.watch()]
    assert told[-2:] == ["running (attempt 1 of 2)", "done"]
    assert await written(client) == ["running", "done"]


async def test_a_second_attempt_is_said_to_be_running_at_once(client: fl.Client) -> None:
    shop = Shop(running_after=3600)
    async with shop.app.connected(client), shop.app.worker():
        assert await (await shop.echo.submit(-1)).result(30) == -1
    assert await written(client) == ["retrying", "running", "done"]


async def test_an_app_may_have_each_beginning_written(client: fl.Client) -> None:
    shop = Shop(running_after=0)
    async with shop.app.connected(client), shop.app.worker():
        await (await shop.echo.submit(1)).result(30)
    assert await written(client) == ["running", "done"]


async def test_of_a_task_without_results_only_failures_are_written(client: fl.Client) -> None:
    shop = Shop()
    async with shop.app.connected(client), shop.app.worker():
        good, bad = await shop.forget.submit(1), await shop.forget.submit(-1)
        with pytest.raises(fl.JobFailed, match="dead: ValueError: negative"):
            await bad.result(60)
        assert [str(one) async for one in good.watch()][-1] == "forgotten"
        with pytest.raises(fl.JobFailed, match="forgotten"):
            await good.result(60)
    assert sorted(await written(client)) == ["dead", "retrying"]
    other = Shop()  # knows nothing but the id, and reads the rest from the record
    async with other.app.connected(client):
        assert (await other.app.job(good.id).status()).state is State.FORGOTTEN


async def test_whoever_submits_says_whether_results_are_kept(client: fl.Client) -> None:
    """A worker of another version keeps to the record."""
    submits, works = Shop(), Shop()
    works.echo.keeps_results = False
    async with submits.app.connected(client):
        job = await submits.echo.submit(1)
    async with works.app.connected(client), works.app.worker():
        assert await works.app.job(job.id).result(30) == 1


# -- what is stored together ---------------------------------------------------------------------------


async def test_waiting_for_results_holds_no_place_and_nothing_is_acknowledged_before(
    cluster: fl.testing.Cluster, client: fl.Client
) -> None:
    """One place, and the broker of the results is away: all tasks run, none is done; then each is, and ran once."""
    for topic in ("media", "media.results"):
        await client.admin.create_topic(topic, partitions=1, replication=1)
    if cluster.primary("media") == cluster.primary("media.results"):
        pytest.fail("both topics have one broker; the story needs two")
    shop = Shop()
    async with shop.app.connected(client), shop.app.worker(concurrency=1) as worker:
        first = await shop.echo.submit_many([(0,) for _ in range(200)])  # from here on they are known to be quick
        assert [await one.result(60) for one in first if isinstance(one, fl.Job)] == [0] * 200
        shop.ran.clear()
        receiver = worker.lines[0].receiver
        gone = cluster.primary("media.results")
        cluster.pause(gone)
        jobs = await shop.echo.submit_many([(number,) for number in range(1, 11)])
        await poll(lambda: len(shop.ran) == 10)
        await asyncio.sleep(3)
        assert receiver.unsettled == 10
        cluster.resume(gone)
        assert [await one.result(60) for one in jobs if isinstance(one, fl.Job)] == [*range(1, 11)]
        await poll(lambda: not receiver.unsettled)
    assert sorted(shop.ran) == [*range(1, 11)]


async def test_many_jobs_are_submitted_together_and_told_one_by_one(client: fl.Client) -> None:
    shop = Shop()
    async with shop.app.connected(client), shop.app.worker():
        jobs = await shop.echo.submit_many([(1,), {"value": 2}, (3,)], priority=5)
        assert [await one.result(30) for one in jobs if isinstance(one, fl.Job)] == [1, 2, 3]


async def test_of_many_jobs_none_is_sent_when_one_would_not_be_taken(client: fl.Client) -> None:
    shop = Shop()
    async with shop.app.connected(client):
        with pytest.raises(InvalidArgument, match="value"):
            await shop.echo.submit_many([(1,), {"other": 2}])
        wrong: list[Any] = ["7", b"7", 7]  # text is no tuple of its characters
        for one in wrong:
            with pytest.raises(InvalidArgument, match="calls"):
                await shop.echo.submit_many([(1,), one])
        with pytest.raises(UnknownTopic):
            await client.admin.describe_topic("media")


def test_jobs_that_were_submitted_together_have_their_results_together() -> None:
    ids = [new_id("echo", 1_000_000 + ms, ms % 12, f"{ms:016x}") for ms in range(8_000)]
    places = [results_partition(one, 8) for one in ids]
    assert places[:1_000] == [places[0]] * 1_000
    assert set(places) == set(range(8))
    assert len({results_partition(f"chosen-{number}", 8) for number in range(100)}) == 8


# -- how many are fetched ------------------------------------------------------------------------------


def depth_after(concurrency: int, *seconds: float) -> int:
    depth = Depth(concurrency, concurrency)
    for one in seconds:
        depth.took(one)
    return depth.decide()


def test_nothing_is_fetched_ahead_of_slow_handlers_and_much_of_quick_ones() -> None:
    assert depth_after(16) == 16
    assert depth_after(16, *[60.0] * 100) == 16
    assert depth_after(16, *[0.0] * 200) == 16 + 16 * AHEAD_TIMES_MAX
    assert depth_after(1_000, *[0.0] * 200) == 1_000 + AHEAD_RECORDS_MAX
    assert depth_after(16, *[AHEAD_S / 4.5] * 200) == 16 + 16 * 4
    assert depth_after(16, *[0.0] * 200, 60.0) == 16


def test_when_all_handlers_stand_still_nothing_is_kept_from_others() -> None:
    depth = Depth(4, 4)
    for _ in range(200):
        depth.took(0.001)
    assert depth.decide() > 4
    assert depth.stalled() == 4
    assert depth.decide() == 4


async def test_what_was_fetched_ahead_of_handlers_that_turn_slow_goes_to_others(client: fl.Client) -> None:
    shop = Shop()
    loop = asyncio.get_running_loop()
    async with shop.app.connected(client), shop.app.worker(concurrency=2) as worker:
        quick = await shop.echo.submit_many([(0,) for _ in range(200)])
        for one in quick:
            assert isinstance(one, fl.Job)
            await one.result(60)
        line = worker.lines[0]
        await shop.sleep.submit_many([(1_000.0,) for _ in range(20)])
        await poll(lambda: shop.ran.count(1_000.0) == 2)
        began = loop.time()
        async with client.receiver("media", group="tasks", prefetch=18) as other:
            for _ in range(18):
                message = await asyncio.wait_for(anext(aiter(other)), 60)
                assert message.delivery_count == 1  # it was given back, and that is no attempt
                await message.ack()
        assert loop.time() - began < STALL_S + 5
        assert line.receiver.unsettled == 2
        await worker.stop(0)


async def test_a_last_attempt_begins_when_nothing_is_here_that_could_die_with_it(
    client: fl.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deep(Depth):
        """Knows its handlers to be quick from the beginning."""

        def __init__(self, concurrency: int, least: int) -> None:
            super().__init__(concurrency, least)
            self._mean_s = 0.0

    monkeypatch.setattr("ferryline.app.worker.Depth", Deep)
    app, here = fl.App(name="deep"), list[int]()

    @app.subscriber("orders", retry=TWO, concurrency=2)
    async def handle(context: fl.Context) -> None:
        here.append(worker.lines[0].receiver.unsettled)
        await asyncio.sleep(1_000)

    await client.admin.create_topic("orders", partitions=1, retry=TWO)
    async with client.producer() as producer:
        for number in range(40):
            await producer.send("orders", b"x", key=str(number))
    async with app.connected(client), client.receiver("orders", group="deep", prefetch=40) as other:
        for _ in range(40):
            await (await anext(aiter(other))).nack(5)  # when the worker is there, and has asked for many
        await other.close()
        async with app.worker() as worker:
            await poll(lambda: len(here) == 2)
            await asyncio.sleep(STALL_S / 2)  # time for more to come, and not yet for it to go back for another reason
            here.append(worker.lines[0].receiver.unsettled)
            assert max(here) <= 4, "what a worker holds in any case"
            await worker.stop(0)
