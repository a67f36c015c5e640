"""The comparison of queues on real servers: what the receivers say is what the servers know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.compare.measure import measure
from benchmarks.compare.peers import Peer
from benchmarks.compare.peers.ferryline_peer import FerrylinePeer
from benchmarks.compare.peers.redis_peer import RedisEverysec
from benchmarks.compare.queue_plan import QUEUE_VARIANTS, QUEUE_WORKLOADS, TASK_VARIANTS
from benchmarks.compare.work import Work

pytestmark = pytest.mark.process
RECORDS = 400
LOADS = {one.name: one for one in QUEUE_WORKLOADS}
ROWS = {one.name: one for one in (*TASK_VARIANTS, *QUEUE_VARIANTS)}


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    yield from running(RedisEverysec(tmp_path_factory.mktemp("redis")))


@pytest.fixture(scope="module")
def ferryline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    yield from running(FerrylinePeer(tmp_path_factory.mktemp("ferryline")))


def running(peer: Peer) -> Iterator[Peer]:
    peer.start()
    try:
        yield peer
    finally:
        peer.stop()


def work(load: str, row: str, peer: Peer) -> Work:
    return Work(replace(LOADS[load], rate=min(200.0, LOADS[load].rate)), ROWS[row], peer, f"t-{load}", RECORDS)


@pytest.mark.redis
@pytest.mark.parametrize("load", ["queue", "queue-drain", "queue-pace"])
def test_redis_knows_every_acknowledgement_that_its_receiver_counts(redis: Peer, load: str) -> None:
    [found] = measure(work(load, "redis everysec", redis)).values()
    assert (found["records"], found["errors"]) == (RECORDS, 0)
    assert found["parts_cpu_s"]["receiver"] > 0
    assert ("latency_ms" in found) == (load == "queue-pace")


def test_ours_knows_every_acknowledgement_that_its_receiver_counts(ferryline: Peer) -> None:
    [found] = measure(work("queue", "ferryline r2 fsync", ferryline)).values()
    assert (found["records"], found["errors"]) == (RECORDS, 0)


def test_tasks_of_ours_run_in_a_worker_of_their_own(ferryline: Peer) -> None:
    [found] = measure(work("tasks", "ferryline r2 fsync", ferryline)).values()
    assert (found["records"], found["errors"]) == (RECORDS, 0)
    assert found["parts_cpu_s"]["worker"] > 0


@pytest.mark.redis
def test_an_acknowledgement_that_is_left_out_is_an_error(
    redis: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receiver is told that all is acknowledged; the server knows better."""
    monkeypatch.setattr("benchmarks.compare.queue_measure.LEFT_S", 0.2)
    (tmp_path / "sitecustomize.py").write_text(
        "import redis\n"
        "plain = redis.client.Pipeline.execute_command\n"
        "def execute(self, *words, **options):\n"
        "    return plain(self, *(words if words[0] != 'XACK' else ('EVAL', 'return 1', 0)), **options)\n"
        "redis.client.Pipeline.execute_command = execute\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    [found] = measure(work("queue", "redis everysec", redis)).values()
    assert found["errors"] >= RECORDS
