"""The contract of a coordinator's REST surface: one table that says of every route what goes in and what comes out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiohttp import web

from ferryline.protocol.exchanges import ROUTING_KEY_BYTES_MAX
from ferryline.protocol.limits import WAIT_MS_MAX
from ferryline_coordinator.answers import SCHEMAS
from ferryline_coordinator.definitions import Definitions
from ferryline_coordinator.models import (
    AddPartitions,
    AlterTopic,
    Bind,
    CreateExchange,
    CreateTopic,
    Join,
    MemberHeartbeat,
    Recover,
    Renew,
)
from ferryline_coordinator.models_access import AddKey, AlterPrincipal, CreatePrincipal
from ferryline_coordinator.rest_backup import Finish, Restore
from ferryline_coordinator.rest_certificates import Rotate
from ferryline_service.conditions import TAGS_CHARS_MAX
from ferryline_service.openapi import document as describe
from ferryline_service.operations import Answer, Operation, Operations, Parameter, answer
from ferryline_service.paging import CURSOR_PATTERN, LIMIT_MAX
from ferryline_service.schemas import ASKED_FLAG, NAME_SCHEMA, TEXT, Schema, component, nullable, one_of, several, shape
from ferryline_service.shared_operations import SHARED

_NAMES: dict[str, Schema] = {
    "topic": NAME_SCHEMA,
    "exchange": NAME_SCHEMA,
    "group": NAME_SCHEMA,
    "broker": {"type": "integer", "minimum": 0, "maximum": 9_999_999_999},
    "binding": {"type": "string", "pattern": "^[0-9a-f]{16}$"},
    "principal": {"type": "string", "pattern": "^[A-Za-z0-9._@:+-]{1,200}$"},
    "key": {"type": "string", "minLength": 1, "maxLength": 100},
}
_OFFSET: Schema = {"type": "integer", "minimum": 0, "maximum": 2**62}
_TAGS: Schema = {"type": "string", "maxLength": TAGS_CHARS_MAX}
_IF_MATCH = (Parameter("If-Match", _TAGS, "Change only what is as one of these ETags says."),)
_IF_NONE_MATCH = (Parameter("If-None-Match", _TAGS, "Answer 304 if it is as one of these ETags says."),)
_PAGE = (
    Parameter("limit", {"type": "integer", "minimum": 1, "maximum": LIMIT_MAX}, "At most so many; all if left out."),
    Parameter("cursor", {"type": "string", "pattern": CURSOR_PATTERN}, "`next_cursor` of the page before."),
)
_DRY_RUN = Parameter("dry_run", ASKED_FLAG, "Only say what would be done.")


def _one(name: str, *headers: str) -> Answer:
    return answer(component(name), *headers)


def _page_of(field: str, name: str) -> Answer:
    return answer(shape(**{field: several(component(name)), "next_cursor": nullable(TEXT)}))


_UNCHANGED = Answer(text="As it was seen.", headers=("ETag",))

OPERATIONS: Operations = {
    **SHARED,
    ("GET", "/v1/topics"): Operation({200: _page_of("topics", "Topic")}, query=_PAGE),
    ("POST", "/v1/topics"): Operation(
        {201: _one("Topic", "ETag")},
        CreateTopic,
        problems=(409,),
        example={"name": "orders", "config": {"partitions": 12, "replication": 2}},
    ),
    ("GET", "/v1/topics/{topic}"): Operation(
        {200: _one("TopicWithPartitions", "ETag"), 304: _UNCHANGED}, headers=_IF_NONE_MATCH
    ),
    ("PATCH", "/v1/topics/{topic}"): Operation(
        {200: _one("Topic", "ETag")},
        AlterTopic,
        headers=_IF_MATCH,
        problems=(409, 412),
        example={"config": {"retention_ms": 86_400_000}},
    ),
    ("DELETE", "/v1/topics/{topic}"): Operation({200: _one("Topic", "ETag")}, headers=_IF_MATCH, problems=(409, 412)),
    ("POST", "/v1/topics/{topic}/partitions"): Operation(
        {200: _one("Topic", "ETag")},
        AddPartitions,
        headers=_IF_MATCH,
        problems=(409, 412),
        example={"partitions": 24, "keys_move": True},
    ),
    ("GET", "/v1/topics/{topic}/route"): Operation(
        {200: _one("KeyRoute")}, query=(Parameter("key", TEXT, "The key, as UTF-8 text.", required=True),)
    ),
    ("GET", "/v1/exchanges"): Operation({200: _page_of("exchanges", "Exchange")}, query=_PAGE),
    ("POST", "/v1/exchanges"): Operation(
        {201: _one("Exchange")}, CreateExchange, problems=(404, 409), example={"name": "events", "type": "topic"}
    ),
    ("GET", "/v1/exchanges/{exchange}"): Operation(
        {200: _one("Exchange", "ETag"), 304: _UNCHANGED}, headers=_IF_NONE_MATCH
    ),
    ("DELETE", "/v1/exchanges/{exchange}"): Operation({200: _one("Exchange")}, headers=_IF_MATCH, problems=(409, 412)),
    ("POST", "/v1/exchanges/{exchange}/bindings"): Operation(
        {201: _one("Bound", "ETag")},
        Bind,
        headers=_IF_MATCH,
        problems=(409, 412),
        example={"topic": "orders", "routing_key": "eu.#"},
    ),
    ("DELETE", "/v1/exchanges/{exchange}/bindings/{binding}"): Operation(
        {200: _one("Exchange", "ETag")}, headers=_IF_MATCH, problems=(412,)
    ),
    ("GET", "/v1/exchanges/{exchange}/route"): Operation(
        {200: _one("ExchangeRoute")},
        query=(
            Parameter("routing_key", {**TEXT, "maxLength": ROUTING_KEY_BYTES_MAX}, "Of the record; empty if left out."),
            Parameter("header", TEXT, "name=value, of the record.", several=True),
        ),
    ),
    ("GET", "/v1/definitions"): Operation({200: _one("Definition", "ETag"), 304: _UNCHANGED}, headers=_IF_NONE_MATCH),
    ("PUT", "/v1/definitions"): Operation(
        {200: _one("Imported"), 207: _one("Imported")},
        Definitions,
        query=(_DRY_RUN, Parameter("keys_move", ASKED_FLAG, "Partitions may be added: keys move to other ones.")),
        example={"topics": [{"name": "orders"}]},
    ),
    ("GET", "/v1/cluster"): Operation({200: _one("Cluster")}),
    ("GET", "/v1/brokers"): Operation({200: answer(shape(brokers=several(component("Broker"))))}),
    ("POST", "/v1/brokers/{broker}/drain"): Operation({200: _one("Broker")}, problems=(409,)),
    ("POST", "/v1/brokers/{broker}/undrain"): Operation({200: _one("Broker")}, problems=(409,)),
    ("DELETE", "/v1/brokers/{broker}"): Operation({200: _one("Broker")}, problems=(409,)),
    ("GET", "/v1/partitions"): Operation(
        {200: answer(shape(partitions=several(component("Partition"))))},
        query=(
            Parameter("topic", NAME_SCHEMA, "Of this topic only."),
            Parameter("state", one_of("", "offline", "under_replicated", "moving"), "In this state only."),
        ),
    ),
    ("POST", "/v1/partitions/recover"): Operation(
        {200: _one("Partition")}, Recover, problems=(404, 409), example={"topic": "orders", "partition": 0}
    ),
    ("GET", "/v1/groups"): Operation({200: _page_of("groups", "Group")}, query=_PAGE),
    ("GET", "/v1/groups/{group}"): Operation({200: _one("Group")}),
    ("DELETE", "/v1/groups/{group}"): Operation(
        {200: answer(shape(group=TEXT, deleted={"const": True}))}, problems=(409,)
    ),
    ("POST", "/v1/groups/{group}/heartbeat"): Operation({200: _one("Assignment")}, MemberHeartbeat, problems=(409,)),
    ("GET", "/v1/metadata"): Operation(
        {200: _one("Metadata")},
        query=(
            Parameter("since", {"type": "integer", "minimum": -1, "maximum": 2**62}, "Revision that is known."),
            Parameter("coord_epoch", _OFFSET, "Coordinator epoch under which it became known."),
            Parameter("wait_ms", {"type": "integer", "minimum": 0, "maximum": WAIT_MS_MAX}, "For a change."),
            Parameter("cluster_id", TEXT, "Refuse if this is another cluster."),
        ),
        problems=(409,),
    ),
    ("GET", "/v1/principals"): Operation({200: answer(shape(principals=several(component("Principal"))))}),
    ("POST", "/v1/principals"): Operation(
        {201: _one("Principal")},
        CreatePrincipal,
        problems=(409,),
        example={"name": "app", "grants": [{"resource": "topic", "pattern": "orders.*", "actions": ["write"]}]},
    ),
    ("GET", "/v1/principals/{principal}"): Operation(
        {200: _one("Principal", "ETag"), 304: _UNCHANGED}, headers=_IF_NONE_MATCH
    ),
    ("PATCH", "/v1/principals/{principal}"): Operation(
        {200: _one("Principal", "ETag")}, AlterPrincipal, headers=_IF_MATCH, problems=(409, 412)
    ),
    ("DELETE", "/v1/principals/{principal}"): Operation(
        {200: _one("Principal", "ETag")},
        query=(
            Parameter("version", {"type": "integer", "minimum": 0, "maximum": 10**15 - 1}, "Refuse if it has another."),
        ),
        headers=_IF_MATCH,
        problems=(409, 412),
    ),
    ("POST", "/v1/principals/{principal}/keys"): Operation(
        {201: _one("NewKey")}, AddKey, optional=True, headers=_IF_MATCH, problems=(409, 412)
    ),
    ("DELETE", "/v1/principals/{principal}/keys/{key}"): Operation(
        {200: _one("Principal", "ETag")}, headers=_IF_MATCH, problems=(409, 412)
    ),
    ("GET", "/v1/login"): Operation({200: _one("Login")}, public=True),
    ("GET", "/v1/ca.crl"): Operation(
        {200: Answer({"application/pkix-crl": {"type": "string", "format": "binary"}}, "Revoked certificates, DER.")},
        public=True,
    ),
    ("POST", "/v1/join"): Operation({200: _one("Certified")}, Join, problems=(401, 403, 409), public=True),
    ("POST", "/v1/renew"): Operation({200: _one("Certified")}, Renew),
    ("GET", "/v1/certificates"): Operation({200: _one("Certificates")}),
    ("POST", "/v1/certificates/renew"): Operation({200: _one("Certificates")}, problems=(409,)),
    ("POST", "/v1/certificates/rotate"): Operation({200: _one("Certificates")}, Rotate, problems=(409,)),
    ("GET", "/v1/upgrade"): Operation({200: _one("Upgrade")}),
    ("POST", "/v1/upgrade/finish"): Operation({200: _one("Upgrade")}, problems=(409,)),
    ("GET", "/v1/backup"): Operation({200: _one("Backup")}),
    ("POST", "/v1/restore"): Operation({200: _one("Restored")}, Restore, problems=(409,)),
    ("POST", "/v1/restore/finish"): Operation({200: _one("Partition")}, Finish, problems=(404, 409)),
}


def document(routes: Iterable[web.AbstractRoute], *, secured: bool) -> dict[str, Any]:
    """Everything that the router serves."""
    return describe("Ferryline coordinator", routes, OPERATIONS, _NAMES, SCHEMAS, secured=secured)
