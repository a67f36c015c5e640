"""Our end of the fault proxy: it starts the process, and says what is cut, slow or broken now."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterable

import msgspec

from ferryline.cli.chaos.proxy import Command, Link, Rule
from ferryline.cli.processes import ProcessFailed


class Network:
    """The proxy process and the rules in force. Rules are counted: two cuts of one link end when both have ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._rules: list[Rule] = []
        self._turn = asyncio.Lock()

    async def start(self, links: Iterable[Link]) -> None:
        """Start the proxy with these links. Raises ProcessFailed."""
        self._spawn()
        await self._tell(Command(links=list(links)))

    def _spawn(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ferryline.cli.chaos.proxy"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches us only; its stdin ends with us
        )

    async def pids(self, pids: dict[str, int]) -> None:
        """Which process is which node."""
        await self._tell(Command(pids=pids))

    async def add(self, *rules: Rule) -> None:
        self._rules += rules
        await self._tell(Command(rules=self._rules))

    async def remove(self, *rules: Rule) -> None:
        for rule in rules:
            if rule in self._rules:
                self._rules.remove(rule)
        await self._tell(Command(rules=self._rules))

    async def clear(self) -> None:
        """Mend everything."""
        self._rules = []
        await self._tell(Command(rules=[]))

    async def reset(self, one: str, other: str) -> None:
        """Break the connections between these two in the middle of what they carry next."""
        await self._tell(Command(reset=(one, other)))

    async def half_open(self, one: str, other: str) -> None:
        """End one side of each connection between these two without telling the other."""
        await self._tell(Command(half_open=(one, other)))

    async def _tell(self, command: Command) -> None:
        async with self._turn:
            await asyncio.to_thread(self._ask, msgspec.json.encode(command) + b"\n")

    def _ask(self, line: bytes) -> None:
        process = self._process
        if process is None:
            raise ProcessFailed("the fault proxy does not run")
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = json.loads(process.stdout.readline() or b"{}")
        except (OSError, ValueError) as error:
            raise ProcessFailed(f"the fault proxy has ended: {error}") from None
        if not answer.get("ok"):
            raise ProcessFailed(f"the fault proxy: {answer.get('error', 'has ended')}")

    def close(self) -> None:
        """End the proxy and every connection through it."""
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            process.wait(3.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
