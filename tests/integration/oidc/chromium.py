"""Headless Chromium, driven over the DevTools protocol: what a person does at a login page."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import aiohttp

from tests.polling import poll

WAIT_S = 60.0
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def program() -> str | None:
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Chromium:
    """One browser with one page. Use it with ``async with``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._http: aiohttp.ClientSession | None = None
        self._page: aiohttp.ClientWebSocketResponse | None = None
        self._count = 0

    async def __aenter__(self) -> Chromium:
        path = program()
        assert path is not None
        self._folder.mkdir(parents=True)
        options = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={self._folder}", "--disable-gpu"]
        options += ["--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage"]
        if os.getuid() == 0:  # where tests run as root, in a container that is a sandbox of its own
            options.append("--no-sandbox")
        log = (self._folder / "log").open("wb")
        # A group of its own: the browser is many processes, which end together.
        self._process = await asyncio.create_subprocess_exec(
            path, *options, "about:blank", stdout=log, stderr=log, start_new_session=True
        )
        log.close()
        port_file = self._folder / "DevToolsActivePort"
        await poll(lambda: port_file.exists() and len(port_file.read_text().split()) == 2, within_s=WAIT_S)
        port = port_file.read_text().split()[0]
        self._http = aiohttp.ClientSession()
        targets = f"http://127.0.0.1:{port}/json/list"

        async def page() -> str:
            assert self._http is not None
            async with self._http.get(targets) as answer:
                found = await answer.json()
            return next((str(one["webSocketDebuggerUrl"]) for one in found if one["type"] == "page"), "")

        self._page = await self._http.ws_connect(await poll(page, within_s=WAIT_S), max_msg_size=0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._page is not None:
            await self._page.close()
        if self._http is not None:
            await self._http.close()
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()

    async def _call(self, method: str, **params: Any) -> dict[str, Any]:
        assert self._page is not None
        self._count += 1
        await self._page.send_json({"id": self._count, "method": method, "params": params})
        async with asyncio.timeout(WAIT_S):
            while True:
                answer: dict[str, Any] = json.loads((await self._page.receive()).data)
                if answer.get("id") == self._count:
                    return dict(answer.get("result", {}))

    async def go(self, url: str) -> None:
        await self._call("Page.navigate", url=url)

    async def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page; None while the page is changing."""
        answer = await self._call("Runtime.evaluate", expression=script, returnByValue=True)
        return answer.get("result", {}).get("value")

    async def text(self) -> str:
        return str(await self.evaluate("document.body ? document.body.innerText : ''"))

    async def see(self, text: str) -> None:
        """Wait until the page shows a text."""

        async def seen() -> bool:
            shown = await self.text()
            assert text in shown, f"{await self.evaluate('location.href')}: {shown[:300]}"
            return True

        await poll(seen, within_s=WAIT_S, what=f"the page shows {text!r}")

    async def type(self, field: str, text: str) -> None:
        """Type into the field of a form, once it is there, as a keyboard does."""
        script = f"(() => {{ const f = document.querySelector('[name={field}]'); f?.focus(); return !!f }})()"
        await poll(lambda: self.evaluate(script), within_s=WAIT_S, what=f"the page has a field {field}")
        await self._call("Input.insertText", text=text)

    async def press(self, button: str = "[type=submit]") -> None:
        """Press a button, once it is there."""
        script = f"(() => {{ const b = document.querySelector('{button}'); b?.click(); return !!b }})()"
        await poll(lambda: self.evaluate(script), within_s=WAIT_S, what=f"the page has a button {button}")
