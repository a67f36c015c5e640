"""What was done and checked over many runs: one JSON line for each, appended when it ends, and their sum."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

NUMBERS = (
    "seconds", "acked", "refused", "unknown", "polled", "copies_read", "receipts", "elections", "takeovers",
    "anomalies",
)  # fmt: skip


def commit_of(folder: Path) -> str:
    """The commit of the working tree that ``folder`` lies in, with a ``+`` if it was changed; "" if there is none."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10.0)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Add a line in one write, so that runs beside each other do not mix theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, json.dumps(entry, sort_keys=True).encode() + b"\n")
    finally:
        os.close(descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    """All entries. Raises ValueError for a line that is none."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def total(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Runs, their sums and the sum of each fault. Runs under sabotage prove the proof, not the product: left out."""
    faults: Counter[str] = Counter()
    queue: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    runs = failed = 0
    commits: set[str] = set()
    for entry in entries:
        if entry.get("sabotage"):
            continue
        runs += 1
        failed += not entry["good"]
        commits.add(str(entry.get("commit", "")))
        faults.update(entry["faults"])
        queue.update(entry.get("queue", {}))
        sums.update({name: entry.get(name, 0) for name in NUMBERS})
    found: dict[str, Any] = {"runs": runs, "failed": failed, "commits": len(commits)}
    found.update({name: round(sums[name]) for name in NUMBERS})
    found["faults"] = dict(sorted(faults.items()))
    if queue:
        found["queue"] = dict(sorted(queue.items()))
    return found
