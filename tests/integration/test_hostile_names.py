"""Names and paths that want out of where they belong: refused by their rule, and nothing of them reaches a disk."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.integration.bad_input import TOPIC, World
from tests.integration.wire import Rest

pytestmark = pytest.mark.process

NAMES = [
    "", ".", "..", "...//", "../../../../etc/passwd", "..\\..\\windows\\win.ini", "/etc/passwd", "~root", "~/.ssh",
    "a/b", "a\\b", "a//b", "./a", "a/.", "a/..", "%2e%2e%2f", "..%2f..%2fetc", "%252e%252e", "..;/admin", "a%00.log",
    "a\x00b", "a\nb", "a\rb", "a\r\nX-Injected: yes", "a\tb", "a b", " a", "a ", "\x7f", "\x1b[31mred", "\x08\x08",
    "__reserved", "__proto__", "n" * 201, "n" * 10_000, "ünïcödé", "\u0430dmin", "a\u202eb", "a\u200bb", "\ufeffa",
    "\ud7ff", "\U0001f600", "e\u0301", "\u2025/", "\uff0e\uff0e", "\uff0fetc", "C:\\con", "con:", "a:b", "a*", "*", "?",
    "a?b=c", "a#b", "a&b", "a|b", "a;rm -rf /", "$(reboot)", "`id`", "${jndi:ldap://x}", "{{7*7}}", "%s%n", "' OR 1=1",
    "a'; DROP TABLE records;--", "<script>", "\"quoted\"", "a,b", "a=b", "a@b", "a+b", "(a)", "[a]", "{a}",
]  # fmt: skip
PROBLEM = {"type", "title", "status", "detail", "code", "retriable", "definite", "request_id"}


def paths(name: str) -> list[tuple[str, str, str]]:
    """(service, method, path) for everything that takes a name in its path, with the name percent-encoded whole."""
    hidden = quote(name, safe="")
    return [
        ("coordinator", "GET", f"/v1/topics/{hidden}"),
        ("coordinator", "DELETE", f"/v1/topics/{hidden}"),
        ("coordinator", "GET", f"/v1/groups/{hidden}"),
        ("coordinator", "GET", f"/v1/exchanges/{hidden}"),
        ("coordinator", "DELETE", f"/v1/exchanges/{TOPIC}/bindings/{hidden}"),
        ("broker", "GET", f"/v1/topics/{hidden}/partitions/0/records"),
        ("broker", "GET", f"/v1/topics/{TOPIC}/partitions/{hidden}/records"),
        ("broker", "GET", f"/v1/queues/{hidden}/g/stats"),
        ("broker", "GET", f"/v1/queues/{TOPIC}/{hidden}/stats"),
        ("broker", "GET", f"/v1/replicas/{hidden}/0"),
    ]


def bodies(name: str) -> list[tuple[str, dict[str, object]]]:
    """(path, body) for everything that creates something under a name."""
    return [
        ("/v1/topics", {"name": name}),
        ("/v1/exchanges", {"name": name, "type": "topic"}),
    ]


def test_the_table_is_as_long_as_promised() -> None:
    assert len(NAMES) * (len(paths("a")) + len(bodies("a"))) >= 200
    assert len(set(NAMES)) == len(NAMES)


def files(root: Path) -> set[str]:
    """What lies under the data of all services, numbers and ids taken out, but for the logs of partitions, which have
    uuids for names and grow by themselves."""
    found = (str(path.relative_to(root)) for path in root.rglob("*") if "partitions" not in path.parts)
    return {re.sub(r"[0-9a-f]{8,}|\d+", "#", path) for path in found}


async def test_no_name_gets_anywhere(world: World) -> None:
    root = world.cluster.local.root
    before, outside = files(root), set(root.parent.iterdir())
    wrong: list[str] = []
    broker = world.urls[world.part().primary]
    async with Rest(world.cluster.url, world.cluster.ca) as coordinator, Rest(broker, world.cluster.ca) as other:
        for name in NAMES:
            for service, method, path in paths(name):
                rest = coordinator if service == "coordinator" else other
                # Encoded already: nobody may tidy the path up on its way.
                status, body = await rest.call(method, path, encoded=True)
                if not 400 <= status < 500 or (isinstance(body, dict) and not set(body) >= PROBLEM):
                    wrong.append(f"{method} {path[:100]}: {status} {str(body)[:200]}")
            for path, told in bodies(name):
                status, body = await coordinator.call("POST", path, told)
                if status != 400 or body.get("code") not in ("INVALID_NAME", "INVALID_ARGUMENT", "MALFORMED_REQUEST"):
                    wrong.append(f"POST {path} {name[:60]!r}: {status} {str(body)[:200]}")
                elif name[:200].isprintable() is False and any(c in str(body["detail"]) for c in "\x00\x1b\r\n"):
                    wrong.append(f"POST {path} {name[:60]!r}: control characters come back")
    assert not wrong, "\n".join(wrong)
    assert files(root) == before
    assert set(root.parent.iterdir()) == outside
    await world.still_serves()


async def test_names_that_are_allowed_are_only_names(world: World) -> None:
    """Letters that look like file names and options are data, and no directory is ever called after a topic."""
    async with Rest(world.cluster.url, world.cluster.ca) as rest:
        for name in ("-rf", "--help", "..a", "a..b", "CON", "nul", "x.log", "meta", "a.dlq.dlq"):
            status, body = await rest.call(
                "POST", "/v1/topics", {"name": name, "config": {"partitions": 1, "replication": 1}}
            )
            assert status == 201, body
            assert (await rest.call("GET", f"/v1/topics/{name}"))[1]["name"] == name
    found = {path.name for path in world.cluster.local.root.rglob("*") if path.is_dir()}
    assert not found & {"-rf", "--help", "..a", "a..b", "CON", "nul", "x.log", "a.dlq.dlq"}
    await world.still_serves()
