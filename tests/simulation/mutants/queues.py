"""What receivers of queues are promised."""

from __future__ import annotations

from tests.simulation.mutants.model import QUEUES, mutant

_ANSWER = "self.waits.add(STATE, last, token, outcome.answer, deadline_ms, record=outcome.record)"
_EARLY = 'self.replica.out.append(outcome.answer) if type(outcome.answer).__name__ == "{}" else ' + _ANSWER

QUEUE_MUTANTS = (
    mutant(
        "lease-answered-early",
        "queues 1",
        "a lease is answered before it is committed",
        QUEUES,
        ("Primary.queue", _ANSWER, _EARLY.format("AnswerLease")),
    ),
    mutant(
        "lease-answered-before-its-record",
        "queues ahead",
        "a lease is answered when its entry is committed, though its record is not",
        QUEUES,
        ("WaitList.add", "if record >= high[RECORDS]:", "if False:"),
    ),
    mutant(
        "settled-ahead",
        "queues ahead",
        "records are settled by looking at them before they are committed",
        QUEUES,
        ("Queues._read", "event.ahead and not event.plain", "False"),
    ),
    mutant(
        "uncommitted-lease-ends",
        "queues ahead",
        "a lease of records that are not committed ends by time",
        QUEUES,
        ("Queue.tick", "max(lease.offsets) >= high_watermark", "False"),
    ),
    mutant(
        "settle-answered-early",
        "queues 1",
        "an ack is answered before it is committed",
        QUEUES,
        ("Primary.queue", _ANSWER, _EARLY.format("AnswerSettle")),
    ),
    mutant(
        "queue-void-rule-off",
        "queues void",
        "what was settled of lost records counts for those that replaced them",
        "2/1/replicated/queues,2/2/replicated/queues,3/2/replicated/queues",
        ("GroupTable.replay", "elif isinstance(entry, QueueEntry) and not", "elif False and not"),
        (
            "GroupTable.replay",
            "return offset < log_start or (offset < log_end and records.epoch_at(offset) == epoch)",
            "return True",
        ),
        weather="blackouts",
    ),
    mutant(
        "acks-not-replayed",
        "Q10",
        "a promoted secondary does not know what was settled",
        QUEUES,
        ("GroupTable.replay", "table.apply(entry)", 'type(entry).__name__ == "Settled" or table.apply(entry)'),
    ),
    mutant(
        "releases-not-replayed",
        "queues 1",
        "a promoted secondary does not know what was released",
        QUEUES,
        ("GroupTable.replay", "table.apply(entry)", 'type(entry).__name__ == "Released" or table.apply(entry)'),
    ),
    mutant(
        "lane-open-while-backing-off",
        "Q8",
        "the next of a lane is handed out while the one before it backs off",
        QUEUES,
        (
            "Window.back_off",
            "self._left(offset, now_ms)",
            "self._left(offset, now_ms)\n"
            "    lane = self.lane_of[offset]\n"
            "    if lane is not None and len(lane) and not self.runs:\n"
            "        self.waiting -= 1\n"
            "        self._step_out(lane, lane.pop(), now_ms)",
        ),
    ),
    mutant(
        "rebuilding-ignored",
        "Q8",
        "a new primary hands out before it has seen again what has a past",
        QUEUES,
        ("Queue.rebuilding", "return self.window.scanned <= self._past_end", "return False"),
    ),
    mutant(
        "batch-past-its-lanes",
        "Q8",
        "a batch enters together though records of its lanes are here",
        QUEUES,
        ("Window.scan_batch", " and self.lanes.keys().isdisjoint(distinct)", ""),
    ),
    mutant(
        "batch-past-itself",
        "Q8",
        "a batch enters together though two of its records are of one lane",
        QUEUES,
        ("Window.scan_batch", "len(distinct) == len(lanes)", "True"),
    ),
    mutant(
        "batch-over-settled",
        "Q10",
        "a batch enters together though some of it is settled",
        QUEUES,
        ("Queue._enter_together", " or table.settled.meets(first, end)", ""),
    ),
    mutant(
        "batch-without-a-past",
        "Q8",
        "a batch enters together though some of it is leased, delayed or parked",
        QUEUES,
        ("Queue._enter_together", " and first > self._past_end", ""),
    ),
    mutant(
        "given-back-keeps-its-receipt",
        "Q3",
        "what was given back can still be acknowledged",
        QUEUES,
        ("QueueTable._released", "story.last = NO_LEASE", "pass"),
    ),
    mutant(
        "attempts-not-counted",
        "Q4",
        "every attempt is the first",
        QUEUES,
        ("QueueTable._leased", "story.attempts += 1", "story.attempts = 1"),
    ),
    mutant(
        "ended-lease-stays",
        "Q6",
        "a lease whose deadline passed is not released",
        QUEUES,
        ("Queue.tick", "if lease is None or lease.deadline_ms != deadline_ms:", "if True:"),
    ),
    mutant(
        "keep-drops-everything",
        "Q5",
        "a receiver that says what it keeps loses that, too",
        QUEUES,
        ("Queue.keep", " and lease.id[1] not in leases", ""),
    ),
    mutant(
        "run-with-two-receivers",
        "Q8",
        "the next run of a lane is handed out while one is with somebody",
        QUEUES,
        (
            "Window._turn",
            "if len(self.lane_of) > len(self.ready) + len(self.backing_off) + len(self.stopped):",
            "if False:",
        ),
    ),
    mutant(
        "run-put-back-in-disorder",
        "Q8",
        "what steps back into the line of a run comes first, whatever stands before it",
        QUEUES,
        ("Lane.insert", "at = self._place(offset)", "at = self.first"),
    ),
    mutant(
        "run-over-a-barrier",
        "Q8",
        "a run goes on behind a record that backs off or is parked",
        QUEUES,
        ("Window.barrier", "return min(chain(self.backing_off, self.stopped), default=math.inf)", "return math.inf"),
    ),
    mutant(
        "copied-before-committed",
        "Q7",
        "a dead letter is copied before its death is committed",
        QUEUES,
        ("Queues.committed", "if after >= high:", "if False:"),
    ),
    mutant(
        "copies-overlap",
        "Q7",
        "the next dead letter is copied before the end of the one before it is committed",
        QUEUES,
        ("Queues.appended", "if isinstance(entry, Settled) and entry.why == COPIED:", "if False:"),
    ),
    mutant(
        "copy-numbered-anew",
        "Q7",
        "a new primary repeats a copy under another number",
        QUEUES,
        (
            "Queues.begin",
            "self._moves[group] = -1",
            "self._moves[group] = -1\n"
            "            for offset, story in list(queue.table.stories.items())[:1000]:\n"
            "                if story.dying is not None:\n"
            "                    queue.moved(offset, story.dying[1], False, now_ms)\n"
            "                    break",
        ),
    ),
    mutant(
        "forgotten-counts-as-copied",
        "Q1 Q12",
        "a target that has forgotten the producer counts as one that took the copy",
        QUEUES,
        ("Queue.moved", "if done:", "if True:"),
    ),
    mutant(
        "snapshot-without-leases",
        "Q5",
        "a snapshot leaves the leases out",
        QUEUES,
        ("QueueTable.row", "for lease in self.leases.values():", "for lease in ():"),
    ),
    mutant(
        "snapshot-without-stories",
        "Q4 Q7",
        "a snapshot leaves out what has happened to records",
        QUEUES,
        ("QueueTable.row", "for offset in sorted(self.known())", "for offset in ()"),
        ("QueueTable.of_row", "[offset for offset in unpacked(given.offsets) if offset in table.stories]", "[]"),
    ),
    mutant(
        "start-over-unsettled",
        "Q1 Q12",
        "the start moves over records that are not settled",
        QUEUES,
        (
            "QueueTable._advance",
            "start = self.settled.next_outside(self.start)",
            "start = max([self.start, *(end for _, end in self.settled)])",
        ),
    ),
    mutant(
        "delay-forgotten",
        "Q5",
        "a new primary does not know how long a record backs off",
        QUEUES,
        ("Queue._enter_with_past", "self._available(record.offset, story.delay_ms, now_ms)",
         "self._available(record.offset, 0, now_ms)"),
    ),
    mutant(
        "any-receipt-acks",
        "Q2 Q3",
        "a receipt is good although the record was leased again",
        QUEUES,
        ("Queue._sorted_out", "story.last == identity and ", ""),
    ),
    mutant(
        "parked-lane-goes-on",
        "Q8",
        "the lane of a parked record goes on",
        QUEUES,
        ("Queue._kill", "self.window.stop(offset, now_ms)", "self.window.gone([offset], now_ms)"),
        (
            "Queue._available",
            "if offset not in self.window.lane_of:\n        return",
            "self.window.lane_of.setdefault(offset, None)",
        ),
    ),
    mutant(
        "unsettled-retained-away",
        "queues pin",
        "retention takes what a queue has not settled",
        QUEUES,
        ("Primary.retained_from", "return limit if pinned is None else min(limit, pinned)", "return limit"),
        weather="short-logs",
    ),
    mutant(
        "retention-before-queues-are-known",
        "queues pin",
        "retention goes on while a new primary does not know its queues",
        QUEUES,
        ("Primary.retained_from", "return self.replica.log_start[RECORDS]", "return self.sync.retained_from()"),
        weather="short-logs",
    ),
    mutant(
        "move-forgotten-while-blocked",
        "Q7",
        "a copy that is done while nothing can be appended is forgotten",
        "2/2/fsync/queues,2/2/replicated/queues,3/2/fsync/queues",
        ("Primary.queue", "self.queues.block(now_ms, event)", "pass"),
    ),
)  # fmt: skip
