"""Harm to the files of a broker: what a failing disk or a careless hand does to them."""

from __future__ import annotations

import random
from pathlib import Path

BITS_MAX = 8
SMALL_BYTES = 1024  # a segment with less in it is not worth harming


def segments_of(data_root: Path) -> list[Path]:
    """Segment files of records below the data root of a broker, sorted."""
    found = data_root.glob("*/partitions/*/records/*.log")
    return sorted(path for path in found if path.stat().st_size > SMALL_BYTES)


def flip(path: Path, draw: random.Random) -> None:
    """Turn one to eight bits of a file over, wherever they are."""
    size = path.stat().st_size
    with path.open("r+b", buffering=0) as file:
        for at in {min(size - 1, draw.randrange(size)) for _ in range(1 + draw.randrange(BITS_MAX))}:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1 << draw.randrange(8)]))
