"""Grants and quotas as people write them: `topic:orders.*`, `cluster`, `records=1000,bytes=1MB`. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from ferryline.cli.quantities import UNLIMITED, parse_size, show_size
from ferryline.cli.settings import UsageError
from ferryline.protocol.access import CLUSTER, MANAGE, READ, RESOURCES, WRITE, Grant, Quota, check_grant
from ferryline.protocol.errors import InvalidRequest

HELP = "topic:NAME, group:NAME, exchange:NAME or cluster; a name may end with *"
_SIZES = ("bytes", "stored_bytes")
_QUOTAS = Quota.__struct_fields__


def parse_grants(
    read: Iterable[str] | None, write: Iterable[str] | None, manage: Iterable[str] | None
) -> tuple[Grant, ...]:
    """One grant for each thing that was named, with all actions that were asked for it. Raises UsageError."""
    wanted: dict[tuple[str, str], list[str]] = {}
    for action, given in ((READ, read), (WRITE, write), (MANAGE, manage)):
        for text in given or ():
            for part in text.split(","):
                actions = wanted.setdefault(_thing(part.strip(), action), [])
                if action not in actions:
                    actions.append(action)
    return tuple(_checked(Grant(resource, pattern, tuple(actions))) for (resource, pattern), actions in wanted.items())


def _thing(text: str, action: str) -> tuple[str, str]:
    if text == CLUSTER:
        return CLUSTER, "*"
    resource, colon, pattern = text.partition(":")
    if not colon or not pattern or resource not in RESOURCES:
        raise UsageError(f"--{action} {text!r}: expected {HELP}")
    return resource, pattern


def _checked(grant: Grant) -> Grant:
    try:
        return check_grant(grant)
    except InvalidRequest as error:
        raise UsageError(f"{grant.resource}:{grant.pattern}: {error.message}") from None


def show_grant(grant: Grant) -> str:
    """`read+write topic:orders.*`."""
    where = CLUSTER if grant.resource == CLUSTER else f"{grant.resource}:{grant.pattern}"
    return f"{'+'.join(grant.actions)} {where}"


def parse_quota(text: str, present: Quota | None = None) -> Quota:
    """`records=1000,bytes=1MB`: what is not named stays as it is in ``present``; `unlimited` or 0 lifts a limit.
    Raises UsageError."""
    values = {name: getattr(present or Quota(), name) for name in _QUOTAS}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in _QUOTAS:
            raise UsageError(f"--quota {part.strip()!r}: expected NAME=NUMBER, with NAME one of {', '.join(_QUOTAS)}")
        values[name] = max(0, _amount(name, value))
    return Quota(**values)


def _amount(name: str, value: str) -> int:
    if name in _SIZES:
        return parse_size(value)
    if value == "unlimited":
        return UNLIMITED
    if not value.isascii() or not value.isdigit() or len(value) > 15:
        raise UsageError(f"--quota {name}={value!r}: not a whole number")
    return int(value)


def show_quota(quota: Quota) -> str:
    """`records=1000/s, bytes=1 MiB/s`; empty without a limit."""
    shown = []
    for name in _QUOTAS:
        if amount := getattr(quota, name):
            per = "/s" if name in ("requests", "records", "bytes") else ""
            shown.append(f"{name}={show_size(amount) if name in _SIZES else amount}{per}")
    return ", ".join(shown)
