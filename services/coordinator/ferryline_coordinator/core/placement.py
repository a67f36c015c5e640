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

from collections import deque
from collections.abc import Collection, Mapping

Assignment = dict[tuple[str, int], tuple[int, ...]]


class Planner:
    """One planning run. ``movable`` limits which partitions may change (placing a new topic moves no old data)."""

    def __init__(
        self,
        assignment: Mapping[tuple[str, int], tuple[int, ...]],
        usable: Collection[int],
        leave: Collection[int] = (),
        movable: Collection[tuple[str, int]] | None = None,
    ) -> None:
        self.plan: Assignment = {key: tuple(assignment[key]) for key in sorted(assignment)}
        self._usable = sorted(usable)
        self._leave = set(leave)
        self._movable = set(self.plan if movable is None else movable)
        self._count = dict.fromkeys(self._usable, 0)
        self._preferred = dict.fromkeys(self._usable, 0)
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
        self._movable.add(key)
        self._set(key, (first, *(b for b in chosen if b != first)))

    def replace_left(self) -> None:
        """Step 1: off the brokers that must be left, onto the emptiest."""
        for key, replicas in self.plan.items():
            for broker_id in replicas:
                if broker_id in self._leave and key in self._movable:
                    pool = [b for b in self._usable if b not in self.plan[key]]
                    if pool:
                        heir = min(pool, key=lambda b: (self._count[b], self._preferred[b], b))
                        self._swap_in(key, broker_id, heir)

    def balance_replicas(self) -> None:
        """Step 2: one replica at a time from the fullest to the emptiest broker."""
        while len(self._usable) > 1:
            high = max(self._usable, key=lambda b: (self._count[b], self._preferred[b], b))
            low = min(self._usable, key=lambda b: (self._count[b], self._preferred[b], b))
            if self._count[high] - self._count[low] <= 1:
                return
            # high has more partitions than low, so one of them is not on low; which role moves follows the primaries.
            lead = self._preferred[high] > self._preferred[low]
            options = [k for k, r in self.plan.items() if high in r and low not in r and k in self._movable]
            if not options:
                return
            self._swap_in(min(options, key=lambda k: ((self.plan[k][0] == high) is not lead, k)), high, low)

    def balance_preferred(self) -> None:
        """Step 3: change who comes first; data moves only where no change of order helps."""
        self._lead_by_usable()
        while len(self._usable) > 1:
            high = max(self._usable, key=lambda b: (self._preferred[b], b))
            low = min(self._usable, key=lambda b: (self._preferred[b], b))
            if self._preferred[high] - self._preferred[low] <= 1:
                return
            if not self._shift(high) and not self._exchange(high, low):
                return

    def _lead_by_usable(self) -> None:
        """A broker that must be left leads nothing if another replica can."""
        for key, replicas in self.plan.items():
            if replicas and replicas[0] in self._leave and key in self._movable:
                heirs = [b for b in replicas if b in self._preferred]
                if heirs:
                    self._lead(key, min(heirs, key=lambda b: (self._preferred[b], b)))

    def _shift(self, high: int) -> bool:
        """Hand a preferred primary down a chain high -> ... -> a broker with at least two fewer."""
        edges: dict[int, dict[int, tuple[str, int]]] = {}
        for key, replicas in self.plan.items():
            if len(replicas) > 1 and replicas[0] in self._preferred and key in self._movable:
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
        gives = [k for k, r in self.plan.items() if r and r[0] == high and low not in r and k in self._movable]
        takes = [k for k, r in self.plan.items() if low in r[1:] and high not in r and k in self._movable]
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
    assignment: Mapping[tuple[str, int], tuple[int, ...]], usable: Collection[int], leave: Collection[int] = ()
) -> Assignment:
    """The whole cluster, balanced; differs from ``assignment`` only where it must."""
    planner = Planner(assignment, usable, leave)
    planner.replace_left()
    planner.balance_replicas()
    planner.balance_preferred()
    return planner.plan


def placed(
    assignment: Mapping[tuple[str, int], tuple[int, ...]],
    new: Mapping[tuple[str, int], int],
    usable: Collection[int],
    fallback: Collection[int] = (),
) -> Assignment:
    """Replicas for new partitions (key -> replication); what exists stays where it is. Returns the new ones only."""
    planner = Planner(assignment, usable, movable=())
    for key in sorted(new):
        planner.place(key, new[key], fallback)
    planner.balance_replicas()
    planner.balance_preferred()
    return {key: planner.plan[key] for key in sorted(new)}
