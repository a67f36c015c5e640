"""`ferryline.testing.Cluster`: real services and the real client in one process, and what breaks them."""

from __future__ import annotations

import asyncio
import logging
import sys
from datetime import datetime
from typing import Any

import pytest

import ferryline as fl
from ferryline_testing.faults import KINDS

Cluster = fl.testing.Cluster


async def read(client: fl.Client, topic: str, count: int, group: str = "audit", within_s: float = 120.0) -> list[bytes]:
    """The first records of a topic, as a group that has read none yet."""
    async with client.consumer(topic, group=group) as consumer, asyncio.timeout(within_s):
        return [(await anext(aiter(consumer))).value for _ in range(count)]


# -- use --------------------------------------------------------------------------------------------


async def test_what_is_sent_is_read() -> None:
    async with Cluster(topics={"orders": 3}) as cluster, cluster.client() as client, client.producer() as producer:
        for number in range(50):
            await producer.send("orders", b"%d" % number, key=f"k{number % 7}")
        assert sorted(await read(client, "orders", 50), key=int) == [b"%d" % number for number in range(50)]


async def test_topics_come_with_settings() -> None:
    settings: dict[str, Any] = {"a": 2, "b": {"partitions": 1, "replication": 3}}
    async with Cluster(topics=settings) as cluster, cluster.client() as client:
        meta = {name: await client.learn_topic(name) for name in ("a", "b")}
        assert {name: (one.config.partitions, one.config.replication) for name, one in meta.items()} == {
            "a": (2, 2),
            "b": (1, 3),
        }


async def test_large_records_pass_under_back_pressure() -> None:
    async with Cluster(topics=["blobs"]) as cluster, cluster.client() as client, client.producer() as producer:
        sent = [bytes([number]) * 900_000 for number in range(8)]
        await asyncio.gather(*(producer.send("blobs", value) for value in sent))
        assert await read(client, "blobs", 8) == sent


async def test_groups_share_partitions_and_live_through_days() -> None:
    async with (
        Cluster(topics={"orders": 4}) as cluster,
        cluster.client() as client,
        client.producer() as producer,
        client.consumer("orders", group="g") as first,
        client.consumer("orders", group="g") as second,
    ):
        await cluster.advance(days=2)
        for partition in range(4):
            await producer.send("orders", b"x", partition=partition)
        await cluster.advance(seconds=5)
        found = [await consumer.pull(10, max_wait=1) for consumer in (first, second)]
        assert [len(batch) for batch in found] == [2, 2]


async def test_retention_goes_by_the_clock_of_the_cluster() -> None:
    day_ms = 86_400_000
    topics = {"log": {"partitions": 1, "retention_ms": day_ms}}
    async with Cluster(topics=topics) as cluster, cluster.client() as client, client.producer() as producer:
        await producer.send("log", b"old")
        await cluster.advance(hours=23)
        assert await read(client, "log", 1, "before") == [b"old"]
        await cluster.advance(days=3)
        await producer.send("log", b"new")
        assert await read(client, "log", 1, "after") == [b"new"]
        assert cluster.events.matching("retention")


# -- faults -----------------------------------------------------------------------------------------


async def test_acknowledged_records_outlive_their_primary() -> None:
    async with Cluster(topics=["orders"]) as cluster, cluster.client() as client, client.producer() as producer:
        await producer.send("orders", b"1")
        first = cluster.primary("orders")
        cluster.kill(first)
        await producer.send("orders", b"2")
        assert cluster.primary("orders") != first
        await cluster.start(first)
        await cluster.healthy()
        assert await read(client, "orders", 2) == [b"1", b"2"]


async def test_acknowledged_records_outlive_a_power_cut_of_all() -> None:
    async with Cluster(topics=["orders"]) as cluster, cluster.client() as client, client.producer() as producer:
        for number in range(20):
            await producer.send("orders", b"%d" % number)
        cluster.power_cut()
        for number in (1, 2, 3):
            await cluster.start(number)
        await cluster.healthy()
        assert await read(client, "orders", 20) == [b"%d" % number for number in range(20)]
        assert len(cluster.events.matching("restart=os_crash")) == 3


async def test_a_power_cut_takes_what_was_not_flushed() -> None:
    """Without it the test before this one would prove nothing."""
    lost = 0
    for seed in range(6):
        topics = {"fast": {"partitions": 1, "replication": 1, "flush": "replicated"}}
        async with Cluster(brokers=1, seed=seed, topics=topics) as cluster, cluster.client() as client:
            node = cluster._brokers[1]
            assert node.shell is not None
            node.shell.partitions._sync = list  # type: ignore[method-assign, assignment]
            async with client.producer(delivery_timeout=2) as producer:
                sent = producer.send_nowait("fast", b"x" * 1000)
                await cluster.advance(seconds=1)
                (written,) = [ends[0] for _, _, ends, _ in node.shell.log_ends()]
                cluster.isolate("client")  # so that it is not sent again
                cluster.power_cut()
                await cluster.start(1)
                with pytest.raises(fl.FerrylineError):
                    await sent
            (found,) = [ends[0] for _, _, ends, _ in node.shell.log_ends()]
            lost += found < written
    assert 0 < lost < 6, "what was not flushed survives in part, as the seed decides"


async def test_an_orderly_stop_hands_over_before_it_ends() -> None:
    async with Cluster(topics={"orders": 3}) as cluster, cluster.client() as client, client.producer() as producer:
        first = cluster.primary("orders")
        await cluster.stop(first)
        assert cluster.events.matching("ended: status 0", f"broker-{first}")
        fenced = [event.what for event in cluster.events.matching("fenced broker=") if "unfenced" not in event.what]
        assert fenced == [f"fenced broker={first} reason=stopping"]
        await producer.send("orders", b"1")
        await cluster.start(first)
        assert cluster.events.matching("restart=clean")


async def test_a_paused_broker_is_replaced_and_comes_back() -> None:
    async with Cluster(topics=["orders"]) as cluster, cluster.client() as client, client.producer() as producer:
        await producer.send("orders", b"1")
        first = cluster.primary("orders")
        cluster.pause(first)
        before = cluster.now()
        await producer.send("orders", b"2")
        assert 2.5 < (cluster.now() - before).total_seconds() < 10, "fenced after three seconds of silence"
        told = len(cluster.events.matching("", f"broker-{first}"))
        await cluster.advance(seconds=30)
        assert len(cluster.events.matching("", f"broker-{first}")) == told, "a stopped process says nothing"
        cluster.resume(first)
        await cluster.healthy()
        assert await read(client, "orders", 2) == [b"1", b"2"]


async def test_a_primary_that_is_cut_off_acknowledges_nothing() -> None:
    async with Cluster(topics=["orders"]) as cluster, cluster.client() as client, client.producer() as producer:
        await producer.send("orders", b"1")
        first = cluster.primary("orders")
        cluster.isolate(first)
        await producer.send("orders", b"2")
        assert cluster.primary("orders") != first
        cluster.heal()
        await cluster.healthy()
        assert await read(client, "orders", 2) == [b"1", b"2"]


async def test_one_way_is_one_way() -> None:
    async with Cluster(brokers=2) as cluster:
        cluster.partition(1, "coordinator", one_way=True)
        network = cluster._network
        assert network.cut_off("broker-1", "coordinator")
        assert not network.cut_off("coordinator", "broker-1")
        await cluster.advance(seconds=5)
        assert cluster.events.matching("fenced broker=1")
        cluster.heal()
        await cluster.healthy()


async def test_traffic_goes_on_without_a_coordinator() -> None:
    async with Cluster(topics=["orders"]) as cluster, cluster.client() as client, client.producer() as producer:
        cluster.kill("coordinator")
        await producer.send("orders", b"1")
        with pytest.raises(fl.FerrylineError):
            await client.admin.create_topic("more", timeout=3)
        await cluster.start("coordinator")
        await cluster.healthy()
        await client.admin.create_topic("more", partitions=1)


async def test_a_broker_that_is_down_refuses_connections() -> None:
    async with Cluster(brokers=2) as cluster:
        cluster.kill(2)
        async with cluster.client() as client:
            assert client.routing.address(2) == "https://broker-2"
            with pytest.raises(fl.errors.ConnectionFailed, match="nobody listens"):
                await client.connector.open("https://broker-2")


async def test_what_a_killed_process_still_does_reaches_nobody() -> None:
    async with Cluster(topics=["orders"]) as cluster, cluster.client() as client, client.producer() as producer:
        first = cluster._brokers[cluster.primary("orders")]
        disk, shell = first.disk, first.shell
        assert shell is not None
        cluster.kill(first.number)
        told = len(cluster.events)
        disk.write_small_atomic("0/clean_stop", b"forged")
        shell.node_driver._link.send_heartbeat(None)  # type: ignore[arg-type]
        await producer.send("orders", b"1")
        assert not first.disk.exists("0/clean_stop")
        assert not [event for event in list(cluster.events)[told:] if event.who == first.name]


@pytest.mark.parametrize("seed", [1, 2])
async def test_nothing_acknowledged_is_lost_in_any_weather(seed: int) -> None:
    faults = fl.testing.Faults(every=(2, 6), lasting=(1, 5))
    async with Cluster(seed=seed, topics={"orders": 3}, faults=faults) as cluster:
        async with cluster.client(timeout=120) as client, client.producer() as producer:
            for number in range(60):
                await producer.send("orders", b"%d" % number, key=f"k{number % 5}")
                await cluster.advance(seconds=1)
            await cluster.calm()
            found = await read(client, "orders", 60)
        assert sorted(found, key=int) == [b"%d" % number for number in range(60)], cluster.story()
        assert len([event for event in cluster.events if event.who == "test"]) > 10


# -- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"brokers": 0}, "brokers"),
        ({"brokers": 51}, "brokers"),
        ({"begin": datetime(2026, 1, 1)}, "time zone"),  # noqa: DTZ001
        ({"latency_ms": (2.0, 1.0)}, "latency_ms"),
        ({"latency_ms": (0.0, 1.0)}, "latency_ms"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Cluster(**settings)


@pytest.mark.parametrize("settings", [{"every": (0, 1)}, {"lasting": (2, 1)}, {"kill": -1}, dict.fromkeys(KINDS, 0)])
def test_faults_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"range of positive seconds|weights"):
        fl.testing.Faults(**settings)


async def test_one_cluster_at_a_time_and_each_but_once() -> None:
    cluster = Cluster(brokers=1)
    with pytest.raises(RuntimeError, match="async with"):
        cluster.client()
    async with cluster:
        with pytest.raises(RuntimeError, match="one at a time"):
            async with Cluster(brokers=1):
                pass
        cluster.now()
    with pytest.raises(RuntimeError, match="used before"):
        await cluster.__aenter__()


@pytest.mark.parametrize("which", [0, 3, "broker-1", True, None])
async def test_who_is_not_there_is_not_killed(which: Any) -> None:
    async with Cluster(brokers=2) as cluster:
        with pytest.raises(ValueError, match="brokers are 1 to 2"):
            cluster.kill(which)


async def test_questions_without_an_answer_say_so() -> None:
    async with Cluster(brokers=2, topics=["t"]) as cluster:
        with pytest.raises(LookupError, match="t/1 does not exist"):
            cluster.primary("t", 1)
        with pytest.raises(ValueError, match="back"):
            await cluster.advance(seconds=-1)
        cluster.kill(1)
        with pytest.raises(TimeoutError, match="broker-1 is down"):
            await cluster.healthy(timeout=1)
        cluster.kill("coordinator")
        with pytest.raises(LookupError, match="coordinator is down"):
            cluster.primary("t")


async def test_a_test_that_fails_leaves_nothing_behind() -> None:
    async def fail() -> None:
        async with Cluster(topics=["t"], faults=fl.testing.Faults()) as cluster:
            client = cluster.client()
            await client.start()
            producer = client.producer()
            await producer.start()
            producer.send_nowait("t", b"x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not left


async def test_log_lines_of_services_go_to_pythons_logging(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "ferryline.testing")
    async with Cluster(brokers=1):
        pass
    assert any(record.name == "ferryline.testing.broker-1" for record in caplog.records)
    assert capsys.readouterr() == ("", "")


def test_without_the_package_the_door_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(vars(fl.testing), "Faults", raising=False)
    monkeypatch.setitem(sys.modules, "ferryline_testing", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install ferryline\[testing\]"):
        _ = fl.testing.Faults


def test_the_door_leads_to_what_it_names() -> None:
    assert set(fl.testing.__all__) <= set(dir(fl.testing))
    assert all(getattr(fl.testing, name).__doc__ for name in fl.testing.__all__)
    with pytest.raises(AttributeError, match="Broker"):
        _ = fl.testing.Broker
