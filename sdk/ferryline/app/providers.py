"""What handlers are provided with besides their record: connections, settings, sessions of a database.

A factory may be sync or async, and may be a generator: what stands behind its ``yield`` runs at the end of its scope.
Of scope "app" a thing is made once for each process, before the first record; of scope "message" for each attempt, and
its factory may take the message, its headers or the `Context`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

from ferryline.app.signatures import ARGUMENT, PROVIDED, VALUE, Signature, named, read_signature
from ferryline.protocol.errors import InvalidArgument

APP, MESSAGE_SCOPE = "app", "message"
Factory = Callable[..., Any]


class Provider:
    """How one type is made."""

    def __init__(self, kind: Any, factory: Factory, scope: str) -> None:
        if scope not in (APP, MESSAGE_SCOPE):
            raise InvalidArgument(f'scope: {scope!r:.40} is neither "app" nor "message"', field="scope")
        if not callable(factory):
            raise InvalidArgument(f"factory: {factory!r:.80} cannot be called", field="factory")
        self.kind = kind
        self.scope = scope
        self.factory = factory
        self.signature = Signature([], None, None)
        self._enter = _entered(factory)

    def resolve(self) -> None:
        """Look at what the factory takes. Raises InvalidArgument, naming what it cannot have."""
        what = f"factory of {named(self.kind)}"
        if isinstance(self.factory, type):  # the class itself: it is made without arguments
            return
        self.signature = read_signature(self.factory, what, (), task=True)
        for parameter in self.signature.parameters:
            if parameter.source in (ARGUMENT, PROVIDED, VALUE) or self.scope == APP:
                raise InvalidArgument(
                    f"{what}: nobody can provide its parameter {parameter.name!r}", field=parameter.name
                )

    async def make(self, stack: AsyncExitStack, values: dict[str, Any]) -> Any:
        """The thing; what it has to clean up is left with ``stack``."""
        return await self._enter(stack, values)


class Providers:
    """All providers of an app, and what those of scope "app" have made."""

    def __init__(self) -> None:
        self.by_type: dict[Any, Provider] = {}
        self._made: dict[Any, Any] = {}
        self._stack = AsyncExitStack()

    def add(self, kind: Any, factory: Factory, scope: str) -> None:
        """Raises InvalidArgument when the type is provided already."""
        if kind in self.by_type:
            raise InvalidArgument(f"{named(kind)} is provided already", field="kind")
        self.by_type[kind] = Provider(kind, factory, scope)

    def resolve(self) -> None:
        """Raises InvalidArgument for a factory that takes what nobody can provide."""
        for provider in self.by_type.values():
            provider.resolve()

    async def open(self) -> None:
        """Make everything of scope "app", in the order in which it was registered."""
        for kind, provider in self.by_type.items():
            if provider.scope == APP:
                self._made[kind] = await provider.make(self._stack, {})

    async def close(self) -> None:
        """Clean up, in the opposite order."""
        self._made.clear()
        stack, self._stack = self._stack, AsyncExitStack()
        await stack.aclose()

    async def get(self, kind: Any, stack: AsyncExitStack, values: Callable[[Signature], dict[str, Any]]) -> Any:
        """The thing of a type, for one attempt, whose end is that of ``stack``."""
        if kind in self._made:
            return self._made[kind]
        provider = self.by_type[kind]
        return await provider.make(stack, values(provider.signature))


def _entered(factory: Factory) -> Callable[[AsyncExitStack, dict[str, Any]], Any]:
    """How to call a factory, and see to its end, by what kind of function it is."""
    if inspect.isasyncgenfunction(factory):
        managed = asynccontextmanager(factory)

        async def enter_async(stack: AsyncExitStack, values: dict[str, Any]) -> Any:
            return await stack.enter_async_context(managed(**values))

        return enter_async
    if inspect.isgeneratorfunction(factory):
        simple = contextmanager(factory)

        async def enter(stack: AsyncExitStack, values: dict[str, Any]) -> Any:
            return stack.enter_context(simple(**values))

        return enter

    async def call(stack: AsyncExitStack, values: dict[str, Any]) -> Any:
        made = factory(**values)
        return await made if inspect.isawaitable(made) else made

    return call
