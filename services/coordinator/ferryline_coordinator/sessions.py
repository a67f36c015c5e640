"""Frames of sessions, translated: brokers' and clients' requests into events, replies into answers."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from typing import Any

from ferryline.protocol.access import StoredBytes
from ferryline.protocol.dead_letters import EnsureTopic
from ferryline.protocol.errors import ErrorInfo, Forbidden, Throttled, UnknownKind, from_info
from ferryline.protocol.frames import FLAG_ANSWER, PREFIX, Frame, Kind, decode_header, encode_value
from ferryline.protocol.messages import (
    ROLE_BROKER,
    AlterIsrs,
    GroupHeartbeat,
    Heartbeat,
    Register,
    Report,
    Resign,
)
from ferryline.protocol.metadata import MetadataRequest
from ferryline_coordinator.access_rules import FRAMES, check_member
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.driver import Driver
from ferryline_service.access.rules import check_frames, check_kind
from ferryline_service.session import ServerSession

WAITING_MAX = 1_000  # requests of one client; it must not take the places of all others


class SessionState:
    """``number`` orders the sessions of a broker (0: a client); ``waiting``: replies that this session waits for."""

    __slots__ = ("number", "waiting")

    def __init__(self, number: int) -> None:
        self.number = number
        self.waiting: set[int] = set()


class Sessions:
    """Owns the numbering of brokers' sessions, and knows each broker's latest."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._number = 0
        self._stopping = False
        self._brokers: dict[int, ServerSession] = {}
        self._encoded: tuple[Any, bytes] = (None, b"")  # the last answer: a change is told to thousands alike
        self._handlers: dict[int, Callable[[ServerSession, Frame], None]] = {
            Kind.METADATA: self._metadata,
            Kind.GROUP_HEARTBEAT: self._group_heartbeat,
            Kind.HEARTBEAT: self._heartbeat,
            Kind.ALTER_ISR: self._alter_isr,
            Kind.REGISTER: self._register,
            Kind.RESIGN: self._resign,
            Kind.REPORT: self._report,
            Kind.ENSURE_TOPIC: self._ensure_topic,
            Kind.STORED: self._stored,
        }
        check_frames(self._handlers, FRAMES, "coordinator")

    # -- what the endpoint calls --------------------------------------------------------------------

    def opened(self, session: ServerSession) -> None:
        session.state = SessionState(0)
        session.close_callbacks.append(self._closed)
        if session.role == ROLE_BROKER:
            self._number += 1
            session.state.number = self._number
            former = self._brokers.get(session.broker_id)
            self._brokers[session.broker_id] = session
            self._driver.post(ev.SessionOpened(self._number, session.broker_id))
            if former is not None:
                former.abort("the broker opened a later session")

    def _closed(self, session: ServerSession) -> None:
        state: SessionState = session.state
        for reply in sorted(state.waiting):
            self._driver.drop(reply)
        if state.number:
            if self._brokers.get(session.broker_id) is session:
                del self._brokers[session.broker_id]
            if self._driver.serving and not self._stopping:
                self._driver.post(ev.SessionClosed(state.number, session.broker_id))

    def on_frame(self, session: ServerSession, frame: Frame) -> None:
        handler = self._handlers.get(frame.kind)
        if handler is None or frame.is_answer:
            raise UnknownKind(f"kind {frame.kind} is not for a coordinator", kind=frame.kind)
        if not session.caller.service:
            check_kind(FRAMES[frame.kind], session.caller)
        handler(session, frame)

    # -- what the driver calls ----------------------------------------------------------------------

    def tell(self, broker_id: int, kind: int, message: Any) -> None:
        """Send a frame on a broker's latest session; without one it is lost, and the core asks again."""
        session = self._brokers.get(broker_id)
        if session is not None:
            encoded = self._encode(message)
            session.send(PREFIX.pack(kind, 0, 0, 0, len(encoded)) + encoded)

    def stop(self) -> None:
        """Sessions end from now on because this coordinator does: no broker is doubted for that."""
        self._stopping = True

    def end_all(self, sessions: Iterable[ServerSession]) -> None:
        """Brokers connect and register again, here or elsewhere: a new term knows none of their sessions."""
        for session in [*self._brokers.values(), *sessions]:
            session.abort("the coordinator began a new term")

    # -- one handler for each kind ------------------------------------------------------------------

    def _metadata(self, session: ServerSession, frame: Frame) -> None:
        message = decode_header(frame.header, MetadataRequest)
        self._post(session, frame, lambda reply: ev.MetadataAsked(reply, message, session.broker_id))

    def _group_heartbeat(self, session: ServerSession, frame: Frame) -> None:
        message = decode_header(frame.header, GroupHeartbeat)
        check_member(session.caller, message)
        self._post(session, frame, lambda reply: ev.GroupHeartbeatReceived(reply, message))

    def _register(self, session: ServerSession, frame: Frame) -> None:
        message = decode_header(frame.header, Register)
        number = self._number_of(session, message.broker_id)
        self._post(session, frame, lambda reply: ev.RegisterReceived(reply, number, message))

    def _heartbeat(self, session: ServerSession, frame: Frame) -> None:
        message = decode_header(frame.header, Heartbeat)
        number = self._number_of(session, message.broker_id)
        self._post(session, frame, lambda reply: ev.HeartbeatReceived(reply, number, message))

    def _alter_isr(self, session: ServerSession, frame: Frame) -> None:
        message = decode_header(frame.header, AlterIsrs)
        number = session.state.number
        for broker_id in {proposal.broker_id for proposal in message.proposals}:
            number = self._number_of(session, broker_id)
        self._post(session, frame, lambda reply: ev.AlterIsrsReceived(reply, number, message))

    def _resign(self, session: ServerSession, frame: Frame) -> None:
        message = decode_header(frame.header, Resign)
        number = self._number_of(session, message.broker_id)
        self._post(session, frame, lambda reply: ev.ResignReceived(reply, number, message))

    def _report(self, session: ServerSession, frame: Frame) -> None:
        message = decode_header(frame.header, Report)
        number = self._number_of(session, message.broker_id)
        self._post(session, frame, lambda reply: ev.ReportReceived(reply, number, message))

    def _ensure_topic(self, session: ServerSession, frame: Frame) -> None:
        message = decode_header(frame.header, EnsureTopic)
        number, topic_id = self._number_of(session, message.broker_id), uuid.uuid4().hex
        self._post(session, frame, lambda reply: ev.TopicEnsured(reply, number, message, topic_id))

    def _stored(self, session: ServerSession, frame: Frame) -> None:
        message = decode_header(frame.header, StoredBytes)
        number = self._number_of(session, message.broker_id)
        self._post(session, frame, lambda reply: ev.StoredTold(reply, number, message))

    def _number_of(self, session: ServerSession, broker_id: int) -> int:
        """Raises Forbidden unless the session is that broker's: its certificate was checked at HELLO."""
        if session.role != ROLE_BROKER or session.broker_id != broker_id:
            raise Forbidden(f"this session does not speak for broker {broker_id}")
        state: SessionState = session.state
        return state.number

    def _post(self, session: ServerSession, frame: Frame, make: Callable[[int], ev.Event]) -> None:
        state: SessionState = session.state
        if not state.number and len(state.waiting) >= WAITING_MAX:
            raise Throttled(f"{WAITING_MAX} requests of this session are not answered", limit=WAITING_MAX)
        kind, correlation = frame.kind, frame.correlation

        def answer(message: Any, error: ErrorInfo | None) -> None:
            state.waiting.discard(reply)
            if error is not None:
                session.fail(kind, correlation, from_info(error))
                return
            encoded = self._encode(message)
            session.send(PREFIX.pack(kind, FLAG_ANSWER, 0, correlation, len(encoded)) + encoded)

        reply = self._driver.expect(answer)
        state.waiting.add(reply)
        try:
            self._driver.post(make(reply))
        except BaseException:
            state.waiting.discard(reply)
            raise

    def _encode(self, message: Any) -> bytes:
        if self._encoded[0] is not message:
            self._encoded = (message, encode_value(message))
        return self._encoded[1]
