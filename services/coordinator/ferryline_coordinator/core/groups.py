"""Consumer groups: who reads which partition (queues.md, section 2).

A heartbeat says what a member is subscribed to and what it holds; the answer says what it should hold. Joining is the
first heartbeat. Assignment is incremental: nobody loses a partition that balance does not need, and the spread is at
most one among members that want the same topics.

*Revoke, then grant*: a partition goes to another member only after its owner left it out of a heartbeat that it sent
knowing of the revocation, or after the owner's session ended. Each grant has a higher generation, which is durable
before anybody hears of it; primaries let the highest claim win.

Members and owners are durable, sessions are not: after a restart every member has a full session to be heard again.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ferryline.protocol.errors import Conflict, InvalidArgument, Throttled, UnknownGroup, UnknownMember, UnknownTopic
from ferryline.protocol.limits import GROUP_PARTITIONS_MAX, check_name, check_range
from ferryline.protocol.messages import GroupAssignment, GroupHeartbeat, GroupPartition
from ferryline_coordinator.core.assignment import assign
from ferryline_coordinator.core.change import Change
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.events import GroupDeleted, GroupHeartbeatReceived
from ferryline_coordinator.core.records import GroupMember, GroupOwners, GroupRecord, group_key, owners_key
from ferryline_coordinator.core.state import CoordinatorState, Key
from ferryline_service.claims import claim_token

GROUP_TOPICS_MAX = 1_000
LEFT_MAX = 1_000  # members that left and are remembered, so that their late heartbeats do not bring them back


class Session(msgspec.Struct):
    """What is known of a member while it is heard. ``sequence`` of its latest heartbeat, -1 before the first."""

    heard_ms: int
    sequence: int = -1
    told: dict[Key, int] = {}  # partition to give up -> sequence of the heartbeat that was answered so


class Group(msgspec.Struct):
    """Soft state of one group: its sessions, and the assignment it moves towards."""

    name: str
    sessions: dict[str, Session]
    target: dict[Key, str]
    stale: bool = True  # members or topics changed since ``target`` was worked out
    unsettled: bool = False  # partitions still change hands
    left: dict[str, int] = {}  # members that left, lately -> sequence they left with


class Groups:
    """All groups of the cluster. Members and owners are read from the records; sessions live here."""

    def __init__(self, config: CoreConfig, state: CoordinatorState) -> None:
        self._config = config
        self._state = state
        self._groups: dict[str, Group] = {}
        self._due_ms: int | None = None  # not after the end of any session; heartbeats only make it too early

    def load(self, now_ms: int) -> None:
        """Everybody the store names gets a full session."""
        for name in sorted(self._state.groups):
            members = self._state.groups[name].members
            self._groups[name] = Group(name, {m.member: Session(now_ms) for m in members}, {})
        self._due_ms = now_ms

    def grace(self, now_ms: int) -> None:
        """The coordinator itself was away: nobody can be blamed for the silence."""
        for group in self._groups.values():
            for session in group.sessions.values():
                session.heard_ms = now_ms

    def topics_changed(self) -> None:
        for group in self._groups.values():
            group.stale = True
        if self._groups:
            self._due_ms = 0

    def members(self) -> int:
        return sum(len(group.sessions) for group in self._groups.values())

    def session_of(self, group: str, member: str) -> Session | None:
        found = self._groups.get(group)
        return found.sessions.get(member) if found is not None else None

    def unsettled(self, group: str) -> bool:
        found = self._groups.get(group)
        return found is not None and found.unsettled

    # -- heartbeats ---------------------------------------------------------------------------------

    def heartbeat(self, change: Change, event: GroupHeartbeatReceived) -> None:
        message = self._checked(event.message)
        group = self._groups.get(message.group)
        if group is None:
            if len(self._groups) >= self._config.groups_max:
                raise Throttled(f"the cluster has {self._config.groups_max} groups", limit=self._config.groups_max)
            group = Group(message.group, {}, {})
        session = group.sessions.get(message.member)
        if message.leave:
            if session is not None:
                self._remove(change, group, [message.member])
                self._settle(change, group)
                group.left[message.member] = message.sequence
                while len(group.left) > LEFT_MAX:
                    del group.left[next(iter(group.left))]
            change.reply(event.reply, GroupAssignment(message.member, [], [], self._config.group_heartbeat_ms))
            return
        if session is None:
            session = self._join(change, group, message)
        elif message.sequence and message.sequence <= session.sequence:
            # Overtaken by a later heartbeat of the same member: it changes nothing, and blames nobody.
            change.reply(event.reply, self._answer(change, group, message, session))
            return
        session.heard_ms, session.sequence = change.now_ms, max(message.sequence, session.sequence)
        self._subscribe(change, group, message)
        self._release(change, group, message, session)
        self._settle(change, group)
        change.reply(event.reply, self._answer(change, group, message, session))

    def _checked(self, message: GroupHeartbeat) -> GroupHeartbeat:
        check_name(message.group, "group")
        check_name(message.member, "member")
        if message.instance_id:
            check_name(message.instance_id, "instance_id")
        check_range(message.session_ms, "session_ms", self._config.session_ms_min, self._config.session_ms_max)
        if message.leave:
            return message
        if not 1 <= len(message.topics) <= GROUP_TOPICS_MAX:
            raise InvalidArgument(f"topics: {len(message.topics)} is outside 1..{GROUP_TOPICS_MAX}", field="topics")
        for topic in message.topics:
            check_name(topic)
        if len(message.owned) > GROUP_PARTITIONS_MAX:
            raise InvalidArgument(f"owned: {len(message.owned)} are over {GROUP_PARTITIONS_MAX}", field="owned")
        return message

    def _join(self, change: Change, group: Group, message: GroupHeartbeat) -> Session:
        if message.sequence and message.sequence <= group.left.get(message.member, 0):
            raise UnknownMember(f"member {message.member} has left group {group.name}")
        for name in message.topics:
            if change.topic(name) is None:
                raise UnknownTopic(f"topic {name} does not exist", topic=name)
        if message.owned and self._was_replaced(change, message):
            raise UnknownMember(
                f"member {message.member} holds partitions of group {message.group} that others own now"
            )
        if len(group.sessions) >= self._config.members_max:
            raise Throttled(f"group {group.name} has {self._config.members_max} members")
        session = Session(change.now_ms)
        former = self._former(change, group, message)
        if former is not None:
            self._take_over(change, group, former, message.member)
        group.sessions[message.member] = session
        ends_ms = change.now_ms + message.session_ms
        self._due_ms = ends_ms if self._due_ms is None else min(self._due_ms, ends_ms)
        self._groups[group.name] = group
        group.stale = True
        return session

    def _was_replaced(self, change: Change, message: GroupHeartbeat) -> bool:
        """It was a member until its session ended. It begins anew, with nothing."""
        for held in message.owned:
            owners = change.owners(message.group, held.topic_id)
            if owners is None or held.partition >= len(owners.owners):
                continue
            if owners.generations[held.partition] >= held.generation and owners.owners[held.partition]:
                return True
        return False

    def _former(self, change: Change, group: Group, message: GroupHeartbeat) -> str | None:
        """The member that this one continues: same static instance, another life."""
        if not message.instance_id:
            return None
        for known in self._record(change, group.name).members:
            if known.instance_id == message.instance_id and known.member != message.member:
                return known.member
        return None

    def _take_over(self, change: Change, group: Group, former: str, member: str) -> None:
        """A static member came back: what it held is granted to its new life; its old one is fenced by generation."""
        for owners in self._all_owners(change, group.name):
            if former in owners.owners:
                change.put(
                    GroupOwners(
                        group.name,
                        owners.topic_id,
                        tuple(member if owner == former else owner for owner in owners.owners),
                        tuple(g + (o == former) for o, g in zip(owners.owners, owners.generations, strict=True)),
                    )
                )
        record = self._record(change, group.name)
        change.put(GroupRecord(group.name, tuple(m for m in record.members if m.member != former)))
        group.sessions.pop(former, None)

    def _subscribe(self, change: Change, group: Group, message: GroupHeartbeat) -> None:
        """Make durable who the member is and what it wants, if that changed."""
        topics = tuple(sorted(set(message.topics)))
        mine = GroupMember(message.member, topics, message.instance_id, message.session_ms)
        record = self._record(change, group.name)
        known = next((m for m in record.members if m.member == message.member), None)
        if known == mine:
            return
        others = tuple(m for m in record.members if m.member != message.member)
        change.put(GroupRecord(group.name, tuple(sorted((*others, mine), key=lambda m: m.member))))
        if known is None or known.topics != topics:
            group.stale = True

    def _release(self, change: Change, group: Group, message: GroupHeartbeat, session: Session) -> None:
        """What it was told to give up and no longer holds is free, if it knew of it when it sent this."""
        held = {(p.topic_id, p.partition) for p in message.owned}
        freed = [
            key
            for key, told in sorted(session.told.items())
            if key not in held and (message.sequence > told or not message.sequence)
        ]
        for key in freed:
            del session.told[key]
        self._grant(change, group, dict.fromkeys(freed, ""))

    # -- assignment ---------------------------------------------------------------------------------

    def _settle(self, change: Change, group: Group) -> None:
        """Bring owners and target together as far as may be now."""
        if group.stale:
            group.target = self._target(change, group)
            group.stale = False
        pending = False
        for owners in self._all_owners(change, group.name):
            topic = change.state.topics.get(owners.topic_id)
            if topic is None or change.topic(topic.name) is None:
                change.delete(owners_key(group.name, owners.topic_id))
        grants: dict[Key, str] = {}
        for key, wanted in group.target.items():
            owner = self._owner(change, group, key)
            if owner == wanted:
                session = group.sessions.get(owner)
                if session is not None:
                    session.told.pop(key, None)
            elif owner and owner in group.sessions:
                pending = True
            else:
                grants[key] = wanted
        for owners in self._all_owners(change, group.name):
            for number, owner in enumerate(owners.owners):
                key = (owners.topic_id, number)
                if owner and key not in group.target:
                    if owner in group.sessions:
                        pending = True
                    else:
                        grants[key] = ""
        self._grant(change, group, grants)
        group.unsettled = pending

    def _target(self, change: Change, group: Group) -> dict[Key, str]:
        """The balanced assignment nearest to what is held now."""
        wants: dict[str, set[str]] = {}
        partitions: dict[str, int] = {}
        for member in self._record(change, group.name).members:
            if member.member not in group.sessions:
                continue
            for name in member.topics:
                topic = change.topic(name)
                if topic is not None:
                    wants.setdefault(member.member, set()).add(topic.id)
                    partitions[topic.id] = topic.config.partitions
        current = {}
        for topic_id in sorted(partitions):
            for number in range(partitions[topic_id]):
                owner = self._owner(change, group, (topic_id, number))
                if owner:
                    current[(topic_id, number)] = owner
        return assign(partitions, wants, current)

    def _answer(self, change: Change, group: Group, message: GroupHeartbeat, session: Session) -> GroupAssignment:
        member, claim_key = message.member, change.cluster.claim_key
        assigned, revoked = [], []
        for owners in self._all_owners(change, group.name):
            if member not in owners.owners:
                continue
            for number, owner in enumerate(owners.owners):
                if owner != member:
                    continue
                key = (owners.topic_id, number)
                generation = owners.generations[number]
                if group.target.get(key) == member:
                    token = claim_token(claim_key, group.name, key[0], number, member, generation)
                    assigned.append(GroupPartition(key[0], number, generation, token))
                else:
                    # An overtaken heartbeat is answered too, but what was sent before it cannot know the answer.
                    session.told.setdefault(key, max(message.sequence, session.sequence))
                    revoked.append(GroupPartition(key[0], number, generation))
        mine = {(p.topic_id, p.partition) for p in assigned} | {(p.topic_id, p.partition) for p in revoked}
        revoked.extend(
            GroupPartition(p.topic_id, p.partition, p.generation)
            for p in message.owned
            if (p.topic_id, p.partition) not in mine
        )
        return GroupAssignment(
            member,
            assigned,
            revoked,
            self._interval(group, message),
            change.coord_epoch,
            message.sequence,
        )

    def _interval(self, group: Group, message: GroupHeartbeat) -> int:
        interval = self._config.group_unsettled_ms if group.unsettled else self._config.group_heartbeat_ms
        return max(50, min(interval, message.session_ms // 3))

    # -- leaving, time, deletion --------------------------------------------------------------------

    def expire(self, change: Change) -> None:
        """End sessions that were silent for too long, and settle groups whose topics changed."""
        if self._due_ms is None or change.now_ms < self._due_ms:
            return
        self._due_ms = None
        for name in sorted(self._groups):
            group = self._groups[name]
            spans = {m.member: m.session_ms for m in self._record(change, name).members}
            over = [
                member
                for member, session in sorted(group.sessions.items())
                if change.now_ms >= session.heard_ms + spans.get(member, 0)
            ]
            if over:
                self._remove(change, group, over)
                change.note("group_sessions_ended", group=name, members=over)
            if over or group.stale:
                self._settle(change, group)
            ends = [session.heard_ms + spans.get(member, 0) for member, session in group.sessions.items()]
            if ends:
                self._due_ms = min(ends) if self._due_ms is None else min(self._due_ms, *ends)

    def _remove(self, change: Change, group: Group, members: list[str]) -> None:
        for member in members:
            group.sessions.pop(member, None)
        record = self._record(change, group.name)
        change.put(GroupRecord(group.name, tuple(m for m in record.members if m.member not in members)))
        group.stale = True

    def delete(self, change: Change, event: GroupDeleted) -> None:
        check_name(event.group, "group")
        record = self._state.groups.get(event.group)
        if record is None:
            raise UnknownGroup(f"group {event.group} does not exist", group=event.group)
        group = self._groups.get(event.group)
        if group is not None and group.sessions:
            raise Conflict(f"group {event.group} has {len(group.sessions)} members", members=len(group.sessions))
        floor = change.cluster.generation_floor
        for owners in self._all_owners(change, event.group):
            floor = max(floor, *owners.generations)
            change.delete(owners_key(event.group, owners.topic_id))
        change.delete(group_key(event.group))
        change.set_cluster(generation_floor=floor)
        self._groups.pop(event.group, None)
        change.reply(event.reply, record)

    def next_deadline_ms(self) -> int | None:
        return self._due_ms

    # -- records ------------------------------------------------------------------------------------

    def _record(self, change: Change, name: str) -> GroupRecord:
        return change.group(name) or GroupRecord(name)

    def _all_owners(self, change: Change, name: str) -> list[GroupOwners]:
        return change.owners_of(name)

    def _owner(self, change: Change, group: Group, key: Key) -> str:
        owners = change.owners(group.name, key[0])
        return owners.owners[key[1]] if owners is not None and key[1] < len(owners.owners) else ""

    def _grant(self, change: Change, group: Group, grants: Mapping[Key, str]) -> None:
        """Give free partitions away (each a new generation), or set them free (""; the generation stays)."""
        by_topic: dict[str, dict[int, str]] = {}
        for (topic_id, number), member in grants.items():
            by_topic.setdefault(topic_id, {})[number] = member
        for topic_id in sorted(by_topic):
            known = change.owners(group.name, topic_id)
            owners = list(known.owners) if known is not None else []
            generations = list(known.generations) if known is not None else []
            missing = max(by_topic[topic_id]) + 1 - len(owners)
            owners.extend([""] * missing)
            generations.extend([0] * missing)
            floor = change.cluster.generation_floor
            for number, member in by_topic[topic_id].items():
                owners[number] = member
                if member:
                    generations[number] = max(generations[number], floor) + 1
            change.put(GroupOwners(group.name, topic_id, tuple(owners), tuple(generations)))
