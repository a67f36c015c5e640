"""Builders and checks shared by the tests of the broker's log."""

from __future__ import annotations

from ferryline.protocol.records import BatchHeader, encode_batch, read_header, split_batches
from ferryline_broker.log.model import LogConfig
from ferryline_broker.log.partition_log import PartitionLog
from ferryline_broker.log.storage import Storage

SMALL = LogConfig(segment_bytes=2000, segment_ms=-1, retention_ms=-1)
TOPIC = "ab" * 16


class ManualClock:
    """A wall clock in ms that only moves when told."""

    def __init__(self, now_ms: int = 1_000_000) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms


def batch(
    offset: int, *, records: int = 3, epoch: int = 1, value: bytes = b"value", timestamp_ms: int = 0, producer: int = -1
) -> bytearray:
    """One stamped batch; records carry their own offset as key, so that equal contents mean equal offsets."""
    rows = [(b"%d" % (offset + number), value, []) for number in range(records)]
    ids = (producer, 0, offset) if producer >= 0 else (-1, -1, -1)
    return encode_batch(rows, base_offset=offset, epoch=epoch, timestamp_ms=timestamp_ms, producer=ids)


def headers_of(data: bytes | bytearray) -> list[tuple[int, BatchHeader]]:
    return split_batches(data)


def append(log: PartitionLog, **options: object) -> bytes:
    """Append one batch at the log end and return its bytes."""
    data = batch(log.log_end, **options)  # type: ignore[arg-type]
    log.append(data, [(0, read_header(data))])
    return bytes(data)


def fill(log: PartitionLog, count: int, **options: object) -> list[bytes]:
    return [append(log, **options) for _ in range(count)]


def contents(log: PartitionLog, bytes_max: int = 700) -> list[bytes]:
    """Every batch of the log, by reading it from start to end as a secondary does."""
    found: list[bytes] = []
    offset = log.log_start
    while offset < log.log_end:
        data = log.read(offset, bytes_max, log.log_end)
        assert data, f"nothing at {offset} of {log.log_start}..{log.log_end}"
        for position, header in split_batches(data):
            assert header.next_offset > offset, "a batch twice, or out of order"
            if not found:
                assert header.base_offset <= offset
            else:
                assert header.base_offset == offset
            found.append(data[position : position + header.size])
            offset = header.next_offset
    return found


def log_files(storage: Storage, path: str) -> list[str]:
    return [name for name in storage.listdir(path) if name.endswith(".log")]
