"""The table of seeded bugs: every row of the tables in section 11 of the replication rules, and ours after them.

``edits``: (function, text, other text). ``required`` is False only for rules that are kept as defence in depth: the
tables say that others cover them, so no schedule can tell.
"""

from __future__ import annotations

import msgspec

ALL = "2/1/fsync,2/1/replicated,2/2/fsync,2/2/replicated,3/2/fsync,3/2/replicated"
FSYNC = "2/1/fsync,2/2/fsync,3/2/fsync"
REPLICATED = "2/2/replicated,3/2/replicated"
ISR_MATTERS = "2/1/fsync,3/2/fsync"  # with 2/2/fsync every commit needs both, so no mistake about the set can lose data
GROUPS = ALL


class Mutant(msgspec.Struct, frozen=True):
    name: str
    rule: str
    about: str
    configs: str
    edits: tuple[tuple[str, str, str], ...]
    required: bool = True
    real_log: bool = False


def _one(
    name: str, rule: str, about: str, configs: str, *edits: tuple[str, str, str], required: bool = True,
    real_log: bool = False,
) -> Mutant:  # fmt: skip
    return Mutant(name, rule, about, configs, edits, required, real_log)


_UNION = "self.maximal_isr = self.maximal_isr | frozenset(wanted)"

TABLE = (
    _one(
        "truncate-to-watermark",
        "F1 F4",
        "a new secondary cuts to its own high watermark",
        FSYNC,
        (
            "PartitionCore._become_secondary",
            "self.secondary.fetch(now_ms)",
            "[self.replica.truncate(log, self.replica.high_watermark[log]) for log in (0, 1)]; "
            "self.secondary.fetch(now_ms)",
        ),
    ),
    _one(
        "shrink-counts-proposed",
        "L6 L4",
        "a proposed smaller in-sync set counts at once",
        ISR_MATTERS,
        (
            "InSyncSet._propose",
            _UNION,
            "self.maximal_isr = frozenset(wanted) | (frozenset() if len(wanted) < len(self.isr) else self.maximal_isr)",
        ),
    ),
    _one(
        "expand-counts-committed",
        "L7 L4",
        "a proposed larger in-sync set does not count yet",
        ISR_MATTERS,
        ("InSyncSet._propose", _UNION, "self.maximal_isr = frozenset(self.isr)"),
    ),
    _one(
        "no-version-check",
        "C6",
        "AlterIsr without compare-and-set on the version",
        ISR_MATTERS,
        ("Partitions._refusal", "if part.version != proposal.version:", "if False:"),
    ),
    _one(
        "join-without-leso",
        "L7",
        "a joiner need not have the start of the epoch",
        "3/2/fsync,3/2/replicated",
        ("InSyncSet._may_join", "max(replica.high_watermark[log], self.leso[log])", "replica.high_watermark[log]"),
    ),
    _one(
        "min-isr-on-maximal",
        "L4 L2",
        "min_isr is judged on the maximal in-sync set",
        "3/2/fsync,2/2/replicated",
        ("Primary.advance", "if len(self.isr) >= part.min_isr:", "if len(self.maximal_isr) >= part.min_isr:"),
    ),
    _one(
        "ack-before-fsync",
        "L3 L4",
        "written counts as flushed, on both sides",
        FSYNC,
        (
            "InSyncSet.progress",
            "return member.flushed[log] if self.replica.fsync else member.fetched[log]",
            "return member.fetched[log]",
        ),
        (
            "InSyncSet.committable",
            "lowest = replica.flushed[log] if replica.fsync or solo else replica.log_end[log]",
            "lowest = replica.log_end[log]",
        ),
    ),
    _one(
        "effects-before-commit",
        "C1",
        "the coordinator speaks before its decision is durable",
        FSYNC,
        (
            "Coordinator._work",
            "if self.queue[0].durable:",
            "if self.queue[0].durable:\n"
            "            early = self.queue[0]\n"
            "            self.queue[0] = type(early)(early.puts, early.deletes, ())\n"
            "            self._carry_out(early)\n"
            "            if not self.queue:\n"
            "                return",
        ),
    ),
    _one(
        "unclean-election",
        "C4 C7",
        "any replica that is up may be elected",
        ISR_MATTERS,
        ("elect", "(part.elr if empty else part.isr)", "(part.replicas if empty else part.isr)"),
        ("can_elect", "pool = part.isr or part.elr", "pool = part.isr or part.replicas"),
    ),
    _one(
        "stale-diverging-heeded",
        "F2",
        "an answer to an earlier fetch of the epoch counts",
        FSYNC,
        ("Secondary._matches", " or data.fetch_id != out.fetch_id", ""),
        ("Secondary._matches", "return all(self._echoes(log, data.logs[log]) for log in BOTH_LOGS)", "return True"),
    ),
    _one(
        "same-epoch-after-restart",
        "C2 L1",
        "a new incarnation goes on under the old epoch",
        FSYNC,
        (
            "Registration.register",
            "if any(broker_id in record.meta.isr for record in change.parts_held(broker_id)):",
            "if False:",
        ),
        ("Registration.finish", "fenced=True,", "fenced=known.meta.fenced if known is not None else True,"),
        ("PartitionCore._primary_meta", "if part.epoch <= replica.seen_epoch:", "if part.epoch < replica.seen_epoch:"),
    ),
    _one(
        "unclean-stays-candidate",
        "C2",
        "a replica that may have lost its tail stays in elr",
        REPLICATED,
        ("Registration.finish", "elif message.restart_class == RESTART_OS_CRASH:", "elif False:"),
    ),
    _one(
        "no-broker-epoch-on-add",
        "C6",
        "a member that restarted since its fetch may be added (KIP-903)",
        REPLICATED,
        ("Partitions._refusal", "if joining.meta.broker_epoch != member.broker_epoch:", "if False:"),
    ),
    _one(
        "registration-not-idempotent",
        "C2",
        "the same incarnation is registered anew each time",
        ALL,
        (
            "Registration.register",
            "if message.incarnation == known.meta.incarnation and known.meta.broker_epoch:",
            "if False:",
        ),
        ("Registration.finish", "message.incarnation <= known.meta.incarnation", "False"),
    ),
    _one(
        "fetch-epoch-unchecked",
        "L3",
        "a fetch of an older epoch is served",
        ALL,
        ("PartitionCore._fetch", "elif fetch.epoch < self.primary.epoch:", "elif False:"),
        required=False,
    ),
    _one(
        "progress-unchecked",
        "section 3",
        "Progress counts before a fetch passed the divergence check",
        FSYNC,
        (
            "Feeder.progress",
            "if member is None or event.session != member.session or event.sender_epoch != member.broker_epoch:",
            "if member is None:",
        ),
        ("Feeder.progress", "if member.fetched[log] >= 0:", "if True:"),
        ("Feeder.progress", "told = min(progress.flushed[log], member.fetched[log])", "told = progress.flushed[log]"),
        required=False,
    ),
    _one(
        "progress-session-unchecked",
        "section 3",
        "Progress of an earlier session counts",
        FSYNC,
        ("Feeder.progress", "event.session != member.session or ", ""),
        required=False,
    ),
    _one(
        "replay-to-watermark",
        "head",
        "delivery state is replayed only to the high watermark",
        GROUPS,
        (
            "Primary.replayed",
            "replica = self.replica",
            "replica = self.replica; entries = [e for e in entries if e[0] < replica.high_watermark[1]]",
        ),
    ),
    _one(
        "void-rule-off",
        "head",
        "state entries that name lost records count",
        "2/2/replicated,3/2/replicated",
        ("_stands", "return entry.offset <= log_end and", "return True or entry.offset <= log_end and"),
    ),
    _one(
        "state-served-early",
        "head",
        "claims and commits before the epoch's start is committed",
        GROUPS,
        ("Primary.ready", "self.groups is not None and all(", "self.groups is not None or all("),
        required=False,
    ),
    _one(
        "hand-over-to-anyone",
        "C10",
        "a resigning primary is followed by any replica that is up",
        ISR_MATTERS,
        (
            "resign",
            "return elect(part,",
            "others = [b for b in part.replicas if b != old and electable(b)]\n"
            "    if others:\n"
            "        return settled(replace(part, primary=others[-1], isr=tuple(b for b in part.replicas "
            "if b in part.isr or b == others[-1]), "
            "elr=tuple(b for b in part.elr if b != others[-1]), epoch=part.epoch + 1))\n"
            "    return elect(part,",
        ),
    ),
    _one(
        "no-dedupe",
        "section 10",
        "a repeated batch is appended again",
        ALL,
        ("ProducerTable.check", "return Verdict(duplicate=batch)", "return ACCEPTED"),
    ),
    _one(
        "dedupe-not-rebuilt",
        "section 10",
        "a promoted secondary knows no producers",
        ALL,
        (
            "Primary.begin",
            "replica = self.replica",
            "replica = self.replica; replica.producers = type(replica.producers)()",
        ),
    ),
    _one(
        "dedupe-not-cut",
        "section 10",
        "the dedupe table keeps what truncation took away",
        ALL,
        ("PartitionCore._dispatch", "self.replica.producers = event.table", "pass"),
    ),
    _one(
        "duplicate-acked-early",
        "section 10",
        "a repeated batch is acknowledged before it is committed",
        ALL,
        (
            "Primary.produce",
            "self.waits.add(RECORDS, last, event.token, answer, now_ms + event.timeout_ms)",
            "replica.out.append(answer)",
        ),
    ),
    _one(
        "no-gap-check",
        "section 10",
        "a batch may follow a gap in the sequence",
        ALL,
        ("ProducerTable.check", 'return Verdict("OUT_OF_ORDER_SEQUENCE", f"sequence', 'return ACCEPTED; (f"sequence'),
    ),
    _one(
        "unknown-producer-any-seq",
        "section 10",
        "an unknown producer may begin anywhere",
        ALL,
        ("ProducerTable.check", "if sequence == 0:", "if sequence == 0 or state is None:"),
    ),
    _one(
        "any-refusal-heeded",
        "L8",
        "a refusal of an earlier proposal ends the present one",
        ISR_MATTERS,
        ("InSyncSet.refused", "result.request_id != proposal.request_id or ", ""),
    ),
    _one(
        "no-request-id",
        "C6",
        "a doubled proposal may be accepted after it was refused",
        ISR_MATTERS,
        ("Partitions._refusal", "if epoch == proposal.broker_epoch and proposal.request_id <= highest:", "if False:"),
        required=False,
    ),
    _one(
        "coord-epoch-unchecked",
        "C6",
        "proposals made to an earlier coordinator are accepted",
        ALL,
        ("Partitions._refusal", "if proposal.coord_epoch != change.coord_epoch:", "if False:"),
        required=False,
    ),
)

OURS = (
    _one(
        "ack-before-replicate",
        "L5",
        "acknowledged when appended",
        ALL,
        ("WaitList.add", "if self._replica.high_watermark[log] > last:", "if True:"),
    ),
    _one(
        "only-own-flush",
        "L4",
        "the high watermark follows the own disk alone",
        ALL,
        ("InSyncSet.committable", "for broker_id in self.maximal_isr:", "for broker_id in ():"),
    ),
    _one(
        "own-flush-ignored",
        "L4",
        "the high watermark does not wait for the own disk",
        FSYNC,
        (
            "InSyncSet.committable",
            "lowest = replica.flushed[log] if replica.fsync or solo else replica.log_end[log]",
            "lowest = replica.log_end[log]",
        ),
    ),
    _one(
        "secondary-claims-flushed",
        "section 3",
        "a secondary reports as flushed what it has only written",
        FSYNC,
        ("Replica.position", "self.flushed[log])", "self.log_end[log])"),
    ),
    _one(
        "solo-without-fsync",
        "L9",
        "a lone primary of a replicated topic does not flush",
        "2/1/replicated",
        ("InSyncSet.committable", "solo = len(self.maximal_isr) == 1", "solo = False"),
    ),
    _one(
        "join-on-records-only",
        "L7",
        "a joiner is not asked about its state log",
        "2/1/fsync,3/2/fsync",
        ("InSyncSet._may_join", "for log in BOTH_LOGS\n", "for log in (RECORDS,)\n"),
    ),
    _one(
        "join-with-old-copy",
        "L7 C8",
        "what a deleted copy had counts for the new one",
        ALL,
        ("InSyncSet._may_join", " or member.version < part.version", ""),
        required=False,
    ),
    _one(
        "elr-forgotten",
        "C3",
        "brokers fenced below min_isr are no candidates",
        "2/2/fsync,3/2/fsync",
        ("fence", "elr = tuple(dict.fromkeys((*part.elr, *removed))) if len(isr) < part.min_isr else ()", "elr = ()"),
    ),
    _one(
        "elr-kept",
        "C4",
        "elr is not emptied when the in-sync set is large enough again",
        "3/2/fsync,2/2/fsync",
        ("alter_isr", "if len(isr) < part.min_isr else ()", "if True else ()"),
    ),
    _one(
        "fenced-one-by-one",
        "C3",
        "the rest of an in-sync set is not probed before a fence",
        "2/1/fsync",
        ("Fencing.advance", "peers = self._peers(change, gone)", "peers = set()"),
        required=False,
    ),
    _one(
        "unfence-too-early",
        "C5",
        "a broker is unfenced before it knows the present picture",
        ALL,
        ("Membership._caught_up", "message.revision >= gate", "True"),
        required=False,
    ),
    _one(
        "damaged-stays",
        "C2 7.4",
        "a replica that reports damage stays a candidate",
        ALL,
        ("Registration.take_reports", "if report.log_state in INCOMPLETE_LOGS:", "if False:"),
        real_log=True,
    ),
    _one(
        "move-drops-early",
        "C8",
        "old replicas leave before the new ones are in sync",
        ALL,
        ("Moves._step", "complete = all(b in part.isr for b in part.adding) and ", "complete = "),
        required=False,
    ),
    _one(
        "foreign-stays",
        "C2",
        "a replica on another storage keeps its standing",
        ALL,
        (
            "Registration.finish",
            "if (not same_storage and not fresh) or rolled_back or message.restart_class == RESTART_FOREIGN:",
            "if False:",
        ),
    ),
    _one(
        "stale-member-commits",
        "K1 K4",
        "a commit of an old generation is accepted",
        GROUPS,
        ("GroupTable.decide_commit", "if generation != current or", "if False and generation != current or"),
        ("GroupTable.decide_commit", "(row and generation and member != row.member)", "False"),
    ),
    _one(
        "commit-goes-back",
        "K2",
        "a late commit moves the group back",
        GROUPS,
        ("GroupTable.decide_commit", "if row and not reset and offset <= row.offset:", "if False:"),
    ),
    _one(
        "group-answered-early",
        "D1.10",
        "claims and commits are answered before they are committed",
        GROUPS,
        (
            "Primary.group",
            "self.waits.add(STATE, replica.log_end[STATE] - 1, event.token, answer, now_ms + event.timeout_ms)",
            "replica.out.append(answer)",
        ),
    ),
    _one(
        "start-before-snapshot",
        "queues 1",
        "the state log starts at a snapshot that is not committed",
        GROUPS,
        (
            "Primary.advance",
            "if 0 <= self.snapshot_offset < replica.high_watermark[STATE]:",
            "if 0 <= self.snapshot_offset:",
        ),
        ("Replica.advance_start", "offset = min(offset, self.high_watermark[log])", "pass"),
    ),
    _one(
        "old-coordinator-heeded",
        "C9",
        "a replaced coordinator is still obeyed",
        ALL,
        ("NodeCore._heed", "if coord_epoch < self.coord_epoch:", "if False:"),
        ("PartitionCore._meta", "if event.coord_epoch < replica.coord_epoch:", "if False:"),
        required=False,
    ),
    _one(
        "definite-while-in-doubt",
        "section 10",
        "the SDK calls a doubtful failure definite",
        ALL,
        ("deadline_error", "if batch.clean:", "if True:"),
    ),
    _one(
        "doubt-forgotten",
        "section 10",
        "the SDK forgets attempts when the primary changes",
        ALL,
        (
            "ProducerCore._retarget",
            "batch.awaited = 0",
            "batch.awaited = 0; batch.doubtful.clear(); batch.ordinal = -1; partition.bumping = True",
        ),
    ),
    _one(
        "bump-while-in-doubt",
        "section 10",
        "the SDK numbers anew before everything is settled",
        ALL,
        (
            "ProducerCore._pump",
            "if partition.bumping and all(batch.clean for batch in partition.numbered()):",
            "if partition.bumping:",
        ),
        (
            "ProducerCore._bump",
            "assert all(batch.clean and not batch.awaited for batch in partition.queue), partition.key",
            "pass",
        ),
    ),
)

MUTANTS = TABLE + OURS
