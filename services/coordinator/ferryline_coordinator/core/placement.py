"""Where replicas live: a pure function from the present assignment to a balanced one with few moves.

Promises, over the *usable* brokers (serving, not leaving), for replicas that are placed on them:

 1. a partition never has two replicas on one broker; its replication does not change;
 2. replicas per broker differ by at most one (if no partition is wider than there are usable brokers);
 3. preferred primaries (first in the assignment) per broker differ by at most one;
 4. a balanced assignment is returned unchanged, so planning again after every step ends.

A replica on a broker that is away for a moment stays where it is, uncounted; one on a broker that must be *left*
(lost for long, drained) moves if there is anywhere to go.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Mapping

Assignment = dict[tuple[str, int], tuple[int, ...]]


class Planner:
    """One planning run. ``counts`` and ``preferred`` are of partitions that are not in ``assignment`` and stay as they
    are (placing a new topic moves no old data). ``steps_max`` bounds what it changes; planning again goes on from
    there."""

    def __init__(
        self,
        assignment: Mapping[tuple[str, int], tuple[int, ...]],
        usable: Collection[int],
        leave: Collection[int] = (),
        *,
        counts: Mapping[int, int] | None = None,
        preferred: Mapping[int, int] | None = None,
        steps_max: int | None = None,
    ) -> None:
        self.plan: Assignment = {key: tuple(assignment[key]) for key in sorted(assignment)}
        self._usable = sorted(usable)
        self._leave = set(leave)
        self._steps = steps_max if steps_max is not None else 2**62
        self._count = {b: (counts or {}).get(b, 0) for b in self._usable}
        self._preferred = {b: (preferred or {}).get(b, 0) for b in self._usable}
        for replicas in self.plan.values():
            self._add(replicas, 1)

    def _add(self, replicas: tuple[int, ...], sign: int) -> None:
        for position, broker_id in enumerate(replicas):
            if broker_id in self._count:
                self._count[broker_id] += sign
                if position == 0:
                    self._preferred[broker_id] += sign

    def _set(self, key: tuple[str, int], replicas: tuple[int, ...]) -> None:
        assert len(set(replicas)) == len(replicas), (key, replicas)
        if self.plan[key]:
            self._steps -= 1
        self._add(self.plan[key], -1)
        self.plan[key] = replicas
        self._add(replicas, 1)

    # -- the steps ----------------------------------------------------------------------------------

    def place(self, key: tuple[str, int], replication: int, fallback: Collection[int] = ()) -> None:
        """Give a new partition its replicas: the emptiest brokers; ``fallback`` only if there are too few."""
        chosen: list[int] = []
        while len(chosen) < replication:
            pool = [b for b in self._usable if b not in chosen] or [b for b in sorted(fallback) if b not in chosen]
            if not pool:
                break
            chosen.append(min(pool, key=lambda b: (self._count.get(b, 0), self._preferred.get(b, 0), b)))
        leaders = [b for b in chosen if b in self._preferred] or chosen
        first = min(leaders, key=lambda b: (self._preferred.get(b, 0), b))
        self.plan.setdefault(key, ())
        self._set(key, (first, *(b for b in chosen if b != first)))

    def place_all(self, new: Mapping[tuple[str, int], int]) -> None:
        """`place` for many, where there are usable brokers enough for each: the same outcome, without a look at every
        broker for every replica."""
        heap = [(self._count[b], self._preferred[b], b) for b in self._usable]
        heapq.heapify(heap)
        for key in sorted(new):
            chosen = [heapq.heappop(heap)[2] for _ in range(new[key])]
            first = min(chosen, key=lambda b: (self._preferred[b], b))
            self.plan[key] = replicas = (first, *(b for b in chosen if b != first))
            self._add(replicas, 1)
            for broker_id in chosen:
                heapq.heappush(heap, (self._count[broker_id], self._preferred[broker_id], broker_id))

    def replace_left(self) -> None:
        """Step 1: off the brokers that must be left, onto the emptiest."""
        for key, replicas in self.plan.items():
            if self._leave.isdisjoint(replicas):
                continue
            for broker_id in replicas:
                if broker_id in self._leave and self._steps > 0:
                    pool = [b for b in self._usable if b not in self.plan[key]]
                    if pool:
                        heir = min(pool, key=lambda b: (self._count[b], self._preferred[b], b))
                        self._swap_in(key, broker_id, heir)

    def balance_replicas(self) -> None:
        """Step 2: one replica at a time from the fullest to the emptiest broker."""
        while len(self._usable) > 1 and self._steps > 0:
            high = max(self._usable, key=lambda b: (self._count[b], self._preferred[b], b))
            low = min(self._usable, key=lambda b: (self._count[b], self._preferred[b], b))
            if self._count[high] - self._count[low] <= 1:
                return
            # high has more partitions than low, so one of them is not on low; which role moves follows the primaries.
            lead = self._preferred[high] > self._preferred[low]
            options = [k for k, r in self.plan.items() if high in r and low not in r]
            if not options:
                return
            self._swap_in(min(options, key=lambda k: ((self.plan[k][0] == high) is not lead, k)), high, low)

    def balance_preferred(self) -> None:
        """Step 3: change who comes first; data moves only where no change of order helps."""
        self._lead_by_usable()
        while len(self._usable) > 1 and self._steps > 0:
            high = max(self._usable, key=lambda b: (self._preferred[b], b))
            low = min(self._usable, key=lambda b: (self._preferred[b], b))
            if self._preferred[high] - self._preferred[low] <= 1:
                return
            if not self._shift(high) and not self._exchange(high, low):
                return

    def _lead_by_usable(self) -> None:
        """A broker that must be left leads nothing if another replica can."""
        for key, replicas in self.plan.items():
            if replicas and replicas[0] in self._leave:
                heirs = [b for b in replicas if b in self._preferred]
                if heirs:
                    self._lead(key, min(heirs, key=lambda b: (self._preferred[b], b)))

    def _shift(self, high: int) -> bool:
        """Hand a preferred primary down a chain high -> ... -> a broker with at least two fewer."""
        edges: dict[int, dict[int, tuple[str, int]]] = {}
        for key, replicas in self.plan.items():
            if len(replicas) > 1 and replicas[0] in self._preferred:
                for broker_id in replicas[1:]:
                    if broker_id in self._preferred:
                        edges.setdefault(replicas[0], {}).setdefault(broker_id, key)
        came: dict[int, int] = {high: high}
        queue = deque([high])
        while queue:
            here = queue.popleft()
            if self._preferred[here] <= self._preferred[high] - 2:
                while here != high:
                    before = came[here]
                    self._lead(edges[before][here], here)
                    here = before
                return True
            for there in sorted(edges.get(here, ())):
                if there not in came:
                    came[there] = here
                    queue.append(there)
        return False

    def _exchange(self, high: int, low: int) -> bool:
        """Swap a preferred primary of high against another replica of low: counts of replicas stay as they are."""
        gives = [k for k, r in self.plan.items() if r and r[0] == high and low not in r]
        takes = [k for k, r in self.plan.items() if low in r[1:] and high not in r]
        if not gives or not takes:
            return False
        self._swap_in(gives[0], high, low)
        self._swap_in(takes[0], low, high)
        return True

    def _lead(self, key: tuple[str, int], broker_id: int) -> None:
        self._set(key, (broker_id, *(b for b in self.plan[key] if b != broker_id)))

    def _swap_in(self, key: tuple[str, int], old: int, new: int) -> None:
        self._set(key, tuple(new if b == old else b for b in self.plan[key]))


def rebalanced(
    assignment: Mapping[tuple[str, int], tuple[int, ...]],
    usable: Collection[int],
    leave: Collection[int] = (),
    *,
    steps_max: int | None = None,
) -> Assignment:
    """The whole cluster, balanced; differs from ``assignment`` only where it must.

    With ``steps_max`` about so many changes towards it, those that matter most first.
    """
    planner = Planner(assignment, usable, leave, steps_max=steps_max)
    planner.replace_left()
    planner.balance_replicas()
    planner.balance_preferred()
    return planner.plan


def is_balanced(
    counts: Mapping[int, int], preferred: Mapping[int, int], usable: Collection[int], leave: Collection[int] = ()
) -> bool:
    """Whether `rebalanced` would change nothing, from the counts alone. False where only a look at all can tell."""
    if any(counts.get(b, 0) for b in leave):
        return False
    spread = [counts.get(b, 0) for b in usable]
    leaders = [preferred.get(b, 0) for b in usable]
    return not spread or (max(spread) - min(spread) <= 1 and max(leaders) - min(leaders) <= 1)


def placed(
    counts: Mapping[int, int],
    preferred: Mapping[int, int],
    new: Mapping[tuple[str, int], int],
    usable: Collection[int],
    fallback: Collection[int] = (),
) -> Assignment:
    """Replicas for new partitions (key -> replication). What exists stays where it is: of it only the counts matter, of
    replicas and of preferred primaries by broker."""
    planner = Planner({}, usable, counts=counts, preferred=preferred)
    if all(replication <= len(usable) for replication in new.values()):
        planner.place_all(new)
    else:
        for key in sorted(new):
            planner.place(key, new[key], fallback)
    planner.balance_replicas()
    planner.balance_preferred()
    return planner.plan
