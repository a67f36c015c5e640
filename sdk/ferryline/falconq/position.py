"""Where a FalconQ consumer stands, and what its next call means. Pure.

A call says "I have processed the last answer". The plain form says it without proof, so a call that is repeated because
its answer was lost skips that answer, unless the gateway saw that the answer could not be written. With ``ack`` a call
names the answer it means, and a repeated call gets the same answer again::

    answer out    ack                             means
    ----------    -----------------------------   ------------------------------------------------------
    yes           none, and it was written        processed: settle it, the next one
    yes           none, and it was not written    the same again
    yes           its token                       processed: settle it, the next one
    yes           "" or the token before it       the answer did not arrive: the same again
    no            none, "" or the last token      the next one
    any           another one                     refused: settling would skip, repeating would repeat
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec

from ferryline.protocol.errors import Conflict

ALL = -1  # the scope of calls without a partition


class HeldLease(msgspec.Struct, frozen=True):
    """Records of one partition that were leased together, or some of them."""

    partition: int
    epoch: int
    number: int
    receipt: bytes
    offsets: list[int]


class Position(msgspec.Struct, frozen=True):
    """One consumer in one scope: a partition, or all of them.

    ``processed``: token of the last answer that was processed, "" before the first. ``token`` names the answer that is
    out, "" if there is none; then ``leases`` and ``messages`` are empty.
    """

    topic_id: str
    topic: str
    consumer: str
    scope: int = ALL
    processed: str = ""
    token: str = ""
    leases: list[HeldLease] = []
    messages: list[dict[str, Any]] = []

    @property
    def member(self) -> str:
        return "falconq" if self.scope == ALL else f"falconq/{self.scope}"

    def repeats(self, ack: str | None, written: bool) -> bool:
        """Whether a call gets the answer that is out once more. Raises Conflict for a token that names neither."""
        if ack is None:
            return bool(self.token) and not written
        if self.token and ack == self.token:
            return False
        if ack in ("", self.processed):
            return bool(self.token)
        known = self.token or self.processed
        raise Conflict(
            f"ack: {ack[:64]!r} is not the last answer of this consumer, which is {known!r}; an empty ack asks for it "
            "again, none at all for the next one",
            field="ack",
            last=known,
        )

    def passed(self) -> Position:
        """The answer that was out is settled."""
        return msgspec.structs.replace(self, processed=self.token or self.processed, token="", leases=[], messages=[])

    def answering(self, leases: list[HeldLease], messages: list[dict[str, Any]]) -> Position:
        """These messages are the next answer. Only after `passed`."""
        assert not self.token, "an answer is out already"
        if not leases:
            return self
        return msgspec.structs.replace(self, token=token_of(leases), leases=leases, messages=messages)


def token_of(leases: Iterable[HeldLease]) -> str:
    """A name for an answer: no two answers hold the same leases."""
    named = ";".join(f"{lease.partition}.{lease.epoch}.{lease.number}" for lease in leases)
    return hashlib.blake2b(named.encode(), digest_size=8).hexdigest()
