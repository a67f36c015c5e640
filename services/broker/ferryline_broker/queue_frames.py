"""RECEIVE, SETTLE, KEEP and QUEUE: queues, as receivers see them, on sessions and over REST.

The core leases what is ready; here is who waits. A receiver asks for records of many partitions; it is parked when none
has any, and asks the core again when one of them wakes. What was leased for a receiver that has left goes back at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from hmac import compare_digest

from msgspec.structs import replace

from ferryline.protocol.access import GROUP, MANAGE, READ
from ferryline.protocol.errors import FerrylineError, Forbidden, NotReady, StorageFailed, Throttled
from ferryline.protocol.frames import Frame, Kind, decode_header
from ferryline.protocol.limits import WAIT_MS_MAX, check_range
from ferryline.protocol.messages import RECORDS
from ferryline.protocol.queue_messages import ORDERINGS, RELEASE, Delivery, Keep, QueueAsk, Receive, Settle
from ferryline_broker.access_rules import QUEUE_LOOKS, TopicCheck, refusal, topic_check
from ferryline_broker.clock import now_ms
from ferryline_broker.core.events import Key
from ferryline_broker.core.queue_events import (
    AnswerLease,
    KeepAsked,
    QueueAsked,
    SettleAsked,
    SettleItem,
    WakeReceivers,
)
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.metrics import BrokerMetrics
from ferryline_broker.ports import Asker
from ferryline_broker.queue_checks import (
    LEASE_MS_MAX,
    LEASE_MS_MIN,
    check_distinct,
    check_group,
    check_one_of,
    check_settle,
)
from ferryline_broker.queue_records import QueueRecords
from ferryline_broker.queue_requests import RECORDS_MAX, ParkedReceive, QueueRequest, SettleRequest
from ferryline_broker.receipts import receipt
from ferryline_broker.told import told
from ferryline_broker.view import ClusterView
from ferryline_service.access.quotas import Quotas
from ferryline_service.server_session import ServerSession

_PARKED_MAX, _PARKED_OF_ONE_MAX = 20_000, 1_000  # requests at this broker; of one session


class QueueHandler:
    """Checks what receivers say, lets the cores decide, and keeps who waits."""

    def __init__(
        self,
        driver: PartitionDriver,
        view: ClusterView,
        metrics: BrokerMetrics,
        records: QueueRecords,
        quotas: Quotas | None = None,
    ) -> None:
        self.driver = driver
        self._view = view
        self._metrics = metrics
        self.records = records
        self._quotas = quotas or Quotas()
        self._loop = asyncio.get_running_loop()
        self._parked: dict[tuple[Key, str], dict[ParkedReceive, int]] = {}  # (partition, group) -> in order of arrival
        self._askers: dict[Asker, set[ParkedReceive]] = {}
        self._woken: dict[tuple[HostedReplica, str], None] = {}  # in this pass
        self._parked_count = self._count = 0

    # -- frames -------------------------------------------------------------------------------------

    def receive(self, session: ServerSession, frame: Frame) -> None:
        ask = decode_header(frame.header, Receive)
        self.ask_receive(session, frame.correlation, ask, self._reader(session, Kind.RECEIVE, ask.group))

    def settle(self, session: ServerSession, frame: Frame) -> None:
        ask = decode_header(frame.header, Settle)
        self.ask_settle(session, frame.correlation, ask, self._reader(session, Kind.SETTLE, ask.group))

    def keep(self, session: ServerSession, frame: Frame) -> None:
        ask = decode_header(frame.header, Keep)
        self.ask_keep(session, frame.correlation, ask, self._reader(session, Kind.KEEP, ask.group))

    def queue(self, session: ServerSession, frame: Frame) -> None:
        ask = decode_header(frame.header, QueueAsk)
        check = topic_check(session, self._view, Kind.QUEUE, READ)
        asker: Asker = session
        if ask.op not in QUEUE_LOOKS:
            session.caller.check(MANAGE, GROUP, ask.group)
            check = None
            if not ask.dry_run:
                asker = told(session, self._view, f"queue_{ask.op}", ask.group, {topic for topic, _ in ask.entries})
        elif ask.op != "groups":  # it names none, and is answered with those that may be read
            session.caller.check(READ, GROUP, ask.group)
        self.ask_queue(asker, frame.correlation, ask, check)

    def _reader(self, session: ServerSession, kind: int, group: str) -> TopicCheck | None:
        """Raises Forbidden unless the group may be read; what each topic is checked with."""
        session.caller.check(READ, GROUP, group)
        return topic_check(session, self._view, kind, READ)

    # -- requests, from whoever asks ----------------------------------------------------------------

    def ask_receive(self, asker: Asker, correlation: int, ask: Receive, check: TopicCheck | None = None) -> None:
        """The answer, like that of the others, comes by ``asker.answer``. Raises what is wrong with the request.
        ``check`` refuses single partitions, also when it waits."""
        check_group(ask.group, ask.member, len(ask.entries))
        check_range(ask.records_max, "records_max", 1, RECORDS_MAX)
        check_range(ask.bytes_max, "bytes_max", 1, 2**31)
        check_range(ask.lease_ms, "lease_ms", LEASE_MS_MIN, LEASE_MS_MAX)
        check_range(ask.wait_ms, "wait_ms", 0, WAIT_MS_MAX)
        check_distinct(ask.entries)
        check_one_of(ask.ordering, "ordering", ORDERINGS)
        check_one_of(ask.start, "start", ("start", "end"))
        self._key()
        if not ask.wait_ms:
            self._quotas.check(asker.caller)
        self._replace(self._askers.get(asker, ()), ask)
        if self._parked_count >= _PARKED_MAX or len(self._askers.get(asker, ())) >= _PARKED_OF_ONE_MAX:
            raise Throttled(f"{self._parked_count} receivers wait at this broker, or {_PARKED_OF_ONE_MAX} of yours")
        parked = ParkedReceive(self, asker, ask, correlation, check)
        for topic_id, partition in ask.entries:
            hosted = self.driver.replicas.get((topic_id, partition))
            if check is not None and (refused := refusal(check, topic_id)) is not None:
                parked.refuse((topic_id, partition), refused)
            elif hosted is None:
                parked.refuse((topic_id, partition), self._view.not_here(topic_id, partition).info())
            else:
                if ask.strict:
                    parked.seen[len(parked.hosted)] = hosted.core.high_watermark[RECORDS]
                parked.hosted.append(hosted)
        self._saw(parked.hosted, ask)
        self._lease(parked)
        self._park(parked)
        self.driver.at_end(parked)

    def _lease(self, parked: ParkedReceive) -> None:
        """Ask every partition for what it has, in turns; later, if its quota is used up."""
        parked.pause = None
        if parked.done or parked.expired:
            return
        if parked.asker.caller.limited and (wait_ms := self._quotas.wait_ms(parked.asker.caller)):
            parked.pause = self._loop.call_later(wait_ms / 1000, self._lease_later, parked)
            return
        ask, now, order = parked.ask, now_ms(), range(len(parked.hosted))
        first = self._count % len(order) if order else 0
        self._count += 1
        for step in order:
            if parked.left <= 0:
                break
            index = (first + step) % len(order)
            if parked.refused(parked.hosted[index]):
                continue
            core = parked.hosted[index].core
            if ask.strict or not core.queue_waited_for(ask.group, ask.ordering, now):
                parked.lease(index, min(parked.left, max(1, core.queue_ready(ask.group))))

    def _lease_later(self, parked: ParkedReceive) -> None:
        self._lease(parked)
        self.driver.at_end(parked)

    def goes_on(self, parked: ParkedReceive) -> None:
        """A standing request was answered, and not for good: it asks again, behind those who have waited."""
        for hosted in parked.hosted:
            waiting = self._parked[hosted.key, parked.ask.group]
            waiting[parked] = waiting.pop(parked)
        self._loop.call_soon(self._ask_on, parked)  # after its answer is written

    def _ask_on(self, parked: ParkedReceive) -> None:
        if parked.pause is None:  # else it asks when that is over
            self._lease_later(parked)

    def ask_settle(self, asker: Asker, correlation: int, ask: Settle, check: TopicCheck | None = None) -> None:
        check_group(ask.group, ask.member, len(ask.entries))
        key = self._key()
        request = SettleRequest(self.driver, asker, Kind.SETTLE, correlation)
        items: dict[Key, tuple[list[int], list[SettleItem]]] = {}
        for index, entry in enumerate(ask.entries):
            try:
                if check is not None:
                    check(entry.topic_id)
                check_settle(entry)
                if not compare_digest(entry.receipt, receipt(key, ask.group, ask.member, entry)):
                    raise Forbidden("receipt: it is not this cluster's for this lease, group and member")
            except FerrylineError as error:
                self._metrics.error(error.code)
                request.refuse(index, error.info())
                continue
            numbers, told = items.setdefault((entry.topic_id, entry.partition), ([], []))
            numbers.append(index)
            told.append(
                SettleItem(
                    entry.epoch, entry.lease, entry.action, entry.offsets, entry.delay_ms, entry.reason, entry.detail
                )
            )
        for where, (numbers, told) in items.items():
            hosted = self.driver.replicas.get(where)
            if hosted is None:
                for index in numbers:
                    request.refuse(index, self._view.not_here(*where).info())
                continue
            counts = hosted.counts.group(ask.group)
            counts.saw(ask.member, now_ms())
            token = self.driver.token(request, request.part(numbers, told, counts), hosted)
            self.driver.feed(hosted, SettleAsked(token, ask.group, ask.member, told, patient=ask.patient))
        self.driver.at_end(request)

    def ask_keep(self, asker: Asker, correlation: int, ask: Keep, check: TopicCheck | None = None) -> None:
        check_group(ask.group, ask.member, len(ask.entries))
        request = SettleRequest(self.driver, asker, Kind.KEEP, correlation)
        for index, entry in enumerate(ask.entries):
            if check is not None and (refused := refusal(check, entry.topic_id)) is not None:
                request.refuse(index, refused)
                continue
            hosted = self.driver.replicas.get((entry.topic_id, entry.partition))
            if hosted is None:
                request.refuse(index, self._view.not_here(entry.topic_id, entry.partition).info())
                continue
            # What waits here would lease for somebody who has just said all that he has.
            self._replace(self._parked.get((hosted.key, ask.group), ()), ask)
            self._saw([hosted], ask)
            token = self.driver.token(request, request.part([index]), hosted)
            self.driver.feed(hosted, KeepAsked(token, ask.group, ask.member, entry.leases))
        self.driver.at_end(request)

    def ask_queue(self, asker: Asker, correlation: int, ask: QueueAsk, check: TopicCheck | None = None) -> None:
        check_group(ask.group, "", len(ask.entries))
        check_range(ask.count, "count", 0, RECORDS_MAX)
        check_distinct(ask.entries)
        request = QueueRequest(self, asker, correlation, ask)
        for index, (topic_id, partition) in enumerate(ask.entries):
            if check is not None and (refused := refusal(check, topic_id)) is not None:
                request.refuse(index, refused)
                continue
            hosted = self.driver.replicas.get((topic_id, partition))
            if hosted is None:
                request.refuse(index, self._view.not_here(topic_id, partition).info())
                continue
            request.expect(index, hosted)
            token = self.driver.token(request, index, hosted)
            event = QueueAsked(token, ask.group, ask.op, ask.offset, ask.count, ask.key, ask.reason, ask.dry_run)
            self.driver.feed(hosted, event)
        self.driver.at_end(request)

    def _saw(self, asked: Iterable[HostedReplica], ask: Receive | Keep) -> None:
        """Count whoever asks among the live receivers of each topic."""
        last = None
        for hosted in asked:
            if hosted.counts is not last:
                last = hosted.counts
                last.group(ask.group).saw(ask.member, now_ms())

    # -- deliveries ---------------------------------------------------------------------------------

    def deliver(self, parked: ParkedReceive, hosted: HostedReplica, answer: AnswerLease) -> None:
        """A lease is committed: its records go to the receiver, or back if it has left."""
        ask = parked.ask
        if parked.asker.closed or parked.done:
            self._give_back(hosted, ask, answer)
            parked.expired = True  # nobody hears the answer, but it waits no longer, in the way of others
            return
        try:
            payload, offsets, rest = parked.payload(hosted, answer.offsets)
        except StorageFailed as failure:
            self.driver.storage_failed(hosted, RECORDS, failure)
            parked.refuse(hosted.key, failure.info())
            return
        if rest:  # the core knows sizes on average only
            self._give_back(hosted, ask, replace(answer, offsets=rest))
        if not offsets:
            parked.expired = True  # it asks again, and by then the core knows what retention took
            return
        attempts = answer.attempts
        if len(offsets) != len(attempts):
            count_of = dict(zip(answer.offsets, attempts, strict=True))
            attempts = [count_of[offset] for offset in offsets]
        hosted.counts.group(ask.group).handed_out(attempts)
        delivery = Delivery(
            *hosted.key, answer.epoch, answer.lease, b"", answer.lease_ms, offsets, attempts, len(payload), None,
            answer.contended,
        )  # fmt: skip
        mac = receipt(self._key(), ask.group, ask.member, delivery)
        self._quotas.charge(parked.asker.caller, records=len(offsets), bytes=len(payload))
        parked.add(replace(delivery, receipt=mac), payload)

    def _give_back(self, hosted: HostedReplica, ask: Receive, answer: AnswerLease) -> None:
        sink = SettleRequest(self.driver, None, Kind.SETTLE, 0)
        token = self.driver.token(sink, sink.part([0]), hosted)
        item = SettleItem(answer.epoch, answer.lease, RELEASE, answer.offsets)
        event = SettleAsked(token, ask.group, ask.member, [item])
        self._loop.call_soon(self.driver.feed, hosted, event)  # not while the core's effects are carried out

    # -- waiting ------------------------------------------------------------------------------------

    def wake(self, hosted: HostedReplica, effect: WakeReceivers) -> None:
        """Records became ready: those who wait the longest ask for them, each for a fair share."""
        if (hosted.key, effect.group) in self._parked:
            self._woken[hosted, effect.group] = None
            self.driver.end_pass_soon()

    def ask_again(self) -> None:
        """At the end of a pass: for those who were woken in it. Whoever is woken by that asks in the next one."""
        woken, self._woken = self._woken, {}
        try:
            while woken:
                who = next(iter(woken))
                del woken[who]
                self._ask_again(*who)
        finally:
            self._woken.update(woken)  # after a mistake in one, the others ask in the next pass
            if self._woken:
                self._loop.call_soon(self.driver.end_pass_soon)

    def _ask_again(self, hosted: HostedReplica, group: str) -> None:
        waiting = self._parked.get((hosted.key, group))
        if not waiting or hosted.broken:
            return
        idle = [(parked, index) for parked, index in waiting.items() if parked.waits and parked.pause is None]
        idle.sort(key=lambda one: one[0].busy)  # who has nothing comes first
        for number, (parked, index) in enumerate(idle):
            if parked.refused(hosted):
                self.driver.at_end(parked)
                continue
            ready = hosted.core.queue_ready(group)
            if not ready and hosted.core.queue_waited_for(group, parked.ask.ordering, now_ms()):
                break  # there is word already that somebody waits
            share = max(1, -(-ready // (len(idle) - number)))
            parked.lease(index, min(parked.left, share))  # also of nothing: it leaves word that somebody waits
            self.driver.at_end(parked)
            if not ready:
                break

    def role_changed(self, hosted: HostedReplica) -> None:
        """Whoever waits here learns that this broker does not lead the partition any more."""
        for (key, _), waiting in list(self._parked.items()):
            if key == hosted.key:
                for parked in list(waiting):
                    if parked.waits and hosted.core.role != "primary":
                        parked.refuse(key, self._view.not_here(*key).info())
                        self.driver.at_end(parked)

    def _replace(self, waiting: Iterable[ParkedReceive], ask: Receive | Keep) -> None:
        """Answer the earlier requests of a member: this one takes their place."""
        for parked in list(waiting):
            if parked.ask.member == ask.member and parked.ask.group == ask.group:
                parked.expire()

    def _park(self, parked: ParkedReceive) -> None:
        for index, hosted in enumerate(parked.hosted):
            self._parked.setdefault((hosted.key, parked.ask.group), {})[parked] = index
        known = self._askers.get(parked.asker)
        if known is None:
            known = self._askers[parked.asker] = set()
            parked.asker.close_callbacks.append(self._asker_closed)
        known.add(parked)
        self._parked_count += 1
        if parked.ask.wait_ms:
            parked.timer = self._loop.call_later(parked.ask.wait_ms / 1000, parked.expire)
        else:
            parked.expired = True

    def unpark(self, parked: ParkedReceive) -> None:
        for hosted in parked.hosted:
            where = (hosted.key, parked.ask.group)
            waiting = self._parked.get(where)
            if waiting is not None:
                waiting.pop(parked, None)
                if not waiting:
                    del self._parked[where]
        known = self._askers.get(parked.asker)
        if known is not None and parked in known:
            known.discard(parked)
            self._parked_count -= 1

    def _asker_closed(self, asker: Asker) -> None:
        waiting = self._askers.pop(asker, set())
        self._parked_count -= len(waiting)
        for parked in waiting:
            parked.close()

    def close(self) -> None:
        """Answer everybody who waits: a stop must not take as long as the longest wait."""
        for known in list(self._askers.values()):
            for parked in list(known):
                if parked.waits:
                    parked.expire()

    def _key(self) -> bytes:
        if not self._view.claim_key:
            raise NotReady("this broker has no key for receipts yet; it is not registered")
        return self._view.claim_key
