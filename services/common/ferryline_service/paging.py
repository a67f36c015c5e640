"""Lists in pages. A cursor says behind which name the next page begins, so what is made or deleted meanwhile moves
nothing: each name that is there all the time is shown exactly once.
"""

from __future__ import annotations

import base64
import binascii
import json
from bisect import bisect_right
from collections.abc import Sequence

from aiohttp import web

from ferryline.protocol.errors import InvalidArgument
from ferryline.protocol.limits import check_range

LIMIT_MAX = 1_000
CURSOR_CHARS_MAX = 500
CURSOR_PATTERN = r"^[A-Za-z0-9_-]{1,500}$"


def page(request: web.Request, what: str, names: Sequence[str]) -> tuple[Sequence[str], str | None]:
    """The names that ``limit`` and ``cursor`` of the query ask for, of sorted ones, and the cursor of the next page:
    None at the end. Without a limit: all that follow. Raises InvalidArgument."""
    text, cursor = request.query.get("limit"), request.query.get("cursor")
    first = 0 if cursor is None else bisect_right(names, behind(what, cursor))
    if text is None:
        return names[first:], None
    if not (text.isascii() and text.isdigit() and len(text) <= 5):
        raise InvalidArgument(f"limit: {text[:40]!r} is not a number", field="limit")
    limit = check_range(int(text), "limit", 1, LIMIT_MAX)
    shown = names[first : first + limit]
    return shown, cursor_behind(what, shown[-1]) if first + limit < len(names) else None


def cursor_behind(what: str, name: str) -> str:
    """Opaque to clients: they hand it back as it is."""
    return base64.urlsafe_b64encode(json.dumps([what, name]).encode()).decode().rstrip("=")


def behind(what: str, cursor: str) -> str:
    """The name that a cursor stands behind. Raises InvalidArgument, also for one of another list."""
    try:
        if len(cursor) > CURSOR_CHARS_MAX:
            raise ValueError
        padded = cursor + "=" * (-len(cursor) % 4)
        found = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        if not (isinstance(found, list) and len(found) == 2 and found[0] == what and isinstance(found[1], str)):
            raise ValueError
    except (binascii.Error, ValueError, RecursionError):
        raise InvalidArgument(f"cursor: {cursor[:40]!r} was not given by this list", field="cursor") from None
    return found[1]
