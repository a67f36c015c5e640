"""Tasks and schedules on a cluster in this process, in virtual time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

import ferryline as fl
from ferryline.app import schedule as schedule_module
from ferryline.app.cron import Every
from ferryline.app.queue import GROUP
from ferryline.app.schedule import LATE_S, Schedule
from ferryline.protocol.errors import DeadlineExceeded, InvalidArgument, OutcomeUnknown, UnknownTopic
from tests.polling import poll

QUICK = fl.exponential(1, 2)
State = fl.JobState


class Size(msgspec.Struct):
    width: int
    height: int = 0


class Shop:
    """An app with some tasks; several of it are several processes."""

    def __init__(self) -> None:
        self.app = fl.App(name="shop")
        self.ran: list[Any] = []
        task = self.app.task

        @task(queue="media", timeout=60, retry=fl.Retry(3, backoff=QUICK))
        async def resize(url: str, size: Size, *, context: fl.Context) -> Size:
            self.ran.append((url, context.attempt))
            if url.startswith("flaky") and context.attempt < 3:
                raise ValueError(f"attempt {context.attempt}")
            if url.startswith("bad"):
                raise ValueError("never")
            if url.startswith("slow"):
                await asyncio.sleep(40)
            return Size(size.width, size.width)

        @task(queue="media")
        async def echo(value: Any = None) -> Any:
            self.ran.append(value)
            return value

        @task(queue="media", retry=fl.Retry(3, backoff=QUICK))
        async def large() -> str:
            self.ran.append("large")
            return "x" * 2_000_000

        @task(queue="media", retry=fl.Retry(3, backoff=QUICK))
        async def wrong() -> int:
            return "text"  # type: ignore[return-value]

        self.resize, self.echo, self.large, self.wrong = resize, echo, large, wrong


@pytest.fixture
async def cluster() -> AsyncIterator[fl.testing.Cluster]:
    async with fl.testing.Cluster(brokers=2) as cluster:
        yield cluster


@pytest.fixture
async def client(cluster: fl.testing.Cluster) -> AsyncIterator[fl.Client]:
    async with cluster.client() as client:
        yield client


@pytest.fixture
async def shop(client: fl.Client) -> AsyncIterator[Shop]:
    """Connected, and nobody works."""
    shop = Shop()
    async with shop.app.connected(client):
        yield shop


async def story(job: fl.Job[Any]) -> list[str]:
    return [str(status) async for status in job.watch()]


# -- results -------------------------------------------------------------------------------------------


async def test_a_task_returns_what_it_returns(shop: Shop) -> None:
    async with shop.app.worker():
        job = await shop.resize.submit("u", size=Size(5))
        assert await job.result(timeout=10) == Size(5, 5)
        assert str(await job.status()) == "done"
        assert [await (await shop.echo.submit(value)).result(10) for value in (None, 1, {"a": [b"x".hex()]})] == [
            None, 1, {"a": ["78"]},
        ]  # fmt: skip
    assert await job.result(timeout=1) == Size(5, 5)  # also when nobody works any more


async def test_a_result_is_found_by_id_from_elsewhere_and_later(shop: Shop, cluster: fl.testing.Cluster) -> None:
    async with shop.app.worker():
        job = await shop.resize.submit("u", Size(5))
        await job.result(10)
    await cluster.advance(hours=5)
    other = Shop()
    async with cluster.client(name="other") as client, other.app.connected(client):
        assert await other.app.job(job.id).result(5) == Size(5, 5)
        status = await other.app.job(job.id).status()
        assert (status.state, status.task, status.attempt, status.attempts) == (State.DONE, "resize", 1, 3)
        assert status.at is not None
        assert cluster.now() - status.at > timedelta(hours=4)


async def test_many_jobs_are_waited_for_together(shop: Shop) -> None:
    async with shop.app.worker(concurrency=50):
        jobs = [await shop.echo.submit(number) for number in range(200)]
        assert await asyncio.gather(*(job.result(30) for job in jobs)) == list(range(200))


async def test_a_result_that_does_not_come_in_time_is_a_typed_error(shop: Shop) -> None:
    job = await shop.echo.submit(1)
    with pytest.raises(DeadlineExceeded, match="it is queued"):
        await job.result(timeout=7)


# -- statuses ------------------------------------------------------------------------------------------


async def test_the_story_of_a_job_that_succeeds_at_the_third_attempt(shop: Shop) -> None:
    job = await shop.resize.submit("flaky", Size(1))
    told = asyncio.create_task(story(job))
    await asyncio.sleep(1)
    async with shop.app.worker():
        assert await job.result(60) == Size(1, 1)
        assert await told == [
            "queued",
            "retrying (attempt 1 of 3): ValueError: attempt 1",  # it never ran for long
            "running (attempt 2 of 3)", "retrying (attempt 2 of 3): ValueError: attempt 2",
            "running (attempt 3 of 3)", "done",
        ]  # fmt: skip


async def test_a_job_that_never_succeeds_is_dead_and_says_why(shop: Shop, client: fl.Client) -> None:
    async with shop.app.worker():
        job = await shop.resize.submit("bad", Size(1))
        with pytest.raises(fl.JobFailed, match="dead: ValueError: never") as failed:
            await job.result(60)
    assert 'raise ValueError("never")' in failed.value.traceback
    assert await story(job) == ["dead: ValueError: never"]
    assert shop.ran == [("bad", 1), ("bad", 2), ("bad", 3)]
    letters = client.dead_letters("media")
    [letter] = await poll(lambda: _browsed(letters))
    assert (letter.reason, letter.attempts) == ("ValueError: never", 3)


async def _browsed(letters: Any) -> list[Any]:
    try:
        return [letter async for letter in letters.browse()]
    except UnknownTopic:
        return []


@pytest.mark.parametrize("name", ["large", "wrong"])
async def test_a_result_that_cannot_be_stored_ends_the_job_at_once(shop: Shop, name: str) -> None:
    async with shop.app.worker():
        job = await getattr(shop, name).submit()
        with pytest.raises(fl.JobFailed, match=r"RecordTooLarge|Expected `int`"):
            await job.result(60)
        assert (await job.status()).attempt == 1


async def test_a_job_that_nobody_submitted_was_never_accepted(
    shop: Shop, cluster: fl.testing.Cluster, client: fl.Client
) -> None:
    now = f"{round(cluster.now().timestamp() * 1000):012x}"
    unknown = [f"resize@{now}.{partition}.0123456789abcdef" for partition in (0, 2, 77)]
    for job_id in (*unknown, "chosen"):  # also before there is any topic
        assert (await shop.app.job(job_id).status()).state is State.NEVER_ACCEPTED
    await shop.echo.submit()
    for job_id in (*unknown, "chosen"):
        assert (await shop.app.job(job_id).status()).state is State.NEVER_ACCEPTED


async def test_a_job_is_queued_or_delayed_or_running_by_what_its_queue_says(
    shop: Shop, cluster: fl.testing.Cluster
) -> None:
    queued, delayed = await shop.resize.submit("slow", Size(1)), await shop.echo.submit(delay=100)
    assert (await shop.app.job(queued.id).status()).state is State.QUEUED
    async with shop.app.worker():
        await poll(lambda: shop.ran)
        assert str(await shop.app.job(queued.id).status()) == "running (attempt 1 of 3)"
        status = await shop.app.job(delayed.id).status()
        assert status.state is State.QUEUED
        assert 90 < status.due_in <= 100
        await queued.result(60)
        assert await delayed.result(200) is None


async def test_a_job_whose_workers_die_is_dead_though_nobody_wrote_that(shop: Shop, client: fl.Client) -> None:
    """Receivers that say nothing take it as often as its queue allows."""
    await client.admin.create_topic("media", retry=fl.Retry(3, backoff=fl.exponential(0, 0)))
    job = await shop.echo.submit(1)
    told = asyncio.create_task(story(job))
    async with client.receiver("media", group=GROUP) as receiver:
        for attempt in range(1, 4):
            message = await anext(aiter(receiver))
            assert str(await job.status()) == f"running (attempt {attempt} of 3)"
            await message.nack(0)
    with pytest.raises(fl.JobFailed, match="dead"):
        await job.result(60)
    assert (await asyncio.wait_for(told, 60))[-1].startswith("dead")


async def test_a_job_that_is_handed_back_is_queued_again(shop: Shop) -> None:
    async with shop.app.worker(grace=1):
        job = await shop.resize.submit("slow", Size(1))
        await poll(lambda: shop.ran)
        assert (await job.status()).state is State.RUNNING
    assert (await job.status()).state is State.QUEUED
    async with shop.app.worker():
        assert await job.result(60) == Size(1, 1)
    assert shop.ran == [("slow", 1), ("slow", 1)]


async def test_what_is_too_long_ago_is_forgotten_not_claimed(shop: Shop, cluster: fl.testing.Cluster) -> None:
    async with shop.app.worker():
        job = await shop.echo.submit(1)
        await job.result(10)
    await cluster.advance(days=9)
    async with cluster.client(name="later") as client:
        other = Shop()
        async with other.app.connected(client):
            assert (await other.app.job(job.id).status()).state in (State.FORGOTTEN, State.DONE)
            with_id = job.id.replace("echo@", "resize@")
            assert (await other.app.job(with_id).status()).state is State.FORGOTTEN


@pytest.mark.parametrize("fault", ["kill", "power_cut", "pause"])
async def test_every_job_ends_though_a_broker_fails_in_between(fault: str) -> None:
    """Whoever waits learns the result, also of what was submitted, begun or reported while nobody led its partition."""
    shop = Shop()
    async with (
        fl.testing.Cluster(brokers=3, seed=5) as cluster,
        cluster.client() as client,
        shop.app.connected(client),
        shop.app.worker(concurrency=8),
    ):
        await (await shop.echo.submit(-1)).result(30)

        async def one(number: int) -> Any:
            await asyncio.sleep(number / 20)
            return await (await shop.echo.submit(number)).result(120)

        waiting = [asyncio.create_task(one(number)) for number in range(60)]
        await asyncio.sleep(1)
        getattr(cluster, fault)(cluster.primary("media"))
        assert await asyncio.gather(*waiting) == list(range(60))
    assert set(shop.ran) == set(range(-1, 60))


# -- submitting ----------------------------------------------------------------------------------------


async def test_an_id_within_five_minutes_is_one_job(shop: Shop, cluster: fl.testing.Cluster) -> None:
    async with shop.app.worker():
        first = await shop.echo.submit(1, id="import-7")
        second = await shop.echo.submit(2, id="import-7")
        assert (first.id, second.id) == ("import-7", "import-7")
        assert [await job.result(30) for job in (first, second)] == [1, 1]
        assert await shop.app.job("import-7").result(10) == 1
        await cluster.advance(seconds=5)
    assert shop.ran == [1]


async def test_whoever_submits_an_id_again_gets_the_result_of_the_first(
    shop: Shop, cluster: fl.testing.Cluster
) -> None:
    """Also when the first is minutes old, and whoever submits it again was not there."""
    other = Shop()
    async with cluster.client(name="other") as client, other.app.connected(client), shop.app.worker():
        await (await other.echo.submit(0)).result(30)  # now it follows the results
        await (await shop.echo.submit(1, id="import-7")).result(30)
        await cluster.advance(minutes=4)
        assert await (await other.echo.submit(2, id="import-7")).result(30) == 1
    assert shop.ran == [0, 1]


async def test_a_story_that_is_read_late_tells_nothing_twice(shop: Shop) -> None:
    async with shop.app.worker():
        job_id = (await shop.resize.submit("flaky", Size(1))).id

        async def retries() -> bool:
            return (await shop.app.job(job_id).status()).state is State.RETRYING

        await poll(retries)
        told = await story(shop.app.job(job_id))  # nobody holds the job, so its history is read anew
    assert told[0].startswith("retrying (attempt 1")
    assert [one.split(":")[0] for one in told[1:]] == [
        "running (attempt 2 of 3)", "retrying (attempt 2 of 3)", "running (attempt 3 of 3)", "done",
    ]  # fmt: skip


async def test_an_id_is_found_in_whatever_partition_its_key_put_it(shop: Shop) -> None:
    for number in range(6):
        await shop.echo.submit(number, key=f"customer-{number}", id=f"job-{number}")
    for number in range(6):
        assert (await shop.app.job(f"job-{number}").status()).state is State.QUEUED


async def test_jobs_of_one_key_run_one_after_the_other(shop: Shop) -> None:
    jobs = [await shop.echo.submit(number, key="customer") for number in range(10)]
    async with shop.app.worker(concurrency=8):
        await asyncio.gather(*(job.result(30) for job in jobs))
    assert shop.ran == list(range(10))


async def test_the_highest_priority_runs_first(shop: Shop, client: fl.Client) -> None:
    await client.admin.create_topic("media", partitions=1)
    jobs = [await shop.echo.submit(priority, priority=priority) for priority in (1, 9, 4, 0, 7)]
    async with shop.app.worker(concurrency=1):
        await asyncio.gather(*(job.result(30) for job in jobs))
    assert shop.ran == [9, 7, 4, 1, 0]


async def test_what_the_task_would_not_take_is_refused_and_nothing_is_sent(shop: Shop, client: fl.Client) -> None:
    with pytest.raises(InvalidArgument, match="size"):
        await shop.resize.submit("u")
    with pytest.raises(InvalidArgument, match="Expected `str`"):
        await shop.resize.submit(5, Size(1))
    with pytest.raises(UnknownTopic):
        await client.admin.describe_topic("media")


async def test_arguments_that_do_not_fit_when_it_is_run_are_hopeless(shop: Shop, client: fl.Client) -> None:
    await shop.app.queues["media"].ensure()
    async with client.producer() as producer:
        await producer.send("media", b'{"url": 5}', headers={"fl-task": "resize"}, id="resize@old-version")
    async with shop.app.worker():
        with pytest.raises(fl.JobFailed, match="the arguments do not fit"):
            await shop.app.job("resize@old-version").result(30)
    assert shop.ran == []


async def test_a_task_of_an_unknown_name_is_left_to_others(shop: Shop, client: fl.Client) -> None:
    await shop.app.queues["media"].ensure()
    async with client.producer() as producer:
        await producer.send("media", b"{}", headers={"fl-task": "tomorrow"}, id="tomorrow@1")
    async with shop.app.worker():
        status = await poll(lambda: _with_error(shop, "tomorrow@1"))
    assert (status.state, "no task of its name" in status.error) == (State.RETRYING, True)


async def _with_error(shop: Shop, job_id: str) -> fl.JobStatus | None:
    status = await shop.app.job(job_id, queue="media").status()
    return status if status.error else None


async def test_an_outcome_that_is_unknown_can_be_asked_for_later(shop: Shop, cluster: fl.testing.Cluster) -> None:
    async with shop.app.client.producer(delivery_timeout=5) as producer:
        shop.app._producer = producer
        await shop.echo.submit(0)
        for broker in (1, 2):
            cluster.partition(broker, "client", one_way=True)  # it arrives, and nobody hears of it
        with pytest.raises(OutcomeUnknown) as unknown:
            await shop.echo.submit(1)
        cluster.heal()
        await cluster.healthy()
        assert (await shop.app.job(unknown.value.details["job"]).status()).state in (State.QUEUED, State.NEVER_ACCEPTED)


async def test_each_of_many_jobs_can_be_asked_for_when_their_outcome_is_unknown(
    shop: Shop, cluster: fl.testing.Cluster
) -> None:
    async with shop.app.client.producer(delivery_timeout=5) as producer:
        shop.app._producer = producer
        await shop.echo.submit(0)
        for broker in (1, 2):
            cluster.partition(broker, "client", one_way=True)
        outcomes = await shop.echo.submit_many([(number,) for number in range(3)])
        assert [type(outcome) for outcome in outcomes] == [OutcomeUnknown] * 3
        ids = {outcome.details["job"] for outcome in outcomes if isinstance(outcome, OutcomeUnknown)}
        assert len(ids) == 3, "they travelled in one batch, which has one error"


@pytest.mark.parametrize("wrong", ["", "\ud800", 5])
async def test_an_id_that_is_no_text_is_refused_by_name(shop: Shop, wrong: Any) -> None:
    with pytest.raises(InvalidArgument, match="id"):
        await shop.echo.submit(id=wrong)


async def test_the_topics_of_a_queue_are_made_as_its_tasks_need_them(shop: Shop, client: fl.Client) -> None:
    await client.admin.create_topic("media", retry=fl.Retry(2, backoff=fl.exponential(7, 9), on_dead="park"))
    await shop.app.queues["media"].ensure()
    retry = fl.Retry.of((await client.admin.describe_topic("media")).config.retry)
    assert retry == fl.Retry(3, backoff=fl.exponential(7, 9), on_dead="park")  # only what is too little is changed
    results = (await client.admin.describe_topic("media.results")).config
    assert (results.partitions, results.retention_ms) == (8, 86_400_000)


# -- schedules -----------------------------------------------------------------------------------------


def scheduled(ran: Counter[str], *declare: Callable[[fl.App, Any], None]) -> fl.App:
    app = fl.App(name="clock")

    async def tick(context: fl.Context) -> None:
        ran[context.job_id] += 1

    for one in declare:
        one(app, tick)
    return app


@pytest.fixture
def untouched_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sets it, so nobody has to look at it, and virtual time can leap from one firing to the next."""
    monkeypatch.setattr(schedule_module, "SLEEP_S_MAX", 86_400.0)


@pytest.mark.usefixtures("untouched_clock")
async def test_each_firing_runs_once_though_two_workers_are_at_it_and_one_ends() -> None:
    """Over the night in which Berlin's clocks are put forward, from 2 to 3: there is no half past two."""
    ran: Counter[str] = Counter()

    def declare(app: fl.App, tick: Any) -> None:
        app.schedule("30 */2 * * *", tz="Europe/Berlin", name="nightly")(tick)

    async with (
        fl.testing.Cluster(brokers=2, begin=datetime(2026, 3, 28, 20, tzinfo=UTC)) as cluster,
        cluster.client(name="a") as one,
        cluster.client(name="b") as two,
    ):
        first, second = scheduled(ran, declare), scheduled(ran, declare)
        async with first.connected(one), first.worker():
            async with second.connected(two), second.worker():
                await cluster.advance(hours=6)
            await cluster.advance(hours=2.6)
    assert set(ran.values()) == {1}
    assert sorted(ran) == [
        f"nightly@2026-03-{at}:30:00Z" for at in ("28T21", "28T23", "29T01", "29T02", "29T04")
    ]  # 22:30, 00:30, 03:30 for 02:30, 04:30, 06:30


@pytest.mark.usefixtures("untouched_clock")
async def test_an_interval_runs_once_too_and_its_result_is_kept(cluster: fl.testing.Cluster) -> None:
    ran: Counter[str] = Counter()

    def declare(app: fl.App, tick: Any) -> None:
        app.schedule(every=60, name="minutely")(tick)

    async with cluster.client(name="a") as one, cluster.client(name="b") as two:
        first, second = scheduled(ran, declare), scheduled(ran, declare)
        async with first.connected(one), first.worker(), second.connected(two), second.worker():
            await cluster.advance(minutes=20.5)
            assert len(ran) == 20
            assert set(ran.values()) == {1}
            assert (await first.job(max(ran)).status()).state is State.DONE


@pytest.mark.usefixtures("untouched_clock")
async def test_a_task_may_be_scheduled_and_submitted(cluster: fl.testing.Cluster, client: fl.Client) -> None:
    app, ran = fl.App(name="clock"), []

    @app.schedule("@hourly")
    @app.task(queue="reports")
    async def report(day: str = "today") -> str:
        ran.append(day)
        return day

    async with app.connected(client), app.worker():
        assert await (await report.submit("monday")).result(10) == "monday"
        await cluster.advance(hours=2, seconds=5)
    assert ran == ["monday", "today", "today"]


async def test_a_firing_that_is_much_too_late_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped for an hour: the queue may have forgotten what others have submitted meanwhile."""
    clock = [datetime(2026, 1, 1, tzinfo=UTC)]
    submitted: list[str] = []

    class Submits:
        name = what = "tick"

        async def submit(self, id: str) -> None:
            submitted.append(id)
            if len(submitted) == 2:
                clock[0] += timedelta(hours=1)  # stopped

    async def sleep(seconds: float) -> None:
        clock[0] += timedelta(seconds=seconds)
        if len(submitted) == 5:
            raise asyncio.CancelledError

    monkeypatch.setattr(schedule_module, "_now", lambda: clock[0])
    monkeypatch.setattr(schedule_module.asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await Schedule(Submits(), Every(60)).run()  # type: ignore[arg-type]
    assert submitted[:2] == ["tick@2026-01-01T00:01:00Z", "tick@2026-01-01T00:02:00Z"]
    assert submitted[2:] == [f"tick@2026-01-01T01:0{minute}:00Z" for minute in (1, 2, 3)]
    assert LATE_S == 120
