"""The token by which a group member proves to a primary that the coordinator gave it a partition.

The coordinator makes it, every broker checks it with the same function and the cluster's claim key, so that a primary
calls nobody back.
"""

from __future__ import annotations

import hashlib
import hmac

from ferryline.protocol.frames import encode_value

CLAIM_KEY_BYTES = 32


def claim_token(claim_key: bytes, group: str, topic_id: str, partition: int, member: str, generation: int) -> bytes:
    """HMAC-SHA256 over all that is claimed. MessagePack is injective here: no field can leak into another."""
    claimed = encode_value((group, topic_id, partition, member, generation))
    return hmac.new(claim_key, claimed, hashlib.sha256).digest()


def claim_token_valid(
    token: bytes, claim_key: bytes, group: str, topic_id: str, partition: int, member: str, generation: int
) -> bool:
    """Compares in constant time."""
    return hmac.compare_digest(token, claim_token(claim_key, group, topic_id, partition, member, generation))
