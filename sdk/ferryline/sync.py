"""The same client without await: ``ferryline.sync.connect`` and everything that comes from it.

::

    from ferryline import sync

    with sync.connect("https://localhost:8443") as client:
        with client.producer() as producer:
            producer.send("orders", b"...", key="customer-1")
        with client.consumer("orders", group="billing") as consumer:
            for message in consumer:
                ...

Every class here is made from its asynchronous twin when this module is imported: same names, same arguments, same
errors. One background loop per process does the work; each call hands its coroutine over and waits. So calls may come
from any thread, and a call costs tens of microseconds more: prefer `send_many` and `batches` where that matters.
``send_nowait`` returns a ``concurrent.futures.Future``.

The types stand in ``sync.pyi``, written by ``python -m ferryline._sync_stub``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import ferryline.client
from ferryline._mirrored import ASYNC_CLASSES, PLAIN_CLASSES, public_members


class _Background:
    """The loop that runs what blocking callers ask for, on a daemon thread of its own. Starts at the first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._thread is None or not self._thread.is_alive():
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="ferryline-sync", daemon=True)
                self._thread.start()
            return self._loop

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine there and wait for it. An interrupted wait (Ctrl-C) cancels it."""
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("a blocking call was made from the background loop itself, which would never end")
        future = asyncio.run_coroutine_threadsafe(work, self.loop())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a plain function there and wait for its result."""

        async def work() -> Any:
            return function(*args, **kwargs)

        return self.run(work())


_background = _Background()
_mirrors: dict[type, type] = {}


class Mirror:
    """Base of the blocking classes: holds the asynchronous twin."""

    def __init__(self, twin: Any) -> None:
        self._twin = twin

    def __repr__(self) -> str:
        return f"<sync {self._twin!r}>"


def _outward(value: Any) -> Any:
    """What a call returned, as a blocking caller can use it."""
    mirror = _mirrors.get(type(value))
    if mirror is not None:
        return mirror(value)
    if isinstance(value, asyncio.Future):
        return _to_concurrent(value)
    if type(value) is list and value and type(value[0]) in _mirrors:
        return [_outward(item) for item in value]
    return value


def _to_concurrent(future: asyncio.Future[Any]) -> concurrent.futures.Future[Any]:
    outside: concurrent.futures.Future[Any] = concurrent.futures.Future()
    outside.set_running_or_notify_cancel()

    def done(inner: asyncio.Future[Any]) -> None:
        if inner.cancelled():
            outside.set_exception(concurrent.futures.CancelledError())
        elif (error := inner.exception()) is not None:
            outside.set_exception(error)
        else:
            outside.set_result(inner.result())

    future.add_done_callback(done)
    return outside


def _inward(value: Any) -> Any:
    if isinstance(value, Mirror):
        return value._twin
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mirror):
        return [_inward(item) for item in value]
    if inspect.isgenerator(value):
        return map(_inward, value)
    return value


def _blocking(name: str, function: Any) -> Any:
    """The blocking form of one method."""

    @functools.wraps(function)
    def method(self: Mirror, *args: Any, **kwargs: Any) -> Any:
        bound = getattr(self._twin, name)
        given = [_inward(arg) for arg in args]
        named = {key: _inward(value) for key, value in kwargs.items()}
        if inspect.isasyncgenfunction(function):
            return _iterate(bound(*given, **named))
        if inspect.iscoroutinefunction(function):
            return _outward(_background.run(bound(*given, **named)))

        async def work() -> Any:  # also plain methods run in the loop: what they touch belongs to it
            return _outward(bound(*given, **named))

        return _background.run(work())

    return method


def _iterate(generator: Any) -> Iterator[Any]:
    try:
        while True:
            try:
                yield _background.run(generator.__anext__())
            except StopAsyncIteration:
                return
    finally:
        _background.run(generator.aclose())


def _property(name: str, twin: property) -> property:
    def read(self: Mirror) -> Any:
        return _outward(_background.call(getattr, self._twin, name))

    return property(read, doc=twin.__doc__)


def _plain(name: str, doc: str | None) -> property:
    """An attribute that any thread may read: no need to ask the loop."""
    return property(lambda self: getattr(self._twin, name), doc=doc)


def _mirror(cls: type) -> type:
    namespace: dict[str, Any] = {"__doc__": cls.__doc__, "__module__": __name__, "__slots__": ("_twin",)}
    plain = PLAIN_CLASSES.get(cls)
    for name in plain or ():
        namespace[name] = _plain(name, None)
    for name, member in public_members(cls):
        if name in namespace:
            continue
        if not isinstance(member, property):
            namespace[name] = _blocking(name, member)
        else:
            namespace[name] = _property(name, member) if plain is None else _plain(name, member.__doc__)
    if hasattr(cls, "__aenter__"):
        namespace["__enter__"] = _enter
        namespace["__exit__"] = _exit
    if hasattr(cls, "__anext__"):
        namespace["__iter__"] = _same
        namespace["__next__"] = _next
    if hasattr(cls, "__await__"):
        namespace["wait"] = _wait
    mirrored = type(cls.__name__, (Mirror,), namespace)
    _mirrors[cls] = mirrored
    return mirrored


def _enter(self: Mirror) -> Any:
    entered = _background.run(self._twin.__aenter__())
    return self if entered is self._twin else _outward(entered)


def _exit(self: Mirror, *exc: object) -> Any:
    return _background.run(self._twin.__aexit__(*exc))


def _same(self: Mirror) -> Mirror:
    return self


def _next(self: Mirror) -> Any:
    try:
        return _outward(_background.run(self._twin.__anext__()))
    except StopAsyncIteration:
        raise StopIteration from None


def _wait(self: Mirror) -> Any:
    """Wait until it has ended; raises what ended it."""

    async def work() -> Any:
        return await self._twin

    return _background.run(work())


(
    Client,
    Producer,
    Consumer,
    Subscription,
    Admin,
    Queue,
    DeadLetters,
    Receiver,
    QueueMessage,
    Processing,
) = (_mirror(cls) for cls in ASYNC_CLASSES)


@functools.wraps(ferryline.client.connect)
def connect(*args: Any, **kwargs: Any) -> Any:
    async def work() -> Any:  # a client belongs to the loop it was made in
        return ferryline.client.connect(*args, **kwargs)

    return Client(_background.run(work()))
