"""What a test may do to a cluster, whoever runs it: child processes (default) or containers.

Names are those of the services: ``coordinator``, ``broker-1``, ``broker-2``, ... Broker ids are the choice of the
coordinator and need not match the names.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

COORDINATOR = "coordinator"


class Cluster(Protocol):
    """A running cluster of real services. Every method returns once the deed is done, unless it says otherwise."""

    @property
    def url(self) -> str:
        """The coordinator's address."""
        ...

    @property
    def urls(self) -> list[str]:
        """Coordinator first, then the brokers."""
        ...

    @property
    def ca(self) -> Path: ...

    @property
    def brokers(self) -> list[str]:
        """Names, also of those that are down."""
        ...

    async def start(self) -> None:
        """Start what does not run, and wait until all of it serves."""
        ...

    async def stop(self) -> None:
        """End everything cleanly."""
        ...

    async def add_broker(self) -> str:
        """One more broker, started and ready; returns its name."""
        ...

    async def kill(self, name: str) -> None:
        """As a power cut of this process: no handler runs."""
        ...

    async def kill_all(self) -> None: ...

    async def pause(self, name: str) -> None:
        """SIGSTOP: the process keeps its sockets and says nothing."""
        ...

    async def resume(self, name: str) -> None: ...

    async def terminate(self, name: str, timeout_s: float = 15.0) -> int | None:
        """SIGTERM and wait; exit status, or None if it still runs."""
        ...

    async def restart(self, name: str) -> None:
        """Start a service that has ended, at its old address, with its old data; wait until it is ready."""
        ...

    def broker_id(self, name: str) -> int: ...

    def name_of(self, broker_id: int) -> str: ...

    def url_of(self, name: str) -> str: ...

    def logs(self, name: str) -> str: ...


ClusterFactory = Callable[..., Awaitable[Cluster]]
