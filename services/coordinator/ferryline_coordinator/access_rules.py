"""Who may use which route and which kind of frame of a coordinator. What is missing here fails the start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ferryline.protocol.access import EXCHANGE, GROUP, MANAGE, READ, TOPIC, WRITE
from ferryline.protocol.frames import Kind
from ferryline.protocol.messages import GroupHeartbeat
from ferryline_coordinator.core.state import CoordinatorState
from ferryline_service.access.caller import Caller
from ferryline_service.access.rules import (
    AUTHENTICATED,
    BODY,
    ENTRY,
    HEADER,
    LOOK,
    NODE,
    OPERATE,
    PATH,
    PUBLIC,
    SHARED_ROUTES,
    FrameRules,
    Need,
    RouteRules,
    granted,
)

_READ_TOPIC, _MANAGE_TOPIC = granted(Need(READ, TOPIC, PATH)), granted(Need(MANAGE, TOPIC, PATH))
_READ_GROUP, _MANAGE_GROUP = granted(Need(READ, GROUP, PATH)), granted(Need(MANAGE, GROUP, PATH))
_READ_EXCHANGE, _MANAGE_EXCHANGE = granted(Need(READ, EXCHANGE, PATH)), granted(Need(MANAGE, EXCHANGE, PATH))

ROUTES: RouteRules = {
    **SHARED_ROUTES,
    ("GET", "/v1/ca.crl"): PUBLIC,  # certificates name it
    ("POST", "/v1/join"): PUBLIC,  # by join tokens, which are used up
    ("POST", "/v1/renew"): NODE,
    ("GET", "/v1/login"): PUBLIC,  # how to get a token
    ("GET", "/v1/topics"): AUTHENTICATED,
    ("POST", "/v1/topics"): granted(Need(MANAGE, TOPIC, BODY)),
    ("GET", "/v1/topics/{topic}"): _READ_TOPIC,
    ("PATCH", "/v1/topics/{topic}"): _MANAGE_TOPIC,
    ("DELETE", "/v1/topics/{topic}"): _MANAGE_TOPIC,
    ("POST", "/v1/topics/{topic}/partitions"): _MANAGE_TOPIC,
    ("GET", "/v1/topics/{topic}/route"): _READ_TOPIC,
    ("GET", "/v1/exchanges"): AUTHENTICATED,
    ("POST", "/v1/exchanges"): granted(Need(MANAGE, EXCHANGE, BODY)),
    ("GET", "/v1/exchanges/{exchange}"): _READ_EXCHANGE,
    ("DELETE", "/v1/exchanges/{exchange}"): _MANAGE_EXCHANGE,
    ("POST", "/v1/exchanges/{exchange}/bindings"): _MANAGE_EXCHANGE,
    ("DELETE", "/v1/exchanges/{exchange}/bindings/{binding}"): _MANAGE_EXCHANGE,
    ("GET", "/v1/exchanges/{exchange}/route"): _READ_EXCHANGE,
    ("GET", "/v1/groups"): AUTHENTICATED,
    ("GET", "/v1/groups/{group}"): _READ_GROUP,
    ("DELETE", "/v1/groups/{group}"): _MANAGE_GROUP,
    ("POST", "/v1/groups/{group}/heartbeat"): granted(Need(READ, GROUP, PATH), Need(READ, TOPIC, ENTRY)),
    ("GET", "/v1/definitions"): AUTHENTICATED,
    ("PUT", "/v1/definitions"): AUTHENTICATED,  # each item is decided by itself
    ("GET", "/v1/cluster"): LOOK,
    ("GET", "/v1/brokers"): LOOK,
    ("GET", "/v1/partitions"): LOOK,
    ("POST", "/v1/partitions/recover"): OPERATE,
    ("POST", "/v1/brokers/{broker}/drain"): OPERATE,
    ("POST", "/v1/brokers/{broker}/undrain"): OPERATE,
    ("DELETE", "/v1/brokers/{broker}"): OPERATE,
    ("GET", "/v1/principals"): OPERATE,
    ("POST", "/v1/principals"): OPERATE,
    ("GET", "/v1/principals/{principal}"): OPERATE,
    ("PATCH", "/v1/principals/{principal}"): OPERATE,
    ("DELETE", "/v1/principals/{principal}"): OPERATE,
    ("POST", "/v1/principals/{principal}/keys"): OPERATE,
    ("DELETE", "/v1/principals/{principal}/keys/{key}"): OPERATE,
    ("POST", "/v1/certificates/rotate"): OPERATE,
    ("GET", "/v1/upgrade"): LOOK,
    ("POST", "/v1/upgrade/finish"): OPERATE,
    ("GET", "/v1/backup"): OPERATE,  # of every record, keys of principals included
    ("POST", "/v1/restore"): OPERATE,
    ("POST", "/v1/restore/finish"): OPERATE,
}

FRAMES: FrameRules = {
    Kind.METADATA: AUTHENTICATED,
    Kind.GROUP_HEARTBEAT: granted(Need(READ, GROUP, HEADER), Need(READ, TOPIC, HEADER)),
    Kind.HEARTBEAT: NODE,
    Kind.ALTER_ISR: NODE,
    Kind.REGISTER: NODE,
    Kind.RESIGN: NODE,
    Kind.REPORT: NODE,
    Kind.ENSURE_TOPIC: NODE,
    Kind.STORED: NODE,
}


def check_member(caller: Caller, message: GroupHeartbeat) -> None:
    """Raises Forbidden unless the group and every topic may be read: whoever may not would only hold partitions up."""
    caller.check(READ, GROUP, message.group)
    for topic in message.topics:
        caller.check(READ, TOPIC, topic)


def check_dead_letters(caller: Caller, state: CoordinatorState, name: str, settings: Mapping[str, Any]) -> None:
    """Raises Forbidden unless the caller may send to the topic that these settings name for the dead letters of topic
    ``name``, and make it if there is none: brokers do both later on, by their own right. What is so already may stay.
    """
    wanted = settings.get("retry", {}).get("dead_letters", "")
    known = state.topic(name)
    if not wanted or (known is not None and known.config.retry.dead_letters == wanted):
        return
    caller.check(MANAGE if state.topic(wanted) is None else WRITE, TOPIC, wanted)
