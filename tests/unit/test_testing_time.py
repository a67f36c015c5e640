"""Virtual time: what takes it from the loop, jumps, and gives it back."""

from __future__ import annotations

import asyncio
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

import ferryline as fl
from ferryline_testing.leaps import Stuck
from ferryline_testing.lives import Life
from ferryline_testing.virtual_time import START_S, VirtualTime


@pytest.fixture
def clock() -> VirtualTime:
    return VirtualTime(asyncio.new_event_loop(), Life("client"))


async def test_an_hour_takes_no_time() -> None:
    began = time.monotonic()
    async with fl.testing.Cluster(brokers=1) as cluster:
        before = cluster.now()
        await asyncio.sleep(3600)
        assert cluster.now() - before == timedelta(hours=1)
    assert time.monotonic() - began < 30


async def test_timers_fire_in_order_across_a_leap() -> None:
    async with fl.testing.Cluster(brokers=1) as cluster:
        loop, fired = asyncio.get_running_loop(), []
        for hours in (30, 10, 20):
            loop.call_later(hours * 3600, fired.append, hours)
        await cluster.advance(hours=25)
        assert fired == [10, 20]
        await cluster.advance(hours=6)
        assert fired == [10, 20, 30]


async def test_a_timeout_of_the_test_is_in_virtual_time() -> None:
    async with fl.testing.Cluster(brokers=1) as cluster:
        before = cluster.now()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(600):
                await asyncio.Event().wait()
        assert cluster.now() - before == timedelta(minutes=10)


async def test_what_the_test_runs_of_the_sdk_in_tasks_of_its_own_is_on_time() -> None:
    async with (
        fl.testing.Cluster(topics=["t"]) as cluster,
        cluster.client() as client,
        client.consumer("t", group="g") as consumer,
        client.receiver("t", group="q") as receiver,
    ):
        before = cluster.now()
        waiting = [asyncio.create_task(one) for one in (consumer.pull(1, max_wait=7200), receiver.receive(1, 7200))]
        assert await asyncio.gather(*waiting) == [[], []]
        assert cluster.now() - before == timedelta(hours=2)
        assert cluster._leaps.count


async def test_clocks_begin_where_they_are_told_to() -> None:
    begin = datetime(2031, 5, 6, 7, tzinfo=UTC)
    async with fl.testing.Cluster(brokers=1, begin=begin, topics=["t"]) as cluster:
        async with cluster.client() as client, client.producer() as producer:
            await cluster.advance(days=2)
            await producer.send("t", b"x")
            async with client.consumer("t", group="g") as consumer:
                message = await anext(aiter(consumer))
        assert begin + timedelta(days=2) <= message.timestamp < begin + timedelta(days=2, seconds=1)


async def test_the_loop_gets_its_own_time_back() -> None:
    loop = asyncio.get_running_loop()
    real, selector, fired = loop.time(), loop._selector, []  # type: ignore[attr-defined]
    loop.call_later(0.05, fired.append, "before")
    async with fl.testing.Cluster(brokers=1):
        assert loop.time() < START_S + 1
        assert fired == []
        loop.call_later(0.05, fired.append, "within")
    assert loop._selector is selector  # type: ignore[attr-defined]
    assert "time" not in vars(loop)
    assert real <= loop.time() < real + 30
    await asyncio.sleep(0.2)
    assert fired == ["before", "within"]


async def test_a_timer_from_before_keeps_its_distance() -> None:
    loop, fired = asyncio.get_running_loop(), []
    loop.call_later(100, fired.append, "before")
    async with fl.testing.Cluster(brokers=1) as cluster:
        await cluster.advance(seconds=99)
        assert fired == []
        await cluster.advance(seconds=2)
        assert fired == ["before"]


async def test_time_stands_still_while_a_thread_works() -> None:
    async with fl.testing.Cluster(brokers=1) as cluster:
        before, name = cluster.now(), await asyncio.to_thread(_work)
        assert cluster.now() - before < timedelta(seconds=1)
        assert name != threading.current_thread().name


async def test_a_thread_may_ask_the_loop_for_what_takes_virtual_time() -> None:
    async with (
        fl.testing.Cluster(topics=["t"]) as cluster,
        cluster.client() as client,
        client.producer() as producer,
    ):
        loop = asyncio.get_running_loop()

        def work() -> int:
            sent = asyncio.run_coroutine_threadsafe(producer.send("t", b"x"), loop).result(10)
            asyncio.run_coroutine_threadsafe(asyncio.sleep(3600), loop).result(10)
            return sent.partition

        before = cluster.now()
        assert await asyncio.to_thread(work) == 0
        assert cluster.now() - before > timedelta(hours=1)


def _work() -> str:
    time.sleep(0.1)
    return threading.current_thread().name


async def test_clocks_of_production_are_the_real_ones_again() -> None:
    from ferryline import batching
    from ferryline_broker import clock, driver, node_driver
    from ferryline_coordinator import clock as coordinator_clock

    names = [(batching, "time_ns"), (clock, "time"), (node_driver, "now_ms"), (coordinator_clock, "time")]
    real = [getattr(module, name) for module, name in names]
    async with fl.testing.Cluster(brokers=1):
        within = [getattr(module, name) for module, name in names]
        assert all(one is not other for one, other in zip(real, within, strict=True))
        assert "id" in vars(driver)
        assert await asyncio.to_thread(clock.wall_ms) > 1_700_000_000_000  # another thread is not in the cluster
        assert abs(await asyncio.to_thread(clock.wall_ms) - time.time() * 1000) < 60_000
    assert [getattr(module, name) for module, name in names] == real
    assert "id" not in vars(driver)


def test_a_test_that_waits_for_nothing_is_told_so() -> None:
    async def wait_for_ever() -> None:
        async with fl.testing.Cluster(brokers=1):
            await asyncio.Event().wait()

    with pytest.raises(Stuck, match="without a deadline"):
        asyncio.run(wait_for_ever())


async def test_a_leap_moves_the_timers_of_processes_only(clock: VirtualTime) -> None:
    loop = clock._loop
    clock.begin()
    mine = loop.call_later(100, list)
    theirs = loop.call_later(1, list, context=Life("broker-1").context())
    clock.leap(50)
    assert (mine.when(), theirs.when()) == (START_S + 100, START_S + 51)
    assert (clock.now_s, clock.leapt_s) == (START_S + 50, 50)
    clock.end()
    assert theirs.cancelled()
    assert not mine.cancelled()
    loop.close()


def test_a_paused_process_hears_its_timers_when_it_goes_on(clock: VirtualTime) -> None:
    loop, life, fired = clock._loop, Life("broker-1"), []
    clock.begin()
    life.paused = clock.holding = True
    for after_s in (2, 1):
        loop.call_later(after_s, fired.append, after_s, context=life.context())
    loop.run_until_complete(asyncio.sleep(5))
    assert fired == []
    life.paused = False
    clock.resume(life)
    loop.run_until_complete(asyncio.sleep(0.001))
    assert fired == [1, 2]
    clock.end()
    loop.close()


def test_a_paused_process_is_not_woken_by_a_timer_of_another_at_the_same_time(clock: VirtualTime) -> None:
    loop, fired = clock._loop, []
    paused, other = Life("broker-1"), Life("broker-2")
    clock.begin()
    paused.paused = clock.holding = True
    for life in (other, paused):
        loop.call_at(START_S + 5, fired.append, life.name, context=life.context())
    loop.run_until_complete(asyncio.sleep(10))
    assert fired == ["broker-2"]
    clock.end()
    loop.close()


def test_a_loop_that_is_not_asyncios_own_is_refused() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def start() -> None:
        async with fl.testing.Cluster(brokers=1):
            pass

    with (
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        pytest.raises(RuntimeError, match=r"asyncio's own"),
    ):
        runner.run(start())
