"""Every error that Ferryline can answer with: one tree, used by services and SDK alike.

Behaviour sits on the class, so that nobody compares codes by hand:

``code``              stable text on the wire; names of classes may change, codes may not
``http_status``       status of the REST answer
``retriable``         the same request may succeed later, unchanged
``refresh_metadata``  the caller's picture of the cluster is probably old
``definite``          the request was surely *not* applied

::

    FerrylineError
    ├─ InvalidRequest            MalformedRequest UnsupportedVersion UnknownKind InvalidName InvalidArgument
    │                            RecordTooLarge CorruptBatch SerializationFailed MethodNotAllowed
    │                            UnsupportedMediaType
    ├─ Unauthorized              BadCredentials Forbidden
    ├─ NotFound                  UnknownTopic UnknownPartition UnknownGroup UnknownBroker UnknownExchange
    │                            UnknownPrincipal Unroutable OffsetOutOfRange LogTruncated
    ├─ Conflict                  TopicExists ExchangeExists PrincipalExists StalePartitioning OutOfOrderSequence
    │                            UnknownProducer ClusterMismatch PreconditionFailed
    ├─ Fenced                    StaleEpoch StaleBrokerEpoch StaleCoordinator StaleMember UnknownMember ProducerFenced
    │                            LeaseLost VersionConflict
    ├─ NotPrimary                carries the primary's id when known
    ├─ Throttled                 BufferFull QuotaExceeded
    ├─ Unavailable               PrimaryNotAvailable NotEnoughReplicas CoordinatorUnavailable CoordinatorLoading
    │                            CoordinatorStandby ShuttingDown StorageFull NotReady NotCommittedYet
    ├─ RequestTimedOut
    ├─ CommitUnknown             appended, but this primaryship cannot say whether it committed
    ├─ InternalError             StorageFailed
    └─ client side only          ConnectionFailed ConnectionLost ClientClosed OutcomeUnknown DeadlineExceeded
                                 PartlyPublished
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec


class ErrorInfo(msgspec.Struct, array_like=True, frozen=True):
    """An error as it travels in a frame. ``details`` holds only JSON values."""

    code: str
    message: str = ""
    retriable: bool = False
    definite: bool = True
    details: dict[str, Any] = {}


class FerrylineError(Exception):
    """Root of all errors. ``remedy`` says what to do about it, in one sentence."""

    code: ClassVar[str] = "ERROR"
    http_status: ClassVar[int] = 500
    retriable: ClassVar[bool] = False
    refresh_metadata: ClassVar[bool] = False
    definite: ClassVar[bool] = True
    remedy: ClassVar[str] = ""

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message or self.code)
        self.message = message or self.code
        self.details: dict[str, Any] = details

    def info(self) -> ErrorInfo:
        return ErrorInfo(self.code, self.message, self.retriable, self.definite, self.details)

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" if self.message != self.code else self.code


# -- the caller's mistake ---------------------------------------------------------------------------


class InvalidRequest(FerrylineError):
    code = "INVALID_REQUEST"
    http_status = 400


class MalformedRequest(InvalidRequest):
    code = "MALFORMED_REQUEST"


class UnsupportedVersion(InvalidRequest):
    code = "UNSUPPORTED_VERSION"
    remedy = "Upgrade the older side; both ranges are in the message."


class UnknownKind(InvalidRequest):
    code = "UNKNOWN_KIND"


class InvalidName(InvalidRequest):
    code = "INVALID_NAME"
    remedy = "Names match [A-Za-z0-9._-]{1,200}, are not '.' or '..' and do not start with '__'."


class InvalidArgument(InvalidRequest):
    code = "INVALID_ARGUMENT"


class RecordTooLarge(InvalidRequest):
    code = "RECORD_TOO_LARGE"
    http_status = 413
    remedy = "Send a smaller value, or raise max_record_bytes of the topic."


class CorruptBatch(InvalidRequest):
    code = "CORRUPT_BATCH"


class SerializationFailed(InvalidRequest):
    code = "SERIALIZATION_FAILED"


class MethodNotAllowed(InvalidRequest):
    """Over REST: the header ``Allow`` names what the address takes."""

    code = "METHOD_NOT_ALLOWED"
    http_status = 405


class UnsupportedMediaType(InvalidRequest):
    code = "UNSUPPORTED_MEDIA_TYPE"
    http_status = 415
    remedy = "Send JSON as it is: with the header Content-Type: application/json, and no Content-Encoding."


class Unauthorized(FerrylineError):
    code = "UNAUTHORIZED"
    http_status = 401


class BadCredentials(Unauthorized):
    code = "BAD_CREDENTIALS"
    remedy = (
        "Show a token of this cluster: FERRYLINE_TOKEN, a context (ferryline context), or ferryline login; whoever may "
        "manage the cluster makes one with ferryline token create."
    )


class Forbidden(Unauthorized):
    code = "FORBIDDEN"
    http_status = 403
    remedy = "ferryline whoami says who you are; who may manage the cluster allows more with ferryline principal grant."


class NotFound(FerrylineError):
    code = "NOT_FOUND"
    http_status = 404


class UnknownTopic(NotFound):
    code = "UNKNOWN_TOPIC"
    refresh_metadata = True
    remedy = "Create it: ferryline topic create NAME."


class UnknownPartition(NotFound):
    code = "UNKNOWN_PARTITION"
    refresh_metadata = True


class UnknownGroup(NotFound):
    code = "UNKNOWN_GROUP"


class UnknownBroker(NotFound):
    code = "UNKNOWN_BROKER"


class UnknownExchange(NotFound):
    code = "UNKNOWN_EXCHANGE"
    refresh_metadata = True
    remedy = "Create it: ferryline exchange create NAME --type topic."


class UnknownPrincipal(NotFound):
    code = "UNKNOWN_PRINCIPAL"
    remedy = "Create it: ferryline principal create NAME."


class Unroutable(NotFound):
    """A mandatory record that no binding takes, and no alternate exchange either. It was sent nowhere."""

    code = "UNROUTABLE"
    refresh_metadata = True
    remedy = "Bind a topic to the exchange: ferryline binding add EXCHANGE --topic NAME."


class OffsetOutOfRange(NotFound):
    """``details``: log_start, high_watermark."""

    code = "OFFSET_OUT_OF_RANGE"
    remedy = "Seek to an offset inside the retained range."


class LogTruncated(NotFound):
    """The log was cut below the asked offset (unclean recovery). ``details``: safe_offset."""

    code = "LOG_TRUNCATED"
    remedy = "Seek to safe_offset; what stood above it is lost."


class Conflict(FerrylineError):
    code = "CONFLICT"
    http_status = 409


class TopicExists(Conflict):
    code = "TOPIC_EXISTS"


class ExchangeExists(Conflict):
    """``details``: type and alternate of the one that is there."""

    code = "EXCHANGE_EXISTS"


class PrincipalExists(Conflict):
    code = "PRINCIPAL_EXISTS"


class StalePartitioning(Conflict):
    """The producer hashed with another partition count than the topic has."""

    code = "STALE_PARTITIONING"
    retriable = True
    refresh_metadata = True


class OutOfOrderSequence(Conflict):
    code = "OUT_OF_ORDER_SEQUENCE"


class UnknownProducer(Conflict):
    """A batch of an unknown producer id that does not begin at sequence 0."""

    code = "UNKNOWN_PRODUCER"


class ClusterMismatch(Conflict):
    code = "CLUSTER_MISMATCH"


class PreconditionFailed(Conflict):
    """It has changed since the asker saw it. ``details``: etag, as it is now."""

    code = "PRECONDITION_FAILED"
    http_status = 412
    remedy = "Get it again, and change what is there now."


class Fenced(FerrylineError):
    code = "FENCED"
    http_status = 409


class StaleEpoch(Fenced):
    code = "STALE_EPOCH"
    retriable = True
    refresh_metadata = True


class StaleBrokerEpoch(Fenced):
    code = "STALE_BROKER_EPOCH"


class StaleCoordinator(Fenced):
    code = "STALE_COORDINATOR"
    retriable = True
    refresh_metadata = True


class StaleMember(Fenced):
    """A later generation of the group owns the partition."""

    code = "STALE_MEMBER"


class UnknownMember(Fenced):
    code = "UNKNOWN_MEMBER"


class ProducerFenced(Fenced):
    code = "PRODUCER_FENCED"


class LeaseLost(Fenced):
    """The record was leased to somebody else since, or given up: nothing was done. ``details``: topic, partition,
    offset."""

    code = "LEASE_LOST"
    remedy = "Expect that somebody works on it again; a longer lease, or extend(), prevents it."


class VersionConflict(Fenced):
    code = "VERSION_CONFLICT"
    refresh_metadata = True


class NotPrimary(FerrylineError):
    """``details``: primary (broker id) and epoch when known."""

    code = "NOT_PRIMARY"
    http_status = 421
    retriable = True
    refresh_metadata = True


class Throttled(FerrylineError):
    code = "THROTTLED"
    http_status = 429
    retriable = True


class BufferFull(Throttled):
    code = "BUFFER_FULL"
    remedy = "Await send() instead of send_nowait(), or raise buffer_bytes."


class QuotaExceeded(Throttled):
    """The principal has used what it may. ``details``: quota (which one), limit, principal, retry_after_ms."""

    code = "QUOTA_EXCEEDED"
    remedy = "Wait as told, or have the principal's quota raised."


class Unavailable(FerrylineError):
    code = "UNAVAILABLE"
    http_status = 503
    retriable = True


class PrimaryNotAvailable(Unavailable):
    code = "PRIMARY_NOT_AVAILABLE"
    refresh_metadata = True


class NotEnoughReplicas(Unavailable):
    code = "NOT_ENOUGH_REPLICAS"
    remedy = "Wait for the missing replica, or lower min_isr of the topic."


class CoordinatorUnavailable(Unavailable):
    code = "COORDINATOR_UNAVAILABLE"
    definite = False


class CoordinatorLoading(Unavailable):
    code = "COORDINATOR_LOADING"


class CoordinatorStandby(Unavailable):
    """Another coordinator is the active one; ``active`` in the details is its URL, if that is known."""

    code = "COORDINATOR_STANDBY"
    refresh_metadata = True


class ShuttingDown(Unavailable):
    code = "SHUTTING_DOWN"
    refresh_metadata = True


class StorageFull(Unavailable):
    code = "STORAGE_FULL"
    http_status = 507
    remedy = "Free disk space or shorten retention; reads and acks go on."


class NotReady(Unavailable):
    """A new primary has not yet committed the start of its epoch."""

    code = "NOT_READY"


class RequestTimedOut(FerrylineError):
    code = "REQUEST_TIMED_OUT"
    http_status = 504
    retriable = True
    definite = False


class CommitUnknown(FerrylineError):
    """Appended, but never seen committed in this primaryship: it may or may not survive."""

    code = "COMMIT_UNKNOWN"
    http_status = 504
    retriable = True
    refresh_metadata = True
    definite = False


class InternalError(FerrylineError):
    code = "INTERNAL"
    definite = False


class StorageFailed(InternalError):
    code = "STORAGE_FAILED"
    retriable = True
    refresh_metadata = True


# -- raised by the client itself --------------------------------------------------------------------


class ConnectionFailed(FerrylineError):
    """No connection could be made; nothing was sent."""

    code = "CONNECTION_FAILED"
    http_status = 503
    retriable = True
    refresh_metadata = True
    remedy = "Check the URL, the CA and that the service runs: ferryline doctor."


class ConnectionLost(FerrylineError):
    """The connection ended while an answer was outstanding."""

    code = "CONNECTION_LOST"
    http_status = 503
    retriable = True
    refresh_metadata = True
    definite = False


class ClientClosed(FerrylineError):
    code = "CLIENT_CLOSED"


class OutcomeUnknown(FerrylineError):
    """The deadline passed after at least one attempt that may have been applied."""

    code = "OUTCOME_UNKNOWN"
    http_status = 504
    definite = False
    remedy = "Read the topic, or send again with the same id, to learn whether it was stored."


class DeadlineExceeded(FerrylineError):
    """The deadline passed and nothing was applied."""

    code = "DEADLINE_EXCEEDED"
    http_status = 504


class PartlyPublished(FerrylineError):
    """Not all topics that an exchange names have the record. ``results``: by topic, where it stands, or its error."""

    code = "PARTLY_PUBLISHED"
    http_status = 502
    definite = False
    remedy = "Send it again to the topics in `results` that failed, not to the exchange."

    def __init__(self, message: str = "", results: dict[str, Any] | None = None, **details: Any) -> None:
        super().__init__(message, **details)
        self.results = results or {}


def _tree(cls: type[FerrylineError]) -> dict[str, type[FerrylineError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        found.update(_tree(sub))
    return found


BY_CODE: dict[str, type[FerrylineError]] = _tree(FerrylineError)


def from_info(info: ErrorInfo) -> FerrylineError:
    """The one place that turns an error off the wire into an exception.

    An unknown code becomes ``InternalError``: not retriable, outcome unknown.
    """
    cls = BY_CODE.get(info.code)
    if cls is None:
        return InternalError(f"{info.code}: {info.message}", **info.details)
    return cls(info.message, **info.details)
