"""Receipts of a producer: proof, kept by whoever sent, of what a cluster has acknowledged.

One line of JSON for each acknowledged batch. ``chain`` is a BLAKE2b of the receipt before it (of the same producer id
and partition, in the order of the log) and of base offset and CRC32C of this batch; the CRC covers every other byte of
it, producer id and sequence included. So the newest receipt proves all batches back to ``first``, where its chain
begins.

A chain begins anew after a batch with an unknown outcome, which may or may not be stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from struct import Struct

import msgspec

CHAIN_BYTES = 16
START = bytes(CHAIN_BYTES)
_LINK = Struct(">qI")


class ReceiptError(ValueError):
    """A line is no receipt."""


class Receipt(msgspec.Struct, frozen=True):
    """One acknowledged batch. ``epoch`` is that of the answer: the batch is of this one or an earlier one."""

    topic: str
    topic_id: str
    partition: int
    offset: int
    count: int
    epoch: int
    producer_id: int
    crc: int
    chain: str
    first: int

    @property
    def next_offset(self) -> int:
        return self.offset + self.count


class StoredBatch(msgspec.Struct, frozen=True):
    """A batch of the producer as a copy holds it."""

    offset: int
    next_offset: int
    epoch: int
    crc: int


@dataclass(frozen=True)
class Missing:
    """A receipt that a copy does not honour."""

    receipt: Receipt
    reason: str


@dataclass(frozen=True)
class Honoured:
    """What came of the receipts of one chain: how many hold, how many retention has outdated, which do not hold."""

    held: int
    expired: int
    missing: list[Missing]


def link(chain: bytes, offset: int, crc: int) -> bytes:
    """The chain after one more batch."""
    return blake2b(chain + _LINK.pack(offset, crc), digest_size=CHAIN_BYTES).digest()


def parse(line: bytes) -> Receipt:
    """One line. Raises ReceiptError."""
    try:
        receipt = msgspec.json.decode(line, type=Receipt)
        sound = len(bytes.fromhex(receipt.chain)) == CHAIN_BYTES
    except (msgspec.DecodeError, ValueError) as error:
        raise ReceiptError(str(error)) from None
    if not sound or receipt.count < 1 or not 0 <= receipt.first <= receipt.offset:
        raise ReceiptError("chain, count, first and offset do not fit together")
    return receipt


Chain = tuple[str, int, int, int]  # topic id, partition, producer id, first offset


def chains(receipts: Iterable[Receipt]) -> dict[Chain, list[Receipt]]:
    """Receipts by chain, each in the order of the log."""
    found: dict[Chain, list[Receipt]] = {}
    for receipt in receipts:
        found.setdefault((receipt.topic_id, receipt.partition, receipt.producer_id, receipt.first), []).append(receipt)
    for rows in found.values():
        rows.sort(key=lambda receipt: receipt.offset)
    return found


def judge(receipts: Sequence[Receipt], stored: Sequence[StoredBatch], log_start: int) -> Honoured:
    """Whether a copy that begins at ``log_start`` and holds these batches of the producer honours one chain's receipts.

    Between two kept receipts, and from ``first`` to the first of them, nothing may be missing, added or changed.
    """
    missing: list[Missing] = []
    alive = [receipt for receipt in receipts if receipt.next_offset > log_start]
    batches = {batch.offset: batch for batch in stored}
    for receipt in alive:
        reason = _differs(receipt, batches.get(receipt.offset))
        if reason:
            missing.append(Missing(receipt, reason))
    bad = {one.receipt.offset for one in missing}
    begin, chain, certain = _anchor(receipts, log_start)
    rows = [batch for batch in stored if batch.offset >= begin]
    at = 0
    for receipt in alive:
        while at < len(rows) and rows[at].offset <= receipt.offset:
            chain = link(chain, rows[at].offset, rows[at].crc)
            at += 1
        if certain and chain.hex() != receipt.chain and receipt.offset not in bad:
            told = f"between offset {begin} and {receipt.offset} a batch of this producer is missing or changed"
            missing.append(Missing(receipt, told))
        chain, certain = bytes.fromhex(receipt.chain), True  # what follows is judged by itself
        begin = receipt.next_offset
    broken = {one.receipt.offset for one in missing}
    return Honoured(len(alive) - len(broken), len(receipts) - len(alive), missing)


def _differs(receipt: Receipt, batch: StoredBatch | None) -> str:
    if batch is None:
        return f"no batch of this producer begins at offset {receipt.offset}"
    if batch.crc != receipt.crc:
        return f"the batch at offset {receipt.offset} has CRC {batch.crc:08x}, not {receipt.crc:08x}"
    if batch.next_offset != receipt.next_offset:
        return f"the batch at offset {receipt.offset} ends at {batch.next_offset}, not {receipt.next_offset}"
    if batch.epoch > receipt.epoch:
        return f"the batch at offset {receipt.offset} is of epoch {batch.epoch}, later than {receipt.epoch}"
    return ""


def _anchor(receipts: Sequence[Receipt], log_start: int) -> tuple[int, bytes, bool]:
    """From which offset on to recompute the chain, its value there, and whether that is certain: batches between the
    last receipt that has expired and the log start may have had receipts that were not kept."""
    if receipts and receipts[0].first >= log_start:
        return receipts[0].first, START, True
    expired = [receipt for receipt in receipts if receipt.next_offset <= log_start]
    return log_start, bytes.fromhex(expired[-1].chain) if expired else START, False
