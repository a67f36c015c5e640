"""The routes that every service has, as its table of operations describes them."""

from __future__ import annotations

from ferryline_service.access import audit_rest, whoami
from ferryline_service.access.audit_log import DONE, FAILED, LIMIT_MAX, LOST, REFUSED
from ferryline_service.operations import Answer, Operation, Operations, Parameter, answer
from ferryline_service.schemas import COUNT, FLAG, TEXT, Schema, nullable, one_of, several, shape

METRICS_TYPE = "text/plain"
GRANT = shape(resource=TEXT, pattern=TEXT, actions=several(TEXT))
QUOTA = shape(requests=COUNT, records=COUNT, bytes=COUNT, connections=COUNT, stored_bytes=COUNT)
_CALLER = shape(
    principal=TEXT,
    by=one_of("nothing", "certificate", "key", "token"),
    key=nullable(TEXT),
    expires_ms=COUNT,
    grants=several(GRANT),
    quota=QUOTA,
    service=one_of("coordinator", "broker"),
    access=FLAG,
    revision=COUNT,
)
_AUDIT = shape(records=several({"type": "object"}), next=TEXT, more=FLAG)
_AUDIT_QUERY: dict[str, Schema] = {
    "after": {"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
    "limit": {"type": "integer", "minimum": 1, "maximum": LIMIT_MAX},
    "principal": TEXT,
    "outcome": one_of("", DONE, FAILED, REFUSED, LOST),
}
_READY = shape({"reason": TEXT, "active": TEXT}, status=one_of("ready", "not ready", "standby"))

SHARED: Operations = {
    ("GET", "/healthz"): Operation({200: answer({"type": "object"})}, public=True),
    ("GET", "/readyz"): Operation({200: answer(_READY), 503: answer(_READY)}, public=True),
    ("GET", "/openapi.json"): Operation({200: answer({"type": "object"})}, public=True),
    ("GET", "/metrics"): Operation({200: Answer({METRICS_TYPE: TEXT}, "For Prometheus.")}),
    ("GET", "/v1/session"): Operation({101: Answer(text="A session begins; see docs/protocol.md.")}, problems=(421,)),
    ("GET", whoami.PATH): Operation({200: answer(_CALLER)}),
    ("GET", audit_rest.PATH): Operation(
        {200: answer(_AUDIT)},
        query=tuple(Parameter(name, _AUDIT_QUERY[name], text) for name, text in audit_rest.QUERIES.items()),
    ),
}
