"""Seeds that once found a bug of the product: (configuration, seed, real log, what it was).

A seed names a run only as long as the simulation draws in the same order; after a change of the simulation it is one
seed more, no worse than another. The stories of the bugs stay true.
"""

from __future__ import annotations

KEPT = (
    ("3/2/fsync", 100, False, "a replica moved away and back within an epoch counted with what its deleted copy had"),
    ("2/2/fsync", 8, False, "a move could never finish because the replica it was to keep was gone"),
    ("2/1/fsync", 234, False, "a cancelled move dropped the only complete copy"),
    ("2/2/fsync", 260, False, "logs parted inside a batch; a cancelled move dropped the only complete copy"),
    ("2/1/fsync", 360, False, "a deposed primary told a reader that was ahead of it that the log had been cut"),
    ("3/2/fsync", 430, False, "the same with an epoch later than its own"),
    ("3/2/replicated", 341, False, "nobody was elected although a complete candidate was up"),
    ("2/1/fsync", 90, False, "a healthy replica stopped for ever because an outdated record called it in sync"),
    ("3/2/replicated", 173, False, "the same"),
    ("2/1/fsync", 216, False, "after retention had taken everything the next primary failed an assertion"),
    ("3/2/replicated", 203, False, "an in-sync replica that ended exactly at the primary's log start stopped"),
    ("3/2/fsync", 418, False, "a primary that had begun at its predecessor's start sent secondaries round for ever"),
    ("3/2/fsync", 500050, False, "a damaged copy was given up although a newer record counted on it"),
    ("2/2/replicated", 519, True, "a hole in what was never synced was called damage, on both copies"),
    ("2/2/replicated", 345, False, "after a declared loss a replica that began above it asked for ever"),
    ("2/2/replicated", 2343, False, "a primary, once cut back to its log start, stopped a complete in-sync replica"),
    ("2/2/fsync", 2810, False, "the same"),
    ("3/2/fsync", 7096, False, "a deposed primary told a reader without an epoch that it was above the log end"),
    ("3/2/replicated", 8459, False, "the same"),
    ("3/2/fsync", 22234, False, "a copy of a refused proposal was accepted: its id was forgotten for another broker's"),
    ("2/2/replicated", 19689, False, "damage found while a registration was under way was never told"),
    ("3/2/replicated", 39671, False, "a high watermark of records that a power cut took came back over other records"),
    ("3/2/fsync", 44416, False, "a deposed primary told a reader of an older epoch that the log had been cut"),
    ("2/2/fsync", 332, False, "a stopped replica whose partition was moved elsewhere stayed on its disk"),
    ("2/1/replicated", 3901, False, "a recovery without force took a short log, the longest was about to serve"),
    ("2/1/replicated", 2341, False, "a replica deleted behind the node's back was not opened when it was moved back"),
    ("2/1/replicated", 23437, False, "a last heartbeat hid that a broker had died with the others"),
    ("2/1/fsync", 64446, False, "a member declared, after its release, that it still held the partition"),
    ("3/2/replicated/queues", 233, False, "a dead letter was copied again: more ends were lost than targets remember"),
    (
        "2/2/replicated/queues",
        101187,
        False,
        "a lease of a lost record outlived it: replayed below the log start, it ended",
    ),
)
