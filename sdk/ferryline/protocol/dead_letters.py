"""Dead letters: where they go, what their headers say, and how a broker sees to it that there is a place for them.

A dead letter is a copy of the record that a queue gave up, with its key, value and headers, and these beside them. The
headers by which queues schedule a record (`DROPPED`) are left out: what has expired would expire again. The id moves
to ``fl-origin-id``, because several groups may give up the same record, and a queue hands out an id only once.
"""

from __future__ import annotations

import hashlib

from ferryline.protocol.messages import Message
from ferryline.protocol.metadata import RetryPolicy, TopicConfig, TopicMeta
from ferryline.protocol.queue_messages import HEADER_DELIVER_AT, HEADER_EXPIRES_AT, HEADER_ID

SUFFIX = ".dlq"
_NAME_MAX = 200  # as limits.NAME_PATTERN has it

HEADER_ORIGIN_TOPIC = "fl-origin-topic"  # its name
HEADER_ORIGIN_PARTITION = "fl-origin-partition"
HEADER_ORIGIN_OFFSET = "fl-origin-offset"
HEADER_ORIGIN_TIMESTAMP = "fl-origin-timestamp"  # ms since the Unix epoch
HEADER_ORIGIN_ID = "fl-origin-id"  # fl-id of the record, if it had one
HEADER_GROUP = "fl-group"  # that gave it up
HEADER_REASON = "fl-dead-reason"
HEADER_ATTEMPTS = "fl-attempts"  # leases, all together
HEADER_EXCEPTION = "fl-exception"  # detail of the last attempt
HEADER_HISTORY = "fl-history"  # JSON: [{"attempt": 1, "reason": "...", "detail": "..."}, ...], oldest first
HEADER_TRUNCATED = "fl-truncated"  # bytes of the value before it was cut; only where the whole did not fit

ADDED = (
    HEADER_ORIGIN_TOPIC,
    HEADER_ORIGIN_PARTITION,
    HEADER_ORIGIN_OFFSET,
    HEADER_ORIGIN_TIMESTAMP,
    HEADER_ORIGIN_ID,
    HEADER_GROUP,
    HEADER_REASON,
    HEADER_ATTEMPTS,
    HEADER_EXCEPTION,
    HEADER_HISTORY,
    HEADER_TRUNCATED,
)
DROPPED = (HEADER_DELIVER_AT, HEADER_EXPIRES_AT, HEADER_ID)


class EnsureTopic(Message):
    """B -> C: make sure that topic ``name`` exists; ``config`` is for one that has to be made.

    A topic that exists is left as it is, so this may be repeated. Answered with `EnsureTopicOk`.
    """

    broker_id: int
    broker_epoch: int
    name: str
    config: TopicConfig
    owner: str = ""


class EnsureTopicOk(Message):
    topic: TopicMeta


def dead_letters_of(name: str, retry: RetryPolicy) -> str:
    """The topic that takes the dead letters of topic ``name``: what its policy says, else ``<name>.dlq``.

    The name itself where there is no place to copy to: dead letters of dead letters stay where they are, parked.
    """
    if retry.dead_letters:
        return retry.dead_letters
    if name.endswith(SUFFIX):
        return name
    if len(name) + len(SUFFIX) <= _NAME_MAX:
        return name + SUFFIX
    mark = hashlib.blake2b(name.encode(), digest_size=6).hexdigest()  # long names may begin alike
    return f"{name[: _NAME_MAX - len(SUFFIX) - len(mark) - 1]}-{mark}{SUFFIX}"
