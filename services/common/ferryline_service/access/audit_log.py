"""The audit log: every change and every refusal, one JSON object a line, under the data directory of a service.

    {"seq":41,"time":"2026-01-31T12:00:00.000Z","principal":"billing","remote":"10.0.0.7","action":"delete_topic",
     "resource":"topic","name":"orders","outcome":"done","code":"","request_id":"6f0c...","count":1}

``outcome``: ``done``, ``failed`` (it was allowed, and something else was wrong) or ``refused``. Changes are kept in
``audit.jsonl``, refusals in ``refused.jsonl``: nobody hides a change by being refused until its line is rotated away.
Equal refusals within a second are two lines, the first at once and one for the rest, with their ``count``.

Nothing here stops a service: what cannot be written is counted, told once in the service's log, and once here when
there is room again. What came from outside is cut, its control characters are escaped, and tokens are blotted out.
"""

from __future__ import annotations

import asyncio
import heapq
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from ferryline_service.access.audit_files import FILE_BYTES_MAX, FILES_MAX, Journal
from ferryline_service.access.caller import Caller
from ferryline_service.logs import get_logger

DONE, FAILED, REFUSED, LOST = "done", "failed", "refused", "lost"
ANONYMOUS = "anonymous"  # nobody whose token could be checked
OTHERS = "*"  # stands for the names in the one line for refusals beyond SECOND_LINES_MAX
TEXT_MAX = 200
DETAILS_MAX = 16
SECOND_MS = 1_000
SECOND_LINES_MAX = 20  # different refusals in a second that get lines of their own
LOOKED_AT_MAX = 10_000  # lines that one question may cost
LIMIT_MAX = 1_000
_TOKEN = re.compile(r"fl_[A-Za-z0-9]{1,64}_[A-Za-z0-9_-]{8,}|eyJ[A-Za-z0-9_-]{4,}\.[A-Za-z0-9_-]*\.?[A-Za-z0-9_-]*")
_log = get_logger()
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, Any]).decode


class AuditPage(msgspec.Struct):
    """Some records, oldest first. ``next`` is the cursor to go on from; ``more``: there are records behind it."""

    records: list[dict[str, Any]]
    next: str
    more: bool


class AuditLog:
    """Writes and reads the log in ``folder``. For one event loop; nothing it does raises, but `read` for a bad cursor.

    ``now_ms``: the wall clock.
    """

    def __init__(
        self,
        folder: Path,
        *,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        file_bytes: int = FILE_BYTES_MAX,
        files: int = FILES_MAX,
    ) -> None:
        self.written = 0
        self.lost = 0  # lines that could not be written
        self._now_ms = now_ms
        self._changes = Journal(folder, "audit", file_bytes=file_bytes, files=files)
        self._refusals = Journal(folder, "refused", file_bytes=file_bytes, files=files)
        self._seq = -1  # of the last line; -1: not looked for yet
        self._untold = 0  # lines that were lost since the last one that was written
        self._second_ms = 0  # when the present second of refusals began; 0: none has
        self._second: dict[tuple[str, ...], list[Any]] = {}  # refusals of it: [how many more, request id, details]
        self._others = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    # -- writing ------------------------------------------------------------------------------------

    def note(
        self,
        caller: Caller | None,
        remote: str | None,
        action: str,
        resource: str,
        name: str,
        outcome: str,
        code: str = "",
        request_id: str = "",
        **details: Any,
    ) -> None:
        """Write a line. ``caller`` None: whoever it was could not show who they are."""
        if self._closed:
            return
        texts = (caller.name if caller is not None else ANONYMOUS, remote or "", action, resource, name)
        fields = tuple(cleaned(text) for text in (*texts, outcome, code))
        if outcome == REFUSED:
            self._refused(fields, request_id, details)
        else:
            self._write(self._changes, fields, 1, request_id, details)

    def flush(self) -> None:
        """Write what was counted and not yet told."""
        second, others = self._second, self._others
        self._second, self._others, self._second_ms = {}, 0, 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for fields, (count, request_id, details) in second.items():
            if count:
                self._write(self._refusals, fields, count, request_id, details)
        if others:
            self._write(self._refusals, (OTHERS,) * 5 + (REFUSED, ""), others, "", {})

    def close(self) -> None:
        """Write what is left, and let go of the files. Nothing is written afterwards."""
        self.flush()
        self._closed = True
        for journal in (self._changes, self._refusals):
            with suppress(OSError):
                journal.close()

    def _refused(self, fields: tuple[str, ...], request_id: str, details: dict[str, Any]) -> None:
        now_ms = self._now_ms()
        if self._second_ms and not 0 <= now_ms - self._second_ms < SECOND_MS:
            self.flush()
        if not self._second_ms:
            self._second_ms = now_ms
            with suppress(RuntimeError):  # no loop: the next refusal or `close` ends the second
                self._timer = asyncio.get_running_loop().call_later(SECOND_MS / 1000, self.flush)
        run = self._second.get(fields)
        if run is not None:
            run[0] += 1
        elif len(self._second) >= SECOND_LINES_MAX:
            self._others += 1
        else:
            self._second[fields] = [0, request_id, details]
            self._write(self._refusals, fields, 1, request_id, details)

    def _write(
        self, journal: Journal, fields: tuple[str, ...], count: int, request_id: str, details: dict[str, Any]
    ) -> None:
        try:
            if self._seq < 0:
                self._seq = max(self._changes.open(), self._refusals.open())
            if self._untold:
                self._append(self._changes, ("", "", "write", "audit", "", LOST, ""), self._untold, "", {})
                _log.warning("audit log is written again", lost=self._untold)
                self._untold = 0
            self._append(journal, fields, count, request_id, details)
        except OSError as error:
            self.lost += 1
            self._untold += 1
            if self._untold == 1:
                _log.error("audit log cannot be written; what is lost is counted", error=str(error))

    def _append(
        self, journal: Journal, fields: tuple[str, ...], count: int, request_id: str, details: dict[str, Any]
    ) -> None:
        who, remote, action, resource, name, outcome, code = fields
        record: dict[str, Any] = {
            "seq": self._seq + 1,
            "time": _utc(self._now_ms()),
            "principal": who,
            "remote": remote,
            "action": action,
            "resource": resource,
            "name": name,
            "outcome": outcome,
            "code": code,
            "request_id": cleaned(request_id),
            "count": count,
        }
        if more := {cleaned(key): _value(value) for key, value in list(details.items())[:DETAILS_MAX]}:
            record["details"] = more
        journal.append(self._seq + 1, _encode(record) + b"\n")
        self._seq += 1
        self.written += 1

    # -- reading ------------------------------------------------------------------------------------

    def read(self, after: int | None, limit: int, *, principal: str = "", outcome: str = "") -> AuditPage:
        """Records after a cursor, oldest first; without one, the newest. At most ``limit`` that fit the filters.

        A question looks at no more than LOOKED_AT_MAX lines: an answer may be empty and ``more`` be true.
        Raises OSError when the log cannot be read.
        """
        if self._seq < 0:
            self._seq = max(self._changes.open(), self._refusals.open())
        newest = after is None
        cursor = max(0, self._seq - LOOKED_AT_MAX) if after is None else min(after, self._seq)
        found: list[dict[str, Any]] = []
        for looked, (seq, line) in enumerate(self._after(cursor)):
            if looked >= LOOKED_AT_MAX or (not newest and len(found) >= limit):
                break
            cursor = seq
            record = _record(line)
            if record is None or (principal and record.get("principal") != principal):
                continue
            if not outcome or record.get("outcome") == outcome:
                found.append(record)
        else:
            cursor = self._seq
        return AuditPage(found[-limit:] if newest else found, str(cursor), cursor < self._seq)

    def _after(self, cursor: int) -> Iterator[tuple[int, bytes]]:
        return heapq.merge(self._changes.after(cursor), self._refusals.after(cursor))


def cleaned(text: str) -> str:
    """``text`` fit for a line that people look at: no control characters, no token, not long."""
    shown = _TOKEN.sub("(token)", text[: 4 * TEXT_MAX])[:TEXT_MAX]
    if not shown.isprintable():
        shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown)
    return shown[:TEXT_MAX]


def _value(value: Any) -> Any:
    """A detail as it is written: numbers as they are, everything else as text."""
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    return cleaned(value if isinstance(value, str) else str(value))


def _utc(now_ms: int) -> str:
    moment = datetime.fromtimestamp(now_ms / 1000, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{now_ms % 1000:03}Z"


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        return _decode(line)
    except msgspec.DecodeError:  # not ours, or damaged
        return None
