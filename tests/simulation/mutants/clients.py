"""What producers, groups and their members are promised."""

from __future__ import annotations

from tests.simulation.mutants.model import ALL, GROUPS, mutant

CLIENTS = (
    mutant(
        "stale-member-commits",
        "K1 K4",
        "a commit of an old generation is accepted",
        GROUPS,
        (
            "GroupTable.decide_commit",
            "stale = generation != current or (row and generation and member != row.member)",
            "stale = False",
        ),
    ),
    mutant(
        "commit-goes-back",
        "K2",
        "a late commit moves the group back",
        GROUPS,
        ("GroupTable.decide_commit", "if row and not reset and offset <= row.offset:", "if False:"),
    ),
    mutant(
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
    mutant(
        "definite-while-in-doubt",
        "section 10",
        "the SDK calls a doubtful failure definite",
        ALL,
        ("deadline_error", "if batch.clean:", "if True:"),
    ),
    mutant(
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
    mutant(
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
    mutant(
        "producers-forgotten-early",
        "section 10",
        "an idle producer is forgotten as soon as another one sends",
        ALL,
        ("ProducerTable.observe", "if len(self._states) > PRODUCERS_MAX:", "if len(self._states) > 1:"),
    ),
    mutant(
        "commit-beyond-watermark",
        "K7",
        "a group may commit what is not committed",
        GROUPS,
        ("GroupTable.decide_commit", "if not 0 <= offset <= high_watermark:", "if offset < 0:"),
        # ... and an application that asks for it
        ("simulation.clients:Member._commit", "offset = max(0, offset - 2)", "offset = offset + 100_000"),
    ),
    mutant(
        "snapshot-incomplete",
        "K2",
        "a snapshot of the delivery state leaves the groups out",
        GROUPS,
        ("GroupTable.snapshot", "for name in sorted(self._rows)]", "for name in sorted(self._rows)[:0]]"),
    ),
    mutant(
        "commits-not-replayed",
        "K2 K3",
        "a promoted secondary knows claims but no commits",
        GROUPS,
        (
            "GroupTable.replay",
            "if isinstance(entry, CommitEntry) and not _stands(entry, records, log_start, log_end):",
            "if isinstance(entry, CommitEntry):",
        ),
    ),
)
