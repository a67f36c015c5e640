"""Requests of etcd's key-value service as JSON, and what is read from its answers."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import msgspec

from ferryline_coordinator.store.etcd_client import number, raw, text
from ferryline_coordinator.store.interface import StoreUnusable

Json = dict[str, Any]
_PLAIN, _PACKED, _SEALED = b"\x00", b"\x01", b"\x02"
_PACK_FROM_BYTES = 4_096  # lists of owners and members repeat themselves


class KeyValue(msgspec.Struct, frozen=True):
    """One key as etcd has it."""

    key: str
    value: bytes
    created: int  # create revision
    modified: int  # mod revision
    lease: int = 0


def put(key: str, value: bytes, lease: int = 0) -> Json:
    body: Json = {"key": text(key), "value": text(value)}
    if lease:
        body["lease"] = str(lease)
    return {"request_put": body}


def delete(key: str) -> Json:
    return {"request_delete_range": {"key": text(key)}}


def delete_below(prefix: str) -> Json:
    return {"request_delete_range": {"key": text(prefix), "range_end": text(after(prefix))}}


def get(key: str) -> Json:
    return {"request_range": {"key": text(key)}}


def created_at(key: str, revision: int) -> Json:
    """Guard: the key was created at ``revision``; 0: it does not exist."""
    return {"key": text(key), "target": "CREATE", "result": "EQUAL", "create_revision": str(revision)}


def modified_at(key: str, revision: int) -> Json:
    """Guard: the last write of the key was at ``revision``; 0: it does not exist."""
    return {"key": text(key), "target": "MOD", "result": "EQUAL", "mod_revision": str(revision)}


def after(prefix: str) -> bytes:
    """The first key that does not begin with ``prefix``. Prefixes of ours end with a slash."""
    encoded = bytearray(prefix.encode())
    encoded[-1] += 1
    return bytes(encoded)


def found(answer: Json) -> list[KeyValue]:
    """Keys of a range answer. Raises StoreUnusable when it is none."""
    kvs = answer.get("kvs", [])
    if not isinstance(kvs, list) or not all(isinstance(kv, dict) for kv in kvs):
        raise StoreUnusable("etcd: the answer to a range holds no keys")
    return [
        KeyValue(
            raw(kv.get("key")).decode("utf-8", "replace"),
            raw(kv.get("value")),
            number(kv.get("create_revision")),
            number(kv.get("mod_revision")),
            number(kv.get("lease")),
        )
        for kv in kvs
    ]


def ranges(answer: Json) -> list[list[KeyValue]]:
    """Keys of each range of a transaction, in order."""
    responses = answer.get("responses", [])
    if not isinstance(responses, list):
        raise StoreUnusable("etcd: the answer to a transaction holds no responses")
    return [found(entry["response_range"]) for entry in responses if "response_range" in entry]


def revision_of(answer: Json) -> int:
    header = answer.get("header")
    revision = number(header.get("revision")) if isinstance(header, dict) else 0
    if revision <= 0:
        raise StoreUnusable("etcd: an answer names no revision")
    return revision


class Values:
    """What stands in etcd for a record: one byte that says how, then the record.

    Large ones are compressed. Those for which ``secret`` holds are sealed: etcd never sees them in the clear.
    """

    def __init__(
        self,
        secret: Callable[[str], bool] | None = None,
        seal: Callable[[bytes, str], bytes] | None = None,
        unseal: Callable[[bytes, str], bytes] | None = None,
    ) -> None:
        self._secret, self._seal, self._unseal = secret, seal, unseal

    def wrap(self, key: str, value: bytes) -> bytes:
        if self._seal is not None and self._secret is not None and self._secret(key):
            return _SEALED + self._seal(value, key)
        if len(value) >= _PACK_FROM_BYTES:
            packed = zlib.compress(value, 1)
            if len(packed) < len(value):
                return _PACKED + packed
        return _PLAIN + value

    def unwrap(self, key: str, wrapped: bytes) -> bytes:
        """Raises StoreUnusable for what `wrap` cannot have made, or another secret sealed."""
        how, value = wrapped[:1], wrapped[1:]
        if how == _PLAIN:
            return value
        if how == _PACKED:
            try:
                return zlib.decompress(value)
            except zlib.error as error:
                raise StoreUnusable(f"etcd: {key}: {error}") from None
        if how == _SEALED and self._unseal is not None:
            return self._unseal(value, key)
        raise StoreUnusable(f"etcd: {key}: sealed, or of a later release ({how!r})")
