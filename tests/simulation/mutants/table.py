"""Every row of the tables in section 11 of the replication rules."""

from __future__ import annotations

from tests.simulation.mutants.model import ALL, FSYNC, GROUPS, ISR_MATTERS, REPLICATED, mutant

_UNION = "self.maximal_isr = self.maximal_isr | frozenset(wanted)"

TABLE = (
    mutant(
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
    mutant(
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
    mutant(
        "expand-counts-committed",
        "L7 L4",
        "a proposed larger in-sync set does not count yet",
        ISR_MATTERS,
        ("InSyncSet._propose", _UNION, "self.maximal_isr = frozenset(self.isr)"),
    ),
    mutant(
        "no-version-check",
        "C6",
        "AlterIsr without compare-and-set on the version",
        ISR_MATTERS,
        ("Partitions._refusal", "if part.version != proposal.version:", "if False:"),
    ),
    mutant(
        "join-without-leso",
        "L7",
        "a joiner need not have the start of the epoch",
        "3/2/fsync,3/2/replicated",
        ("InSyncSet._may_join", "max(replica.high_watermark[log], self.leso[log])", "replica.high_watermark[log]"),
    ),
    mutant(
        "min-isr-on-maximal",
        "L4 L2",
        "min_isr is judged on the maximal in-sync set",
        "3/2/fsync,2/2/replicated",
        ("Primary.advance", "if len(self.isr) >= part.min_isr:", "if len(self.maximal_isr) >= part.min_isr:"),
    ),
    mutant(
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
    mutant(
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
    mutant(
        "unclean-election",
        "C4 C7",
        "any replica that is up may be elected",
        ISR_MATTERS,
        ("elect", "(part.elr if empty else part.isr)", "(part.replicas if empty else part.isr)"),
        ("can_elect", "pool = part.isr or part.elr", "pool = part.isr or part.replicas"),
    ),
    mutant(
        "stale-diverging-heeded",
        "F2",
        "an answer to an earlier fetch of the epoch counts",
        FSYNC,
        ("Secondary._matches", " or data.fetch_id != out.fetch_id", ""),
        ("Secondary._matches", "return all(self._echoes(log, data.logs[log]) for log in BOTH_LOGS)", "return True"),
        weather="late-flushes",
    ),
    mutant(
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
    mutant(
        "unclean-stays-candidate",
        "C2",
        "a replica that may have lost its tail stays in elr",
        REPLICATED,
        ("Registration.finish", "elif message.restart_class == RESTART_OS_CRASH:", "elif False:"),
    ),
    mutant(
        "no-broker-epoch-on-add",
        "C6",
        "a member that restarted since its fetch may be added (KIP-903)",
        REPLICATED,
        ("Partitions._refusal", "if joining.meta.broker_epoch != member.broker_epoch:", "if False:"),
        weather="joiners",
    ),
    mutant(
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
    mutant(
        "fetch-epoch-unchecked",
        "L3",
        "a fetch of an older epoch is served",
        "3/2/replicated,3/2/fsync",
        ("PartitionCore._fetch", "elif fetch.epoch < self.primary.epoch:", "elif False:"),
        weather="flips",
    ),
    mutant(
        "progress-unchecked",
        "section 3",
        "Progress counts before a fetch passed the divergence check",
        "3/2/fsync",
        (
            "Feeder.progress",
            "if member is None or event.session != member.session or event.sender_epoch != member.broker_epoch:",
            "if member is None:",
        ),
        ("Feeder.progress", "if member.fetched[log] >= 0:", "if True:"),
        ("Feeder.progress", "told = min(progress.flushed[log], member.fetched[log])", "told = progress.flushed[log]"),
        weather="half-open",
    ),
    mutant(
        "progress-session-unchecked",
        "section 3",
        "Progress of an earlier session counts",
        "3/2/fsync",
        ("Feeder.progress", "event.session != member.session or ", ""),
        weather="half-open",
    ),
    mutant(
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
    mutant(
        "void-rule-off",
        "head",
        "state entries that name lost records count",
        "2/2/replicated,3/2/replicated",
        ("_stands", "return entry.offset <= log_end and", "return True or entry.offset <= log_end and"),
        weather="blackouts",
    ),
    mutant(
        "state-served-early",
        "head",
        "claims and commits before the epoch's start is committed",
        GROUPS,
        ("Primary.ready", "self.groups is not None and all(", "self.groups is not None or all("),
    ),
    mutant(
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
    mutant(
        "no-dedupe",
        "section 10",
        "a repeated batch is appended again",
        ALL,
        ("ProducerTable.check", "return Verdict(duplicate=batch)", "return ACCEPTED"),
    ),
    mutant(
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
    mutant(
        "dedupe-not-cut",
        "section 10",
        "the dedupe table keeps what truncation took away",
        ALL,
        ("PartitionCore._dispatch", "self.replica.producers = event.table", "pass"),
        weather="late-flushes",
    ),
    mutant(
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
    mutant(
        "no-gap-check",
        "section 10",
        "a batch may follow a gap in the sequence",
        ALL,
        ("ProducerTable.check", 'return Verdict("OUT_OF_ORDER_SEQUENCE", f"sequence', 'return ACCEPTED; (f"sequence'),
    ),
    mutant(
        "unknown-producer-any-seq",
        "section 10",
        "an unknown producer may begin anywhere",
        ALL,
        ("ProducerTable.check", "if sequence == 0:", "if sequence == 0 or state is None:"),
        weather="late-flushes",
    ),
    mutant(
        "any-refusal-heeded",
        "L8",
        "a refusal of an earlier proposal ends the present one",
        ISR_MATTERS,
        ("InSyncSet.refused", "result.request_id != proposal.request_id or ", ""),
        weather="echoes",
    ),
    mutant(
        "no-request-id",
        "C6",
        "a doubled proposal may be accepted after it was refused",
        ISR_MATTERS,
        ("Partitions._refusal", "if epoch == proposal.broker_epoch and proposal.request_id <= highest:", "if False:"),
        weather="echoes",
    ),
    mutant(
        "coord-epoch-unchecked",
        "C6",
        "proposals made to an earlier coordinator are accepted",
        ALL,
        ("Partitions._refusal", "if proposal.coord_epoch != change.coord_epoch:", "if False:"),
        weather="echoes",
    ),
)
