"""Whoever asks something, as a service knows them once their token or certificate was checked. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ferryline.protocol.access import Grant, Quota
from ferryline.protocol.errors import Forbidden

SERVICE, EVERYBODY = "service", "everybody"
NAME_CHARS_MAX = 200  # of whatever exists; what is asked of longer ones is not remembered


class Caller:
    """One principal, compiled for deciding often: answers are remembered, for as many names as one may ask about.

    ``service``: a node of the cluster, or anybody while access is off: everything is allowed. ``expires_ms``: wall
    clock time at which the token ends, 0 for never. ``key_id``: of the API key that was shown, "" for other tokens.
    ``verified``: what the JWT said that was shown, None for other tokens. ``limited``: there is some quota.
    """

    __slots__ = (
        "_answers",
        "expires_ms",
        "grants",
        "key_id",
        "limited",
        "name",
        "quota",
        "service",
        "verified",
    )

    def __init__(
        self,
        name: str,
        grants: Iterable[Grant] = (),
        quota: Quota | None = None,
        *,
        service: bool = False,
        expires_ms: int = 0,
        key_id: str = "",
        verified: Any = None,
    ) -> None:
        self.name = name
        self.quota = quota or Quota()
        self.limited = self.quota != Quota()
        self.service = service
        self.expires_ms = expires_ms
        self.key_id = key_id
        self.verified = verified
        self.grants = tuple(grants)
        self._answers: dict[tuple[str, str, str], bool] = {}

    @property
    def owner(self) -> str:
        """As whose a topic counts that this one creates: nobody's while access is off."""
        return "" if self.service else self.name

    def may(self, action: str, resource: str, name: str) -> bool:
        """Whether some grant allows it."""
        if self.service:
            return True
        asked = (action, resource, name)
        answer = self._answers.get(asked)
        if answer is None:
            answer = any(grant.allows(action, resource, name) for grant in self.grants)
            if len(name) <= NAME_CHARS_MAX:
                if len(self._answers) >= 10_000:  # names come from outside, and some before anybody looked at them
                    self._answers.clear()
                self._answers[asked] = answer
        return answer

    def check(self, action: str, resource: str, name: str) -> None:
        """Raises Forbidden, naming who, what and on what."""
        if not self.may(action, resource, name):
            raise Forbidden(
                f"{self.name or 'nobody'} may not {action} {resource} {name[:200]}",
                principal=self.name,
                action=action,
                resource=resource,
                name=name[:200],
            )


# While access is off everybody is this one; nodes are one of their own each, by the name of their certificate.
UNCHECKED = Caller(EVERYBODY, service=True)
# Whoever was not asked who they are, or has no right to be here any more. Nothing is granted to it.
NOBODY = Caller("")
