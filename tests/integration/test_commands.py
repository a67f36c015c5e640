"""The command line against a real cluster: what a user types, and what comes out."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ferryline as fl
from ferryline.cli.processes import LocalCluster
from polling import poll_blocking

pytestmark = pytest.mark.process

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    made = LocalCluster(tmp_path_factory.mktemp("commands"), brokers=3)
    made.start()
    yield made
    made.kill_all()


@pytest.fixture(scope="module")
def ferryline(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run the program against the cluster; the exit status must be the expected one."""
    home = tmp_path_factory.mktemp("home")

    def run(*args: str, stdin: str = "", status: int = 0, **env: str) -> Done:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FERRYLINE_")}
        clean |= {"HOME": str(home), "FERRYLINE_HOME": str(home / "data"), "COLUMNS": "160", "NO_COLOR": "1"}
        clean |= {"FERRYLINE_URL": cluster.url, "FERRYLINE_CA": str(cluster.ca), **env}
        done = subprocess.run(
            [sys.executable, "-m", "ferryline.cli", *args],
            input=stdin,
            capture_output=True,
            text=True,
            env=clean,
            timeout=90,
            check=False,
        )
        assert done.returncode == status, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


def as_json(done: Done) -> Any:
    return json.loads(done.stdout)


def lines(done: Done) -> list[str]:
    return done.stdout.splitlines()


def test_a_topic_lives_from_create_to_delete(ferryline: Run) -> None:
    ferryline("topic", "create", "life", "-p", "4", "--retention", "2d", "--min-isr", "1")
    assert "TOPIC_EXISTS" in ferryline("topic", "create", "life", status=1).stderr
    ferryline("topic", "create", "life", "--if-not-exists")
    assert "life" in ferryline("topic", "list").stdout
    found = as_json(ferryline("topic", "describe", "life", "-o", "json"))
    assert (found["partitions"], found["replication"], found["retention_ms"]) == (4, 2, 172_800_000)
    assert len(found["partition_list"]) == 4
    ferryline("topic", "alter", "life", "--retention", "unlimited", "--max-record-bytes", "2MiB")
    found = as_json(ferryline("topic", "describe", "life", "--output", "json"))
    assert (found["retention_ms"], found["max_record_bytes"]) == (-1, 2 * 1024 * 1024)
    refused = ferryline("topic", "add-partitions", "life", "6", status=2)
    assert "--keys-move" in refused.stderr
    ferryline("topic", "add-partitions", "life", "6", "--keys-move")
    assert as_json(ferryline("topic", "describe", "life", "-o", "json"))["partitions"] == 6
    ferryline("topic", "delete", "life", "--yes")
    assert "UNKNOWN_TOPIC" in ferryline("topic", "describe", "life", status=3).stderr
    ferryline("topic", "delete", "life", "--yes", status=3)


def test_retry_settings_are_set_shown_and_changed_one_by_one(ferryline: Run) -> None:
    ferryline("topic", "create", "jobs", "-p", "1", "--retry-attempts", "8", "--retry-backoff", "1s..5m")
    shown = as_json(ferryline("topic", "describe", "jobs", "-o", "json"))["retry"]
    told = {"attempts": 8, "backoff_ms": 1_000, "backoff_max_ms": 300_000}
    told |= {"on_dead": "skip", "dead_letters": "jobs.dlq"}
    assert shown == told
    assert "8 attempts, 1s..5m apart, then to jobs.dlq" in ferryline("topic", "describe", "jobs").stdout
    changed = ferryline("topic", "alter", "jobs", "--on-dead", "park", "--dead-letters", "graveyard").stdout
    assert "on_dead=park" in changed
    shown = as_json(ferryline("topic", "describe", "jobs", "-o", "json"))["retry"]
    assert shown == {**told, "on_dead": "park", "dead_letters": "graveyard"}
    assert "retry.on_dead" in ferryline("topic", "alter", "jobs", "--on-dead", "drop", status=2).stderr
    assert "1..1000" in ferryline("topic", "alter", "jobs", "--retry-attempts", "1001", status=2).stderr
    assert "longest" in ferryline("topic", "alter", "jobs", "--retry-backoff", "5s..1s", status=2).stderr
    ferryline("topic", "delete", "jobs", "--yes")


def test_wrong_settings_are_usage_errors_that_name_the_limit(ferryline: Run) -> None:
    assert "INVALID_NAME" in ferryline("topic", "create", "no/slash", status=2).stderr
    assert "10000" in ferryline("topic", "create", "big", "-p", "10001", status=2).stderr
    assert "flush" in ferryline("topic", "create", "odd", "--flush", "sometimes", status=2).stderr
    assert "nothing to change" in ferryline("topic", "alter", "big", status=2).stderr


def test_lines_go_in_and_come_out_again(ferryline: Run) -> None:
    ferryline("topic", "create", "lines", "-p", "1")
    done = ferryline("produce", "lines", stdin="one\ntwo\nthree\n")
    assert "3 of 3 records acknowledged" in done.stderr
    assert lines(ferryline("consume", "lines", "--from", "start", "--exit")) == ["one", "two", "three"]
    assert lines(ferryline("consume", "lines", "--from", "-2", "--exit")) == ["two", "three"]
    assert lines(ferryline("consume", "lines", "--from", "start", "--count", "1")) == ["one"]
    assert lines(ferryline("consume", "lines", "--from", "@-1h", "--count", "3")) == ["one", "two", "three"]
    shown = lines(ferryline("consume", "lines", "--from", "start", "-e", "-f", "%o\\n"))
    offsets = [int(text) for text in shown]
    window = f"{offsets[1]}:{offsets[2]}"
    assert lines(ferryline("consume", "lines", "--from", window)) == ["two"]
    assert lines(ferryline("consume", "lines", "--exit")) == []


def test_keys_headers_and_json_survive_the_round_trip(ferryline: Run, tmp_path: Path) -> None:
    ferryline("topic", "create", "shapes", "-p", "3")
    ferryline("produce", "shapes", "-f", "%k %v\\n", "-H", "src=test", stdin="c1 hello world\n")
    ferryline("produce", "shapes", "-K", ":", stdin="c2:x:y\n")
    path = tmp_path / "in.jsonl"
    path.write_text('{"customer": {"id": 7}, "n": 1}\n')
    ferryline("produce", "shapes", "--key-field", "customer.id", str(path))
    blob = tmp_path / "blob"
    blob.write_bytes(b"\xff\x00\n")
    ferryline("produce", "shapes", "--whole-files", "--key", "b", str(blob))
    records = [json.loads(line) for line in lines(ferryline("consume", "shapes", "--from", "start", "-e", "--json"))]
    by_key = {record["key"]: record for record in records}
    assert by_key["c1"]["value"] == "hello world"
    assert by_key["c1"]["headers"] == [["src", "test"]]
    assert by_key["c2"]["value"] == "x:y"
    assert json.loads(by_key["7"]["value"])["n"] == 1
    assert by_key["b"]["value_base64"] == "/wAK"
    shown = ferryline("consume", "shapes", "--from", "start", "-e", "-f", "%t|%k|%S\\n").stdout
    assert "shapes|c1|11" in shown


def test_what_cannot_be_sent_is_told_and_the_rest_is_sent(ferryline: Run) -> None:
    ferryline("topic", "create", "mixed", "-p", "1")
    done = ferryline("produce", "mixed", "-K", ":", stdin="a:1\nno separator\nb:2\n", status=1)
    assert "-:2" in done.stderr
    assert "2 of 2 records acknowledged" in done.stderr
    done = ferryline("produce", "mixed", stdin="x" * 1_100_000 + "\nsmall\n", status=2)
    assert "RECORD_TOO_LARGE" in done.stderr
    assert "1 of 2 records acknowledged" in done.stderr
    assert "UNKNOWN_TOPIC" in ferryline("produce", "nowhere", stdin="x\n", status=3).stderr
    assert "UNKNOWN_TOPIC" in ferryline("consume", "nowhere", "-e", status=3).stderr


def test_a_group_has_lag_can_be_moved_and_forgotten(ferryline: Run) -> None:
    ferryline("topic", "create", "grouped", "-p", "2")
    ferryline("produce", "grouped", "-K", ":", stdin="".join(f"k{n}:{n}\n" for n in range(10)))
    got = lines(ferryline("consume", "grouped", "--group", "billing", "--count", "4"))
    assert len(got) == 4
    described = as_json(ferryline("group", "describe", "billing", "--topic", "grouped", "-o", "json"))
    assert described["lag"] == 6, "what is left; the marks of epochs are no records"
    rest = lines(ferryline("consume", "grouped", "--group", "billing", "--count", "6"))
    assert sorted(got + rest, key=int) == [str(n) for n in range(10)]
    shown = as_json(ferryline("group", "seek", "billing", "grouped", "--to", "start", "--dry-run", "-o", "json"))
    assert 10 <= sum(-row["change"] for row in shown) <= 12, "records, and perhaps control records"
    assert as_json(ferryline("group", "describe", "billing", "--topic", "grouped", "-o", "json"))["lag"] == 0
    ferryline("group", "seek", "billing", "grouped", "--to", "start")
    again = lines(ferryline("consume", "grouped", "--group", "billing", "--count", "10"))
    assert sorted(again, key=int) == [str(n) for n in range(10)]
    ferryline("group", "list")
    ferryline("group", "delete", "billing", "--yes")
    assert "UNKNOWN_GROUP" in ferryline("group", "describe", "nobody", status=3).stderr


def test_the_cluster_shows_its_health_and_its_brokers(ferryline: Run) -> None:
    ferryline("topic", "create", "shown")
    health = as_json(ferryline("cluster", "health", "-o", "json"))
    assert (health["health"], health["brokers"], health["offline"]) == ("good", 3, 0)
    assert len(as_json(ferryline("broker", "list", "-o", "json"))) == 3
    assert "primary" in ferryline("cluster", "partitions").stdout
    assert as_json(ferryline("cluster", "partitions", "--troubled", "-o", "json")) == []
    assert len(as_json(ferryline("cluster", "in-sync", "-o", "json"))) == 3
    assert ferryline("cluster", "in-sync", "-o", "yaml").stdout.startswith("-\n  broker: 1\n")
    assert len(lines(ferryline("broker", "list", "-o", "ndjson"))) == 3
    ferryline("broker", "drain", "99", "--no-wait", status=3)
    ferryline("broker", "undrain", "99", status=3)


def test_a_broker_is_drained_and_comes_back(ferryline: Run) -> None:
    ferryline("topic", "create", "moving", "-p", "6")
    broker = as_json(ferryline("broker", "list", "-o", "json"))[0]["id"]
    ferryline("broker", "drain", str(broker), "--wait-timeout", "60")
    row = next(row for row in as_json(ferryline("broker", "list", "-o", "json")) if row["id"] == broker)
    assert (row["state"], row["replicas"]) == ("draining", 0)
    assert "stop it first" in ferryline("broker", "forget", str(broker), status=5).stderr
    ferryline("broker", "undrain", str(broker))
    row = next(row for row in as_json(ferryline("broker", "list", "-o", "json")) if row["id"] == broker)
    assert row["state"] == "running"


def test_doctor_finds_nothing_wrong_here_and_the_right_thing_elsewhere(
    ferryline: Run, cluster: LocalCluster, tmp_path: Path, eventually_blocking: Any
) -> None:
    eventually_blocking(lambda: "all their copies" in ferryline("doctor").stdout, within_s=30, what="all is well")
    other = tmp_path / "ca.crt"
    other.write_text(_another_ca())
    done = ferryline("doctor", "--ca", str(other), status=5)
    assert "is signed by" in done.stdout
    done = ferryline("doctor", "--url", cluster.url.replace("https", "http"), status=5)
    assert "does not answer HTTP" in done.stdout
    done = ferryline("doctor", "--url", "https://127.0.0.1:1", status=5)
    assert "nothing listens" in done.stdout
    done = ferryline("doctor", "--url", "https://no-such-host.invalid:8443", status=5)
    assert "does not resolve" in done.stdout
    found = as_json(ferryline("doctor", "-o", "json"))
    assert {row["level"] for row in found} <= {"ok", "warning"}


def _another_ca() -> str:
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "another CA")])
    now = datetime.now(UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return cert.public_bytes(serialization.Encoding.PEM).decode()


def test_certificates_are_shown_with_their_expiry(ferryline: Run) -> None:
    rows = as_json(ferryline("certs", "show", "-o", "json"))
    assert [row["signed_by_ca"] for row in rows] == [True, True]
    assert rows[1]["days_left"] > 1
    ferryline("certs", "expiry", "--days", "1")
    assert "CERTIFICATE_EXPIRES" in ferryline("certs", "expiry", "--days", "100000", status=1).stderr


def test_bench_measures_the_running_cluster(ferryline: Run) -> None:
    done = ferryline(
        "bench", "produce", "latency", "--records", "2000", "--rounds", "1", "--no-compare-confluent", "--json"
    )
    results = as_json(done)["results"]
    assert results["produce"]["ferryline"]["median"] > 0
    assert results["produce"]["ferryline"]["errors"] == 0
    assert results["latency"]["ferryline"]["p50"] > 0


async def give_up(cluster: LocalCluster, topic: str, count: int) -> None:
    """Receive as group `media` and reject everything but the first record."""
    async with (
        fl.connect(cluster.url, ca=cluster.ca) as client,
        client.receiver(topic, group="media", ordering="none") as receiver,
    ):
        for number in range(count):
            message = await anext(receiver)
            if number:
                await message.reject("no stock", "Traceback ...\nOutOfStock: none left")
            else:
                await message.ack()


def test_queues_and_dead_letters_are_looked_at_and_sent_back(ferryline: Run, cluster: LocalCluster) -> None:
    ferryline("topic", "create", "lost", "-p", "1")
    assert "no queue group" in ferryline("queue", "list", "lost").stdout
    assert "UNKNOWN_GROUP" in ferryline("queue", "stats", "lost", "media", status=3).stderr
    assert "no dead letters" in ferryline("dlq", "list", "lost").stdout
    ferryline("produce", "lost", "-f", "%k %v\\n", stdin="a one\nb two\nc three\nd four\n")
    asyncio.run(give_up(cluster, "lost", 3))
    listed = poll_blocking(
        lambda: [one for one in [as_json(ferryline("dlq", "list", "lost", "-o", "json"))] if len(one) == 2],
        what="two dead letters",
    )[0]
    assert [(one["key"], one["value"], one["reason"]) for one in listed] == [
        ("b", "two", "no stock"), ("c", "three", "no stock")
    ]  # fmt: skip
    assert listed[0]["exception"] == "OutOfStock: none left"
    [group] = as_json(ferryline("queue", "list", "lost", "-o", "json"))
    assert (group["group"], group["unsettled"], group["dying"]) == ("media", 1, 0)
    assert "ordering none" in ferryline("queue", "stats", "lost", "media").stdout
    [left] = as_json(ferryline("queue", "peek", "lost", "media", "-o", "json"))
    assert (left["key"], left["value"]) == ("d", "four")
    place = listed[0]["from"]
    told = ferryline("explain", place).stdout
    assert "settled" in told
    assert "lost.dlq/0/" in told
    assert "given up by media: no stock" in told
    waits = as_json(ferryline("explain", f"lost/0/{left['offset']}", "-o", "json"))
    assert waits["groups"]["media"]["state"] == "available"
    assert "not there" in ferryline("explain", "lost/0/999").stdout
    assert "not in the retained log since" in ferryline("explain", "lost/0", "-t", "lost", status=3).stderr
    assert "UNKNOWN_MESSAGE" in ferryline("explain", "nobody", "--since=-1h", status=3).stderr
    assert ferryline("explain", "nobody", "--since", "soon", status=2)
    assert "UNKNOWN_PARTITION" in ferryline("explain", "lost/7/0", status=3).stderr
    assert "say which" in ferryline("dlq", "redrive", "lost", status=2).stderr
    assert "2 would be redriven" in ferryline("dlq", "redrive", "lost", "--all", "--dry-run").stdout
    ferryline("queue", "pause", "lost", "media")
    assert as_json(ferryline("queue", "stats", "lost", "media", "-o", "json"))[0]["paused"]
    ferryline("queue", "resume", "lost", "media")
    assert "1 redriven" in ferryline("dlq", "redrive", "lost", "--key", "b").stdout
    [rest] = as_json(ferryline("dlq", "list", "lost", "-o", "json"))
    assert rest["key"] == "c"
    assert "would be purged" in ferryline("queue", "purge", "lost", "media", "--dry-run").stdout
    assert as_json(ferryline("queue", "purge", "lost", "media", "--yes", "-o", "json"))["purged"] == 2
    assert "nothing is parked" in ferryline("queue", "redrive", "lost", "media").stdout
    ferryline("queue", "delete", "lost", "media", "--yes")
    assert "UNKNOWN_GROUP" in ferryline("queue", "stats", "lost", "media", status=3).stderr
