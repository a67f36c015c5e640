"""CLAIM, COMMIT and COMMITTED: delivery state of log groups, at the primary of each partition.

A claim carries the coordinator's MAC; that is checked here, everything else is the core's decision. One answer per
frame, once every entry is settled.
"""

from __future__ import annotations

from collections.abc import Sequence

from ferryline.protocol.access import GROUP, MANAGE, READ
from ferryline.protocol.errors import (
    FerrylineError,
    Forbidden,
    InvalidArgument,
    MalformedRequest,
    NotReady,
)
from ferryline.protocol.frames import Frame, Kind, decode_header
from ferryline.protocol.limits import (
    COMMIT_METADATA_BYTES_MAX,
    FRAME_ENTRIES_MAX,
    OFFSET_MAX,
    check_name,
    check_range,
)
from ferryline.protocol.messages import (
    ANY_GENERATION,
    RECORDS,
    Claim,
    ClaimEntry,
    Commit,
    CommitEntry,
    Committed,
    CommittedAnswer,
    CommittedResult,
)
from ferryline_broker.access_rules import TopicCheck, topic_check
from ferryline_broker.core.events import AnswerGroup, Claimed, CommitAsked, CommittedAsked, Event, Refuse
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.metrics import BrokerMetrics
from ferryline_broker.ports import Answer, Asker
from ferryline_broker.produce import refusal_info
from ferryline_broker.told import told
from ferryline_broker.view import ClusterView
from ferryline_service.claims import claim_token_valid
from ferryline_service.server_session import ServerSession
from ferryline_service.tls import identity_broker_id

_MEMBER_CHARS_MAX = 256
_GENERATION_MAX = 2**62


class GroupRequest:
    """One frame; results keep the order of its entries."""

    __slots__ = ("_asker", "_correlation", "_driver", "_hosted", "_kind", "_left", "_results")

    def __init__(self, driver: PartitionDriver, asker: Asker, kind: Kind, correlation: int, count: int) -> None:
        self._driver = driver
        self._asker = asker
        self._kind = kind
        self._correlation = correlation
        self._left = count
        self._results: list[CommittedResult | None] = [None] * count
        self._hosted: list[HostedReplica | None] = [None] * count

    def refuse(self, index: int, topic_id: str, partition: int, error: FerrylineError) -> None:
        self._put(index, CommittedResult(topic_id, partition, error=error.info()))

    def expect(self, index: int, hosted: HostedReplica) -> None:
        self._hosted[index] = hosted

    def settle(self, index: int, answer: Answer) -> None:
        hosted = self._hosted[index]
        assert hosted is not None
        topic_id, partition = hosted.key
        if type(answer) is AnswerGroup:
            state, core = answer.state, hosted.core
            self._put(
                index,
                CommittedResult(
                    topic_id,
                    partition,
                    state.offset,
                    state.offset_epoch,
                    state.generation,
                    state.metadata,
                    core.log_start[RECORDS],
                    core.high_watermark[RECORDS],
                    lag=hosted.records_from(state.offset),
                ),
            )
        else:
            assert isinstance(answer, Refuse), answer
            self._put(index, CommittedResult(topic_id, partition, error=refusal_info(answer)))

    def _put(self, index: int, result: CommittedResult) -> None:
        self._results[index] = result
        self._left -= 1

    def emit(self) -> None:
        if self._left == 0:
            self._left = -1
            results = [result for result in self._results if result is not None]
            self._asker.answer(self._kind, self._correlation, CommittedAnswer(results))
            self._driver.answered(self._asker)


class GroupHandler:
    """Checks what claims and commits say, and lets the cores decide."""

    def __init__(self, driver: PartitionDriver, view: ClusterView, metrics: BrokerMetrics) -> None:
        self._driver = driver
        self._view = view
        self._metrics = metrics

    def claim(self, session: ServerSession, frame: Frame) -> None:
        ask = decode_header(frame.header, Claim)
        _check_group(ask.group, ask.member)
        session.caller.check(READ, GROUP, ask.group)
        request = self._request(session, Kind.CLAIM, frame.correlation, ask.entries)
        check = topic_check(session, self._view, Kind.CLAIM, READ)
        for index, entry in enumerate(ask.entries):
            try:
                if check is not None:
                    check(entry.topic_id)
                hosted = self._hosted(entry.topic_id, entry.partition)
                self._check_claim(ask, entry)
            except FerrylineError as error:
                self._refuse(request, index, entry.topic_id, entry.partition, error)
                continue
            token = self._token(request, index, hosted)
            self._driver.feed(hosted, Claimed(token, ask.group, ask.member, entry.generation))
        self._driver.at_end(request)

    def commit(self, session: ServerSession, frame: Frame) -> None:
        lowest = ANY_GENERATION if identity_broker_id(session.identity) else 0
        ask = decode_header(frame.header, Commit)
        session.caller.check(READ, GROUP, ask.group)
        asker: Asker = session
        if any(entry.reset and entry.generation <= 0 for entry in ask.entries):
            session.caller.check(MANAGE, GROUP, ask.group)  # moved by hand: no member goes back to what it has seen
            asker = told(session, self._view, "seek_group", ask.group, {entry.topic_id for entry in ask.entries})
        self.ask_commit(asker, frame.correlation, ask, lowest, topic_check(session, self._view, Kind.COMMIT, READ))

    def ask_commit(
        self, asker: Asker, correlation: int, ask: Commit, lowest: int = 0, check: TopicCheck | None = None
    ) -> None:
        """``lowest``: generation that may be named. ``check`` refuses single entries."""
        _check_group(ask.group, ask.member)
        request = self._request(asker, Kind.COMMIT, correlation, ask.entries)
        for index, entry in enumerate(ask.entries):
            try:
                if check is not None:
                    check(entry.topic_id)
                hosted = self._hosted(entry.topic_id, entry.partition)
                _check_commit(entry, lowest)
            except FerrylineError as error:
                self._refuse(request, index, entry.topic_id, entry.partition, error)
                continue
            token = self._token(request, index, hosted)
            event: Event = CommitAsked(
                token, ask.group, ask.member, entry.generation, entry.offset, entry.metadata, entry.reset
            )
            self._driver.feed(hosted, event)
        self._driver.at_end(request)

    def committed(self, session: ServerSession, frame: Frame) -> None:
        ask = decode_header(frame.header, Committed)
        session.caller.check(READ, GROUP, ask.group)
        check = topic_check(session, self._view, Kind.COMMITTED, READ)
        self.ask_committed(session, frame.correlation, ask, check)

    def ask_committed(self, asker: Asker, correlation: int, ask: Committed, check: TopicCheck | None = None) -> None:
        """``check`` refuses single entries."""
        _check_group(ask.group, "")
        request = self._request(asker, Kind.COMMITTED, correlation, ask.entries)
        for index, (topic_id, partition) in enumerate(ask.entries):
            try:
                if check is not None:
                    check(topic_id)
                hosted = self._hosted(topic_id, partition)
            except FerrylineError as error:
                self._refuse(request, index, topic_id, partition, error)
                continue
            self._driver.feed(hosted, CommittedAsked(self._token(request, index, hosted), ask.group))
        self._driver.at_end(request)

    # -- inside -------------------------------------------------------------------------------------

    def _request(self, asker: Asker, kind: Kind, correlation: int, entries: Sequence[object]) -> GroupRequest:
        if not 0 < len(entries) <= FRAME_ENTRIES_MAX:
            raise MalformedRequest(f"entries: {len(entries)} is outside 1..{FRAME_ENTRIES_MAX}")
        return GroupRequest(self._driver, asker, kind, correlation, len(entries))

    def _refuse(self, request: GroupRequest, index: int, topic_id: str, partition: int, error: FerrylineError) -> None:
        self._metrics.error(error.code)
        request.refuse(index, topic_id, partition, error)

    def _hosted(self, topic_id: str, partition: int) -> HostedReplica:
        hosted = self._driver.replicas.get((topic_id, partition))
        if hosted is None:
            raise self._view.not_here(topic_id, partition)
        return hosted

    def _token(self, request: GroupRequest, index: int, hosted: HostedReplica) -> int:
        request.expect(index, hosted)
        return self._driver.token(request, index, hosted)

    def _check_claim(self, ask: Claim, entry: ClaimEntry) -> None:
        check_range(entry.generation, "generation", 1, _GENERATION_MAX)
        key = self._view.claim_key
        if not key:
            raise NotReady("this broker has no claim key yet; it is not registered")
        if not claim_token_valid(
            entry.token, key, ask.group, entry.topic_id, entry.partition, ask.member, entry.generation
        ):
            raise Forbidden("token: it is not the coordinator's for this group, member, partition and generation")


def _check_group(group: str, member: str) -> None:
    check_name(group, "group")
    if len(member) > _MEMBER_CHARS_MAX:
        raise InvalidArgument(f"member: {len(member)} characters, limit {_MEMBER_CHARS_MAX}", field="member")


def _check_commit(entry: CommitEntry, lowest: int) -> None:
    check_range(entry.generation, "generation", lowest, _GENERATION_MAX)
    check_range(entry.offset, "offset", 0, OFFSET_MAX)
    size = len(entry.metadata.encode())
    if size > COMMIT_METADATA_BYTES_MAX:
        raise InvalidArgument(f"metadata: {size} bytes, limit {COMMIT_METADATA_BYTES_MAX}", field="metadata")
