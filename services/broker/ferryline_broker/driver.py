"""Run the partition cores: feed events, carry out effects in order, keep one timer. No decision about the protocol.

One pass of the loop, from a client's batch to its acknowledgement::

    pass n      frame -> Produced -> [Append, Flush, AwaitPassEnd, ...]  write() to the page cache
    pass n + 1  `_end_pass`: PassEnded -> SendData; all frames leave     the secondary starts its own write and flush
    pass n + 2  `_sync`: fdatasync of every dirty log, Flushed -> effects, `_end_pass` again

The flush comes one pass after the frames because uvloop hands bytes to the kernel between passes: otherwise the
secondary would wait for this broker's disk before it starts on its own. fdatasync runs inline: beside a loop that is
never idle a thread waits longer for the interpreter lock than the disk takes. While batches keep coming it waits a few
passes more, so that a busy broker flushes megabytes at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import Any

from ferryline.protocol.errors import FerrylineError, StorageFailed, StorageFull
from ferryline.protocol.messages import RECORDS, STATE, ResignEntry
from ferryline_broker.clock import now_ms
from ferryline_broker.core import events as ev
from ferryline_broker.core import queue_events as qe
from ferryline_broker.deadlines import Deadlines
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.log.group import GroupFlush
from ferryline_broker.log.interface import LogDamaged
from ferryline_broker.metrics import BrokerMetrics
from ferryline_broker.opening import rebuild_producers, replay_state
from ferryline_broker.ports import Answer, Asker, Emitter, LinkPort, PeerPort, QueuePort, Request
from ferryline_service.logs import get_logger

_POSTPONED_MAX = 6  # passes of the loop; each reads at most 256 KiB from a session
_log = get_logger()


class PartitionDriver:
    """All partition cores of one broker.

    `feed` is the only way in. Whoever feeds an event from outside calls nothing else: the end of the pass is arranged
    here. ``peers`` and ``link`` are set once, before the first event.
    """

    def __init__(self, metrics: BrokerMetrics, group: GroupFlush, on_fatal: Callable[[str], None]) -> None:
        self.metrics = metrics
        self._group = group
        self.replicas: dict[ev.Key, HostedReplica] = {}
        self.peers: PeerPort
        self.link: LinkPort
        self.queues: QueuePort
        self.delete_replica: Callable[[ev.Key], None]
        self.on_appended: Callable[[int], None] = _ignore
        self.on_damaged: Callable[[HostedReplica, LogDamaged], None] = _ignore
        self.on_unwritable: Callable[[str], None] = _ignore
        self.on_full: Callable[[], str] = str  # returns what there is to say about the disk
        self._on_fatal = on_fatal
        self._loop = asyncio.get_running_loop()
        self._waiters: dict[int, tuple[Request, int, HostedReplica]] = {}
        self._token = 0
        self._emitters: dict[Emitter, None] = {}
        self._awaiting: dict[HostedReplica, None] = {}
        self._fresh: list[HostedReplica] = []  # have appended in this pass
        self._answered: dict[Asker, None] = {}
        self._pass_due = self._sync_due = False
        self._dirty: list[tuple[HostedReplica, int]] = []
        self._appends = self._appends_seen = self._postponed = 0
        self._deadlines = Deadlines(self._due, lambda hosted, error: self._break(hosted, ev.Tick(), error))
        self._do: dict[type[ev.Effect], Callable[[HostedReplica, Any], None]] = {
            ev.Append: self._append,
            ev.Flush: self._flush,
            ev.Truncate: self._truncate,
            ev.ResetLog: self._reset,
            ev.AdvanceStart: self._advance_start,
            ev.PersistEpoch: lambda hosted, effect: hosted.store.persist_epoch(effect.epoch),
            ev.ReplayState: self._replay_state,
            ev.RebuildProducers: self._rebuild_producers,
            ev.AnswerProduce: self._answer,
            ev.AnswerGroup: self._answer,
            ev.AnswerBarrier: self._answer,
            ev.Refuse: self._answer,
            ev.SendFetch: self._send_fetch,
            ev.SendProgress: self._send_progress,
            ev.AwaitPassEnd: lambda hosted, _: self._awaiting.update({hosted: None}),
            ev.SendData: self._send_data,
            ev.SendAlterIsr: self._send_alter_isr,
            ev.SendResign: self._send_resign,
            ev.SendReport: lambda _, effect: self.link.add_report(effect.report),  # this pass ends like every other
            ev.WakeReaders: self._wake_readers,
            ev.RoleChanged: self._role_changed,
            ev.RefreshMetadata: lambda _, __: self.link.refresh_metadata(),
            ev.DeleteReplica: self._delete,
            qe.AnswerLease: self._answer,
            qe.AnswerSettle: self._answer,
            qe.AnswerQueue: self._answer,
            qe.ReadWindow: lambda hosted, effect: self.queues.read_window(hosted, effect),
            qe.WakeReceivers: lambda hosted, effect: self.queues.wake(hosted, effect),
            qe.MoveDead: lambda hosted, effect: self.queues.move_dead(hosted, effect),
        }

    # -- events in ----------------------------------------------------------------------------------

    def token(self, request: Request, index: int, hosted: HostedReplica) -> int:
        """A handle for one answer; ``request.settle(index, answer)`` will be called exactly once."""
        self._token = token = self._token + 1
        self._waiters[token] = (request, index, hosted)
        return token

    def feed(self, hosted: HostedReplica, event: ev.Event) -> None:
        """Let the core of ``hosted`` handle ``event`` and carry out what it wants."""
        if hosted.broken:
            self._refuse_broken(hosted, event)
            return
        try:
            effects = hosted.core.handle(event, now_ms())
            if effects:
                self._carry_out(hosted, effects)
            self._deadlines.arm_soon(hosted)
            self.end_pass_soon()
        except Exception as error:  # an assertion, or a mistake that leaves core and log in doubt about each other
            self._break(hosted, event, error)

    def feed_all(self, event: ev.Event, role: str = "") -> None:
        """Feed ``event`` to every core, or to those in ``role``."""
        for hosted in list(self.replicas.values()):
            if not role or hosted.core.role == role:
                self.feed(hosted, event)

    def host(self, hosted: HostedReplica) -> None:
        self.replicas[hosted.key] = hosted
        self._deadlines.arm(hosted)

    def unhost(self, key: ev.Key) -> HostedReplica | None:
        """Forget a replica; whoever waits for it learns that it is gone."""
        if (hosted := self.replicas.pop(key, None)) is None:
            return None
        hosted.broken = "deleted"
        self.queues.cut(hosted)
        self._settle_all(hosted, "NOT_PRIMARY", "this broker does not hold the partition any more")
        self._wake(hosted)
        return hosted

    # -- effects out --------------------------------------------------------------------------------

    def _carry_out(self, hosted: HostedReplica, effects: list[ev.Effect]) -> None:
        do = self._do
        effect = effects[0]
        try:
            for effect in effects:
                do[type(effect)](hosted, effect)
        except (StorageFailed, StorageFull) as error:
            failed = self.write_failed if type(effect) in ev.WRITES else self.storage_failed
            failed(hosted, getattr(effect, "log", RECORDS), error)
            return
        if hosted.follow_ups:
            follow_ups, hosted.follow_ups = hosted.follow_ups, []
            for event in follow_ups:
                self.feed(hosted, event)

    def write_failed(self, hosted: HostedReplica, log: int, error: FerrylineError) -> None:
        """`storage_failed` of a write. A full disk stops this replica and harms nothing; after anything else the
        process has to end, as after a failed flush, once it has handed over what it can.
        """
        if isinstance(error, StorageFull):
            reason = f"{self.on_full()}: {error.message}"
            _log.error("no space left, replica stopped", partition=hosted.name, log=log, error=reason)
            hosted.follow_ups = []
            self.feed(hosted, ev.StorageFailed(log, reason, (hosted.logs[RECORDS].log_end, hosted.logs[STATE].log_end)))
        else:
            self.storage_failed(hosted, log, error)
            if not isinstance(error, LogDamaged):
                self.on_unwritable(f"write failed: {error.message}")

    def storage_failed(self, hosted: HostedReplica, log: int, error: FerrylineError) -> None:
        """Tell the core that its disk refused; the remaining effects of its last event were dropped."""
        _log.error("storage failed", partition=hosted.name, log=log, error=str(error))
        hosted.follow_ups = []
        self.feed(hosted, ev.StorageFailed(log, str(error)))
        if isinstance(error, LogDamaged):
            self.on_damaged(hosted, error)
        self.end_pass_soon()

    def _append(self, hosted: HostedReplica, effect: ev.Append) -> None:
        log, headers = hosted.logs[effect.log], effect.headers
        begin = log.log_end
        log.append(effect.data, headers)
        hosted.fresh[effect.log] = (begin, log.log_end, effect.data)
        self._fresh.append(hosted)
        hosted.unsaved = True
        self._appends += 1
        if effect.log == RECORDS:
            hosted.count_in(len(effect.data), headers)
        self.on_appended(len(effect.data))

    def _flush(self, hosted: HostedReplica, effect: ev.Flush) -> None:
        if not hosted.flush_due[effect.log]:
            hosted.flush_due[effect.log] = True
            self._dirty.append((hosted, effect.log))
            self.end_pass_soon()

    def _truncate(self, hosted: HostedReplica, effect: ev.Truncate) -> None:
        hosted.logs[effect.log].truncate(effect.offset)
        self._cut(hosted)

    def _reset(self, hosted: HostedReplica, effect: ev.ResetLog) -> None:
        hosted.logs[effect.log].reset(effect.offset, effect.epoch)
        self._cut(hosted)

    def _cut(self, hosted: HostedReplica) -> None:
        self.queues.cut(hosted)
        hosted.fresh = [None, None]
        hosted.unsaved = True

    def _advance_start(self, hosted: HostedReplica, effect: ev.AdvanceStart) -> None:
        hosted.logs[effect.log].advance_start(effect.offset)
        hosted.unsaved = True

    def _replay_state(self, hosted: HostedReplica, _: ev.ReplayState) -> None:
        hosted.follow_ups.append(ev.StateReplayed(replay_state(hosted.store)))

    def _rebuild_producers(self, hosted: HostedReplica, _: ev.RebuildProducers) -> None:
        hosted.follow_ups.append(ev.ProducersRebuilt(rebuild_producers(hosted.store)))

    def _answer(self, hosted: HostedReplica, effect: Answer) -> None:
        waiter = self._waiters.pop(effect.token, None)
        assert waiter is not None, f"{hosted.name}: token {effect.token} was answered twice"
        waiter[0].settle(waiter[1], effect)
        self.at_end(waiter[0])

    def _send_fetch(self, _: HostedReplica, effect: ev.SendFetch) -> None:
        self.peers.add_fetch(effect.to, effect.fetch)
        self.end_pass_soon()

    def _send_progress(self, _: HostedReplica, effect: ev.SendProgress) -> None:
        self.peers.add_progress(effect.to, effect.progress)
        self.end_pass_soon()

    def _send_data(self, hosted: HostedReplica, effect: ev.SendData) -> None:
        data, parts = hosted.read_for_secondary(effect, self.peers.room(effect.session))
        self.peers.add_data(effect.session, data, parts)
        self.end_pass_soon()

    def _send_alter_isr(self, _: HostedReplica, effect: ev.SendAlterIsr) -> None:
        self.link.add_alter_isr(effect.proposal)
        self.end_pass_soon()

    def _send_resign(self, _: HostedReplica, effect: ev.SendResign) -> None:
        self.link.add_resign(effect.entry)
        self.end_pass_soon()

    def _wake_readers(self, hosted: HostedReplica, effect: ev.WakeReaders) -> None:
        hosted.unsaved = True
        if effect.log == RECORDS:
            if 0 < hosted.sampled_end <= effect.high_watermark:
                self.metrics.commit_seconds.observe(perf_counter() - hosted.sampled_s)
                hosted.sampled_end = 0
            if hosted.readers:
                self._wake(hosted)

    def _role_changed(self, hosted: HostedReplica, effect: ev.RoleChanged) -> None:
        _log.info("role", partition=hosted.name, role=effect.role, epoch=effect.epoch, reason=effect.reason)
        hosted.sampled_end = 0
        self._wake(hosted)
        self.queues.role_changed(hosted)

    def _delete(self, _: HostedReplica, effect: ev.DeleteReplica) -> None:
        self._loop.call_soon(self.delete_replica, effect.key)  # not while its own effects are carried out

    def _wake(self, hosted: HostedReplica) -> None:
        for reader in hosted.readers:
            self.at_end(reader)

    # -- end of the pass ----------------------------------------------------------------------------

    def at_end(self, emitter: Emitter) -> None:
        """Call ``emitter.emit()`` once, at the end of this pass."""
        self._emitters[emitter] = None
        self.end_pass_soon()

    def answered(self, asker: Asker) -> None:
        """Answers were queued for ``asker``: write them at the end of this pass, all in one go."""
        self._answered[asker] = None
        self.end_pass_soon()

    def end_pass_soon(self) -> None:
        if not self._pass_due:
            self._pass_due = True
            self._loop.call_soon(self._end_pass)

    def _end_pass(self) -> None:
        self._pass_due = True  # whatever is fed from here on ends with it
        self._guarded(self.queues.ask_again)
        awaiting, self._awaiting = self._awaiting, {}
        for hosted in awaiting:
            self._guarded(self.feed, hosted, ev.PassEnded())
        self._pass_due = False
        if self._dirty and not self._sync_due:
            self._sync_due = True
            self._appends_seen, self._postponed = self._appends, 0
            self._loop.call_soon(self._sync)
        emitters, self._emitters = self._emitters, {}
        for emitter in emitters:
            self._guarded(emitter.emit)
        answered, self._answered = self._answered, {}
        for asker in answered:
            self._guarded(asker.flush)
        self._guarded(self.peers.emit)
        self._guarded(self.link.emit)
        for hosted in self._fresh:
            hosted.fresh = [None, None]
        self._fresh.clear()

    def _guarded(self, emit: Callable[..., None], *args: Any) -> None:
        """One peer's trouble must not keep the others waiting."""
        try:
            emit(*args)
        except Exception:
            _log.exception("frames could not be sent")

    def _sync(self) -> None:
        """Group commit: every log that is due becomes durable, however many batches were appended since the last."""
        if self._appends != self._appends_seen and self._postponed < _POSTPONED_MAX:
            # More has come since the last look, so more is likely to lie in the sockets: one flush for all of it.
            self._appends_seen, self._postponed = self._appends, self._postponed + 1
            self._loop.call_soon(self._sync)
            return
        self._sync_due = False
        dirty, self._dirty, started = self._dirty, [], perf_counter()
        for hosted, log in dirty:
            hosted.flush_due[log] = False
        due = [(hosted, log) for hosted, log in dirty if not hosted.broken]
        failures = dict(self._group.flush([hosted.logs[log] for hosted, log in due]))
        self.metrics.flush_seconds.observe(perf_counter() - started)
        self._pass_due = True  # it ends below
        try:
            flushed: dict[HostedReplica, list[int]] = {}
            for hosted, log in due:
                if (failure := failures.get(hosted.logs[log])) is None:
                    flushed.setdefault(hosted, [-1, -1])[log] = hosted.logs[log].flushed_end
                else:
                    self.storage_failed(hosted, log, failure)
            for hosted, ends in flushed.items():
                self.feed(hosted, ev.Flushed(RECORDS, *ends))
            for failure in failures.values():
                # Rule L10: what a failed fsync has lost nobody knows, and asking again would be told "done".
                self._on_fatal(f"flush failed: {failure}")
        finally:
            self._end_pass()

    # -- time ---------------------------------------------------------------------------------------

    def _due(self, hosted: HostedReplica, now: int) -> None:
        """Its deadline may have come."""
        if hosted.broken:
            return
        if hosted.deadline_ms is not None and hosted.deadline_ms <= now:
            self.feed(hosted, ev.Tick())
        else:
            self._deadlines.arm(hosted)

    # -- failed assertions --------------------------------------------------------------------------

    def _break(self, hosted: HostedReplica, event: ev.Event, error: Exception) -> None:
        """An invariant does not hold: stop this partition loudly, let another replica lead; the others go on."""
        if hosted.broken:
            return
        hosted.tell_story(event, error)
        was_primary, epoch = hosted.core.role == "primary", hosted.core.epoch
        reason = f"invariant violated: {type(error).__name__}: {str(error)[:200]}"
        hosted.follow_ups = []
        try:
            self._carry_out(hosted, hosted.core.abandon(reason))
        except Exception:
            _log.exception("the partition could not even stop in order", partition=hosted.name)
        hosted.broken = reason
        if was_primary:
            self.link.add_resign(ResignEntry(*hosted.key, epoch, "damaged"))
        self._settle_all(hosted, "COMMIT_UNKNOWN", "the partition stopped on this broker")
        self._wake(hosted)
        self.end_pass_soon()

    def _settle_all(self, hosted: HostedReplica, code: str, message: str) -> None:
        for token in [token for token, waiter in self._waiters.items() if waiter[2] is hosted]:
            self._answer(hosted, ev.Refuse(token, code, message))

    def _refuse_broken(self, hosted: HostedReplica, event: ev.Event) -> None:
        if token := getattr(event, "token", 0):
            self._answer(hosted, ev.Refuse(token, "STORAGE_FAILED", hosted.broken))

    def settle_everything(self, code: str, message: str) -> None:
        """At the very end: nobody may be left waiting."""
        for _ in range(2):  # again, for whoever was woken in this pass
            for token, waiter in list(self._waiters.items()):
                self._answer(waiter[2], ev.Refuse(token, code, message))
            self._end_pass()


def _ignore(*_: object) -> None: ...
