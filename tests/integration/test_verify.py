"""`ferryline verify` on real processes: it finds what was done to files, mends it, and compares receipts."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from ferryline.cli.processes import LocalCluster
from ferryline.proof.receipts import parse
from ferryline.protocol.records import BatchHeader, set_producer, split_batches

pytestmark = pytest.mark.process

PARTITIONS = 2
RECORDS = 24_000
WITHIN_S = 60.0


@dataclass
class Stage:
    """A cluster and the command line."""

    cluster: LocalCluster
    home: Path

    def run(self, *args: str, stdin: bytes = b"", status: int = 0) -> subprocess.CompletedProcess[bytes]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FERRYLINE_")}
        clean |= {"HOME": str(self.home), "COLUMNS": "200", "NO_COLOR": "1"}
        clean |= {"FERRYLINE_URL": ",".join(self.cluster.urls), "FERRYLINE_CA": str(self.cluster.ca)}
        command = [sys.executable, "-m", "ferryline.cli", *args]
        done = subprocess.run(command, input=stdin, capture_output=True, env=clean, timeout=90, check=False)
        told = f"{args}: {done.returncode}\n{done.stdout.decode()}\n{done.stderr.decode()}"
        assert done.returncode == status, told
        return done

    def verify(self, *args: str, status: int = 0) -> list[dict[str, Any]]:
        """What the command found in each partition."""
        found: list[dict[str, Any]] = json.loads(self.run("verify", *args, "-o", "json", status=status).stdout)
        return found

    def fill(self, topic: str, *settings: str, records: int = RECORDS, receipts: Path | None = None) -> list[bytes]:
        """Create a topic and write to it; the values, sorted."""
        self.run("topic", "create", topic, "-p", str(PARTITIONS), *settings)
        return self.more(topic, records, receipts)

    def more(self, topic: str, records: int, receipts: Path | None = None) -> list[bytes]:
        draw = random.Random(f"{topic}{records}")
        rows = [b"%d:%s" % (number, draw.randbytes(60).hex().encode()) for number in range(records)]
        args = ["produce", topic, "--linger", "0.002", *(["--receipts", str(receipts)] if receipts else [])]
        self.run(*args, stdin=b"".join(row + b"\n" for row in rows))
        return sorted(rows)

    def values(self, topic: str) -> list[bytes]:
        """Every record that a consumer gets."""
        return sorted(self.run("consume", topic, "--from", "start", "--exit").stdout.splitlines())

    def part(self, topic: str, partition: int = 0) -> dict[str, Any]:
        found = json.loads(self.run("topic", "describe", topic, "-o", "json").stdout)
        return {**found["partition_list"][partition], "topic_id": found["id"]}

    def folder(self, broker: int, part: dict[str, Any]) -> Path:
        """Where a broker keeps its copy."""
        name = f"{part['topic_id']}-{part['partition']}"
        root = self.cluster.data_dir(self.cluster.name_of(broker))
        return next(path for path in root.glob(f"*/partitions/{name}") if path.is_dir())

    def restart(self, broker: int, deed: Callable[[], None]) -> None:
        """Do something to the files of a broker that is down."""
        name = self.cluster.name_of(broker)
        self.cluster.kill(name)
        deed()
        self.cluster.start_one(name)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    # Without the scrubber, which would find the damage before the command does.
    quiet = ("--scrub-bytes-per-s", "0")
    made = LocalCluster(tmp_path_factory.mktemp("verify"), brokers=3, broker_args=quiet)
    made.start()
    yield Stage(made, tmp_path_factory.mktemp("home"))
    made.kill_all()


def flip(path: Path, position: int) -> None:
    """Turn one bit over."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def batch_of(path: Path, number: int) -> tuple[int, BatchHeader]:
    """Position and header of that batch of a segment, or of its last; of those that hold many records. A producer that
    is slow for a moment makes some of one record."""
    batches = [(at, header) for at, header in split_batches(path.read_bytes()) if header.size > 1_000]
    return batches[min(number, len(batches) - 1)]


def logs_of(folder: Path, log: str = "records") -> list[Path]:
    return sorted((folder / log).glob("*.log"))


def test_a_clean_cluster_verifies(stage: Stage) -> None:
    stage.fill("clean", "--segment-bytes", "1MiB")
    rows = stage.verify("clean")
    assert [row["state"] for row in rows] == ["agree"] * PARTITIONS
    assert sum(row["up_to"] - row["from"] for row in rows) >= RECORDS
    assert all(len(row["copies"]) == 2 and row["bytes"] > 0 for row in rows)
    table = stage.run("verify", "clean").stdout.decode()
    assert "agree" in table
    assert "0 partitions with something wrong" in table
    stage.run("verify", "nonsense", status=3)


@pytest.mark.parametrize(
    ("which", "byte"),
    [
        pytest.param(0, 300, id="sealed, body"),
        pytest.param(-1, 300, id="active, body", marks=pytest.mark.slow),
        pytest.param(0, 13, id="sealed, epoch", marks=pytest.mark.slow),
        pytest.param(-1, 14, id="active, epoch"),
    ],
)
def test_a_flipped_bit_on_a_secondary_is_named_and_mended(stage: Stage, which: int, byte: int) -> None:
    topic = f"flip{which}{byte}".replace("-", "m")
    rows = stage.fill(topic, "--segment-bytes", "1MiB")
    part = stage.part(topic)
    victim = next(broker for broker in part["replicas"] if broker != part["primary"])
    path = logs_of(stage.folder(victim, part))[which]
    at, header = batch_of(path, 3)
    flip(path, at + byte)
    bad, other = stage.verify(topic, status=1)
    (finding,) = bad["findings"]
    assert (finding["kind"], finding["broker"], finding["log"]) == ("damaged", victim, "records")
    assert (finding["offset"], finding["position"]) == (header.base_offset, at)
    assert finding["file"].endswith(path.name)
    assert other["findings"] == []
    stage.run("verify", topic, "--repair")
    assert [row["state"] for row in stage.verify(topic)] == ["agree", "agree"]
    assert stage.values(topic) == rows
    assert list(stage.folder(victim, part).glob("damaged-*")), "the damaged files are kept"


def test_a_damaged_primary_hands_over_before_it_is_mended(stage: Stage) -> None:
    rows = stage.fill("leader", "--segment-bytes", "1MiB")
    part = stage.part("leader")
    path = logs_of(stage.folder(part["primary"], part))[-1]
    flip(path, batch_of(path, 2)[0] + 200)
    told = stage.run("verify", "leader", "--repair", status=0).stderr.decode()
    assert "after it had handed over" in told
    assert [row["state"] for row in stage.verify("leader")] == ["agree", "agree"]
    assert stage.values("leader") == rows


def test_a_file_cut_short_under_a_running_broker_is_found_and_mended(stage: Stage) -> None:
    rows = stage.fill("short", "--segment-bytes", "1MiB")
    part = stage.part("short")
    victim = next(broker for broker in part["replicas"] if broker != part["primary"])
    path = logs_of(stage.folder(victim, part))[0]
    os.truncate(path, path.stat().st_size // 2)
    (bad, _) = stage.verify("short", status=1)
    assert bad["findings"][0]["kind"] == "damaged"
    stage.run("verify", "short", "--repair")
    assert stage.values("short") == rows


def test_damage_in_the_state_log_is_found_and_mended_and_the_group_stands_where_it_stood(stage: Stage) -> None:
    stage.fill("state")
    stage.run("consume", "state", "--group", "readers", "--from", "start", "--count", "1000")
    part = stage.part("state")
    victim = next(broker for broker in part["replicas"] if broker != part["primary"])
    path = logs_of(stage.folder(victim, part), "state")[-1]
    flip(path, 70)
    bad = stage.verify("state", status=1)[0]["findings"]
    assert [(finding["log"], finding["broker"]) for finding in bad] == [("state", victim)]
    before = stage.run("group", "describe", "readers", "-o", "json").stdout
    stage.run("verify", "state", "--repair")
    assert json.loads(stage.run("group", "describe", "readers", "-o", "json").stdout) == json.loads(before)


def test_side_files_that_are_flipped_or_lost_while_a_broker_is_down_cost_nothing(stage: Stage) -> None:
    """Index, seal and checkpoint are copies of what the log says, or come in two."""
    rows = stage.fill("side", "--segment-bytes", "1MiB")
    part = stage.part("side")
    victim = next(broker for broker in part["replicas"] if broker != part["primary"])
    folder = stage.folder(victim, part)

    def deed() -> None:
        for path in (folder / "records").glob("*.index"):
            flip(path, path.stat().st_size // 2)
        for path in (folder / "records").glob("*.seal"):
            path.unlink()
        flip(folder / "meta", 30)

    stage.restart(victim, deed)
    assert [row["state"] for row in stage.verify("side")] == ["agree", "agree"]
    assert stage.values("side") == rows


def test_a_broker_that_starts_with_a_file_missing_fetches_its_copy_again_by_itself(
    stage: Stage, eventually_blocking: Callable[..., Any]
) -> None:
    rows = stage.fill("gone", "--segment-bytes", "1MiB")
    part = stage.part("gone")
    victim = next(broker for broker in part["replicas"] if broker != part["primary"])
    stage.restart(victim, lambda: logs_of(stage.folder(victim, part))[0].unlink())

    def back() -> bool:
        return victim in stage.part("gone")["in_sync"]

    eventually_blocking(back, within_s=WITHIN_S)
    assert [row["state"] for row in stage.verify("gone")] == ["agree", "agree"]
    assert stage.values("gone") == rows


def test_the_only_copy_is_never_given_up(stage: Stage) -> None:
    stage.fill("single", "-r", "1")
    part = stage.part("single")
    path = logs_of(stage.folder(part["primary"], part))[-1]
    flip(path, batch_of(path, 1)[0] + 100)
    was = path.read_bytes()
    told = stage.run("verify", "single", "--repair", status=1).stderr.decode()
    assert "is kept as it is" in told
    assert path.read_bytes() == was


def forge(path: Path, number: int) -> None:
    """Change a value inside a batch and give the batch a checksum that fits."""
    at, header = batch_of(path, number)
    batch = bytearray(path.read_bytes()[at : at + header.size])
    batch[-10] ^= 1
    set_producer(batch, header.producer_id, header.producer_epoch, header.base_sequence)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(batch)


def test_where_two_copies_differ_and_both_check_out_somebody_must_say_whom_to_trust(stage: Stage) -> None:
    rows = stage.fill("differ")
    part = stage.part("differ")
    victim = next(broker for broker in part["replicas"] if broker != part["primary"])
    forge(logs_of(stage.folder(victim, part))[-1], 5)
    findings = stage.verify("differ", status=1)[0]["findings"]
    assert {(finding["kind"], finding["broker"]) for finding in findings} == {("differs", b) for b in part["replicas"]}
    assert len({finding["offset"] for finding in findings}) == 1
    assert "is kept as it is" in stage.run("verify", "differ", "--repair", status=1).stderr.decode()
    stage.run("verify", "differ", "--repair", "--trust", str(part["primary"]))
    assert stage.verify("differ")[0]["state"] == "agree"
    assert stage.values("differ") == rows


def test_receipts_are_honoured_until_a_batch_is_missing_or_changed(stage: Stage, tmp_path: Path) -> None:
    kept = tmp_path / "receipts.jsonl"
    stage.fill("proofs", receipts=kept)
    stage.more("proofs", 500, kept)  # another producer, the same file
    receipts = [parse(line) for line in kept.read_bytes().splitlines(keepends=True)]
    assert sum(receipt.count for receipt in receipts) == RECORDS + 500
    found = json.loads(stage.run("verify", "--receipts", str(kept), "-o", "json").stdout)
    assert (found["missing"], found["expired"], found["held"]) == (0, 0, 2 * len(receipts))

    newest = tmp_path / "newest.jsonl"  # the newest alone vouches for all before it
    lines = kept.read_bytes().splitlines(keepends=True)
    last = {(receipt.producer_id, receipt.partition): line for receipt, line in zip(receipts, lines, strict=True)}
    newest.write_bytes(b"".join(last.values()))
    stage.run("verify", "--receipts", str(newest))

    invented = tmp_path / "invented.jsonl"
    invented.write_bytes(kept.read_bytes().replace(b'"offset":%d,' % receipts[2].offset, b'"offset":%d,' % 10**9))
    assert "no batch of this producer" in stage.run("verify", "--receipts", str(invented), status=1).stderr.decode()

    part = stage.part("proofs", receipts[0].partition)
    for broker in part["replicas"]:  # all copies agree on a forgery: only who sent it can tell
        forge(logs_of(stage.folder(broker, part))[-1], 4)
    assert stage.verify("proofs")[0]["state"] == "agree"
    for file in (kept, newest):
        assert "receipts are not honoured" in stage.run("verify", "--receipts", str(file), status=1).stderr.decode()


def _write_until(pipe: IO[bytes], stop: threading.Event) -> None:
    for number in itertools.count():
        if stop.is_set():
            return
        pipe.write(b"".join(b"more-%d-%d %s\n" % (number, row, b"x" * 80) for row in range(1_000)))
        pipe.flush()


def test_verify_works_beside_traffic(stage: Stage) -> None:
    stage.fill("busy", "--segment-bytes", "1MiB")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FERRYLINE_")}
    clean |= {"FERRYLINE_URL": ",".join(stage.cluster.urls), "FERRYLINE_CA": str(stage.cluster.ca)}
    command = [sys.executable, "-m", "ferryline.cli", "produce", "busy"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=clean) as traffic:
        assert traffic.stdin is not None
        stop = threading.Event()
        writer = threading.Thread(target=_write_until, args=(traffic.stdin, stop))
        writer.start()
        try:
            seen = [stage.verify("busy") for _ in range(2)]
        finally:
            stop.set()
            writer.join()
            traffic.stdin.close()
        assert traffic.wait(60) == 0
    assert seen[1][0]["up_to"] > seen[0][0]["up_to"], "there was traffic"
    assert all(row["state"] == "agree" for rows_seen in seen for row in rows_seen)


def test_a_recorded_history_is_judged_without_a_cluster(stage: Stage, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    lines = [
        '{"f":"header","version":1}',
        '{"f":"send","proc":"p","topic":"t","partition":0,"values":[[0,3]],"offsets":[[1,3]],"t0":1,"t1":2}',
    ]
    read = '{"f":"poll","proc":"c","topic":"t","partition":0,"values":[[0,%d]],"offsets":[[1,%d]]}'
    good.write_text("\n".join([*lines, read % (3, 3)]) + "\n")
    bad.write_text("\n".join([*lines, read % (2, 2)]) + "\n")
    assert "every promise was kept" in stage.run("verify", "--history", str(good)).stdout.decode()
    assert "unseen: 1" in stage.run("verify", "--history", str(bad), status=1).stdout.decode()
