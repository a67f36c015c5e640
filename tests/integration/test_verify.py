"""`ferryline verify` on real processes: it finds what was done to the files of brokers, mends it, and honours receipts."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ferryline.cli.processes import LocalCluster
from ferryline.proof.receipts import parse
from ferryline.protocol.records import split_batches

pytestmark = pytest.mark.process

PARTITIONS = 2
RECORDS = 40_000
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
        self.cluster.restart(name)


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
