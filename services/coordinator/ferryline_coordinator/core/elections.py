"""Who may lead a partition: rules C3 to C6 as functions from one partition record to the next.

They set everything but ``version``, which the working copy raises once per decision. Frozen partitions (the store has
forgotten something) elect nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from msgspec.structs import replace

from ferryline.protocol.metadata import NO_BROKER, PartitionMeta

Electable = Callable[[int], bool]


def settled(part: PartitionMeta) -> PartitionMeta:
    """Whenever enough replicas are in sync, nobody outside is complete any more: elr is empty."""
    if part.elr and len(part.isr) >= part.min_isr:
        return replace(part, elr=())
    return part


def elect(
    part: PartitionMeta,
    electable: Electable,
    reluctant: Electable = lambda _: False,
    *,
    frozen: bool = False,
    without: Collection[int] = (),
) -> PartitionMeta:
    """C4: first electable of isr in assignment order; else, if isr is empty, of elr; else nobody. epoch + 1, always.

    ``reluctant`` brokers (being drained) come last; ``without`` names brokers that must not be chosen.
    """
    empty = not part.isr
    pool = [b for b in in_order(part) if b in (part.elr if empty else part.isr) and b not in without and electable(b)]
    pool.sort(key=lambda b: reluctant(b))  # stable: the assignment order stays within each half
    chosen = pool[0] if pool and not frozen else NO_BROKER
    if chosen != NO_BROKER and empty:
        part = replace(part, isr=(chosen,), elr=tuple(b for b in part.elr if b != chosen))
    return settled(replace(part, primary=chosen, epoch=part.epoch + 1))


def in_order(part: PartitionMeta) -> list[int]:
    """Everybody who could be a candidate, preferred first. elr members that are no replicas any more do not occur."""
    return list(part.replicas)


def can_elect(part: PartitionMeta, electable: Electable) -> bool:
    """Whether a partition without primary has a candidate now."""
    pool = part.isr or part.elr
    return part.primary == NO_BROKER and any(electable(b) for b in pool)


def fence(
    part: PartitionMeta,
    gone: Collection[int],
    electable: Electable,
    reluctant: Electable = lambda _: False,
    *,
    frozen: bool = False,
) -> PartitionMeta:
    """C3: take a set of brokers out of the in-sync set, as one step.

    Below min_isr they stay candidates (elr): nothing can have been committed without them. As one set, so that of two
    replicas that died together both are.
    """
    removed = tuple(b for b in part.isr if b in gone)
    if not removed:
        return part
    isr = tuple(b for b in part.isr if b not in gone)
    elr = tuple(dict.fromkeys((*part.elr, *removed))) if len(isr) < part.min_isr else ()
    part = replace(part, isr=isr, elr=elr)
    waiting = part.primary == NO_BROKER and not frozen and can_elect(part, electable)  # an elr member became eligible
    if part.primary in gone or waiting:
        part = elect(part, electable, reluctant, frozen=frozen, without=gone)
    return part


def exclude(
    part: PartitionMeta,
    broker_id: int,
    electable: Electable,
    reluctant: Electable = lambda _: False,
    *,
    frozen: bool = False,
    remember: bool = True,
) -> PartitionMeta:
    """C2, C7: a replica lost data (or cannot say that it did not): no candidate before it has fetched again.

    ``remember`` keeps it in last_known_elr, where recovery looks; a replica on new storage holds nothing to remember.
    """
    if broker_id not in part.isr and broker_id not in part.elr and broker_id not in part.last_known_elr:
        return part
    was = broker_id in part.isr or broker_id in part.elr
    known = part.last_known_elr
    if not remember:
        known = tuple(b for b in known if b != broker_id)
    elif was and broker_id not in known:
        known = (*known, broker_id)
    part = replace(
        part,
        isr=tuple(b for b in part.isr if b != broker_id),
        elr=tuple(b for b in part.elr if b != broker_id),
        last_known_elr=known,
    )
    if part.primary == broker_id:
        part = elect(part, electable, reluctant, frozen=frozen, without=(broker_id,))
    return part


def alter_isr(part: PartitionMeta, new_isr: Collection[int]) -> PartitionMeta:
    """C6, once accepted: the in-sync set is ``new_isr``, in assignment order."""
    isr = tuple(b for b in part.replicas if b in new_isr)
    removed = tuple(b for b in part.isr if b not in isr)
    elr = tuple(b for b in dict.fromkeys((*part.elr, *removed)) if b not in isr) if len(isr) < part.min_isr else ()
    known = tuple(b for b in part.last_known_elr if b not in isr)
    return replace(part, isr=isr, elr=elr, last_known_elr=known)


def resign(
    part: PartitionMeta, electable: Electable, reluctant: Electable = lambda _: False, *, frozen: bool = False
) -> PartitionMeta:
    """C10: the primary gave up. Somebody else in sync leads; if there is nobody, the same broker under a new epoch."""
    old = part.primary
    heir = any(b != old and electable(b) for b in part.isr)
    return elect(part, electable, reluctant, frozen=frozen, without=(old,) if heir else ())
