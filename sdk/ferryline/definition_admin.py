"""Definitions, a part of `Admin`: topics, exchanges and principals of a cluster as one document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ferryline.calls import CoordinatorCalls


class DefinitionAdmin(CoordinatorCalls):
    """What a cluster is told to be, out of it and into it. Records and keys are no part of it."""

    async def export_definitions(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Topics with their settings, exchanges with their bindings, principals without their keys: what the token
        may read."""
        answer: dict[str, Any] = await self._ask("GET", "/v1/definitions", timeout)
        return answer

    async def import_definitions(
        self,
        document: Mapping[str, Any],
        *,
        dry_run: bool = False,
        keys_move: bool = False,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Make and change what ``document`` names; nothing is deleted, and doing it again changes nothing.

        ``dry_run``: only say what would be done. ``keys_move``: partitions may be added to topics. What cannot be done
        is told in ``results``, item by item, and keeps nothing else from being done. Raises InvalidArgument and
        InvalidName for a document that fits no cluster.
        """
        query = f"dry_run={str(dry_run).lower()}&keys_move={str(keys_move).lower()}"
        answer: dict[str, Any] = await self._change("PUT", f"/v1/definitions?{query}", dict(document), timeout)
        return answer
