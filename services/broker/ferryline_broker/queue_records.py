"""What queues read of the record log: keys and headers for the window, whole records for deliveries.

A batch is decoded once and kept while there is room (one budget for all partitions); a delivery mostly finds its
records here. What is there can only change where a log is cut, which throws away all that is known of the partition.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import OrderedDict
from operator import attrgetter

from ferryline.protocol.errors import CorruptBatch
from ferryline.protocol.messages import RECORDS
from ferryline.protocol.queue_messages import (
    HEADER_DELIVER_AT,
    HEADER_EXPIRES_AT,
    HEADER_ID,
    HEADER_PRIORITY,
    PRIORITIES,
    PRIORITY_DEFAULT,
)
from ferryline.protocol.records import BatchBuilder, BatchHeader, DecodedRecord, decode_batch, stamp
from ferryline_broker.core.events import Bytes, Key
from ferryline_broker.core.queue_events import ReadWindow, Scanned, ScannedBatch, WindowRead
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.log.walk import checked_batches
from ferryline_service.logs import get_logger

CACHE_BYTES = 64 * 1024 * 1024
_READ_BYTES = 256 * 1024
_RECORD_OVERHEAD_BYTES = 150  # of a decoded record, beside its contents
_HEADER_OVERHEAD_BYTES = 200  # of each of its headers
_TOGETHER_MIN = 6  # records of a batch: fewer enter a window faster one by one
_HANDED_ON_BYTES_MIN = 2_048  # of a batch: smaller ones are cheaper for everybody as one that is made of their records
_YEARS_MS = 100 * 365 * 86_400_000
_DELAY_MS_MAX = 366 * 86_400_000  # a year is what clients may ask for; more would hold retention back for ever
_log = get_logger()
_key, _headers = attrgetter("key"), attrgetter("headers")


class _Batch:
    """One decoded batch; ``records`` is empty for a control batch, and for one that does not decode.

    ``data``: as it is in the log, if it may be handed on like that. ``scanned``: what a window wants to know of it;
    None where it has to look at each. ``cost``: bytes of memory, about.
    """

    __slots__ = ("cost", "data", "header", "records", "scanned")

    def __init__(self, header: BatchHeader, records: list[DecodedRecord], data: memoryview) -> None:
        self.header = header
        self.records = records
        self.scanned: ScannedBatch | None = None
        headers = sum(map(len, map(_headers, records)))
        if len(records) >= _TOGETHER_MIN and not headers:
            self.scanned = ScannedBatch(header.base_offset, list(map(_key, records)))
        packed, size = header.codec != "none", header.size
        if packed:
            size = sum(len(record.key or b"") + len(record.value or b"") for record in records)
        handed_on = records and not packed and header.size >= _HANDED_ON_BYTES_MIN
        self.data = bytes(data) if handed_on else b""
        self.cost = len(self.data) + size + _RECORD_OVERHEAD_BYTES * len(records) + _HEADER_OVERHEAD_BYTES * headers


class QueueRecords:
    """Reads and keeps decoded batches. Raises StorageFailed (also for damage) where the log does."""

    def __init__(self, bytes_max: int = CACHE_BYTES) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._batches: OrderedDict[tuple[Key, int], _Batch] = OrderedDict()  # (partition, base offset), oldest first
        self._bases: dict[Key, list[int]] = {}

    def window(self, hosted: HostedReplica, ask: ReadWindow, now_ms: int, wall_ms: int) -> WindowRead:
        """The answer to a core's ReadWindow. Moments of the wall clock become moments of this broker's clock."""
        scanned: list[Scanned | ScannedBatch] = []
        next_offset, size = ask.offset, 0
        for batch in self._read(hosted, ask.offset, ask.below, ask.bytes_max):
            next_offset = batch.header.next_offset
            size += batch.header.size
            if batch.scanned is not None:
                scanned.append(batch.scanned)
                continue
            scanned += [
                _with_headers(record, now_ms, wall_ms) if record.headers else Scanned(record.offset, record.key)
                for record in batch.records
            ]
        return WindowRead(ask.group, ask.offset, next_offset, scanned, size, ask.ahead)

    def records(self, hosted: HostedReplica, offsets: list[int]) -> list[DecodedRecord]:
        """The records at these offsets, in ascending order. An offset that is not there (retained away) is left out."""
        found: list[DecodedRecord] = []
        records: list[DecodedRecord] = []
        base = end = -1  # of the batch that ``records`` are
        for offset in offsets:
            if not base <= offset < end:
                batch = self._batch(hosted, offset)
                if batch is None:
                    continue
                base, end, records = batch.header.base_offset, batch.header.next_offset, batch.records
            if records:
                found.append(records[offset - base])
        return found

    def delivery(self, hosted: HostedReplica, offsets: list[int]) -> tuple[bytearray, list[int]]:
        """The records at these offsets, as batches one after the other, and the offsets where there are any: what was
        retained away is left out. A batch that is leased as a whole is handed on as it stands in the log, with the
        checksum of whoever sent it; its base offset, which that leaves out, becomes its place in the delivery."""
        payload, found = bytearray(), list[int]()
        loose: list[DecodedRecord] = []
        at, count = 0, len(offsets)
        while at < count:
            batch = self._batch(hosted, offsets[at])
            if batch is None or not batch.records:
                at += 1
                continue
            base, records = batch.header.base_offset, batch.records
            end = base + len(records)
            if batch.data and _are(offsets, at, base, end):
                _add(payload, batch_of(loose), len(found) - len(loose))
                loose = []
                _add(payload, batch.data, len(found))
                found += offsets[at : at + len(records)]
                at += len(records)
                continue
            while at < count and base <= (offset := offsets[at]) < end:
                loose.append(records[offset - base])
                found.append(offset)
                at += 1
        _add(payload, batch_of(loose), len(found) - len(loose))
        return payload, found

    def peeked(self, hosted: HostedReplica, offsets: list[int], bytes_max: int) -> tuple[dict[str, object], Bytes]:
        """The records at these offsets; the first ones, if all of them are too much for one answer."""
        records: list[DecodedRecord] = []
        size = 0
        for offset in offsets:
            for record in self.records(hosted, [offset]):
                size += len(record.key or b"") + len(record.value or b"")
                records.append(record)
            if size >= bytes_max:
                break
        return {"offsets": [record.offset for record in records]}, batch_of(records)

    def forget(self, key: Key) -> None:
        """The replica is gone, or was cut: another record may come to stand where one stood."""
        for base in self._bases.pop(key, ()):
            self._bytes -= self._batches.pop((key, base)).cost

    # -- inside -------------------------------------------------------------------------------------

    def _batch(self, hosted: HostedReplica, offset: int) -> _Batch | None:
        bases = self._bases.get(hosted.key)
        if bases:
            at = bisect_right(bases, offset) - 1
            if at >= 0:
                key = (hosted.key, bases[at])
                batch = self._batches[key]
                if offset < batch.header.next_offset:
                    self._batches.move_to_end(key)
                    return batch
        for batch in self._read(hosted, offset, hosted.core.high_watermark[RECORDS], 1):
            if batch.header.base_offset <= offset < batch.header.next_offset:
                return batch
        return None

    def _read(self, hosted: HostedReplica, offset: int, below: int, bytes_max: int) -> list[_Batch]:
        log = hosted.logs[RECORDS]
        if offset < log.log_start or offset >= below:
            return []
        data = log.read(offset, min(bytes_max, _READ_BYTES), below)
        view = memoryview(data)
        found: list[_Batch] = []
        for at, header in checked_batches(log.path, data, offset):
            known = self._batches.get((hosted.key, header.base_offset))
            if known is None or known.header != header:
                try:
                    records = [] if header.is_control else list(decode_batch(view[at : at + header.size], header))
                except CorruptBatch as error:
                    # Its CRC holds, so the disk is good and a client sent it like that. To log readers it is an error;
                    # a queue goes on behind it, as on every other copy.
                    _log.error(
                        "a batch does not decode, queues skip it",
                        partition=hosted.name,
                        offset=header.base_offset,
                        records=header.record_count,
                        error=error.message,
                    )
                    records = []
                known = _Batch(header, records, view[at : at + header.size])
                self._keep(hosted.key, known)
            found.append(known)
        return found

    def _keep(self, key: Key, batch: _Batch) -> None:
        base = batch.header.base_offset
        old = self._batches.pop((key, base), None)
        if old is not None:
            self._bytes -= old.cost
        else:
            insort(self._bases.setdefault(key, []), base)
        self._batches[key, base] = batch
        self._bytes += batch.cost
        while self._bytes > self._bytes_max and len(self._batches) > 1:
            (owner, first), oldest = self._batches.popitem(last=False)
            self._bytes -= oldest.cost
            self._bases[owner].remove(first)
            if not self._bases[owner]:
                del self._bases[owner]


def _are(offsets: list[int], at: int, base: int, end: int) -> bool:
    """Whether [base, end) are the ``offsets`` from ``at`` on. The first and the last are looked at before all others:
    few of many, or another order, as by priority, must not cost as much as the whole batch."""
    last = at + end - base - 1
    if offsets[at] != base or last >= len(offsets) or offsets[last] != end - 1:
        return False
    return offsets[at : last + 1] == list(range(base, end))


def _add(payload: bytearray, batch: bytes | bytearray, place: int) -> None:
    if batch:
        payload += batch
        stamp(payload, place, 0, len(payload) - len(batch))


def batch_of(records: list[DecodedRecord]) -> bytearray:
    """One batch of exactly these records; of none, nothing."""
    if not records:
        return bytearray()
    builder = BatchBuilder(2**30)
    builder.extend([(record.timestamp, record.key, record.value, record.headers) for record in records])
    return builder.build()


def _with_headers(record: DecodedRecord, now_ms: int, wall_ms: int) -> Scanned:
    """What headers say that queues know. A value that makes no sense counts as none: a record must not stop a queue."""
    priority, due_ms, expires_ms, identity = PRIORITY_DEFAULT, 0, 0, b""
    ahead_ms = now_ms - wall_ms
    for name, value in record.headers:
        if value is None or not name.startswith("fl-"):
            continue
        if name == HEADER_PRIORITY:
            level = _number(value)
            priority = level if 0 <= level < PRIORITIES else PRIORITY_DEFAULT
        elif name == HEADER_DELIVER_AT:
            due_ms = max(0, _number(value) + ahead_ms) if 0 < _number(value) <= wall_ms + _DELAY_MS_MAX else 0
        elif name == HEADER_EXPIRES_AT:
            expires_ms = max(1, _number(value) + ahead_ms) if _number(value) > 0 else 0
        elif name == HEADER_ID:
            identity = value
    return Scanned(record.offset, record.key, priority, due_ms, expires_ms, identity)


def _number(value: bytes) -> int:
    """A moment or level in ASCII digits; -1 for anything else."""
    if not value.isdigit() or len(value) > 15:
        return -1
    return min(int(value), _YEARS_MS)
