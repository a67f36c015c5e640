"""Receipts that a producer keeps of what was acknowledged; `ferryline verify --receipts` compares them with the copies.

``client.producer(receipts="receipts.jsonl")``: one line for each acknowledged batch. The format, and what it proves, is
in `ferryline.proof.receipts`.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from ferryline.accumulator import Batch, PartitionKey
from ferryline.proof.receipts import START, Receipt, link

log = logging.getLogger("ferryline.producer")

ReceiptSink = Callable[[Receipt], None]
ReceiptsLike = str | os.PathLike[str] | ReceiptSink
_CRC_AT = slice(17, 21)
_NOTHING, _UNKNOWN = -1, -2  # instead of a base offset


class Receipts:
    """Writes a line before the futures of its batch resolve, unless an earlier batch of the partition is unsettled: a
    chain follows the order of the log, so that one comes first.

    A sink that fails costs its lines, never the producer: the chain goes on, and the next line that is written vouches
    for those before it.
    """

    def __init__(self, sink: ReceiptsLike) -> None:
        self._file: BinaryIO | None = None
        self._sink: ReceiptSink
        if callable(sink):
            self._sink = sink
        else:
            # Without a buffer each line is one write: whole lines, also after a kill.
            self._file = Path(sink).open("ab", buffering=0)  # noqa: SIM115 it lives as long as the producer
            self._sink = self._write
        self._chains: dict[tuple[str, int, int], tuple[bytes, int]] = {}  # (.., producer id) -> chain, its first offset
        self._unsettled: dict[PartitionKey, deque[Batch]] = {}
        self._outcomes: dict[int, tuple[int, int]] = {}  # batch number -> base offset (or _NOTHING, _UNKNOWN), epoch
        self._epochs: dict[int, int] = {}
        self._failed = False

    def sent(self, batch: Batch) -> None:
        """A batch was closed; in the order of its partition."""
        self._unsettled.setdefault(batch.key, deque()).append(batch)

    def answered(self, number: int, epoch: int) -> None:
        """A broker said yes to batch ``number`` in ``epoch``."""
        self._epochs[number] = epoch

    def acknowledged(self, batch: Batch, base_offset: int) -> None:
        """Last word: it stands at ``base_offset``."""
        self._settle(batch, base_offset)

    def failed(self, batch: Batch, *, definite: bool) -> None:
        """Last word: it is surely not stored, or nobody knows; then its chain begins anew behind it."""
        self._settle(batch, _NOTHING if definite else _UNKNOWN)

    def close(self) -> None:
        """Close the file. Lines are in the page cache at once; who needs them after a power cut syncs the file."""
        if self._file is not None:
            self._file.close()

    def _settle(self, batch: Batch, base_offset: int) -> None:
        self._outcomes[batch.number] = (base_offset, self._epochs.pop(batch.number, 0))
        queue = self._unsettled[batch.key]
        while queue and queue[0].number in self._outcomes:
            first = queue.popleft()
            self._put(first, *self._outcomes.pop(first.number))

    def _put(self, batch: Batch, base_offset: int, epoch: int) -> None:
        key = (*batch.key, batch.identity[0])
        if base_offset < 0:
            if base_offset == _UNKNOWN:
                self._chains.pop(key, None)
            return
        crc = int.from_bytes(batch.data[_CRC_AT], "big")
        chain, first = self._chains.get(key, (START, base_offset))
        chain = link(chain, base_offset, crc)
        self._chains[key] = (chain, first)
        name, count = batch.topic.name, len(batch.futures)
        receipt = Receipt(name, *batch.key, base_offset, count, epoch, key[2], crc, chain.hex(), first)
        try:
            self._sink(receipt)
        except Exception as error:
            if not self._failed:
                log.warning("a receipt could not be kept: %s", error)
            self._failed = True

    def _write(self, receipt: Receipt) -> None:
        assert self._file is not None
        self._file.write(msgspec.json.encode(receipt) + b"\n")
