"""Workers on a cluster in this process, in virtual time: subscribers, retries, dead letters, stopping."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

import ferryline as fl
from ferryline.dead_letters import DeadLetter
from ferryline.protocol.errors import InvalidArgument, UnknownTopic
from tests.polling import poll

TOPICS = {"orders": 2, "one": 1}
QUICK = fl.exponential(1, 2)


class Order(msgspec.Struct):
    n: int


class Rates:
    """Something that handlers share."""


class Bench:
    """A cluster, a client, and an app to declare in."""

    def __init__(self, cluster: fl.testing.Cluster, client: fl.Client) -> None:
        self.cluster = cluster
        self.client = client
        self.app = fl.App(name="shop")

    @asynccontextmanager
    async def working(self, **options: Any) -> AsyncIterator[fl.Worker]:
        async with self.app.connected(self.client), self.app.worker(**options) as worker:
            yield worker

    async def send(self, topic: str, *numbers: int, keys: int = 0) -> None:
        async with self.client.producer() as producer:
            for number in numbers:
                await producer.send(topic, Order(number), key=f"k{number % keys}" if keys else None)

    async def letters(self, topic: str, count: int) -> list[DeadLetter]:
        """Dead letters, once there are so many."""
        async with asyncio.timeout(120):
            while True:
                try:
                    found = [letter async for letter in self.client.dead_letters(topic).browse()]
                except UnknownTopic:
                    found = []
                if len(found) >= count:
                    return found
                await asyncio.sleep(1)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with fl.testing.Cluster(brokers=2, topics=TOPICS) as cluster, cluster.client() as client:
        yield Bench(cluster, client)


# -- what becomes of a record --------------------------------------------------------------------------


async def test_each_record_is_handled_once_and_acknowledged(bench: Bench) -> None:
    seen: Counter[int] = Counter()

    @bench.app.subscriber("orders", group="billing")
    async def handle(order: Order, message: fl.Message[Order], headers: fl.Headers) -> None:
        assert message.value == order
        assert headers["content-type"] == b"application/json"
        seen[order.n] += 1

    await bench.send("orders", *range(200), keys=20)
    async with bench.working():
        await poll(lambda: len(seen) == 200)
    async with bench.working():
        await asyncio.sleep(60)
    assert set(seen.values()) == {1}


async def test_a_subscriber_retries_as_it_says_and_then_the_record_is_dead(bench: Bench) -> None:
    tried: list[tuple[int, int, float]] = []
    loop = asyncio.get_running_loop()

    @bench.app.subscriber("one", retry=fl.Retry(3, backoff=QUICK))
    async def handle(order: Order, context: fl.Context) -> None:
        tried.append((order.n, context.attempt, loop.time()))
        assert (context.attempts, context.name, context.job_id) == (3, "handle", "")
        if order.n == 1:
            raise ValueError("no stock")

    await bench.send("one", 1, 2, keys=1)
    async with bench.working():
        [letter] = await bench.letters("one", 1)
        await poll(lambda: len(tried) == 4)
    assert [one[:2] for one in tried] == [(1, 1), (1, 2), (1, 3), (2, 1)]  # the lane waits for its head
    assert tried[1][2] - tried[0][2] < 1.5
    assert tried[2][2] - tried[1][2] < 2.5
    assert (letter.reason, letter.attempts) == ("ValueError: no stock", 3)
    assert 'raise ValueError("no stock")' in letter.exception
    assert "ferryline/app" not in letter.exception


async def test_without_a_retry_of_its_own_the_topic_decides(bench: Bench) -> None:
    await bench.client.admin.alter_topic("one", retry=fl.Retry(2, backoff=QUICK))
    tried: list[int] = []

    @bench.app.subscriber("one")
    def handle(order: Order, context: fl.Context) -> None:
        tried.append(context.attempts)
        raise ValueError("no")

    await bench.send("one", 1)
    async with bench.working():
        [letter] = await bench.letters("one", 1)
    assert (tried, letter.attempts) == ([2, 2], 2)


async def test_what_is_rejected_or_unreadable_is_dead_at_once(bench: Bench) -> None:
    called: list[int] = []

    @bench.app.subscriber("one")
    async def handle(order: Order) -> None:
        called.append(order.n)
        raise fl.Reject("no such customer")

    async with bench.client.producer() as producer:
        await producer.send("one", b"nonsense")
    await bench.send("one", 5)
    async with bench.working():
        letters = await bench.letters("one", 2)
    assert called == [5]
    assert {letter.reason.split(":")[0] for letter in letters} == {"SerializationFailed", "Reject"}
    assert [letter.attempts for letter in letters] == [1, 1]


async def test_an_attempt_that_takes_too_long_has_failed(bench: Bench) -> None:
    cancelled = asyncio.Event()

    @bench.app.subscriber("one", timeout=5, retry=fl.Retry(1))
    async def handle(order: Order) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()

    await bench.send("one", 1)
    async with bench.working():
        [letter] = await bench.letters("one", 1)
    assert cancelled.is_set()
    assert letter.reason == "TimeoutError: subscriber handle took longer than 5 s"


async def test_a_time_limit_of_the_handlers_own_is_not_called_ours(bench: Bench) -> None:
    @bench.app.subscriber("one", timeout=50, retry=fl.Retry(1))
    async def handle(order: Order) -> None:
        raise TimeoutError("the bank is slow")

    await bench.send("one", 1)
    async with bench.working():
        [letter] = await bench.letters("one", 1)
    assert letter.reason == "TimeoutError: the bank is slow"


async def test_attempts_that_ended_without_a_word_count(bench: Bench) -> None:
    """Two receivers take the record and die; the third one is a worker whose retry allows two attempts."""
    called: list[int] = []

    @bench.app.subscriber("one", group="g", retry=fl.Retry(2, backoff=QUICK))
    async def handle(order: Order) -> None:
        called.append(order.n)

    await bench.send("one", 1)
    for _ in range(2):
        async with bench.client.receiver("one", group="g") as receiver:
            message = await anext(aiter(receiver))
            await message.nack(0)  # as the end of a lease: an attempt that counts
    async with bench.working():
        [letter] = await bench.letters("one", 1)
    assert called == []
    assert "without a word" in letter.reason


async def test_a_handler_may_settle_the_record_itself(bench: Bench) -> None:
    seen: list[int] = []

    @bench.app.subscriber("one")
    async def handle(message: fl.QueueMessage[Order], context: fl.Context) -> None:
        seen.append(context.attempt)
        if context.attempt == 1:
            await message.nack(30)
        else:
            await message.ack()
            raise ValueError("too late to matter")

    await bench.send("one", 1)
    async with bench.working():
        await poll(lambda: len(seen) == 2)
        await asyncio.sleep(300)
    assert seen == [1, 2]


# -- side by side --------------------------------------------------------------------------------------


async def test_keys_run_side_by_side_up_to_the_limit_and_one_key_in_order(bench: Bench) -> None:
    running: Counter[bytes] = Counter()
    most, order_of = 0, {}

    @bench.app.subscriber("orders", concurrency=4)
    async def handle(order: Order, message: fl.Message[Order]) -> None:
        nonlocal most
        running[message.key] += 1
        assert running[message.key] == 1
        most = max(most, running.total())
        await asyncio.sleep(1)
        order_of.setdefault(message.key, []).append(order.n)
        running[message.key] -= 1

    await bench.send("orders", *range(40), keys=10)
    async with bench.working():
        await poll(lambda: sum(map(len, order_of.values())) == 40)
    assert most == 4
    assert all(numbers == sorted(numbers) for numbers in order_of.values())


async def test_where_the_partition_is_the_lane_a_failure_holds_back_what_comes_behind(bench: Bench) -> None:
    done: list[int] = []

    @bench.app.subscriber("one", ordering="partition", concurrency=8, retry=fl.Retry(3, backoff=QUICK))
    async def handle(order: Order, context: fl.Context) -> None:
        await asyncio.sleep(0.1)
        if order.n == 3 and context.attempt == 1:
            raise ValueError("again, please")
        done.append(order.n)

    await bench.send("one", *range(20))
    async with bench.working():
        await poll(lambda: len(done) == 20)
    assert done == list(range(20))


class Taken:
    """A record of a run, as its receiver hands it out; what fails takes back those behind it."""

    def __init__(self, run: list[Taken], n: int) -> None:
        self.run, self.n = run, n
        self.topic, self.partition, self.delivery_count, self.id, self.raw = "one", 0, 1, "", b"%d" % n
        self.value = Order(n)
        self.is_held = True

    @asynccontextmanager
    async def processing(self) -> AsyncIterator[None]:
        yield

    def ack_nowait(self) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    async def nack(self, *_: Any) -> None:
        for other in self.run[self.n :]:
            other.is_held = False


async def test_a_run_that_is_here_together_is_worked_on_in_order_and_not_beyond_a_failure(bench: Bench) -> None:
    began: list[int] = []

    @bench.app.subscriber("one", ordering="partition", concurrency=8, retry=fl.Retry(3, backoff=QUICK))
    async def handle(order: Order) -> None:
        began.append(order.n)
        await asyncio.sleep(10 - order.n)
        if order.n == 3:
            raise ValueError("again, please")

    run: list[Taken] = []
    run += [Taken(run, n) for n in range(6)]
    async with bench.working() as worker:
        for message in run:
            worker.lines[0]._begin(message)  # type: ignore[arg-type]
        await poll(lambda: not worker.lines[0]._running)
    assert began == [0, 1, 2, 3]


async def test_a_function_that_is_no_coroutine_runs_in_a_thread(bench: Bench) -> None:
    threads: set[str] = set()

    @bench.app.subscriber("one")
    def handle(order: Order, context: fl.Context) -> None:
        threads.add(threading.current_thread().name)

    await bench.send("one", *range(5))
    async with bench.working():
        await poll(lambda: threads)
    assert all(name.startswith("ferryline-handle") for name in threads)


async def test_middleware_stands_around_every_attempt_the_first_outermost(bench: Bench) -> None:
    told: list[str] = []

    @bench.app.use
    async def outer(message: Any, call_next: Any) -> Any:
        told.append("outer")
        try:
            return await call_next(message)
        except ValueError:
            told.append("swallowed")

    @bench.app.use
    async def inner(message: Any, call_next: Any) -> Any:
        told.append(f"inner {message.value.n}")
        await call_next(message)

    @bench.app.subscriber("one", retry=fl.Retry(1))
    async def handle(order: Order) -> None:
        told.append("handler")
        raise ValueError

    await bench.send("one", 7)
    async with bench.working():
        await poll(lambda: len(told) == 4)
        await asyncio.sleep(60)
    assert told == ["outer", "inner 7", "handler", "swallowed"]


async def test_hooks_and_providers_live_as_long_as_the_worker(bench: Bench) -> None:
    told: list[str] = []
    app = bench.app

    async def rates() -> AsyncIterator[Rates]:
        told.append("rates")
        yield Rates()
        told.append("rates end")

    def session(context: fl.Context) -> Any:
        told.append(f"session {context.message.value.n}")
        yield context.attempt
        told.append("session ends")

    app.provide(Rates, rates)
    app.provide(float, session, scope="message")
    app.on_start(lambda: told.append("start"))

    @app.on_stop
    async def stop() -> None:
        assert app.client is bench.client
        told.append("stop")

    @app.subscriber("one")
    async def handle(order: Order, rates: Rates, session: float) -> None:
        told.append("handler")

    await bench.send("one", 1)
    async with bench.working():
        await poll(lambda: "session ends" in told)
    assert told == ["rates", "start", "session 1", "handler", "session ends", "stop", "rates end"]


# -- stopping ------------------------------------------------------------------------------------------


async def test_a_worker_that_stops_finishes_what_it_has_and_gives_back_the_rest_at_once(bench: Bench) -> None:
    loop = asyncio.get_running_loop()
    done: list[int] = []

    @bench.app.subscriber("one", group="g", concurrency=2, prefetch=10)
    async def handle(order: Order) -> None:
        await asyncio.sleep(5)
        done.append(order.n)

    await bench.send("one", *range(10))
    async with bench.app.connected(bench.client):
        worker = bench.app.worker(grace=30)
        await worker.start()
        await poll(lambda: bench.client.closables and worker.lines[0].receiver.unsettled == 10)
        stopping = asyncio.create_task(worker.stop())
        began = loop.time()
        async with bench.client.receiver("one", group="g", value=Order) as other:
            back = [await anext(aiter(other)) for _ in range(8)]
            assert loop.time() - began < 1
            assert {message.delivery_count for message in back} == {1}
            await stopping
            assert sorted([*done, *(message.value.n for message in back)]) == list(range(10))
            assert len(done) == 2
            await other.ack_many(back)
            assert not await other.receive(1, 120)


@pytest.mark.parametrize("passes", range(4))
async def test_what_comes_in_the_moment_in_which_a_worker_stops_is_handled_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    """1. a record arrives  2. before it is in hand, the worker is told to stop  3. it goes to another one, as new."""
    handled: list[tuple[int, int]] = []
    stopping: list[asyncio.Task[None]] = []

    @bench.app.subscriber("one", group="g")
    async def handle(order: Order, context: fl.Context) -> None:
        handled.append((order.n, context.attempt))
        await asyncio.sleep(1)  # what nobody waits for is freed meanwhile

    receive = fl.Receiver.receive

    async def received(receiver: fl.Receiver[Any], *args: Any) -> Any:
        batch = await receive(receiver, *args)
        if batch and not stopping:
            stopping.append(asyncio.create_task(first.stop()))
            for _ in range(passes):
                await asyncio.sleep(0)
        return batch

    async with bench.app.connected(bench.client):
        first = bench.app.worker()
        with monkeypatch.context() as patch:
            patch.setattr(fl.Receiver, "receive", received)
            await first.start()
            await bench.send("one", 1)
            await poll(lambda: stopping)
            await stopping[0]
        async with bench.app.worker():
            await poll(lambda: handled)
            await asyncio.sleep(60)
    assert handled == [(1, 1)]


async def test_what_is_not_done_after_the_grace_is_cancelled_and_given_back(bench: Bench) -> None:
    loop = asyncio.get_running_loop()
    ended: list[str] = []

    @bench.app.subscriber("one", group="g")
    async def handle(order: Order) -> None:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    await bench.send("one", 1)
    async with bench.app.connected(bench.client):
        worker = bench.app.worker(grace=3)
        await worker.start()
        await poll(lambda: worker.lines[0]._running)
        began = loop.time()
        await worker.stop()
        assert 3 <= loop.time() - began < 4
        assert ended == ["cancelled"]
        async with bench.client.receiver("one", group="g") as other:
            message = await anext(aiter(other))
            assert loop.time() - began < 5
            assert message.delivery_count == 1  # the attempt does not count
            await message.ack()


async def test_handlers_can_see_that_the_worker_stops(bench: Bench) -> None:
    seen: list[bool] = []

    @bench.app.subscriber("one", group="g")
    async def handle(context: fl.Context) -> None:
        seen.append(context.stopping)
        await poll(lambda: context.stopping)
        seen.append(context.stopping)

    await bench.send("one", 1)
    async with bench.working():
        await poll(lambda: seen)
    assert seen == [False, True]


# -- what cannot run -----------------------------------------------------------------------------------


async def test_a_worker_without_anything_to_do_is_refused(bench: Bench) -> None:
    async with bench.app.connected(bench.client):
        with pytest.raises(InvalidArgument, match="no subscriber and no task"):
            await bench.app.worker().start()


@pytest.mark.parametrize(
    ("retry", "named"),
    [
        (fl.Retry(6), "6 attempts, but topic one allows 5; `ferryline topic alter one --retry-attempts 6`"),
        (fl.Retry(3, on_dead="park"), "does not park"),
        (fl.Retry(3, dead_letters="elsewhere"), r"go to one\.dlq"),
    ],
)
async def test_what_the_topic_does_not_allow_is_refused_at_start(bench: Bench, retry: fl.Retry, named: str) -> None:
    bench.app.subscriber("one", retry=retry)(lambda: None)
    async with bench.app.connected(bench.client):
        with pytest.raises(InvalidArgument, match=named):
            await bench.app.worker().start()


async def test_a_topic_that_does_not_exist_is_refused_at_start(bench: Bench) -> None:
    bench.app.subscriber("nowhere")(lambda: None)
    async with bench.app.connected(bench.client):
        with pytest.raises(UnknownTopic):
            await bench.app.worker().start()


async def test_a_topic_that_is_deleted_ends_the_worker(bench: Bench) -> None:
    bench.app.subscriber("one")(lambda: None)
    async with bench.working() as worker:
        await bench.client.admin.delete_topic("one")
        with pytest.raises(UnknownTopic):
            await asyncio.wait_for(worker.failed(), 60)


async def test_another_ordering_than_the_group_has_ends_the_worker(bench: Bench) -> None:
    async with bench.client.receiver("one", group="shop", ordering="none") as receiver:
        await receiver.receive(1, 1)
    bench.app.subscriber("one")(lambda: None)
    async with bench.working() as worker:
        with pytest.raises(InvalidArgument, match="ordering"):
            await asyncio.wait_for(worker.failed(), 60)


async def test_an_app_is_connected_once_at_a_time(bench: Bench) -> None:
    async with bench.app.connected(bench.client):
        with pytest.raises(InvalidArgument, match="connected already"):
            await bench.app.connected(bench.client).__aenter__()
    async with bench.app.connected(bench.client):
        assert bench.app.client is bench.client
