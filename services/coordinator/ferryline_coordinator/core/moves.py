"""Replacing lost replicas (C8), rebalancing, and giving primaries back to whom they were assigned (C10).

A move is: the new replica joins ``replicas`` and ``adding``; it catches up and its primary takes it into the in-sync
set; then the old one leaves. The record itself says how far a move has come, so a restart continues it. While it runs,
``replicas`` is the target assignment followed by those in ``removing``.
"""

from __future__ import annotations

from msgspec.structs import replace

from ferryline.protocol.frames import Kind
from ferryline.protocol.messages import Handover, HandoverEntry
from ferryline.protocol.metadata import NO_BROKER, PartitionMeta
from ferryline_coordinator.core.change import Change
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.elections import settled
from ferryline_coordinator.core.events import Tell
from ferryline_coordinator.core.placement import is_balanced, rebalanced
from ferryline_coordinator.core.records import PartRecord
from ferryline_coordinator.core.state import Key

_HANDOVER_LOOKS = 60  # in about so many looks, once a second, all primaries are back where they belong


def target(part: PartitionMeta) -> tuple[int, ...]:
    """The assignment that a partition has, or will have when its move is done."""
    return tuple(b for b in part.replicas if b not in part.removing)


class Moves:
    """Soft: since when brokers are away or back, and which primaries were asked to hand over."""

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        self._away_ms: dict[int, int] = {}  # broker -> fenced since
        self._back_ms: dict[int, int] = {}  # broker -> usable since
        self._asked_ms: dict[Key, int] = {}  # partition -> its primary was asked to hand over
        self._look_ms: int | None = None
        self.unbalanced = False

    def changed(self, now_ms: int) -> None:
        """Something changed that placement may depend on: look at it soon."""
        soon = now_ms + self._config.balance_ms
        if self._look_ms is None or self._look_ms > soon:  # it may be armed for a broker that has long been away
            self._look_ms = soon

    def next_deadline_ms(self) -> int | None:
        return self._look_ms

    def look(self, change: Change) -> None:
        """One pass: finish, give up, start, hand over. Arms the next look if anything is left to do."""
        now_ms = change.now_ms
        if self._look_ms is None or now_ms < self._look_ms:
            return
        self._look_ms = None
        wait = self._watch_brokers(change)
        leave = self._to_leave(change)
        busy = False
        active = 0
        for key in sorted(change.state.moving):
            record = change.part(key)
            if record is not None and (record.meta.adding or record.meta.removing):
                active += not self._step(change, record, leave)
                busy = True
        busy |= self._start(change, active, leave)
        busy |= self._hand_over(change)
        self.unbalanced = busy
        if busy:
            wait.append(now_ms + self._config.balance_ms)
        if wait:
            self._look_ms = max(min(wait), now_ms + 1)

    def _watch_brokers(self, change: Change) -> list[int]:
        """Note who came and went; returns when the next of them has been away, or back, for long enough."""
        now_ms, due = change.now_ms, []
        for broker in change.brokers():
            broker_id = broker.meta.id
            if broker.meta.fenced:
                self._back_ms.pop(broker_id, None)
                since = self._away_ms.setdefault(broker_id, now_ms) + self._config.replacement_ms
            else:
                self._away_ms.pop(broker_id, None)
                since = self._back_ms.setdefault(broker_id, now_ms) + self._config.preferred_ms
            if since > now_ms:
                due.append(since)
        return due

    def _to_leave(self, change: Change) -> list[int]:
        """Brokers that no replica should stay on: drained, or away for too long."""
        lost = change.now_ms - self._config.replacement_ms
        brokers = [broker.meta for broker in change.brokers()]
        return [b.id for b in brokers if b.draining or self._away_ms.get(b.id, change.now_ms) <= lost]

    # -- moves --------------------------------------------------------------------------------------

    def _start(self, change: Change, active: int, leave: list[int]) -> bool:
        """Plan over the targets, and begin as many moves as may run. Returns whether any is left to begin."""
        usable = [broker.meta.id for broker in change.brokers() if change.usable(broker.meta.id)]
        state = change.state
        if not change.writes_parts and is_balanced(state.assigned, state.preferred, usable, leave):
            return False  # as nearly always: nothing to plan, however many partitions there are
        records = {record.meta.key: record for record in change.parts()}
        now = {key: target(record.meta) for key, record in records.items()}
        # No more than can run: a plan for thousands of moves would hold everybody up, and be stale before it is done.
        planned = rebalanced(now, usable, leave, steps_max=4 * self._config.moves_max)
        wanted = [key for key in sorted(now) if planned[key] != now[key]]
        # Copies that are missing come first, then brokers to be left, then balance.
        wanted.sort(key=lambda key: (len(records[key].meta.isr) >= len(now[key]), not set(now[key]) & set(leave)))
        waiting = False
        for key in wanted:
            part = records[key].meta
            new = set(planned[key]) - set(now[key])
            if part.adding or part.removing or (new and (part.primary == NO_BROKER or not part.isr)):
                waiting = True  # one move at a time; and nobody can catch up while nobody leads
            elif not new:
                change.put_part(replace(part, replicas=planned[key]))
            elif active >= self._config.moves_max:
                waiting = True
            else:
                active += 1
                waiting = True
                self._begin(change, part, planned[key])
        return waiting

    def _begin(self, change: Change, part: PartitionMeta, planned: tuple[int, ...]) -> None:
        adding = tuple(b for b in planned if b not in part.replicas)
        removing = tuple(b for b in part.replicas if b not in planned)
        change.put_part(replace(part, replicas=(*planned, *removing), adding=adding, removing=removing))
        change.note(
            "move_started",
            topic_id=part.topic_id,
            partition=part.partition,
            adding=list(adding),
            removing=list(removing),
        )

    def _step(self, change: Change, record: PartRecord, leave: list[int]) -> bool:
        """Finish a move whose new replicas are in sync, give up one whose new replica is lost; whether it ended."""
        part = self._keep_instead(change, record.meta, leave)
        # One that is in elr has everything, perhaps as the only one: dropping it would drop acknowledged records. Where
        # nobody surely has everything, one that lost its unflushed tail may hold the most: recovery is to choose.
        counted = (*part.isr, *part.elr) or part.last_known_elr
        unfit = [b for b in part.adding if not change.usable(b) and b not in counted]
        if unfit:
            self._cancel(change, part, unfit)
            return True
        remaining = tuple(b for b in part.isr if b not in part.removing)
        complete = all(b in part.isr for b in part.adding) and len(remaining) >= max(1, part.min_isr)
        if not complete or part.primary == NO_BROKER or part.primary in part.removing:
            return False  # still catching up, or the primary has to hand over first
        keep = target(part)
        done = replace(
            part,
            replicas=keep,
            isr=remaining,
            elr=tuple(b for b in part.elr if b in keep),
            last_known_elr=tuple(b for b in part.last_known_elr if b in keep),
            adding=(),
            removing=(),
        )
        change.put_part(settled(done))
        change.note("move_finished", topic_id=part.topic_id, partition=part.partition, replicas=list(keep))
        return True

    def _keep_instead(self, change: Change, part: PartitionMeta, leave: list[int]) -> PartitionMeta:
        """A replica that was to stay has been lost meanwhile: keep a good one that was to go in its place."""
        keep = target(part)
        lost = [b for b in keep if b in leave and b not in part.adding]
        good = [b for b in part.removing if change.usable(b) and b in part.isr]
        instead = dict(zip(lost, good, strict=False))
        if not instead:
            return part
        kept = tuple(instead.get(b, b) for b in keep)
        removing = tuple(b for b in part.replicas if b not in kept)
        return change.put_part(replace(part, replicas=(*kept, *removing), removing=removing))

    def _cancel(self, change: Change, part: PartitionMeta, unfit: list[int]) -> None:
        """Without the new replicas that were lost on the way; as many of the old ones stay as are needed instead."""
        adding = tuple(b for b in part.adding if b not in unfit)
        removing = part.removing[: len(adding)]
        kept = (*(b for b in target(part) if b not in unfit), *part.removing[len(adding) :])
        replicas = (*kept, *removing)
        change.put_part(
            replace(
                part,
                replicas=replicas,
                elr=tuple(b for b in part.elr if b in replicas),
                last_known_elr=tuple(b for b in part.last_known_elr if b in replicas),
                adding=adding,
                removing=removing,
            )
        )
        change.note("move_cancelled", "warning", topic_id=part.topic_id, partition=part.partition, lost=unfit)

    # -- hand-over ----------------------------------------------------------------------------------

    def _hand_over(self, change: Change) -> bool:
        """Ask primaries that are not the preferred ones to hand over. Returns whether any is not where it belongs."""
        now_ms = change.now_ms
        asked: dict[int, list[HandoverEntry]] = {}
        outstanding, left = 0, False
        misled = change.state.misled
        # Thousands of them (a broker came back) are to be where they belong within a minute or so.
        at_once = max(self._config.handovers_max, len(misled) // _HANDOVER_LOOKS)
        for key in [key for key in self._asked_ms if key not in misled]:
            del self._asked_ms[key]
        for key in sorted(misled):
            record = change.part(key)
            if record is None:
                continue
            part = record.meta
            heir = self._heir(change, record)
            since = self._asked_ms.get(part.key)
            if heir is None:
                self._asked_ms.pop(part.key, None)
                continue
            left = True
            if since is not None and now_ms < since + self._config.handover_retry_ms:
                outstanding += 1
            elif outstanding + sum(map(len, asked.values())) < at_once:
                self._asked_ms[part.key] = now_ms
                entry = HandoverEntry(part.topic_id, part.partition, part.epoch, heir)
                asked.setdefault(part.primary, []).append(entry)
        for broker_id in sorted(asked):
            change.add(Tell(broker_id, Kind.HANDOVER, Handover(asked[broker_id])))
        return left

    def _heir(self, change: Change, record: PartRecord) -> int | None:
        """Who should lead instead of the present primary, if anybody should and can."""
        part = record.meta
        if part.primary == NO_BROKER or record.frozen or not part.replicas:
            return None
        keep = target(part)
        must = part.primary in part.removing and all(b in part.isr for b in part.adding)
        for broker_id in keep if must else keep[:1]:
            if broker_id == part.primary or broker_id not in part.isr or not change.usable(broker_id):
                continue
            settled_in = change.now_ms - self._back_ms.get(broker_id, change.now_ms) >= self._config.preferred_ms
            if must or settled_in:
                return broker_id
        return None
