"""Principals and the policy that is made of them and of the access file. Every refusal names the field and its limits.

What the file declares is the file's: it is not changed here, and goes before a record of the same name. The policy's
revision is durable with each change, and rises with each term too, because the file may be another one by then.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import astuple, fields, replace

from ferryline.protocol.access import (
    GRANTS_MAX,
    KEYS_MAX,
    PRINCIPALS_MAX,
    AccessPolicy,
    Grant,
    PrincipalMeta,
    Quota,
    check_grant,
    check_principal,
)
from ferryline.protocol.errors import (
    Conflict,
    InvalidArgument,
    NotFound,
    PrincipalExists,
    Throttled,
    UnknownPrincipal,
    UnsupportedVersion,
    VersionConflict,
)
from ferryline.protocol.frames import Kind, encode_value
from ferryline.protocol.limits import check_range
from ferryline.protocol.messages import Done
from ferryline_coordinator.core.change import Change
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.events import (
    AccessChanged,
    KeyAdded,
    KeyRemoved,
    PrincipalAltered,
    PrincipalCreated,
    PrincipalDeleted,
    StoredTold,
    Tell,
)
from ferryline_coordinator.core.records import principal_key
from ferryline_coordinator.core.stored import Stored
from ferryline_coordinator.core.tags import check_expected, principal_tag

ACCESS_LEVEL = 2  # feature level of the first release whose brokers know of access
COMMENT_CHARS_MAX = 500
QUOTA_MAX = 2**53  # what JSON carries without loss everywhere


def check_grants(grants: Iterable[Grant], field: str = "grants") -> tuple[Grant, ...]:
    """Grants that make sense, and not too many. Raises InvalidArgument."""
    found = tuple(grants)
    if len(found) > GRANTS_MAX:
        raise InvalidArgument(f"{field}: {len(found)} are over the limit of {GRANTS_MAX}", field=field)
    return tuple(check_grant(grant, f"{field}.{number}") for number, grant in enumerate(found))


def check_quota(quota: Quota, field: str = "quota") -> Quota:
    """A quota without negative numbers. Raises InvalidArgument."""
    for about, value in zip(fields(quota), astuple(quota), strict=True):
        check_range(value, f"{field}.{about.name}", 0, QUOTA_MAX)
    return quota


def check_comment(comment: str) -> str:
    """Short text for people. Raises InvalidArgument."""
    if len(comment) > COMMENT_CHARS_MAX or not comment.isprintable():
        raise InvalidArgument(
            f"comment: expected at most {COMMENT_CHARS_MAX} printable characters, got {len(comment)}", field="comment"
        )
    return comment


class Principals:
    """Carries out commands on principals. A refused one changes nothing."""

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        self._file = config.access
        self._made: tuple[int, AccessPolicy] | None = None  # by the revision it has
        self._stored = Stored()

    def policy(self, change: Change) -> AccessPolicy | None:
        """Who may do what, as of this change; None while access is off."""
        if self._file is None:
            return None
        revision = change.cluster.access_revision
        if self._made is None or self._made[0] != revision:
            declared = {principal.name for principal in self._file.principals}
            stored = tuple(record for record in change.principals() if record.name not in declared)
            principals = (*self._file.principals, *stored)
            policy = replace(self._file, revision=revision, enabled=True, principals=principals)
            self._made = revision, replace(policy, over=self._over(change, policy))
        return self._made[1]

    def check_level(self, feature_level: int) -> None:
        """Raises UnsupportedVersion for a broker that would ask nobody who they are."""
        if self._file is not None and feature_level < ACCESS_LEVEL:
            raise UnsupportedVersion(
                f"feature_level: access is on, which a broker of level {feature_level} knows nothing of; upgrade it"
            )

    def stored(self, change: Change, event: StoredTold) -> None:
        """What a broker holds of whom. Everybody is told who may not write, when that has changed."""
        self._stored.take(event.message.broker_id, event.message.owners)
        policy = self.policy(change)
        if policy is not None and policy.over != self._over(change, policy):
            self._publish(change)
        change.reply(event.reply, Done())

    def _over(self, change: Change, policy: AccessPolicy) -> tuple[tuple[str, int], ...]:
        serving = [record.meta.id for record in change.brokers() if not record.meta.fenced]
        return self._stored.over(policy, serving)

    # -- commands -----------------------------------------------------------------------------------

    def read(self, change: Change, file: AccessPolicy) -> None:
        """The file as it is now. It is never refused: who wrote it may do everything."""
        self._file = file
        self._publish(change)

    def restored(self, change: Change) -> None:
        """Records of principals came back with a backup; while access is off nobody needs to know."""
        if self._file is not None:
            self._publish(change)
            self._check_size(change)

    def create(self, change: Change, event: PrincipalCreated) -> None:
        name = self._free_name(change, event.name)
        if len(change.state.principals) + len(self._declared()) >= PRINCIPALS_MAX:
            raise Throttled(f"the cluster has {PRINCIPALS_MAX} principals", limit=PRINCIPALS_MAX)
        principal = PrincipalMeta(
            name,
            check_grants(event.grants),
            check_quota(event.quota),
            (),
            event.disabled,
            1,
            check_comment(event.comment),
        )
        self._put(change, event.reply, principal)

    def alter(self, change: Change, event: PrincipalAltered) -> None:
        known = self._existing(change, event.name, event.version, event.expected)
        self._put(
            change,
            event.reply,
            replace(
                known,
                grants=known.grants if event.grants is None else check_grants(event.grants),
                quota=known.quota if event.quota is None else check_quota(event.quota),
                disabled=known.disabled if event.disabled is None else event.disabled,
                comment=known.comment if event.comment is None else check_comment(event.comment),
                version=known.version + 1,
            ),
        )

    def delete(self, change: Change, event: PrincipalDeleted) -> None:
        known = self._existing(change, event.name, event.version, event.expected)
        change.delete(principal_key(known.name))
        self._publish(change)
        change.reply(event.reply, known)

    def add_key(self, change: Change, event: KeyAdded) -> None:
        known = self._existing(change, event.name, None, event.expected)
        if len(known.keys) >= KEYS_MAX:
            raise Throttled(f"principal {known.name} has {KEYS_MAX} keys; remove one first", limit=KEYS_MAX)
        if event.key.expires_ms and event.key.expires_ms <= event.key.created_ms:
            raise InvalidArgument(
                f"expires_ms: {event.key.expires_ms} has passed; it is {event.key.created_ms}", field="expires_ms"
            )
        policy = self.policy(change)
        assert policy is not None
        if any(key.id == event.key.id for principal in policy.principals for key in principal.keys):
            raise Conflict(f"there is a key {event.key.id} already; ask again", field="key")
        self._put(change, event.reply, replace(known, keys=(*known.keys, event.key), version=known.version + 1))

    def remove_key(self, change: Change, event: KeyRemoved) -> None:
        known = self._existing(change, event.name, None, event.expected)
        keys = tuple(key for key in known.keys if key.id != event.key_id)
        if len(keys) == len(known.keys):
            raise NotFound(f"principal {known.name} has no key {event.key_id[:40]!r}", field="key")
        self._put(change, event.reply, replace(known, keys=keys, version=known.version + 1))

    # -- inside -------------------------------------------------------------------------------------

    def _declared(self) -> frozenset[str]:
        """Names that the file has taken. Raises Conflict while access is off: what everybody may do then must not hold
        when it is on."""
        if self._file is None:
            raise Conflict("access is off: start the coordinator with --access FILE first")
        return frozenset(principal.name for principal in self._file.principals)

    def _free_name(self, change: Change, given: str) -> str:
        name = check_principal(given, "name")
        if name in self._declared():
            raise PrincipalExists(f"principal {name} is declared in the access file", principal=name)
        if change.principal(name) is not None:
            raise PrincipalExists(f"principal {name} exists", principal=name)
        return name

    def _existing(self, change: Change, given: str, version: int | None, expected: tuple[str, ...]) -> PrincipalMeta:
        name = check_principal(given)
        if name in self._declared():
            raise Conflict(f"principal {name} is declared in the access file; change it there", principal=name)
        known = change.principal(name)
        if known is None:
            raise UnknownPrincipal(f"principal {name} does not exist", principal=name)
        if version is not None and version != known.version:
            raise VersionConflict(
                f"version: principal {name} has {known.version}, not {version}", field="version", version=known.version
            )
        check_expected(principal_tag(known), expected)
        return known

    def _put(self, change: Change, reply: int, principal: PrincipalMeta) -> None:
        """Store it, tell everybody, and answer; unless all of them together would be more than a frame can tell.

        In this order: who has an answer may try at once what it says.
        """
        change.put(principal)
        self._publish(change)
        change.reply(reply, principal)
        self._check_size(change)

    def _check_size(self, change: Change) -> None:
        size, limit = len(encode_value(self.policy(change))), self._config.access_bytes_max
        if size > limit:
            self._made = None  # what is refused was never a policy
            raise Throttled(f"all principals with their grants would take {size} bytes, of {limit}", limit=limit)

    def _publish(self, change: Change) -> None:
        """The policy of this change, to ourselves and to every broker, once it is durable."""
        change.set_cluster(access_revision=change.cluster.access_revision + 1)
        policy = self.policy(change)
        assert policy is not None
        change.add(AccessChanged(policy))
        for record in change.brokers():
            if record.meta.broker_epoch:
                change.add(Tell(record.meta.id, Kind.ACCESS, policy))
