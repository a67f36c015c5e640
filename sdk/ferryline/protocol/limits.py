"""Names and limits. Each limit says what breaks without it."""

from __future__ import annotations

import re

from ferryline.protocol.errors import InvalidArgument, InvalidName

NAME_PATTERN = re.compile(r"\A[A-Za-z0-9._-]{1,200}\Z")

RECORD_BYTES_MAX = 1024 * 1024  # default of a topic's max_record_bytes: key + value + headers
RECORD_BYTES_CEILING = 8 * 1024 * 1024  # no topic may allow more; a batch must fit in a frame
BATCH_BYTES_DEFAULT = 256 * 1024  # producer target
BATCH_BYTES_MAX = 10 * 1024 * 1024  # one batch, as sent; bounds what a broker buffers per entry
BATCH_DECODED_BYTES_MAX = 64 * 1024 * 1024  # absolute cap on decompression (codec bombs)
BATCH_RATIO_MAX = 1000  # and relative: decoded / sent
BATCH_RECORDS_MAX = 1_000_000
FRAME_BYTES_MAX = 32 * 1024 * 1024  # one WebSocket message
FRAME_HEADER_BYTES_MAX = 4 * 1024 * 1024
FRAME_ENTRIES_MAX = 10_000  # partitions named in one frame
HEADERS_MAX = 100  # headers of one record
HEADER_NAME_BYTES_MAX = 255
PARTITIONS_MAX = 10_000  # of one topic
REPLICATION_MAX = 7
GROUP_PARTITIONS_MAX = 100_000
COMMIT_METADATA_BYTES_MAX = 4096
WAIT_MS_MAX = 60_000  # any long poll
TIMEOUT_MS_MAX = 600_000  # any request
IN_FLIGHT_MAX = 5  # batches of one producer in one partition: seq < lowest unsettled + this
HTTP_BODY_BYTES_MAX = 8 * 1024 * 1024
OFFSET_MAX = 2**62


def check_name(name: object, what: str = "topic") -> str:
    """Return ``name`` if it may name a ``what``; otherwise raise InvalidName, naming the field and the rule.

    Names never reach a path: directories are named by uuid. The rule exists so that a name survives
    URLs, shells, metrics labels and logs unescaped.
    """
    if not isinstance(name, str):
        raise InvalidName(f"{what}: expected text, got {type(name).__name__}", field=what)
    if not NAME_PATTERN.match(name) or name in (".", ".."):
        shown = name[:64].encode("unicode_escape").decode()
        raise InvalidName(f"{what}: {shown!r} does not match [A-Za-z0-9._-]{{1,200}}", field=what)
    if name.startswith("__"):
        raise InvalidName(f"{what}: {name[:64]!r} starts with '__', which is reserved", field=what)
    return name


def check_range(value: object, what: str, low: int, high: int) -> int:
    """Return ``value`` if it is an int in [low, high]; otherwise raise InvalidArgument naming both limits."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(f"{what}: expected an integer, got {type(value).__name__}", field=what)
    if not low <= value <= high:
        raise InvalidArgument(f"{what}: {value} is outside {low}..{high}", field=what, low=low, high=high)
    return value
