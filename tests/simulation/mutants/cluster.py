"""What the coordinator must keep: elections, fencing, registration, moves."""

from __future__ import annotations

from tests.simulation.mutants.model import ALL, GROUPS, mutant

CLUSTER = (
    mutant(
        "elr-forgotten",
        "C3",
        "brokers fenced below min_isr are no candidates",
        "2/2/fsync,3/2/fsync",
        ("fence", "elr = tuple(dict.fromkeys((*part.elr, *removed))) if len(isr) < part.min_isr else ()", "elr = ()"),
    ),
    mutant(
        "elr-kept",
        "C4",
        "elr is not emptied when the in-sync set is large enough again",
        "3/2/fsync,2/2/fsync",
        ("alter_isr", "if len(isr) < part.min_isr else ()", "if True else ()"),
    ),
    mutant(
        "fenced-one-by-one",
        "C3",
        "the rest of an in-sync set is not probed before a fence",
        "2/1/fsync",
        ("Fencing.advance", "peers = self._peers(change, gone)", "peers = set()"),
        weather="twins",
    ),
    mutant(
        "unfence-too-early",
        "C5",
        "a broker is unfenced before it knows the present picture",
        ALL,
        ("Membership._caught_up", "message.revision >= gate", "True"),
        weather="late-flushes",
    ),
    mutant(
        "damaged-stays",
        "C2 7.4",
        "a replica that reports damage stays a candidate",
        ALL,
        ("Registration.take_reports", "if report.log_state in INCOMPLETE_LOGS:", "if False:"),
        weather="bad-disks",
    ),
    mutant(
        "damage-told-once",
        "C2 7.4",
        "damage that is found while a registration is under way is not told by another one",
        ALL,
        ("NodeCore._register_answered", "if self._untold:", "if False:"),
        weather="bad-disks",
    ),
    mutant(
        "move-drops-early",
        "C8",
        "old replicas leave before the new ones are in sync",
        ALL,
        ("Moves._step", "complete = all(b in part.isr for b in part.adding) and ", "complete = "),
        weather="moves",
    ),
    mutant(
        "foreign-stays",
        "C2",
        "a replica on another storage keeps its standing",
        ALL,
        (
            "Registration.finish",
            "if (not same_storage and not fresh) or rolled_back or message.restart_class == RESTART_FOREIGN:",
            "if False:",
        ),
        weather="bad-disks",
    ),
    mutant(
        "elected-while-fenced",
        "C4",
        "a fenced broker may be elected",
        ALL,
        ("core.change:Change.electable", "not broker.meta.fenced and ", ""),
    ),
    mutant(
        "epoch-not-raised",
        "C4",
        "a new primary goes on in the epoch of the old one",
        ALL,
        ("elect", "epoch=part.epoch + 1", "epoch=part.epoch"),
    ),
    mutant(
        "zombie-commits",
        "C9 section 12",
        "the store takes commits of a coordinator that was replaced",
        ALL,
        ("Store.commit", "if epoch != self.epoch:", "if False:"),
        weather="two-coordinators",
    ),
    mutant(
        "move-removes-the-new-copy",
        "C8",
        "a finished move keeps the old replica instead of the new one",
        ALL,
        ("Moves._step", "keep = target(part)", "keep = tuple(b for b in part.replicas if b not in part.adding)"),
        ("Moves._step", "isr=remaining", "isr=tuple(b for b in part.isr if b in keep)"),
        weather="moves",
    ),
    mutant(
        "group-generation-not-raised",
        "K1",
        "a partition changes hands without a new generation",
        GROUPS,
        (
            "Groups._grant",
            "generations[number] = max(generations[number], floor) + 1",
            "generations[number] = max(generations[number], floor, 1)",
        ),
    ),
    mutant(
        "topic-id-reused",
        "M2",
        "a new topic gets the identity of a deleted one",
        ALL,
        (
            "Topics.create",
            "topic = TopicMeta(event.topic_id,",
            "topic = TopicMeta(next(iter(sorted(change.state.gone)), event.topic_id),",
        ),
    ),
    mutant(
        "unknown-commit-taken-for-done",
        "section 12",
        "a coordinator goes on after a commit of unknown outcome",
        ALL,
        ("Coordinator._commit", 'if fate != "ok":', "if False:"),
    ),
)
