"""After the last read: what the brokers themselves say about their copies, and what the producers' receipts prove.

The copies are compared from disk, records and delivery state; every receipt must be held by every copy in sync.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ferryline.cli.verify_receipts import ReceiptAuditor
from ferryline.cli.verify_replicas import Auditor, Brokers
from ferryline.proof.receipts import Receipt, parse

if TYPE_CHECKING:
    from ferryline.client import Client

SHOWN_MAX = 5


class Audit:
    """``receipts`` and ``bytes`` say how much was looked at; ``trouble`` what was found."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.bytes = 0
        self.receipts = 0
        self.trouble: list[str] = []

    async def run(self, topics: Sequence[str], receipts: Sequence[Path]) -> None:
        """Compare all copies of ``topics``, then look for every receipt."""
        cluster = self._client.routing.cluster
        brokers = Brokers(self._client)
        auditor = Auditor(brokers, progress=self._counted)
        for name in topics:
            meta = self._client.routing.topic(name)
            for part in cluster.partitions_of(meta.id) if meta is not None else ():
                checked = await auditor.check(name, part)
                self.trouble += [finding.sentence() for finding in checked.findings]
        account = await ReceiptAuditor(brokers, cluster).check(lines(receipts))
        self.receipts = account.receipts
        if account.missing:
            self.trouble.append(f"{account.missing:,} of {account.receipts:,} receipts are not held by every copy")
            self.trouble += account.told[:SHOWN_MAX]
        self.trouble += account.unchecked[:SHOWN_MAX]

    def _counted(self, size: int) -> None:
        self.bytes += size


async def repair(urls: Sequence[str], ca: str) -> str:
    """What an operator does about harm: ``ferryline verify --repair``. Returns what it says."""
    command = [sys.executable, "-m", "ferryline.cli", "--url", ",".join(urls), "--ca", ca, "verify", "--repair"]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    told, _ = await process.communicate()
    return told.decode(errors="replace")


def lines(files: Sequence[Path]) -> Iterator[Receipt]:
    """Receipts of several producers."""
    for path in files:
        with path.open("rb") as file:
            for line in file:
                yield parse(line)
