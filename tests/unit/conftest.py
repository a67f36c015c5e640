"""Fixtures of this folder that cost seconds and are shared by several files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from unit.store_etcd import EtcdProcesses


@pytest.fixture(scope="session")
def etcd() -> Iterator[EtcdProcesses]:
    """Three etcd processes; whoever asks for them keeps to a prefix of its own, and marks its test ``etcd``."""
    processes = EtcdProcesses()
    try:
        yield processes.start()
    finally:
        processes.stop()
