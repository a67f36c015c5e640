"""Feeds the compiled codec damaged batches until it breaks: `python -m tests.unit.codec_fuzz [--rounds N] [--seed S]`.

Run by `scripts/codec-sanitizers`, where a read beyond a buffer ends the process. Here only a crash or an exception
other than CorruptBatch does.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
from typing import Any

from ferryline.message import Message, Source
from ferryline.protocol import _codec, records
from ferryline.protocol.errors import CorruptBatch


def batch(chance: random.Random) -> bytearray:
    """A good batch of a few records."""
    builder = records.BatchBuilder(chance.choice([200, 1_000, 20_000]))
    for _ in range(chance.randint(1, 30)):
        pairs: list[tuple[str, bytes | None]] = [
            (chance.choice(["a", "name", "ß" * 40]), chance.choice([None, b"", b"v" * 90]))
            for _ in range(chance.choice([0, 0, 1, 3]))
        ]
        key = chance.choice([None, b"", chance.randbytes(chance.randint(1, 200))])
        builder.append(chance.randrange(2**45), key, chance.randbytes(chance.randint(0, 300)), pairs)
    return builder.build()


def damage(data: bytearray, chance: random.Random) -> None:
    """Flip, cut or stretch; half of the time where lengths are likely."""
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(57, len(data)) if chance.random() < 0.5 else chance.randrange(len(data))
        data[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
    if chance.random() < 0.4:
        del data[chance.randrange(61, len(data) + 1) :]
    if chance.random() < 0.2:
        data += chance.randbytes(chance.randint(1, 20))
    if chance.random() < 0.7:
        struct.pack_into(">i", data, 8, len(data) - 12)


def look_at(data: bytes, source: Source) -> int:
    """Everything that is done with bytes from outside. Returns 1 when they were taken."""
    found: list[tuple[int, Any]]
    try:
        found = records.split_batches(data, verify=False)
        for at, header in found:
            part = memoryview(data)[at : at + header.size]
            list(records.decode_batch(part, header))
            for message in records.decode_messages(part, header, Message, source, plain=False):
                repr((message.key, message.value, message.headers, message.timestamp_ms))
    except CorruptBatch:
        return 0
    return 1


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    assert _codec.COMPILED, _codec.WHY
    chance, source, taken = random.Random(options.seed), Source("t", 0, None), 0
    for number in range(options.rounds):
        data = batch(chance)
        if number % 10:
            damage(data, chance)
        exact = bytes(data)  # of exactly this size, so that a sanitizer sees the first byte behind it
        taken += look_at(exact, source)
    print(f"{options.rounds} batches: {taken} taken, {options.rounds - taken} refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
