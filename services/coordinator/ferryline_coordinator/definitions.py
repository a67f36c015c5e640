"""What a cluster is told to be, as one document: topics, exchanges with bindings, principals without their keys. Pure.

`exported` shows it; `planned` compares a document with what is there and says, item by item, what is to be done.
Nothing is deleted: what the document does not name stays, and doing it twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec.structs import asdict
from pydantic import Field

from ferryline.protocol.access import PRINCIPALS_MAX, PrincipalMeta, check_principal
from ferryline.protocol.errors import InvalidArgument
from ferryline.protocol.exchanges import EXCHANGE_TYPES, BindingMeta, ExchangeMeta
from ferryline.protocol.limits import REPLICATION_MAX, check_name
from ferryline.protocol.metadata import RetryPolicy, TopicConfig, TopicMeta
from ferryline_coordinator.core.exchanges import check_binding
from ferryline_coordinator.core.principals import check_comment, check_grants, check_quota
from ferryline_coordinator.core.state import CoordinatorState
from ferryline_coordinator.core.topics import checked_config
from ferryline_coordinator.models import Bind, Body, Kind, MaybeName, TopicSettings, as_json
from ferryline_coordinator.models_access import CreatePrincipal
from ferryline_coordinator.views import exchange_json
from ferryline_service.schemas import Name

VERSION = 1
TOPICS_MAX, EXCHANGES_MAX, BINDINGS_MAX = 10_000, 1_000, 1_000
TOPIC, EXCHANGE, BINDING, PRINCIPAL = "topic", "exchange", "binding", "principal"
CREATE, ALTER, ADD_PARTITIONS, BIND, UNCHANGED, CONFLICT = (
    "create", "alter", "add_partitions", "bind", "unchanged", "conflict",
)  # fmt: skip
_FIXED = ("replication",)  # of a topic that is there


class TopicDefinition(Body):
    name: Name
    config: TopicSettings = TopicSettings()


class ExchangeDefinition(Body):
    name: Name
    type: Kind
    alternate: MaybeName | None = None
    bindings: list[Bind] = Field([], max_length=BINDINGS_MAX)


class Definitions(Body):
    """As `GET /v1/definitions` shows it. ``cluster_id``: where it comes from; it may be put into another one."""

    version: Annotated[int, Field(ge=VERSION, le=VERSION)] = VERSION
    topics: list[TopicDefinition] = Field([], max_length=TOPICS_MAX)
    exchanges: list[ExchangeDefinition] = Field([], max_length=EXCHANGES_MAX)
    principals: list[CreatePrincipal] = Field([], max_length=PRINCIPALS_MAX)
    cluster_id: str = Field("", max_length=64)


class Step(msgspec.Struct, frozen=True):
    """One item of a plan. ``kind``: topic, exchange, binding or principal; ``exchange``: whose binding it is.

    ``action`` says what is done; ``detail`` what changes, or why it cannot be done.
    """

    kind: str
    name: str
    action: str
    detail: str = ""
    settings: dict[str, Any] = {}
    exchange: str = ""
    type: str = ""
    binding: BindingMeta | None = None


def exported(
    state: CoordinatorState, topics: Sequence[str], exchanges: Sequence[str], principals: Sequence[PrincipalMeta]
) -> dict[str, Any]:
    """The document, of those topics, exchanges and principals."""
    shown = []
    for name in exchanges:
        exchange = exchange_json(state.exchanges[name])
        bindings = [{key: value for key, value in one.items() if key != "id"} for one in exchange["bindings"]]
        shown.append({key: exchange[key] for key in ("name", "type", "alternate")} | {"bindings": bindings})
    found = {topic.name: topic for topic in state.topics.values()}
    return {
        "version": VERSION,
        "cluster_id": state.cluster.cluster_id if state.cluster is not None else "",
        "topics": [{"name": name, "config": as_json(found[name].config)} for name in topics],
        "exchanges": shown,
        "principals": [_principal_shown(principal) for principal in principals],
    }


def _principal_shown(principal: PrincipalMeta) -> dict[str, Any]:
    """What can be made again: everything but its keys, which nobody has."""
    return {
        "name": principal.name,
        "grants": [as_json(grant) for grant in principal.grants],
        "quota": as_json(principal.quota),
        "disabled": principal.disabled,
        "comment": principal.comment,
    }


def check(wanted: Definitions) -> None:
    """Raises InvalidArgument or InvalidName for a document that fits no cluster, naming the item and the field."""
    any_topic = TopicConfig(replication=REPLICATION_MAX, retry=RetryPolicy(backoff_ms=0, backoff_max_ms=86_400_000))
    for number, topic in enumerate(wanted.topics):
        check_name(topic.name, f"topics.{number}.name")
        checked_config(topic.config.given(), any_topic)
    for number, exchange in enumerate(wanted.exchanges):
        check_name(exchange.name, f"exchanges.{number}.name")
        if exchange.type not in EXCHANGE_TYPES:
            field = f"exchanges.{number}.type"
            raise InvalidArgument(
                f"{field}: {exchange.type[:40]!r} is none of {', '.join(EXCHANGE_TYPES)}", field=field
            )
        if exchange.alternate:
            check_name(exchange.alternate, f"exchanges.{number}.alternate")
        for bind in exchange.bindings:
            check_binding(exchange.type, bind.binding())
    for one in wanted.principals:
        given = one.given()
        check_principal(one.name)
        check_grants(given["grants"])
        check_quota(given["quota"])
        check_comment(given["comment"])


def planned(state: CoordinatorState, wanted: Definitions) -> list[Step]:
    """In the order in which it can be done: topics, exchanges (alternates first), bindings, principals."""
    found = {topic.name: topic for topic in state.topics.values()}
    steps: list[Step] = []
    for topic in wanted.topics:
        steps += _topic_steps(found.get(topic.name), topic.name, topic.config.given())
    for exchange in _alternates_first(wanted.exchanges):
        steps.append(_exchange_step(state.exchanges.get(exchange.name), exchange))
    for exchange in wanted.exchanges:
        known = state.exchanges.get(exchange.name)
        for bind in exchange.bindings:
            binding = bind.binding()
            there = known is not None and binding in known.bindings
            target = f"{'exchange' if binding.to_exchange else 'topic'} {binding.target}"
            steps.append(
                Step(
                    BINDING,
                    f"{exchange.name} -> {target}",
                    UNCHANGED if there else BIND,
                    binding.routing_key,
                    exchange=exchange.name,
                    binding=binding,
                )
            )
    return steps + [_principal_step(state.principals.get(one.name), one) for one in wanted.principals]


def _topic_steps(known: TopicMeta | None, name: str, given: dict[str, Any]) -> list[Step]:
    if known is None:
        return [Step(TOPIC, name, CREATE, settings=given)]
    now: dict[str, Any] = {**asdict(known.config), "retry": asdict(known.config.retry)}
    changed = {key: value for key, value in given.items() if key != "retry" and now[key] != value}
    retry = {key: value for key, value in given.get("retry", {}).items() if now["retry"][key] != value}
    if retry:
        changed["retry"] = retry
    steps: list[Step] = []
    for field in _FIXED:
        if field in changed:
            detail = f"{field} is {now[field]} and cannot become {changed.pop(field)}"
            steps.append(Step(TOPIC, name, CONFLICT, detail))
    count = changed.pop("partitions", None)
    if count is not None and count < now["partitions"]:
        steps.append(Step(TOPIC, name, CONFLICT, f"{now['partitions']} partitions cannot become {count}"))
    elif count is not None:
        detail = f"partitions {now['partitions']} -> {count}: keys move"
        steps.append(Step(TOPIC, name, ADD_PARTITIONS, detail, {"partitions": count}))
    if changed:
        told = ", ".join(f"{key} {now[key]} -> {value}" for key, value in changed.items() if key != "retry")
        detail = ", ".join(filter(None, [told, f"retry {retry}" if retry else ""]))
        steps.append(Step(TOPIC, name, ALTER, detail, changed))
    return steps or [Step(TOPIC, name, UNCHANGED)]


def _exchange_step(known: ExchangeMeta | None, wanted: ExchangeDefinition) -> Step:
    if known is None:
        return Step(EXCHANGE, wanted.name, CREATE, wanted.alternate or "", type=wanted.type)
    if (known.type, known.alternate) != (wanted.type, wanted.alternate or ""):
        detail = f"it is a {known.type} exchange with alternate {known.alternate or None}; delete it first"
        return Step(EXCHANGE, wanted.name, CONFLICT, detail)
    return Step(EXCHANGE, wanted.name, UNCHANGED)


def _principal_step(known: PrincipalMeta | None, wanted: CreatePrincipal) -> Step:
    given = wanted.given()
    if known is None:
        return Step(PRINCIPAL, wanted.name, CREATE, "without keys", settings=given)
    changed = {name: value for name, value in given.items() if getattr(known, name) != value}
    action = ALTER if changed else UNCHANGED
    return Step(PRINCIPAL, wanted.name, action, ", ".join(changed), settings={**changed, "name": wanted.name})


def _alternates_first(exchanges: Sequence[ExchangeDefinition]) -> list[ExchangeDefinition]:
    """An exchange can only be made once its alternate is there. A circle of alternates is refused when it is made."""
    left = {exchange.name: exchange for exchange in exchanges}
    order: list[ExchangeDefinition] = []
    while left:
        chain = [next(iter(left))]
        while (before := left[chain[-1]].alternate) in left and before not in chain:
            assert before is not None
            chain.append(before)
        order += [left.pop(name) for name in reversed(chain)]
    return order
