"""`GET /v1/audit`: what a service's audit log says, by cursor."""

from __future__ import annotations

import msgspec
from aiohttp import web

from ferryline.protocol.errors import InvalidArgument, StorageFailed
from ferryline.protocol.limits import check_range
from ferryline_service.access.audit_log import DONE, FAILED, LIMIT_MAX, LOST, REFUSED, AuditLog

PATH = "/v1/audit"
QUERIES = {
    "after": "Cursor of the last record that is known; 0 from the beginning; left out: the newest ones.",
    "limit": f"At most so many records: 1 to {LIMIT_MAX}; 100 if left out.",
    "principal": "Only what this principal did or was refused.",
    "outcome": "Only done, failed, refused or lost.",
}
_LIMIT = 100
_OUTCOMES = (DONE, FAILED, REFUSED, LOST)
_CURSOR_MAX = 10**18 - 1


class AuditRest:
    """One route. Who may ask is the gate's business."""

    def __init__(self, log: AuditLog) -> None:
        self._log = log

    def routes(self) -> list[web.RouteDef]:
        return [web.get(PATH, self.read_audit)]

    async def read_audit(self, request: web.Request) -> web.Response:
        """Changes and refusals that this service has decided on, newest last."""
        query = request.query
        after = _number(query["after"], "after", 0, _CURSOR_MAX) if "after" in query else None
        limit = _number(query["limit"], "limit", 1, LIMIT_MAX) if "limit" in query else _LIMIT
        outcome = query.get("outcome", "")
        if outcome not in ("", *_OUTCOMES):
            raise InvalidArgument(f"outcome: expected one of {', '.join(_OUTCOMES)}", field="outcome")
        try:
            page = self._log.read(after, limit, principal=query.get("principal", ""), outcome=outcome)
        except OSError as error:
            raise StorageFailed(f"the audit log cannot be read: {error.strerror}") from None
        return web.json_response(body=msgspec.json.encode(page))


def _number(text: str, field: str, low: int, high: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 20:
        raise InvalidArgument(f"{field}: expected a number, got {text[:40]!r}", field=field)
    return check_range(int(text), field, low, high)
