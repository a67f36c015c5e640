"""Which member of a group should hold which partition: balanced, with as few moves as that needs. Pure.

Promises: every partition of a topic that somebody wants has exactly one owner who wants it; among members that want the
same topics the spread is at most one; an assignment that is balanced already comes back unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

Key = tuple[str, int]


def assign(partitions: Mapping[str, int], wants: Mapping[str, Set[str]], current: Mapping[Key, str]) -> dict[Key, str]:
    """``partitions``: count by topic; ``wants``: topics by member; ``current``: what is held now."""
    able: dict[str, list[str]] = {topic: [] for topic in sorted(partitions)}
    for member in sorted(wants):
        for topic in sorted(wants[member]):
            if topic in able:
                able[topic].append(member)
    load = dict.fromkeys(sorted(wants), 0)
    owned: dict[Key, str] = {}
    free: list[Key] = []
    for topic, members in able.items():
        eligible = set(members)
        for number in range(partitions[topic]):
            owner = current.get((topic, number), "")
            if owner in eligible:
                owned[(topic, number)] = owner
                load[owner] += 1
            elif members:
                free.append((topic, number))
    # Topics that few members want first: they have the least choice.
    free.sort(key=lambda key: (len(able[key[0]]), key))
    for key in free:
        owner = min(able[key[0]], key=lambda member: (load[member], member))
        owned[key] = owner
        load[owner] += 1
    _level(owned, able, load)
    return {key: owned[key] for key in sorted(owned)}


def _level(owned: dict[Key, str], able: Mapping[str, list[str]], load: dict[str, int]) -> None:
    """Move single partitions from a member to one with at least two fewer, until nothing moves.

    Every step lowers the sum of the squared loads, so it ends.
    """
    held: dict[str, list[Key]] = {member: [] for member in load}
    for key in sorted(owned, reverse=True):
        held[owned[key]].append(key)
    while True:
        step = _step(held, able, load)
        if step is None:
            return
        key, giver, taker = step
        held[giver].remove(key)
        held[taker].append(key)
        owned[key] = taker
        load[giver] -= 1
        load[taker] += 1


def _step(
    held: Mapping[str, list[Key]], able: Mapping[str, list[str]], load: Mapping[str, int]
) -> tuple[Key, str, str] | None:
    lowest = min(load.values(), default=0)
    emptiest: dict[str, str] = {}  # topic -> its least loaded member; each is looked for once
    for giver in sorted(load, key=lambda member: (-load[member], member)):
        if load[giver] - lowest < 2:
            return None
        best: tuple[int, str, Key] | None = None
        seen: set[str] = set()
        for key in held[giver]:
            topic = key[0]
            if topic in seen:
                continue
            seen.add(topic)
            taker = emptiest.get(topic)
            if taker is None:
                taker = emptiest[topic] = min(able[topic], key=lambda member: (load[member], member))
            if load[taker] <= load[giver] - 2 and (best is None or (load[taker], taker) < best[:2]):
                best = (load[taker], taker, key)
        if best is not None:
            return best[2], giver, best[1]
    return None
