"""Who may use which route and which kind of frame of a broker. What is missing here fails the start.

The rules of frames say what their handlers ask of the session; the entries of a frame are decided one by one.
"""

from __future__ import annotations

from collections.abc import Callable

from ferryline.protocol.access import GROUP, MANAGE, READ, TOPIC, WRITE
from ferryline.protocol.errors import ErrorInfo, FerrylineError, Forbidden, UnknownTopic
from ferryline.protocol.frames import Kind
from ferryline_broker.view import ClusterView
from ferryline_service.access.rules import (
    AUTHENTICATED,
    ENTRY,
    HEADER,
    LOOK,
    NODE,
    OPERATE,
    PATH,
    SHARED_ROUTES,
    FrameRules,
    Need,
    RouteRules,
    granted,
)
from ferryline_service.server_session import ServerSession

_READ_TOPIC = granted(Need(READ, TOPIC, PATH))
_READ_QUEUE = granted(Need(READ, GROUP, PATH), Need(READ, TOPIC, PATH))
_MANAGE_GROUP = granted(Need(MANAGE, GROUP, PATH))
_QUEUE = "/v1/queues/{topic}/{group}"
_REPLICA = "/v1/replicas/{topic_id}/{partition}"

ROUTES: RouteRules = {
    **SHARED_ROUTES,
    ("POST", "/v1/topics/{topic}/records"): granted(Need(WRITE, TOPIC, PATH)),
    ("GET", "/v1/topics/{topic}/partitions/{partition}/records"): _READ_TOPIC,
    ("POST", "/v1/exchanges/{exchange}/publish"): granted(Need(WRITE, TOPIC, ENTRY)),
    ("GET", "/v1/groups/{group}/offsets"): granted(Need(READ, GROUP, PATH), Need(READ, TOPIC, ENTRY)),
    ("PUT", "/v1/groups/{group}/offsets"): _MANAGE_GROUP,
    ("POST", f"{_QUEUE}/receive"): _READ_QUEUE,
    ("POST", f"{_QUEUE}/settle"): _READ_QUEUE,
    ("POST", f"{_QUEUE}/keep"): _READ_QUEUE,
    ("GET", f"{_QUEUE}/peek"): _READ_QUEUE,
    ("GET", f"{_QUEUE}/stats"): _READ_QUEUE,
    ("GET", f"{_QUEUE}/explain"): _READ_QUEUE,
    ("POST", f"{_QUEUE}/purge"): _MANAGE_GROUP,
    ("POST", f"{_QUEUE}/pause"): _MANAGE_GROUP,
    ("POST", f"{_QUEUE}/resume"): _MANAGE_GROUP,
    ("POST", f"{_QUEUE}/redrive"): _MANAGE_GROUP,
    ("DELETE", _QUEUE): _MANAGE_GROUP,
    ("GET", _REPLICA): LOOK,
    ("GET", f"{_REPLICA}/digests"): LOOK,
    ("POST", f"{_REPLICA}/repair"): OPERATE,
    ("GET", f"{_REPLICA}/logs/{{log}}"): OPERATE,  # records of whatever topic
    ("PUT", f"{_REPLICA}/logs/{{log}}"): OPERATE,
    ("POST", f"{_REPLICA}/restored"): OPERATE,
}

_READ_ENTRIES = granted(Need(READ, TOPIC, ENTRY))
_GROUP_ENTRIES = granted(Need(READ, GROUP, HEADER), Need(READ, TOPIC, ENTRY))

FRAMES: FrameRules = {
    Kind.PRODUCE: granted(Need(WRITE, TOPIC, ENTRY)),
    Kind.FETCH: _READ_ENTRIES,
    Kind.OFFSETS: _READ_ENTRIES,
    Kind.CLAIM: _GROUP_ENTRIES,
    Kind.COMMIT: _GROUP_ENTRIES,  # manage on the group for an entry that moves it back and is no member's
    Kind.COMMITTED: _GROUP_ENTRIES,
    Kind.METADATA: AUTHENTICATED,
    Kind.RECEIVE: _GROUP_ENTRIES,
    Kind.SETTLE: _GROUP_ENTRIES,
    Kind.KEEP: _GROUP_ENTRIES,
    Kind.QUEUE: _GROUP_ENTRIES,  # manage on the group, and no topic, for an op that is none of QUEUE_LOOKS
    Kind.REPLICA_FETCH: NODE,
    Kind.REPLICA_PROGRESS: NODE,
}
QUEUE_LOOKS = ("groups", "stats", "peek", "explain")

TopicCheck = Callable[[str], None]


def topic_check(session: ServerSession, view: ClusterView, kind: int, action: str) -> TopicCheck | None:
    """What each entry of a frame is checked with: by topic id, raising Forbidden. None: everything is allowed."""
    if session.caller.service:
        return None

    def check(topic_id: str) -> None:
        topic = view.topic(topic_id)
        if topic is None:
            raise UnknownTopic(f"topic_id: {topic_id[:64]!r} is not known here")
        try:
            session.caller.check(action, TOPIC, topic.name)
        except Forbidden as error:
            session.note_refused(kind, error)
            raise

    return check


def refusal(check: TopicCheck, topic_id: str) -> ErrorInfo | None:
    """What an entry of this topic is refused with; None: it is not."""
    try:
        check(topic_id)
    except FerrylineError as error:
        return error.info()
    return None
