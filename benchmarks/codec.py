"""The two codecs operation by operation: `python -m benchmarks.codec [--rounds N]`.

Each round is a process for each codec, in turns; shown is the least time of all rounds, which a busy machine disturbs
least. Nanoseconds for each record of 100 bytes, unless the line says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

RECORDS = 2_000


def least(work: Callable[[], object], each: int, repeat: int = 60) -> float:
    """The least time of one call in ns, divided by ``each``."""
    best = float("inf")
    for _ in range(repeat):
        started = time.perf_counter_ns()
        work()
        best = min(best, time.perf_counter_ns() - started)
    return best / each


def measure() -> dict[str, float]:
    """Every operation with the codec that this process uses."""
    from ferryline.message import Message, Source
    from ferryline.protocol import records

    value = b"ferryline-" * 10
    rows = [(1_700_000_000_000, b"%012d" % number, value, []) for number in range(RECORDS)]

    def append() -> bytearray:
        builder = records.BatchBuilder(2**20)
        add = builder.append
        for stamp, key, data, headers in rows:
            add(stamp, key, data, headers)
        return builder.build()

    def extend() -> bytearray:
        builder = records.BatchBuilder(2**20)
        builder.extend(rows)
        return builder.build()

    data = bytes(append())
    view, header, source = memoryview(data), records.read_header(data), Source("t", 0, None)

    def messages() -> list[Message[bytes]]:
        return records.decode_messages(view, header, Message, source, plain=True)

    taken = messages()

    def look() -> int:
        return sum(len(message.key or b"") + len(message.raw or b"") for message in taken)

    block = bytes(2**20)
    return {
        "append one by one, and build": least(append, RECORDS),
        "append all at once, and build": least(extend, RECORDS),
        "decode into messages": least(messages, RECORDS),
        "look at key and value of a message": least(look, RECORDS),
        "CRC32C, for each KiB": least(lambda: records.crc32c(block), 1024),
        "read one header": least(lambda: records.read_header(data), 1, 2_000),
    }


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure()))
        return 0
    found: dict[str, dict[str, float]] = {"python": {}, "compiled": {}}
    for _ in range(options.rounds):
        for codec, figures in found.items():
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.codec", "--one"],
                env={**os.environ, "FERRYLINE_CODEC": codec},
                stdout=subprocess.PIPE,
                check=True,
            )
            for name, ns in json.loads(done.stdout).items():
                figures[name] = min(ns, figures.get(name, ns))
    print(f"{'ns':36} {'python':>9} {'compiled':>9} {'times':>6}")
    for name, ns in found["python"].items():
        ours = found["compiled"][name]
        print(f"{name:36} {ns:9,.0f} {ours:9,.0f} {ns / ours:6.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
