"""docs/login.md: its access files are read, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from ferryline.cli.app import build
from ferryline_coordinator.access_file import parse_access

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "login.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(blocks("toml"))))
def test_what_stands_in_the_page_is_an_access_file(number: int) -> None:
    policy = parse_access(blocks("toml")[number].encode())
    assert policy.enabled
    assert policy.issuers[0].client_id


def test_the_ready_entry_for_google_is_the_one_of_the_example_file() -> None:
    (ours,) = parse_access(blocks("toml")[0].encode()).issuers
    example = parse_access((ROOT / "docs" / "access.example.toml").read_bytes())
    theirs = next(issuer for issuer in example.issuers if issuer.name == "google")
    for field in ("issuer", "algorithms", "name_claim", "scopes"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert bool(ours.client_secret) == bool(theirs.client_secret)


def test_the_program_on_the_page_is_one() -> None:
    (block,) = blocks("python")
    body = "".join(f"    {line}" for line in block.splitlines(keepends=True))
    compile(f"async def main():\n{body}", "docs/login.md", "exec")


def test_every_command_on_the_page_exists() -> None:
    lines = [line.split("#")[0].split() for line in blocks("sh")[0].splitlines()]
    assert len(lines) >= 4
    for program, noun, *options in lines:
        assert program == "ferryline"
        command = get_command(build(noun)).commands[noun]  # type: ignore[attr-defined]
        known = {name for parameter in command.params for name in parameter.opts}
        assert set(options) <= known
