"""The limits that docs/concepts.md tells are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

from ferryline.protocol import limits

PAGE = Path(__file__).resolve().parents[2] / "docs/concepts.md"
UNITS = {"": 1, "B": 1, "KiB": 1024, "MiB": 1024**2, "characters": 1, "s": 1000}
NAME_CHARACTERS_MAX = max(n for n in range(1, 1000) if limits.NAME_PATTERN.match("a" * n))
SAID = {
    "name of a topic": NAME_CHARACTERS_MAX,
    "key, value and headers": limits.RECORD_BYTES_MAX,
    "the same, whatever": limits.RECORD_BYTES_CEILING,
    "headers of a record": limits.HEADERS_MAX,
    "name of a header": limits.HEADER_NAME_BYTES_MAX,
    "one batch, as sent": limits.BATCH_BYTES_MAX,
    "records of one batch": limits.BATCH_RECORDS_MAX,
    "one batch, decompressed": limits.BATCH_DECODED_BYTES_MAX,
    "one frame": limits.FRAME_BYTES_MAX,
    "body of a REST request": limits.HTTP_BODY_BYTES_MAX,
    "partitions of a topic": limits.PARTITIONS_MAX,
    "copies of a partition": limits.REPLICATION_MAX,
    "partitions that a group reads": limits.GROUP_PARTITIONS_MAX,
    "text with a commit": limits.COMMIT_METADATA_BYTES_MAX,
    "wait of a long poll": limits.WAIT_MS_MAX,
    "time limit of a request": limits.TIMEOUT_MS_MAX,
    "batches under way": limits.IN_FLIGHT_MAX,
}


def told() -> dict[str, int]:
    """What the page says is limited, and the limit in bytes, ms or pieces."""
    table = PAGE.read_text(encoding="utf-8").split("## Limits", 1)[1]
    found = {}
    for what, number, unit in re.findall(r"^\| ([a-z].*?) \| ([\d,]+) ?(\w*) \|$", table, re.MULTILINE):
        found[what] = int(number.replace(",", "")) * UNITS[unit]
    return found


def test_the_limits_on_the_page_are_those_of_the_code() -> None:
    rows = {what: limit for what, limit in told().items() if what != "what"}
    wrong = []
    for begin, limit in SAID.items():
        found = [told_limit for what, told_limit in rows.items() if what.startswith(begin)]
        if found != [limit]:
            wrong.append(f"{begin}: the page says {found}, the code {limit}")
    assert not wrong
    assert len(rows) == len(SAID), "a row that nothing checks, or a limit that no row tells"
