"""Which partition a key belongs to. One function, used by the SDK and served by the coordinator."""

from __future__ import annotations

import zlib


def partition_of(key: bytes, partitions: int) -> int:
    """CRC32 of the key modulo the partition count: librdkafka's ``consistent`` placement.

    The same key lands on the same partition as long as the count stays.
    """
    assert partitions > 0
    return zlib.crc32(key) % partitions
