"""What all coordinators of a cluster share besides its records: things that are made once and hardly ever change.

The CA, the key of the join tokens, and which token was used by whom. With `Vault.create` the first one wins, and
everybody reads the same afterwards; only the CA is ever replaced, step by step (`rotation`). In etcd everything is
sealed with a key that only coordinators have.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ferryline_coordinator.store.etcd_client import EtcdClient, EtcdRefused, EtcdUnavailable
from ferryline_coordinator.store.etcd_keys import Keys, transaction
from ferryline_coordinator.store.etcd_requests import created_at, get, modified_at, put, ranges
from ferryline_coordinator.store.interface import StoreUnusable
from ferryline_service.logs import get_logger

SECRET_BYTES_MIN = 32
_NONCE_BYTES = 12
_CALL_S = 4.0
_RETRY_S = 0.5
_log = get_logger()


class Vault(Protocol):
    """Names are made of letters, digits, dots, dashes and slashes."""

    async def create(self, name: str, value: bytes) -> bytes:
        """Keep ``value`` under ``name`` unless something is there; returns what is there now. Durable."""
        ...

    async def read(self, name: str) -> bytes | None:
        """What is under ``name``."""
        ...

    async def replace(self, name: str, old: bytes, new: bytes) -> bool:
        """Put ``new`` where ``old`` is; False where something else is by now. Durable."""
        ...


class Seal:
    """AES-256-GCM under a key derived from the cluster secret; a value opens only under the name it was sealed for."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) < SECRET_BYTES_MIN:
            raise ValueError(f"the cluster secret has {len(secret)} bytes, {SECRET_BYTES_MIN} are the least")
        derive = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"ferryline coordinator store 1")
        self._cipher = AESGCM(derive.derive(secret))

    def seal(self, value: bytes, name: str) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, value, name.encode())

    def unseal(self, sealed: bytes, name: str) -> bytes:
        """Raises StoreUnusable when it was sealed with another secret, or changed."""
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], name.encode())
        except (InvalidTag, ValueError):
            raise StoreUnusable(f"{name}: sealed with another cluster secret, or changed since") from None


def read_secret(path: Path) -> bytes:
    """The cluster secret. Raises StoreUnusable when it cannot be read or is too short."""
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise StoreUnusable(f"cluster secret: {error}") from None
    if len(secret) < SECRET_BYTES_MIN:
        raise StoreUnusable(f"cluster secret: {path} has {len(secret)} bytes, {SECRET_BYTES_MIN} are the least")
    return secret


class EtcdVault:
    """Keys that are created once. No primaryship is needed: creating and replacing are atomic by themselves."""

    def __init__(self, client: EtcdClient, prefix: str, seal: Seal) -> None:
        self._client = client
        self._root = Keys(prefix).vault
        self._seal = seal

    async def create(self, name: str, value: bytes) -> bytes:
        key = self._root + name
        sealed = self._seal.seal(value, f"vault/{name}")
        while True:
            try:
                answer = await transaction(
                    self._client, [created_at(key, 0)], [put(key, sealed)], [get(key)], within_s=_CALL_S
                )
            except (EtcdUnavailable, EtcdRefused) as error:
                _refused(error)
            else:
                if answer.get("succeeded"):
                    return value
                there = ranges(answer)[0]  # of whoever was first; or of an earlier try of this very request
                return self._seal.unseal(there[0].value, f"vault/{name}")
            await asyncio.sleep(_RETRY_S)

    async def read(self, name: str) -> bytes | None:
        while True:
            try:
                answer = await transaction(self._client, [], [get(self._root + name)], [], within_s=_CALL_S)
            except (EtcdUnavailable, EtcdRefused) as error:
                _refused(error)
            else:
                there = ranges(answer)[0]
                return self._seal.unseal(there[0].value, f"vault/{name}") if there else None
            await asyncio.sleep(_RETRY_S)

    async def replace(self, name: str, old: bytes, new: bytes) -> bool:
        key = self._root + name
        sealed = self._seal.seal(new, f"vault/{name}")
        while True:
            try:
                answer = await transaction(self._client, [], [get(key)], [], within_s=_CALL_S)
                there = ranges(answer)[0]
                value = self._seal.unseal(there[0].value, f"vault/{name}") if there else None
                if value != old:
                    return value == new  # an earlier try of this very request, whose answer was lost
                guard = modified_at(key, there[0].modified)
                answer = await transaction(self._client, [guard], [put(key, sealed)], [], within_s=_CALL_S)
            except (EtcdUnavailable, EtcdRefused) as error:
                _refused(error)
                await asyncio.sleep(_RETRY_S)
            else:
                if answer.get("succeeded"):
                    return True


def _refused(error: EtcdUnavailable | EtcdRefused) -> None:
    """Wait for an etcd that does not answer or is full; nothing else."""
    if isinstance(error, EtcdRefused) and not error.no_space:
        raise StoreUnusable(f"etcd refuses this coordinator: {error}") from None
    _log.warning("etcd does not answer yet", error=str(error))
