"""What Schemathesis is told of a cluster on one machine (``SCHEMATHESIS_HOOKS``): names that exist, and what not to do
to it for hours. Only valid values are replaced, by other valid ones: what is wrong on purpose stays as it is.
"""

from __future__ import annotations

import atexit
import json
import os
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import schemathesis

PARTITIONS, REPLICATION, WAIT_MS, OFFSET = (
    3,
    3,
    20,
    30,
)  # of what is made, at most; 10,000 partitions are valid, and a long wait
TOPICS, GROUPS, EXCHANGES = ("contract-1", "contract-2"), ("group-1", "group-2"), ("exchange-1", "exchange-2")
PRINCIPALS = ("principal-1", "principal-2")
_KNOWN: dict[str, tuple[Any, ...]] = {
    "topic": TOPICS,
    "group": GROUPS,
    "exchange": EXCHANGES,
    "partition": (0, 1, 2),
    "broker": (1, 2, 3, 99),
    "principal": PRINCIPALS,
    "topic_id": tuple(os.environ.get("CONTRACT_TOPIC_IDS", "").split()),
}
_KEPT = ("/v1/brokers/{broker}/drain", "/v1/certificates/rotate")


def chosen(name: str, value: Any) -> Any:
    """Three values of four become one that there is; always the same one, so that a seed gives the same run."""
    known, number = _KNOWN.get(name), zlib.crc32(repr(value).encode())
    return known[number // 4 % len(known)] if known and number % 4 else value


def tamed(value: Any) -> Any:
    """A body that asks for less of what is costly, and of what holds a connection for a minute."""
    if isinstance(value, list):
        return [tamed(one) for one in value]
    if not isinstance(value, dict):
        return value
    limits = {"replication": REPLICATION, "min_isr": REPLICATION, "wait_ms": WAIT_MS, "partitions": PARTITIONS}
    made = {}
    for key, one in value.items():
        if key in limits and type(one) is int and limits[key] < one <= 60_000:
            one = 1 + one % limits[key]
        made[key] = chosen(key, one) if key in ("topic", "partition") and type(one) in (str, int) else tamed(one)
    if type(made.get("topic")) is str and "exchange" in made:
        del made["exchange"]  # a binding leads to one of them: no schema says that well
    return made


_answers: Counter[str] = Counter()  # "GET /v1/topics 200"


@schemathesis.hook
def after_call(context: Any, case: schemathesis.Case, response: Any) -> None:
    """Count what was answered: a run that is refused throughout would prove little."""
    del context
    _answers[f"{case.operation.label} {response.status_code}"] += 1


@atexit.register
def _tell() -> None:
    target = os.environ.get("CONTRACT_ANSWERS")
    if target:
        Path(target).write_text(json.dumps(_answers))


@schemathesis.hook
def before_call(context: Any, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """Replace values where the whole case is valid."""
    del context, kwargs
    if case.headers is not None and "Accept" not in case.headers:
        case.headers["Accept"] = "application/json"
    query = case.query if isinstance(case.query, dict) else {}
    if query.get("follow") in (True, "true", "1", 1):
        query["follow"] = "false"  # it would never end
    if str(query.get("wait_ms", "")).isdigit() and WAIT_MS < int(query["wait_ms"]) <= 60_000:
        query["wait_ms"] = WAIT_MS
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if case.operation.path in _KEPT:
        case.path_parameters = {**(case.path_parameters or {}), **({"broker": 99} if case.path_parameters else {})}
        return
    if isinstance(query.get("offset"), int) and query["offset"] > OFFSET:
        query["offset"] %= OFFSET
    if case.path_parameters:
        case.path_parameters = {name: chosen(name, value) for name, value in case.path_parameters.items()}
    if isinstance(case.body, dict):
        case.body = tamed(case.body)
