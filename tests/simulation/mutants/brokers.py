"""What a broker and its replicas must keep, beyond the tables of the replication rules."""

from __future__ import annotations

from tests.simulation.mutants.model import ALL, FSYNC, GROUPS, ISR_MATTERS, REPLICATED, mutant

BROKERS = (
    mutant(
        "ack-before-replicate",
        "L5",
        "acknowledged when appended",
        ALL,
        ("WaitList.add", "if self._replica.high_watermark[log] > last:", "if True:"),
    ),
    mutant(
        "only-own-flush",
        "L4",
        "the high watermark follows the own disk alone",
        ALL,
        ("InSyncSet.committable", "for broker_id in self.maximal_isr:", "for broker_id in ():"),
    ),
    mutant(
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
    mutant(
        "secondary-claims-flushed",
        "section 3",
        "a secondary reports as flushed what it has only written",
        FSYNC,
        ("Replica.position", "self.flushed[log])", "self.log_end[log])"),
    ),
    mutant(
        "solo-without-fsync",
        "L9",
        "a lone primary of a replicated topic does not flush",
        "2/1/replicated",
        ("InSyncSet.committable", "solo = len(self.maximal_isr) == 1", "solo = False"),
    ),
    mutant(
        "join-on-records-only",
        "L7",
        "a joiner is not asked about its state log",
        "2/1/fsync,3/2/fsync",
        ("InSyncSet._may_join", "for log in BOTH_LOGS\n", "for log in (RECORDS,)\n"),
    ),
    mutant(
        "join-with-old-copy",
        "L7 C8",
        "what a deleted copy had counts for the new one",
        ALL,
        ("InSyncSet._may_join", " or member.version < part.version", ""),
        weather="moves",
    ),
    mutant(
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
    mutant(
        "old-coordinator-heeded",
        "C9",
        "a replaced coordinator is still obeyed",
        ALL,
        ("Registration._regressed", "if seen <= change.coord_epoch:", "if True:"),
        ("NodeCore._heed", "if coord_epoch < self.coord_epoch:", "if False:"),
        ("PartitionCore._meta", "if event.coord_epoch < replica.coord_epoch:", "if False:"),
        weather="two-coordinators",
    ),
    mutant(
        "lossy-flag-not-sticky",
        "section 7.1",
        "a second start forgets that the one before had lost data",
        REPLICATED,
        (
            "NodeStore._start",
            "if before is not None and before.lossy_pending and lossy != RESTART_FOREIGN:",
            "if False:",
        ),
        weather="twice-down",
        real_log=True,
    ),
    mutant(
        "divergence-unchecked",
        "L3",
        "a fetch is served without comparing epochs",
        FSYNC,
        ("Feeder._divergence", "if epoch < position.last_epoch or end < position.fetch_offset:", "if False:"),
    ),
    mutant(
        "no-answer-is-no",
        "L8",
        "a proposal without an answer counts as refused",
        ISR_MATTERS,
        (
            "InSyncSet.evaluate",
            "    wanted = [b for b in self.isr",
            "    if self.proposal is not None:\n"
            "        self.proposal, self.maximal_isr = None, frozenset(self.isr)\n"
            "    wanted = [b for b in self.isr",
        ),
        weather="echoes",
    ),
    mutant(
        "cut-inside-a-batch",
        "F4",
        "a secondary that does not know the primary's epoch cuts at its end all the same",
        FSYNC,
        ("Secondary._diverged", " if own_epoch == epoch else own_end, replica", ", replica"),
    ),
    mutant(
        "later-start-not-seen",
        "F6",
        "a secondary compares epochs that the primary no longer retains",
        ALL,
        ("Secondary._begins_later", "return data.diverging[0] < 0 and", "return False and"),
        weather="short-logs",
    ),
    mutant(
        "conflict-from-old-record",
        "F4 F6",
        "an outdated record of the partition proves a conflict",
        ALL,
        ("Secondary._behind", "if self._primary_version <= part.version:", "if True:"),
        weather="short-logs",
    ),
    mutant(
        "reads-uncommitted",
        "L5",
        "readers get what is not committed yet",
        ALL,
        (
            "check_read",
            'log end {end}", high)\n    return ReadVerdict(below=high)',
            'log end {end}", high)\n    return ReadVerdict(below=end)',
        ),
    ),
    mutant(
        "secondary-reads-uncommitted",
        "F7",
        "a secondary serves what it has, committed or not",
        ALL,
        (
            "check_read",
            "if role == ROLE_SECONDARY:\n        return ReadVerdict(below=high)",
            "if role == ROLE_SECONDARY:\n        return ReadVerdict(below=end)",
        ),
    ),
    mutant(
        "reader-false-alarm",
        "section 10",
        "a deposed primary tells a reader that knows more that the log was cut",
        ALL,
        ("check_read", "if offset_epoch > epoch:", "if False:"),
    ),
    mutant(
        "unknown-called-definite",
        "L5",
        "whoever waits when a primaryship ends hears that nothing was stored",
        ALL,
        ("PartitionCore._leave", '"COMMIT_UNKNOWN"', '"NOT_PRIMARY"'),
    ),
    mutant(
        "timeout-called-definite",
        "L5",
        "whoever waits too long hears that nothing was stored",
        ALL,
        ("WaitList.expire", '"COMMIT_UNKNOWN"', '"NOT_ENOUGH_REPLICAS"'),
    ),
)
