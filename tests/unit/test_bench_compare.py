"""The comparison suite: percentiles, medians, tables, goals, counts; and its roles on a queue in memory."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks.compare import worker
from benchmarks.compare.clients import CLIENTS, Adapter
from benchmarks.compare.goals import verdicts
from benchmarks.compare.peers.catalogue import PEERS
from benchmarks.compare.plan import GROUPS, HEADLINE, SYSTEMS, VARIANTS, WORKLOADS, cells, chosen_workloads
from benchmarks.compare.processes import PeerFailed, Program, Usage, eventually, free_port, send, usage
from benchmarks.compare.render import render
from benchmarks.compare.runner import SCALE_MAX, SCALE_MIN, fitting, still_rising
from benchmarks.compare.spec import Outcome, Spec, key_of, latencies, percentile, sent_ns, stamp_of
from benchmarks.compare.stats import Spread, best, row, table


def result(rate: float, **changes: Any) -> dict[str, Any]:
    """One round at ``rate`` records a second that cost 1 us of the client and 2 us of the servers per record."""
    found = {"round": 1, "records": 1_000, "seconds": 1_000 / rate, "records_per_s": rate, "mb_per_s": rate / 1e4}
    found |= {"client_cpu_s": 0.001, "server_cpu_s": 0.002, "server_written": 200_000, "server_rss": 5e8}
    found |= {"client_rss": 5e7, "errors": 0}
    return found | changes


def timed(p50: float, p99: float) -> dict[str, Any]:
    return result(900.0, latency_ms={"p50": p50, "p90": p99, "p99": p99, "p999": p99, "max": p99})


def report(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A report as it stands in the JSON."""
    machine = {"processor": "a processor", "cores": 2, "memory_gib": 8.0, "system": "Linux", "python": "3.11"}
    machine |= {"java": "none", "load_average": [0.1], "load_average_after": [2.0], "commit": "abc"}
    settings = {"rounds": 2, "scale": 1.0, "minutes": 3.0, "warm_up_s": 90.0}
    floor = {"p50": 0.4, "p90": 0.5, "p99": 1.0, "p999": 1.0, "max": 1.0}
    limits = {"sockets": {"100": [9e6]}, "disk": {"100": [8e6]}, "one_at_a_time_ms": [floor]}
    return {
        "machine": machine,
        "settings": settings,
        "versions": {"kafka-3": "4"},
        "left_out": {"nats-3": "nats-server is not installed\nand a long log"},
        "failures": [],
        "limits": limits,
        "rounds": rounds,
    }


# -- arithmetic -------------------------------------------------------------------------------------


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.99, 0.999, 1.0)] == [50.0, 99.0, 100.0, 100.0]
    assert percentile([7.0], 0.5) == 7.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_latencies_are_in_milliseconds_whatever_the_order() -> None:
    found = latencies([3_000_000, 1_000_000, 2_000_000])
    assert (found["p50"], found["max"]) == (2.0, 3.0)
    assert latencies([]) == {}


def test_a_spread_is_the_median_and_the_range() -> None:
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0)


def test_costs_are_per_record_and_errors_add_up() -> None:
    found = row("100B", "produce", HEADLINE, [result(100.0, errors=1), result(300.0, errors=2), result(200.0)])
    assert found.rate == Spread(200.0, 100.0, 300.0)
    assert (found.client_us.median, found.server_us.median, found.total_us) == pytest.approx((1.0, 2.0, 3.0))
    assert found.written == pytest.approx(200.0)
    assert found.errors == 3


def test_the_best_is_the_fastest_of_those_that_were_measured() -> None:
    rows = table({"100B|produce|a": [result(1.0)], "100B|produce|b": [result(2.0)]})["100B", "produce"]
    found = best(rows, ["a", "b", "c"])
    assert found is not None
    assert found.variant == "b"
    assert best(rows, ["c"]) is None


# -- what travels -----------------------------------------------------------------------------------


def test_specs_and_outcomes_survive_the_way_to_a_worker_and_back() -> None:
    spec = Spec("pika", "pace", "t", "s", rate=10.0, stamps=True)
    assert Spec.from_json(spec.as_json()) == spec
    outcome = Outcome(1, 2, 3, 4, 0.5, 6, latency_ms={"p50": 1.0})
    assert Outcome.from_json(json.loads(outcome.as_json())) == outcome


@pytest.mark.parametrize("size", [100, 1_024, 16_384])
def test_a_stamp_changes_no_size_and_tells_its_time(size: int) -> None:
    pad = Spec("", "", "", "", value_bytes=size).value()
    assert len(pad) == size
    stamped = stamp_of(123_456_789, pad)
    assert len(stamped) == size
    assert sent_ns(stamped) == 123_456_789
    assert sent_ns(pad) == 0


def test_keys_are_distinct_and_of_one_length() -> None:
    assert len({key_of(number) for number in range(1_000)}) == 1_000
    assert {len(key_of(number)) for number in (0, 10**9)} == {12}


# -- plan -------------------------------------------------------------------------------------------


def test_every_row_names_a_server_and_a_client_that_exist_and_says_what_an_ack_means() -> None:
    assert len({one.name for one in VARIANTS}) == len(VARIANTS)
    for one in VARIANTS:
        assert one.peer in PEERS
        assert PEERS[one.peer].system == one.system
        assert one.client in CLIENTS
        assert any(word in one.ack for word in ("page cache", "flushed", "memory"))
        assert one.flushed == ("flushed" in one.ack.split(";")[0])


def test_a_choice_of_workloads_may_name_groups() -> None:
    assert [one.name for one in chosen_workloads(["partitions"])] == list(GROUPS["partitions"])
    assert chosen_workloads([]) == list(WORKLOADS)
    with pytest.raises(ValueError, match="no workload"):
        chosen_workloads(["prodcue"])


def test_central_workloads_have_every_row_and_others_the_main_ones() -> None:
    found = cells(WORKLOADS, {"ferryline", *SYSTEMS})
    central = [one.variant.name for one in found if one.workload.name == "100B"]
    others = [one.variant for one in found if one.workload.name == "16KiB"]
    assert central == [one.name for one in VARIANTS]
    assert others
    assert all(one.main for one in others)
    assert {one.variant.system for one in found if one.workload.name == "partitions-200"} == {"ferryline", "kafka"}


def test_rows_of_one_client_speed_get_the_same_number_of_records() -> None:
    for workload in WORKLOADS:
        counts = {(one.slow, workload.count(one, 0.7)) for one in VARIANTS}
        assert len(counts) <= 2


def test_counts_are_scaled_to_the_budget_and_within_bounds() -> None:
    some = cells(chosen_workloads(["100B"]), {"ferryline", "kafka"})
    twice = fitting(some, len(some) + 10.0, 5 * (len(some) + 20.0), 5, tried=0.5)
    assert twice == pytest.approx(1.0)
    assert fitting(some, 1_000.0, 1.0, 5, tried=0.5) == SCALE_MIN
    assert fitting(some, 1.0, 1e6, 5, tried=0.5) == SCALE_MAX


# -- goals and tables -------------------------------------------------------------------------------


def test_a_goal_that_is_missed_says_by_how_much() -> None:
    rounds = {
        f"100B|produce|{HEADLINE}": [result(80_000.0)],
        "100B|produce|kafka r2 confluent": [result(100_000.0)],
        "100B|produce|rabbitmq 3 pika": [result(4_000.0)],
    }
    found = {one.goal_text: one for one in verdicts(table(rounds))}
    assert str(found["produce 100B, best durable peer"]).endswith("MISSED by 20%")
    assert found["produce 100B, RabbitMQ"].met
    assert found["produce 100B, RabbitMQ"].value == pytest.approx(20.0)
    assert "produce 100B, NATS" not in found


def test_a_peer_without_durability_is_no_yardstick_but_is_shown() -> None:
    rounds = {
        f"1KiB|consume|{HEADLINE}": [result(100.0)],
        "1KiB|consume|redis everysec": [result(1_000.0)],
        "1KiB|consume|redis always": [result(50.0)],
    }
    found = {one.goal_text: one for one in verdicts(table(rounds))}
    assert found["consume 1KiB, best durable peer"].met
    shown = found["consume 1KiB, best peer in any setting"]
    assert not shown.counts
    assert not shown.met


def test_latency_is_better_when_it_is_less() -> None:
    rounds = {
        f"one-at-a-time|latency|{HEADLINE}": [timed(1.0, 9.0)],
        "one-at-a-time|latency|kafka r2 confluent": [timed(2.0, 3.0)],
        "one-at-a-time|latency|kafka r3 confluent": [timed(4.0, 30.0)],
    }
    found = {one.goal_text: one for one in verdicts(table(rounds))}
    assert found["one-at-a-time p50, kafka"].met
    assert "MISSED by 200%" in str(found["one-at-a-time p99, kafka"])


def test_processor_time_counts_production_and_consumption_of_all_processes() -> None:
    cheap, dear = result(1.0), result(1.0, server_cpu_s=0.008)
    rounds = {}
    for what in ("produce", "consume"):
        rounds[f"100B|{what}|{HEADLINE}"] = [cheap]
        rounds[f"100B|{what}|kafka r2 confluent"] = [dear]
    found = {one.goal_text: one for one in verdicts(table(rounds))}
    assert found["processor time 100B, Kafka"].value == pytest.approx(6 / 18)


def test_the_report_shows_every_row_what_was_left_out_and_what_an_ack_means() -> None:
    rounds = {
        f"100B|produce|{HEADLINE}": [result(80_000.0), result(90_000.0)],
        f"100B|consume|{HEADLINE}": [result(800_000.0)],
        "100B|produce|redis always": [result(9_000.0)],
        f"one-at-a-time|latency|{HEADLINE}": [timed(1.0, 9.0)],
        f"partitions-200|produce|{HEADLINE}": [result(70_000.0)],
    }
    text = render(report(rounds))
    assert "| ferryline r2 fsync | 85,000 (80,000 .. 90,000) |" in text
    assert "* nats-3: nats-server is not installed\n" in text
    assert "flushed (fdatasync) on both copies, TLS" in text
    assert "* partitions-200: without nats, rabbitmq, redis: " in text
    assert "1.00 (1.00 .. 1.00) | 9.00 (9.00 .. 9.00)" in text
    assert "1 of 1 goals met" in text


def test_plots_are_drawn_from_the_same_rows(tmp_path: Path) -> None:
    plots = pytest.importorskip(
        "benchmarks.compare.plots", reason="matplotlib is not installed (scripts/peers/install)"
    )
    rounds = {f"100B|produce|{HEADLINE}": [result(8.0)], f"one-at-a-time|latency|{HEADLINE}": [timed(1.0, 9.0)]}
    made = plots.plot_all(table(rounds), tmp_path, "x")
    assert [path.name for path in made] == ["x-throughput.png", "x-latency.png", "x-cost.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


# -- roles, on a queue in memory --------------------------------------------------------------------


class Memory(Adapter):
    """A queue in memory that hands out batches of at most ``step``; values carry stamps where the test put them."""

    def __init__(self, spec: Spec, values: list[bytes], step: int) -> None:
        super().__init__(spec)
        self.values, self.step = values, step

    async def open_producer(self) -> None: ...

    async def send_all(self, first: int, count: int) -> None:
        self.values += [self.value] * count

    async def send_one(self, number: int) -> None:
        self.values.append(self.value)

    async def send_soon(self, key: bytes, value: bytes) -> None:
        self.values.append(value)

    async def drain(self) -> None: ...

    async def open_consumer(self) -> None: ...

    async def read_values(self) -> list[bytes]:
        found, self.values = self.values[: self.step], self.values[self.step :]
        return found

    async def read(self) -> tuple[int, int]:
        found = await self.read_values()
        return len(found), sum(map(len, found))

    async def close(self) -> None: ...


def until() -> float:
    return time.monotonic() + 1.0


async def test_a_reader_does_not_count_what_came_before_its_clock() -> None:
    spec = Spec("x", "read", "t", "s", count=100)
    found = await worker.read_plain(Memory(spec, [spec.value()] * 100, 10), spec, until())
    assert (found.records, found.value_bytes, found.errors) == (90, 9_000, 0)


def test_a_batch_is_a_small_part_of_all() -> None:
    assert [Spec("", "", "", "", count=count).batch for count in (200, 6_000, 10**6)] == [20, 300, 2_000]


async def test_a_reader_that_got_everything_at_once_measured_nothing() -> None:
    spec = Spec("x", "read", "t", "s", count=100)
    with pytest.raises(SystemExit, match="nothing to measure"):
        await worker.read_plain(Memory(spec, [spec.value()] * 100, 60), spec, until())


async def test_records_that_never_came_are_errors() -> None:
    spec = Spec("x", "read", "t", "s", count=100)
    found = await worker.read_plain(Memory(spec, [spec.value()] * 97, 10), spec, time.monotonic() + 0.1)
    assert found.errors == 3


async def test_a_backlog_is_over_with_its_last_record_whatever_came_in_between() -> None:
    spec = Spec("x", "read", "t", "s", count=40, stamps=True)
    fresh = stamp_of(time.monotonic_ns(), spec.value())
    values = [spec.value()] * 20 + [fresh] * 10 + [spec.value()] * 20 + [fresh] * 50
    found = await worker.read_stamped(Memory(spec, values, 5), spec, until())
    assert found.records == 45  # 40 old and 10 fresh ones, without the first five
    assert found.errors == 0


async def test_latency_is_from_the_stamp_to_the_hands_of_the_consumer() -> None:
    spec = Spec("x", "read", "t", "s", count=4, stamps=True, rate=1_000.0, warm_up=1)
    sent = stamp_of(time.monotonic_ns() - 5_000_000_000, spec.value())
    found = await worker.read_stamped(Memory(spec, [sent] * 4, 2), spec, until())
    assert found.latency_ms["p50"] == pytest.approx(5_000.0, abs=900.0)


async def test_producers_share_the_records_without_losing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[bytes] = []
    spec = Spec("x", "produce", "t", "s", count=1_003, producers=7)
    made: list[Memory] = []

    def make(asked: Spec) -> Memory:
        made.append(Memory(asked, stored, 1))
        made[-1].values = stored
        return made[-1]

    monkeypatch.setattr(worker, "adapter", make)
    monkeypatch.setattr(sys, "stdin", io.StringIO("GO\n"))
    found = await worker.produce(spec)
    assert len(made) == 7
    assert found.records == 1_003
    assert sum(worker.part(1_003, number, 7) for number in range(7)) == 1_003


# -- processes --------------------------------------------------------------------------------------


def test_a_server_is_stopped_woken_and_ended_by_its_id(tmp_path: Path) -> None:
    code = "import time; print('up', flush=True)\nwhile True: sum(range(10000))"
    program = Program("busy", [sys.executable, "-c", code], tmp_path)
    try:
        eventually("it is up", lambda: "up" in program.tail(), 10.0, [program])
        eventually("it has used the processor", lambda: usage([program.pid]).cpu_s > 0.1, 20.0)
        send([program.pid], signal.SIGSTOP)
        state = Path(f"/proc/{program.pid}/stat")
        eventually("it is stopped", lambda: state.read_text().rsplit(")", 1)[1].split()[0] == "T", 10.0)
        before = usage([program.pid])
        assert usage([program.pid]).since(before).cpu_s == 0.0
    finally:
        program.end()
    assert program.process.returncode is not None


def test_a_server_that_ends_by_itself_is_reported_with_its_last_words(tmp_path: Path) -> None:
    program = Program("broken", [sys.executable, "-c", "raise SystemExit('no such disk')"], tmp_path)
    with pytest.raises(PeerFailed, match="no such disk"):
        eventually("never", lambda: False, 20.0, [program])


def test_a_process_that_ended_takes_nothing_back() -> None:
    before = Usage({1: (5.0, 100), 2: (90.0, 9_000)}, 10)
    found = Usage({1: (6.0, 150), 3: (0.5, 7)}, 20).since(before)
    assert (found.cpu_s, found.written, found.rss) == (1.5, 57, 20)


def test_ports_are_handed_out_once() -> None:
    assert len({free_port() for _ in range(20)}) == 20


def test_a_wrong_option_is_refused_before_anything_starts() -> None:
    command = [sys.executable, "-m", "benchmarks.compare", "--workloads", "prodcue"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no workload" in done.stderr


def test_a_server_that_still_gets_faster_is_not_warm() -> None:
    assert still_rising([50.0, 60.0]), "two passes say nothing"
    assert still_rising([68.0, 90.0, 130.0, 200.0])
    assert still_rising([68.0, 72.0, 76.0, 81.0]), "slowly, but it adds up"
    assert not still_rising([68.0, 200.0, 230.0, 231.0, 229.0, 235.0])
    assert not still_rising([0.0, 0.0, 0.0, 0.0]), "a workload that does not produce"
