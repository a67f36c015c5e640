"""For brokers of the dead letter campaign, which find this folder in PYTHONPATH: die by kill -9 at a step of a move.

Python loads this module at its start. A file of the folder DIE_AT names a step; the first broker that comes to it takes
the file away and is dead before it does anything else.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

SOURCE_STEPS = ("asked", "made", "sending", "sent", "told")
TARGET_STEPS = ("arrived", "appended", "answered")


def die_at(step: str) -> None:
    try:
        os.unlink(os.path.join(os.environ["DIE_AT"], step))
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def around(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def install() -> None:
    import asyncio

    from ferryline_broker.coordinator import CoordinatorLink
    from ferryline_broker.dead_letters import DeadLetters
    from ferryline_broker.produce import ProduceHandler, ProduceRequest

    def asked(real: Any) -> Any:
        def move(self: Any, hosted: Any, effect: Any) -> None:
            die_at("asked")
            real(self, hosted, effect)

        return move

    def made(real: Any) -> Any:
        async def ensure_topic(self: Any, name: str, config: Any, owner: str = "") -> Any:
            topic = await real(self, name, config, owner)
            die_at("made")
            return topic

        return ensure_topic

    def sending(real: Any) -> Any:
        async def produce(self: Any, *args: Any) -> Any:
            die_at("sending")
            offset = await real(self, *args)
            die_at("sent")
            return offset

        return produce

    def told(real: Any) -> Any:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            real(self, *args, **kwargs)
            tell = self.tell

            def telling(hosted: Any, event: Any) -> None:
                tell(hosted, event)
                die_at("told")

            self.tell = telling

        return init

    def arrived(real: Any) -> Any:
        def handle(self: Any, session: Any, frame: Any) -> None:
            if session.identity is None:
                real(self, session, frame)
                return
            die_at("arrived")
            real(self, session, frame)
            die_at("appended")

        return handle

    def answered(real: Any) -> Any:
        def emit(self: Any) -> None:
            results = len(self._results)
            real(self)
            if results and self._session.identity is not None:
                asyncio.get_running_loop().call_later(0.005, die_at, "answered")  # once the frame has left

        return emit

    around(DeadLetters, "move", asked)
    around(CoordinatorLink, "ensure_topic", made)
    around(DeadLetters, "_produce", sending)
    around(DeadLetters, "__init__", told)
    around(ProduceHandler, "handle", arrived)
    around(ProduceRequest, "emit", answered)


if "DIE_AT" in os.environ and "ferryline_broker" in sys.orig_argv:
    install()
