"""Which store the settings name, and the vault that goes with it. Nothing is opened before its first use."""

from __future__ import annotations

import ssl
from pathlib import Path

from ferryline_coordinator.config import CoordinatorConfig
from ferryline_coordinator.core.records import CLUSTER_KEY
from ferryline_coordinator.store.etcd import EtcdStore
from ferryline_coordinator.store.etcd_campaign import Refuses
from ferryline_coordinator.store.etcd_client import EtcdClient
from ferryline_coordinator.store.etcd_requests import Values
from ferryline_coordinator.store.interface import MetaStore, StoreUnusable
from ferryline_coordinator.store.memory import MemoryStore
from ferryline_coordinator.store.sqlite import SqliteStore
from ferryline_coordinator.store.vault import EtcdVault, Seal, Vault, read_secret


def open_store(config: CoordinatorConfig, url: str, refuses: Refuses | None) -> tuple[MetaStore, Vault | None]:
    """The back-end; ``url`` of this coordinator is told to others. Without a vault, secrets are in the data directory.

    Raises StoreUnusable.
    """
    if config.store == "memory":
        return MemoryStore(), None
    if config.store == "sqlite":
        return SqliteStore(config.data_dir / "meta"), None
    assert config.cluster_secret_file is not None  # checked with the settings
    seal = Seal(read_secret(config.cluster_secret_file))
    client = EtcdClient(
        config.etcd_endpoints,
        tls=_tls(config),
        user=config.etcd_user,
        password=_password(config.etcd_password_file),
    )
    # The cluster's record holds the key that signs claims of groups.
    values = Values(secret=lambda key: key == CLUSTER_KEY, seal=seal.seal, unseal=seal.unseal)
    store = EtcdStore(
        client,
        prefix=config.etcd_prefix,
        url=url,
        ttl_s=config.etcd_lease_ms / 1000,
        values=values,
        refuses=refuses,
        compact=config.etcd_compact,
    )
    return store, EtcdVault(client, config.etcd_prefix, seal)


def _tls(config: CoordinatorConfig) -> ssl.SSLContext | None:
    if not any(endpoint.startswith("https") for endpoint in config.etcd_endpoints):
        return None
    try:
        context = ssl.create_default_context(cafile=str(config.etcd_ca) if config.etcd_ca is not None else None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2  # etcd of Debian 12 is built with TLS 1.3, older ones are not
        if config.etcd_cert is not None:
            context.load_cert_chain(config.etcd_cert, config.etcd_key)
    except (OSError, ssl.SSLError) as error:
        raise StoreUnusable(f"certificates for etcd: {error}") from None
    return context


def _password(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text().strip()
    except OSError as error:
        raise StoreUnusable(f"password for etcd: {error}") from None
