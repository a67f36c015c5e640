"""Receipts: the MAC that names a lease, and the text by which REST names one record of it.

The MAC is over the lease, not over the record: which records a lease holds, the core knows.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode

import msgspec

from ferryline.protocol.frames import encode_value
from ferryline.protocol.limits import OFFSET_MAX
from ferryline.protocol.queue_messages import Delivery, SettleEntry

_RECEIPT_BYTES = 16
_INT_MAX = 2**63 - 1


def receipt(key: bytes, group: str, member: str, lease: Delivery | SettleEntry) -> bytes:
    """The MAC that names a lease of a member. MessagePack is injective here: no field can leak into another."""
    named = encode_value(("lease", group, member, lease.topic_id, lease.partition, lease.epoch, lease.lease))
    return hmac.digest(key, named, hashlib.sha256)[:_RECEIPT_BYTES]


class Named(msgspec.Struct, array_like=True, frozen=True):
    """What the text of a receipt says. Nothing of it is proven before the MAC is checked."""

    topic_id: str
    partition: int
    epoch: int
    number: int
    mac: bytes
    member: str
    offset: int

    @property
    def lease(self) -> tuple[str, int, int, int, bytes]:
        return (self.topic_id, self.partition, self.epoch, self.number, self.mac)


_decode = msgspec.msgpack.Decoder(Named).decode


def receipt_of(delivery: Delivery, member: str, offset: int) -> str:
    """One record of a delivery, as text for URLs and JSON."""
    named = Named(
        delivery.topic_id, delivery.partition, delivery.epoch, delivery.lease, delivery.receipt, member, offset
    )
    return urlsafe_b64encode(encode_value(named)).decode().rstrip("=")


def named_by(text: str) -> Named | None:
    """The reverse; None for what never was a receipt."""
    try:
        named = _decode(urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4)))
    except (ValueError, binascii.Error, msgspec.DecodeError):  # text beyond ASCII is a ValueError, too
        return None
    numbers = (named.partition, named.epoch, named.number)
    if not 0 <= named.offset <= OFFSET_MAX or not all(0 <= number <= _INT_MAX for number in numbers):
        return None
    return named
